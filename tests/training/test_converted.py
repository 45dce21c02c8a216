"""The converted backbone in the cache: whole, the right one, and proven; or made anew."""

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import runs_fixture
from file_faults import ENVIRONMENT, posix

from finetune_cli import files
from finetune_cli.backbones import build, source
from finetune_cli.backbones.source import Wanted
from finetune_cli.cache import backbones, maintenance
from finetune_cli.cache.folder import CacheFolder
from finetune_cli.errors import GateError, RunError, StorageError, WeightsError
from finetune_cli.inference import runtimes
from finetune_cli.runs import manifest
from finetune_cli.training import converted
from finetune_cli.training.converted import Conversion, Converted
from finetune_cli.training.tuning import cuts

SIZE = runs_fixture.SIZE


@pytest.fixture(scope="module")
def keras_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone") / "tiny.keras"
    runs_fixture.tiny_backbone().save(path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, keras_file):
    """A cache that holds the tiny backbone; not to be changed by a test."""
    cache = tmp_path_factory.mktemp("made")
    make(cache, keras_file)
    return cache


@pytest.fixture
def cache(made, tmp_path):
    return shutil.copytree(made, tmp_path / "cache")


def wanted(keras_file, size=SIZE):
    return Wanted(str(keras_file), "imagenet", size, 0)


def conversion_of(cache, keras_file, here=False):
    return Conversion(wanted(keras_file), CacheFolder(cache, cache), here)


def key(keras_file, size=SIZE, seed=0):
    return converted._key(source.find_source(wanted(keras_file, size)), size, seed)


def make(cache, keras_file):
    converted.make(cache, key(keras_file), replace(wanted(keras_file), weights_sha256=files.sha256(keras_file)))
    return entry(cache)


def entry(cache):
    return next(path for path in (cache / backbones.NAME).iterdir() if path.is_dir())


def test_it_holds_what_the_backbone_is(made, keras_file):
    found, built = Converted.read(entry(made)), build.build(wanted(keras_file))
    assert (found.name, found.width, found.feature_map) == (built.name, 24, True)
    assert found.parameters == built.parameters == built.model.count_params()
    assert found.original == built.original
    assert found.last_stage_share == cuts.share_above(built.model, cuts.LAST_STAGE)
    assert (found.fingerprint, found.weights_sha256) == (built.fingerprint, files.sha256(keras_file))
    photos = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    features = runtimes.OpenVinoRuntime(found.openvino_model()).infer(photos)
    right = np.asarray(runs_fixture.tiny_backbone()(photos.astype(np.float32)))
    np.testing.assert_allclose(features, right, atol=1e-4 * np.abs(right).max())


def test_what_is_in_the_cache_needs_no_process(made, keras_file):
    with conversion_of(made, keras_file) as conversion:
        conversion.begin()
        assert conversion._process._process is None
        assert conversion.finish() == Converted.read(entry(made))


def test_the_graph_is_there_before_it_is_compared_and_in_the_cache_after(tmp_path, made, keras_file):
    photos = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    with conversion_of(tmp_path, keras_file) as conversion:
        early = conversion.start()
        features = runtimes.OpenVinoRuntime(early.openvino_model()).infer(photos)
        assert conversion.start() is early
        found = conversion.finish()
        assert conversion.start() is conversion.finish() is found
    assert (early.folder, early.fingerprint, early.width) == (found.folder, found.fingerprint, found.width)
    assert found == Converted.read(found.folder)
    read = Converted.read(entry(made)).openvino_model()
    np.testing.assert_array_equal(features, runtimes.OpenVinoRuntime(read).infer(photos))


