"""Measures every exported form on all test photos of two sets; prints the tables of docs/serving.md.

    python benchmarks/exports.py PHOTOS [RUNS]

PHOTOS is a folder with `hymenoptera/{train,val}` and `scenes/{train,test}`. RUNS: a folder to keep the runs in, which
are trained there if they are not there yet. Needs the extras onnx, litert and int8. One table for each set: the size on
the disk, the median of the milliseconds for one decoded photo on all cores, the accuracy, the share of the photos with
the answer of the run, and the largest and the mean difference of a probability. Below the form `savedmodel` are its
inputs that decode or resize by themselves, and below `openvino` what its plugin does without the f32 hint.
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


def row(name: str, size: float, milliseconds: float, accuracy: float, same: float, largest: float, mean: float) -> None:
    cells = [name, f"{size / 1e6:.1f}" if size else "", f"{milliseconds:.1f}" if milliseconds else ""]
    print(f"| {' | '.join(cells)} | {accuracy:.1%} | {same:.1%} | {largest:.1g} | {mean:.1g} |", flush=True)


def form(one: Exported) -> None:
    figures, options = one.figures, [value for value in one.options.values() if value not in {"none", "nhwc"}]
    assert figures is not None
    row(" ".join([one.form, *options]), one.size, figures.milliseconds, figures.accuracy.value,
        figures.agreement.value, figures.largest, figures.mean)  # fmt: skip


def other(name: str, photos: Photos, answers: Iterator[np.ndarray]) -> None:
    """A row for `answers`, an iterator of probabilities (1, C) for the photos in turn."""
    found = np.concatenate(list(answers))
    apart = np.abs(found - photos.reference).max(axis=1)
    given, wanted = found.argmax(axis=1), photos.reference.argmax(axis=1)
    row(name, 0, 0, (given == photos.labels).mean(), (given == wanted).mean(), apart.max(), apart.mean())


def inputs_of_savedmodel(folder: Path, photos: Photos) -> None:
    most = photos.run.image_settings.max_pixels
    for signature in open_model(folder, cores()).signatures():
        if signature.takes == "bytes":
            files = (one.path.read_bytes() for one in photos.samples)
            other(f"- {signature.name}, files", photos, (signature.answer([file]) for file in files))
        else:
            whole = (decode_whole(one.path, most) for one in photos.samples)
            other(f"- {signature.name}, full size", photos, (signature.answer(image[None]) for image in whole))


def openvino_without_hint(folder: Path, photos: Photos) -> None:
    """The plugin takes bfloat16 where the CPU has it."""
    ov = import_openvino()
    compiled = ov.compile_model(ov.Core().read_model(folder / "model.xml"), "CPU")
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    pixels = (run_photos.pixels(one, photos.run.image_settings)[None].astype(np.float32) for one in photos.samples)
    other(f"- without a hint: {precision}", photos, (compiled({"image": image})["probabilities"] for image in pixels))


BELOW: dict[str, Callable[[Path, Photos], None]] = {
    "savedmodel": inputs_of_savedmodel,
    "openvino": openvino_without_hint,
}


def measure(folder: Path, name: str, runs: Path) -> None:
    photos = test_photos(trained(folder, name, runs))
    accuracy = float((photos.reference.argmax(axis=1) == photos.labels).mean())
    print(f"\n{name}, {len(photos.samples)} test photos, {cores()} threads; the run: {accuracy:.1%}\n")
    print("| format | MB | ms | accuracy | same answer | largest difference | mean |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as place:
        for quantize, names in VARIANTS.items():
            request = ExportRequest(names, Path(place, quantize), options={"quantize": quantize}, benchmark=True)
            for one in export(photos.run, request, Silent()).exports:
                form(one)
                if quantize == "none" and one.form in BELOW:
                    BELOW[one.form](one.folder, photos)


def main(photos: str, runs: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as place:
        for name in SETS:
            measure(Path(photos), name, Path(runs or place).absolute())


if __name__ == "__main__":
    main(*sys.argv[1:])
