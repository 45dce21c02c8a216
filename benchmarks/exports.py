"""Measures every exported form on all test photos of two sets; prints the table of docs/serving.md.

    python benchmarks/exports.py PHOTOS [RUNS]

PHOTOS is a folder with `hymenoptera/{train,val}` and `scenes/{train,test}`. RUNS: a folder to keep the runs in, which
are trained there if they are not there yet. Needs the extras onnx, litert and int8. The table has the size on the disk
and the median of the milliseconds for one decoded photo on all cores (both of the last set), and for each set the
accuracy, the share of the photos with the answer of the run, and the largest difference of a probability. Below
`savedmodel` are its inputs that decode or resize by themselves; below `openvino`, its plugin without the f32 hint.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune_cli import api
from finetune_cli.evaluation import photos as run_photos
from finetune_cli.exports.export import Exported, ExportRequest, export
from finetune_cli.exports.opening import open_model
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.inference.runtimes import import_openvino
from finetune_cli.parallel import cores
from finetune_cli.photos.decode import decode_whole
from finetune_cli.progress import Silent
from finetune_cli.runs.run import Run

SETS = {"scenes": {"test": "test"}, "hymenoptera": {"val": "val"}}
VARIANTS = {
    "none": ("savedmodel", "keras", "onnx", "litert", "openvino"),
    "float16": ("onnx", "litert", "openvino"),
    "int8": ("onnx", "litert", "openvino"),
}


@dataclass(frozen=True)
class Row:
    """What was measured for one form, or for one input of it, which has no size and no time of its own."""

    accuracy: float
    same: float
    largest: float
    size: int | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class Photos:
    """All test photos of a run: their samples, labels (n,), and the run's probabilities (n, C)."""

    run: Run
    samples: tuple[run_photos.Sample, ...]
    labels: np.ndarray
    reference: np.ndarray


def trained(folder: Path, name: str, runs: Path) -> Run:
    found = sorted(runs.glob(f"{name}-*/run.json"))
    if not found:
        data = {"train": folder / name / "train"} | {key: folder / name / part for key, part in SETS[name].items()}
        api.train(
            None,
            data={key: str(path) for key, path in data.items()},
            augmentation={"horizontal_flip": True, "width_shift_range": 0.1, "height_shift_range": 0.1},
            output={"directory": str(runs)},
        )
        found = sorted(runs.glob(f"{name}-*/run.json"))
    return Run.load(found[-1].parent)


def test_photos(run: Run) -> Photos:
    samples = run_photos.photos_of_run(run, None, cores(), lambda *_: None).samples
    predictor = RunPredictor(run, workers=1, latency=True)
    answers = [predictor.probabilities(run_photos.pixels(one, run.image_settings)[None]) for one in samples]
    return Photos(run, samples, np.array([one.label for one in samples]), np.concatenate(answers))


def of_export(one: Exported) -> tuple[str, Row]:
    """Its name in the table, and its row."""
    figures, options = one.figures, [value for value in one.options.values() if value not in {"none", "nhwc"}]
    assert figures is not None
    shares = figures.accuracy.value, figures.agreement.value
    return " ".join([one.form, *options]), Row(*shares, figures.largest, one.size, figures.milliseconds)


def of_answers(photos: Photos, answers: Iterator[np.ndarray]) -> Row:
    """The row for `answers`, an iterator of probabilities (1, C) for the photos in turn."""
    found = np.concatenate(list(answers))
    given, wanted = found.argmax(axis=1), photos.reference.argmax(axis=1)
    shares = float((given == photos.labels).mean()), float((given == wanted).mean())
    return Row(*shares, float(np.abs(found - photos.reference).max()))


def inputs_of_savedmodel(folder: Path, photos: Photos) -> dict[str, Row]:
    most, rows = photos.run.image_settings.max_pixels, {}
    for signature in open_model(folder, cores()).signatures():
        if signature.takes == "bytes":
            files = (one.path.read_bytes() for one in photos.samples)
            rows[f"- {signature.name}, files"] = of_answers(photos, (signature.answer([file]) for file in files))
        else:
            whole = (decode_whole(one.path, most) for one in photos.samples)
            rows[f"- {signature.name}, full size"] = of_answers(photos, (signature.answer(i[None]) for i in whole))
    return rows


def openvino_without_hint(folder: Path, photos: Photos) -> dict[str, Row]:
    """The plugin takes bfloat16 where the CPU has it."""
    ov = import_openvino()
    compiled = ov.compile_model(ov.Core().read_model(folder / "model.xml"), "CPU")
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    pixels = (run_photos.pixels(one, photos.run.image_settings)[None].astype(np.float32) for one in photos.samples)
    answers = (compiled({"image": image})["probabilities"] for image in pixels)
    return {f"- without a hint: {precision}": of_answers(photos, answers)}


BELOW: dict[str, Callable[[Path, Photos], dict[str, Row]]] = {
    "savedmodel": inputs_of_savedmodel,
    "openvino": openvino_without_hint,
}


def measure(run: Run) -> dict[str, Row]:
    photos, rows = test_photos(run), {}
    with tempfile.TemporaryDirectory() as place:
        for quantize, names in VARIANTS.items():
            request = ExportRequest(names, Path(place, quantize), options={"quantize": quantize}, benchmark=True)
            for one in export(run, request, Silent()).exports:
                name, row = of_export(one)
                rows[name] = row
                if quantize == "none" and one.form in BELOW:
                    rows |= BELOW[one.form](one.folder, photos)
    return rows


def print_table(found: dict[str, dict[str, Row]]) -> None:
    """`found`: set -> name -> row."""
    columns = [f"{name}: {what}" for name in found for what in ("accuracy", "same answer", "largest difference")]
    print(f"| format | MB | ms | {' | '.join(columns)} |\n| --- | --- | --- |{' --- |' * len(columns)}")
    for name, last in list(found.values())[-1].items():
        cells = [name, *("" if x is None else f"{x:.1f}" for x in (last.size and last.size / 1e6, last.milliseconds))]
        for rows in found.values():
            cells += [f"{rows[name].accuracy:.1%}", f"{rows[name].same:.1%}", f"{rows[name].largest:.2g}"]
        print(f"| {' | '.join(cells)} |")


def main(photos: str, runs: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as place:
        print_table({name: measure(trained(Path(photos), name, Path(runs or place).absolute())) for name in SETS})


if __name__ == "__main__":
    main(*sys.argv[1:])
