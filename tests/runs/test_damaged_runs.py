"""Every file of a finished run, cut off and with a flipped bit: seen by whoever uses it, never silently used."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_cli.errors import FinetuneError
from finetune_cli.evaluation import evaluate
from finetune_cli.exports import export
from finetune_cli.inference import predict
from finetune_cli.progress import Silent
from finetune_cli.report import html
from finetune_cli.runs.run import Run

USED = {
    "predict": {"run.json", "inference/model.xml", "inference/model.bin"},
    "evaluate": {"run.json", "inference/model.xml", "inference/model.bin", "split.csv"},
    "export": {"run.json", "model.keras", "split.csv", "predictions.csv"},
}


@pytest.fixture
def copy(tiny_run, tmp_path):
    """The tiny run with its photos, to be damaged."""
    shutil.copytree(tiny_run.photos, tmp_path / "photos")
    shutil.copytree(tiny_run.run.folder, tmp_path / "runs" / "tiny-1")
    return tmp_path / "runs" / "tiny-1"


def damages(content: bytes, seed: int) -> list[bytes]:
    """Cut off at each sixteenth, and with one bit flipped in each quarter."""
    rng = random.Random(seed)
    cut = [content[: len(content) * i // 16] for i in range(16)]
    for quarter in range(4):
        flipped = bytearray(content)
        flipped[(len(content) * quarter + rng.randrange(len(content))) // 4] ^= 1 << rng.randrange(8)
        cut.append(bytes(flipped))
    return cut


def test_every_damage_of_every_file_is_seen(copy, record_property):
    whole = Run.load(copy)
    tries = 0
    for name in ("run.json", *whole.manifest.files):
        content = (copy / name).read_bytes()
        for damaged in damages(content, len(content)):
            (copy / name).write_bytes(damaged)
            tries += 1
            with pytest.raises(FinetuneError, match="damaged") as caught:
                Run.load(copy).file(name)
            assert name in caught.value.problem
            assert len(caught.value.problem.splitlines()) == 1
        (copy / name).write_bytes(content)
    for name in whole.manifest.files:
        (copy / name).unlink()
        with pytest.raises(FinetuneError, match="cannot be read"):
            whole.file(name)
    record_property("tries", tries)
    assert tries == 20 * (1 + len(whole.manifest.files))


def answer(folder: Path, _output: Path) -> object:
    """`predict`: all that it says of two photos."""
    photos = sorted((folder.parents[1] / "photos" / "test").rglob("*.png"))[:2]
    found = predict.predict(predict.RunPredictor(Run.load(folder), workers=1), photos, top_k=3)
    return [(each.label, each.top) for each in found]


def judge(folder: Path, output: Path) -> object:
    """`evaluate` with its report: the numbers. A section of the page may say instead that its file is damaged."""
    result = evaluate.evaluate(Run.load(folder), Silent(), target=evaluate.Target(output.name))
    html.report(result.judged, result.folder, Silent())
    return result.judged.evaluation.to_json()


def write_openvino(folder: Path, output: Path) -> object:
    """`export`: the weights that it writes."""
    export.export(Run.load(folder), export.ExportRequest(names=["openvino"], output=output), Silent())
    return next(output.rglob("*.bin")).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "use"), [("predict", answer), ("evaluate", judge), ("export", write_openvino)], ids=USED
)
def test_a_command_refuses_what_it_uses_and_needs_nothing_else(copy, tmp_path, command, use: Callable, record_property):
    outputs = iter(tmp_path / f"out-{i}" for i in range(10_000))
    undamaged = use(copy, next(outputs))
    refused, tries = set(), 0
    for name in ("run.json", *Run.load(copy).manifest.files):
        content = (copy / name).read_bytes()
        for damaged in damages(content, len(content))[7::4]:  # half of it, and flipped bits
            (copy / name).write_bytes(damaged)
            tries += 1
            try:
                found = use(copy, next(outputs))
            except FinetuneError as error:
                refused.add(name if name in error.problem else error.problem)
            else:
                assert found == undamaged, f"{name} was used although it is damaged"
        (copy / name).write_bytes(content)
    record_property("tries", tries)
    assert refused >= USED[command]
    assert refused <= {"run.json", *Run.load(copy).manifest.files}, "an error that does not name the file"
    assert use(copy, next(outputs)) == undamaged
