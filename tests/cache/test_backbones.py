"""Converted backbones in the cache: counted, marked as used, pruned."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from finetune_cli import files
from finetune_cli.cache import backbones, maintenance
from finetune_cli.cache.features import FeatureStore
from finetune_cli.errors import RunError


def converted(cache: Path, key: str, size: int, age: float) -> Path:
    folder = backbones.entry(cache, key)
    folder.mkdir(parents=True)
    (folder / "backbone.bin").write_bytes(b"x" * size)
    os.utime(folder, (time.time() - age,) * 2)
    return folder


def keys(cache: Path) -> set[str]:
    return {path.name for path in (cache / backbones.NAME).iterdir() if not path.name.startswith(".")}


def test_those_that_were_not_used_for_the_longest_go_first(tmp_path):
    for key, age in (("old", 300), ("used", 400), ("new", 10)):
        converted(tmp_path, key, 1000, age)
    backbones.mark_used(backbones.entry(tmp_path, "used"))
    assert backbones.prune(tmp_path, 3000) == 0
    assert keys(tmp_path) == {"old", "used", "new"}
    assert backbones.prune(tmp_path, 2500) == 1000
    assert keys(tmp_path) == {"used", "new"}
    assert backbones.prune(tmp_path, 1000) == 1000
    assert keys(tmp_path) == {"used"}
    assert backbones.size(tmp_path) == (1, 1000)
    assert backbones.prune(tmp_path / "absent", 0) == 0


def test_what_is_being_converted_is_left_alone(tmp_path):
    converted(tmp_path, "old", 1000, 300)
    with files.lock(tmp_path / backbones.NAME), pytest.raises(RunError, match="in use"):
        backbones.prune(tmp_path, 0)
    assert keys(tmp_path) == {"old"}


def test_links_lead_nowhere(tmp_path):
    elsewhere = converted(tmp_path / "other", "one", 1000, 300)
    (tmp_path / backbones.NAME).symlink_to(elsewhere.parent)
    assert backbones.prune(tmp_path, 0) == 0
    assert (elsewhere / "backbone.bin").is_file()


def test_the_cache_is_pruned_as_a_whole_features_first(tmp_path):
    with FeatureStore(tmp_path) as store:
        store.put([(bytes([i]) * 32, np.zeros(1280, np.float32)) for i in range(100)])
    converted(tmp_path, "one", 200_000, 300)
    converted(tmp_path, "two", 200_000, 200)
    line = maintenance.prune(tmp_path, "700kB")
    assert keys(tmp_path) == {"one", "two"}
    with FeatureStore(tmp_path) as store:
        assert 10 < len(store.has([bytes([i]) * 32 for i in range(100)])) < 60
    assert "and 2 converted backbones, 400 kB, are left in" in line
    line = maintenance.prune(tmp_path, "300kB")
    assert keys(tmp_path) == {"two"}
    assert "; 0 features, " in line
    assert "and 1 converted backbone, 200 kB, are left in" in line
