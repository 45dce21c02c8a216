"""The arrays of a run that answers `unknown`: written and read, and refused when a stranger wrote them."""

import io
from dataclasses import replace

import numpy as np
import pytest
from manifest_example import EXAMPLE

from finetune_cli import files
from finetune_cli.errors import RunError
from finetune_cli.metrics import novelty
from finetune_cli.runs import novelty as stored
from finetune_cli.runs import run as runs
from finetune_cli.runs.manifest import Manifest, Unknown

FACTS = Unknown(0.05, (0.01, 0.1), 7, 19, 0.25, {"ant": 0.5}, {"distance": 0.5}, False)
REFERENCES = novelty.unit(np.random.default_rng(0).normal(size=(7, 16))).astype(np.float16)
SCORES = np.linspace(0, 1, 19)


def written(folder, **contents: bytes):
    folder.mkdir()
    names = stored.write(folder, REFERENCES, SCORES)
    for name, content in contents.items():
        files.write_bytes(folder / f"unknown-{name}.npy", content)
    backbone = replace(EXAMPLE.backbone, width=16)
    return runs.finish(folder, replace(EXAMPLE, backbone=backbone, unknown=FACTS), names)


def as_file(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def test_it_is_read_as_it_was_written(tmp_path):
    run = written(tmp_path / "run")
    assert run.manifest.unknown == FACTS
    found = stored.read(run)
    np.testing.assert_array_equal(found.score.references, REFERENCES.astype(np.float32))
    np.testing.assert_array_equal(found.held_out, SCORES)
    assert (found.score.energy_weight, found.false_rejects) == (0.25, 0.05)


def test_a_run_without_it_has_none(tmp_path):
    assert stored.read(runs.Run(tmp_path, EXAMPLE)) is None
    document = EXAMPLE.to_json()
    assert document["unknown"] is None
    assert Manifest.from_json(document) == EXAMPLE


def header(shape):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no array",
        as_file(REFERENCES)[:-2],
        as_file(REFERENCES) + b"xx",
        as_file(REFERENCES.astype(np.float32)),
        as_file(REFERENCES[:6]),
        as_file(np.asfortranarray(REFERENCES)),
        as_file(np.where(REFERENCES > 0.3, np.inf, REFERENCES).astype(np.float16)),
        as_file(np.array([{"a": 1}] * 7, object), allow_pickle=True),
        header((10**12, 16)),
        header((7, 16)),
        header("x" * 9000),
        b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"-" * 8999 + b"1",
        b"\x93NUMPY\x01\x00" + (30).to_bytes(2, "little") + b"{1: 2, 'a': 3}".ljust(30),
    ],
    ids=[
        "empty",
        "text",
        "short",
        "long",
        "type",
        "shape",
        "order",
        "infinite",
        "pickle",
        "huge",
        "header",
        "name",
        "nested",
        "keys",
    ],
)
def test_another_array_is_refused_although_its_hash_is_right(tmp_path, content):
    with pytest.raises(RunError, match=r"unknown-references\.npy is damaged"):
        stored.read(written(tmp_path / "run", references=content))


def test_a_size_beyond_all_numbers_is_refused(tmp_path):
    folder = tmp_path / "run"
    written(folder, references=header((2**60, 16)))
    facts = replace(FACTS, references=2**60)
    backbone = replace(EXAMPLE.backbone, width=16)
    names = ["unknown-references.npy", "unknown-scores.npy"]
    with pytest.raises(RunError, match=r"unknown-references\.npy is damaged"):
        stored.read(runs.finish(folder, replace(EXAMPLE, backbone=backbone, unknown=facts), names))


@pytest.mark.parametrize("scores", [SCORES[::-1], np.full(19, np.nan), SCORES[:18]])
def test_other_scores_are_refused(tmp_path, scores):
    with pytest.raises(RunError, match=r"unknown-scores\.npy is damaged"):
        stored.read(written(tmp_path / "run", scores=as_file(np.array(scores))))


@pytest.mark.parametrize(
    "change",
    [
        {"false_rejects": 2},
        {"interval": [0.1]},
        {"references": 0},
        {"held_out": "19"},
        {"energy_weight": -1},
        {"detection": {"ant": 2}},
        {"tuned": None},
    ],
)
def test_facts_that_make_no_sense_are_refused(change):
    document = EXAMPLE.to_json() | {"unknown": {**FACTS.to_json(), **change}}
    del document["sha256"]
    from finetune_cli.runs.manifest import seal

    with pytest.raises(ValueError, match=next(iter(change))):
        Manifest.from_json(seal(document))