@pytest.mark.parametrize("name", ["backbone.xml", "backbone.bin", "classifier.keras", "facts.json"])
@pytest.mark.parametrize("fault", ["flipped", "cut", "gone"])
def test_a_damaged_one_is_not_used(cache, name, fault):
    path = entry(cache) / name
    data = bytearray(path.read_bytes())
    if fault == "gone":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(data[:-2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert Converted.read(entry(cache)) is None


def test_a_damaged_one_is_written_again(cache, keras_file):
    before = {path.name: path.read_bytes() for path in entry(cache).iterdir()}
    (entry(cache) / "backbone.bin").write_bytes(b"")
    (cache / backbones.NAME / ".left-00000000.tmp").mkdir()  # of a killed process
    found = Converted.read(make(cache, keras_file))
    assert found is not None
    for name in ("backbone.xml", "backbone.bin"):
        assert (entry(cache) / name).read_bytes() == before[name]
    assert not list((cache / backbones.NAME).glob(".*.tmp"))


@pytest.mark.parametrize("here", [False, True])
def test_a_training_makes_a_damaged_one_anew(cache, keras_file, here):
    whole = (entry(cache) / "backbone.bin").read_bytes()
    (entry(cache) / "backbone.bin").write_bytes(whole[:-4])
    with conversion_of(cache, keras_file, here) as conversion:
        conversion.begin()
        found = conversion.finish()
        assert (conversion._process._process is not None) == (not here)
    assert (found.folder / "backbone.bin").read_bytes() == whole


@pytest.mark.parametrize("facts", [None, [], {}, {"backbone": {}}, {"backbone": {"width": 1}, "files": {}}, "x" * 10])
def test_foreign_facts_are_not_used(cache, facts):
    sealed = manifest.seal(facts) if isinstance(facts, dict) else facts
    (entry(cache) / "facts.json").write_text(json.dumps(sealed))
    assert Converted.read(entry(cache)) is None


def test_a_hostile_graph_with_fitting_hashes_never_reaches_openvino(cache, monkeypatch):
    folder = entry(cache)
    xml = folder / "backbone.xml"
    xml.write_text(xml.read_text().replace('type="Relu"', 'type="Loop"').replace('type="ReLU"', 'type="Loop"'))
    facts = json.loads((folder / "facts.json").read_text())
    facts["files"]["backbone.xml"] = files.sha256(xml)
    (folder / "facts.json").write_text(json.dumps(manifest.seal(facts)))
    monkeypatch.setattr(runtimes, "_core", None)
    with pytest.raises(RunError, match="'Loop'") as caught:
        Converted.read(folder).openvino_model()
    assert "finetune cache clear" in caught.value.remedy


def test_the_key_names_all_that_it_depends_on(keras_file, tmp_path, monkeypatch):
    other = tmp_path / "tiny.keras"
    model = runs_fixture.tiny_backbone()
    model.layers[2].kernel.assign(model.layers[2].kernel * 2)
    model.save(other)
    keys = [key(keras_file), key(other)]
    random = [
        converted._key(source.find_source(Wanted("resnet50", None, size, seed)), size, seed)
        for size, seed in ((64, 0), (64, 1), (96, 0))
    ]
    keys += [*random, converted._key(source.find_source(Wanted("resnet101", None, 64, 0)), 64, 0)]
    monkeypatch.setattr(converted, "_version", lambda package: f"another {package}")
    keys.append(key(keras_file))
    monkeypatch.setattr(converted, "_FORMAT", converted._FORMAT + 1)
    keys.append(key(keras_file))
    assert len(set(keys)) == len(keys) == 8
    assert key(keras_file, seed=0) == key(keras_file, seed=1), "the weights are in the file"


def test_a_backbone_that_openvino_computes_otherwise_is_refused(tmp_path, keras_file, monkeypatch):
    right = runtimes.convert

    def wrong(model):
        converted_model = right(model)
        relu = next(node for node in converted_model.get_ordered_ops() if node.get_type_name() == "Relu")
        relu.output(0).replace(relu.input_value(0))
        return converted_model

    monkeypatch.setattr(runtimes, "convert", wrong)
    with pytest.raises(GateError, match="disagrees with TensorFlow's"):
        make(tmp_path, keras_file)
    assert not [path for path in (tmp_path / backbones.NAME).iterdir() if path.is_dir()]


def test_errors_of_the_other_process_are_those_of_this_one(tmp_path):
    (tmp_path / "bad.keras").write_bytes(b"no archive")
    with conversion_of(tmp_path, tmp_path / "bad.keras") as conversion:
        conversion.begin()
        with pytest.raises(WeightsError, match=r"bad\.keras cannot be read as a \.keras model"):
            conversion.finish()


@posix
def test_a_folder_that_cannot_be_written_is_told(tmp_path, keras_file):
    (tmp_path / backbones.NAME).write_text("a file has that name")
    with pytest.raises(StorageError, match=r"backbones: Not a directory"):
        make(tmp_path, keras_file)


@posix
def test_a_link_in_the_cache_is_not_followed(cache, tmp_path, keras_file):
    elsewhere, folder = tmp_path / "elsewhere", entry(cache)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert Converted.read(folder) is None
    before = sorted(path.name for path in elsewhere.iterdir())
    found = Converted.read(make(cache, keras_file))
    assert found is not None
    assert not found.folder.is_symlink()
    assert sorted(path.name for path in elsewhere.iterdir()) == before
    shutil.rmtree(cache / backbones.NAME)
    (cache / backbones.NAME).symlink_to(elsewhere)
    with pytest.raises(StorageError, match="symbolic link"):
        make(cache, keras_file)
    maintenance.clear(cache)
    assert sorted(path.name for path in elsewhere.iterdir()) == before


def test_a_cache_that_can_only_be_read_is_read_and_the_rest_is_made_elsewhere(made, tmp_path, keras_file):
    folder = CacheFolder(made, tmp_path / "scratch", "the cache is only read")
    with Conversion(wanted(keras_file), folder, here=False) as conversion:
        assert conversion.finish().folder == entry(made)
    for cache in (tmp_path / "empty", tmp_path / "scratch"):
        folder = CacheFolder(cache, tmp_path / "scratch", "the cache is only read")
        with Conversion(wanted(keras_file), folder, here=False) as conversion:
            assert conversion.finish().folder.parent == tmp_path / "scratch" / backbones.NAME
    assert not (tmp_path / "empty").exists()


@posix
def test_a_full_disk_leaves_no_half_of_it(tmp_path, keras_file):
    program = f"""
import resource, sys
from pathlib import Path
from finetune_cli import keras_setup
from finetune_cli.backbones.source import Wanted
from finetune_cli.errors import StorageError
from finetune_cli.training import converted
keras_setup.import_keras()
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    converted.make(Path({str(tmp_path)!r}), "key", Wanted({str(keras_file)!r}, "imagenet", {SIZE}, 0))
except StorageError as exc:
    sys.exit(f"told: {{exc}}")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120
    )
    assert "told: " in ended.stderr
    assert not [path for path in (tmp_path / backbones.NAME).iterdir() if path.is_dir()]


def test_two_that_come_at_once_make_it_once(tmp_path, keras_file, monkeypatch):
    count, right = [], runtimes.convert
    monkeypatch.setattr(runtimes, "convert", lambda model: count.append(1) or right(model))
    threads = [threading.Thread(target=make, args=(tmp_path, keras_file)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1
    assert Converted.read(entry(tmp_path)) is not None


def test_the_cache_tells_of_backbones_and_clears_them(cache):
    size = sum(path.stat().st_size for path in entry(cache).iterdir())
    assert maintenance.info(cache)[-1].endswith(f"backbones: 1, {files.human_bytes(size)}")
    assert maintenance.clear(cache).endswith(f"{files.human_bytes(size)} freed")
    assert maintenance.info(cache)[-1].startswith("feature cache")
