"""The proof of an export: validation photos of the run through the exported model, compared with the run's answers.

Up to 64 photos, half of them the hardest (those with the least margin between the two best classes, where a small
difference changes the answer) and half spread over the others. The run answers through its own `inference/` form.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import BadImage, DataError, GateError
from finetune_cli.exports.forms import Floats, Opened, Pixels, Signature
from finetune_cli.observer import Observer
from finetune_cli.parallel import cores, ordered_map
from finetune_cli.photos.codecs import opened as opened_image
from finetune_cli.photos.dataset import Sample
from finetune_cli.runs import judged
from finetune_cli.runs.predictor import RunPredictor
from finetune_cli.runs.run import Run
from finetune_cli.tables import read_csv

MOST_PHOTOS = 64
CALIBRATION_PHOTOS = 200
LARGEST_DIFFERENCE = 1e-4
LEAST_AGREEMENT = 0.95
# Two classes whose probabilities are closer than this are a tie, and either may win in a form that is not exact.
TIE = 0.1
_A_BATCH = 5  # an odd number, so that the last batch has another size: both must be right
_TIMED_PHOTOS = 20
_ORIENTATION = 0x0112  # Exif 2.32


@dataclass(frozen=True, eq=False)
class Photo:
    """One photo to replay: `pixels` uint8 (size, size, 3); `foreign`: why an exported model cannot decode its file."""

    path: Path
    name: str
    pixels: Pixels
    foreign: str | None


@dataclass(frozen=True, eq=False)
class Replay:
    """The photos and the run's probabilities ``float32 (n, C)`` for them; `missing` validation photos were not found.

    `measured`: the largest difference from predictions.csv, which was written when the run was trained.
    """

    photos: tuple[Photo, ...]
    reference: Floats
    missing: int
    measured: float


@dataclass(frozen=True)
class Check:
    """How far one signature is from the run on `photos` photos.

    agreement: share with the same most probable class; agreement_or_tie: share where that, or where the run itself
    held both classes within `TIE`. largest, mean: of a photo's largest difference of a probability. `limit`: the
    largest one allowed; None: judged by agreement_or_tie. `worst`: the photo with the largest difference.
    """

    signature: str
    photos: int
    agreement: float
    agreement_or_tie: float
    largest: float
    mean: float
    limit: float | None
    worst: str
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the limit was kept (NaN never does)."""
        if self.limit is not None:
            return self.largest <= self.limit
        return self.agreement_or_tie >= LEAST_AGREEMENT and math.isfinite(self.largest)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {
            "signature": self.signature,
            "photos": self.photos,
            "left_out": self.left_out,
            "top1_agreement": self.agreement,
            "top1_agreement_or_tie": self.agreement_or_tie,
            "largest_difference": self.largest if math.isfinite(self.largest) else None,
            "mean_difference": self.mean if math.isfinite(self.mean) else None,
            "worst_photo": self.worst,
            "limit": self.rule(),
            "passed": self.passed,
        }

    def rule(self) -> str:
        """The limit in words."""
        return f"top-1, {LEAST_AGREEMENT:.0%}" if self.limit is None else f"<= {self.limit:g}"


def collect(run: Run, root: Path | None, observer: Observer) -> Replay:
    """Choose, find, read and decode the photos of `run` (moved ones below `root`) and let the run answer for them.

    Raises `DataError` when not one of them can be found with its old content.
    """
    with observer.stage("looking for validation photos", None, "files") as advance:
        found = judged.photos_of_run(run, root, cores(), advance, part="val")
    margins = _margins(run)
    samples = choose(found.samples, [margins.get(sample.name, 0.0) for sample in found.samples])
    photos: list[Photo] = []
    with observer.stage("validation photos", len(samples)) as advance:
        for photo in ordered_map(lambda sample: _read(sample, run), samples, cores()):
            advance(1)
            if photo is not None:
                photos.append(photo)
    if not photos:
        raise DataError(
            f"the {len(samples)} chosen validation photos have changed since the run was trained",
            "say where the unchanged ones are with --data ROOT",
        )
    predictor = RunPredictor(run, workers=1, latency=True)
    reference = np.concatenate([predictor.probabilities(photo.pixels[None]) for photo in photos])
    missing = len(found.bad) + len(samples) - len(photos)
    return Replay(tuple(photos), reference, missing, _from_measured(run, photos, reference))


def choose(samples: Sequence[Sample], margins: Sequence[float]) -> list[Sample]:
    """Up to `MOST_PHOTOS`: half of them with the least margins, half evenly spread over the others."""
    order = np.argsort(margins, kind="stable")
    if len(order) > MOST_PHOTOS:
        half = MOST_PHOTOS // 2
        others = np.linspace(half, len(order) - 1, MOST_PHOTOS - half).astype(int)
        order = order[np.concatenate([np.arange(half), others])]
    return [samples[i] for i in order]


def _predictions(run: Run) -> dict[str, Floats]:
    """Validation photo -> the probabilities that were measured when the run was trained."""
    rows = read_csv(run.file("predictions.csv"), ("split", "path", "true", "predicted", *run.classes))
    return {row[1]: np.array(row[4:], np.float32) for row in rows if row[0] == "val"}


def _margins(run: Run) -> dict[str, float]:
    best = {name: np.sort(row)[-2:] for name, row in _predictions(run).items()}
    return {name: float(row[1] - row[0]) for name, row in best.items()}


def _from_measured(run: Run, photos: Sequence[Photo], reference: Floats) -> float:
    measured = _predictions(run)
    known = [
        (row, measured[photo.name]) for photo, row in zip(photos, reference, strict=True) if photo.name in measured
    ]
    return max((float(np.abs(now - then).max()) for now, then in known), default=0.0)


def _read(sample: Sample, run: Run) -> Photo | None:
    settings = run.image_settings
    try:
        pixels = judged.pixels(sample, settings)
        with opened_image(sample.path, settings.max_pixels) as image:
            foreign = _foreign(image)
    except BadImage:
        return None
    return Photo(sample.path, sample.name, pixels, foreign)


def _foreign(image: Any) -> str | None:
    """Why `tf_photos.py` does not see this image as `images.py` does, if it does not."""
    if image.format in {"JPEG", "MPO"}:
        return None
    if image.format != "PNG":
        return f"{image.format} files"
    try:
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # noqa: BLE001 - damaged Exif data raise anything; `images.py` ignores them, too
        turned = False
    return "PNG files that are to be turned" if turned else None


def calibration_photos(run: Run, root: Path | None, observer: Observer) -> Iterator[Pixels]:
    """Up to `CALIBRATION_PHOTOS` training photos ``uint8 (size, size, 3)``, evenly spread; unreadable ones left out."""
    with observer.stage("looking for training photos", None, "files") as advance:
        samples = judged.photos_of_run(run, root, cores(), advance, part="train").samples
    chosen = np.linspace(0, len(samples) - 1, min(len(samples), CALIBRATION_PHOTOS)).astype(int)
    for i in chosen:
        try:
            yield judged.pixels(samples[i], run.image_settings)
        except BadImage:
            continue


def compare(model: Opened, replay: Replay, exact: bool) -> tuple[Check, ...]:
    """Replay the photos through every signature of `model`; `exact`: whether pixels must give equal probabilities."""
    checks: list[Check] = []
    for signature in model.signatures():
        if signature.takes == "pixels":
            answers = _answers(signature, [photo.pixels for photo in replay.photos])
            limit = LARGEST_DIFFERENCE if exact else None
            checks.append(_check(signature.name, replay.photos, answers, replay.reference, limit))
        else:
            checks += _compare_bytes(signature, replay)
    return tuple(checks)


def _compare_bytes(signature: Signature, replay: Replay) -> Iterator[Check]:
    rows = [i for i, photo in enumerate(replay.photos) if photo.foreign is None]
    if rows:
        photos = [replay.photos[i] for i in rows]
        answers = _answers(signature, photos)
        left_out = Counter(photo.foreign for photo in replay.photos if photo.foreign is not None)
        yield _check(signature.name, photos, answers, replay.reference[rows], None, dict(left_out))


def _answers(signature: Signature, photos: Sequence[Any]) -> Floats:
    """The answers of `signature`, batch by batch; of files, one batch is in memory at a time."""
    rows = []
    for start in range(0, len(photos), _A_BATCH):
        batch = photos[start : start + _A_BATCH]
        encoded = signature.takes == "bytes"
        rows.append(signature.answer([photo.path.read_bytes() for photo in batch] if encoded else np.stack(batch)))
    return np.concatenate(rows)


def _check(
    name: str,
    photos: Sequence[Photo],
    answers: Floats,
    reference: Floats,
    limit: float | None,
    left_out: dict[str, int] | None = None,
) -> Check:
    if answers.shape != reference.shape:
        raise GateError(f"{name} answers {answers.shape[1:]} numbers a photo, the run {reference.shape[1:]}")
    differences: NDArray[np.float32] = np.abs(answers - reference).max(axis=1)
    ours, theirs = answers.argmax(axis=1), reference.argmax(axis=1)
    lead = reference.max(axis=1) - reference[np.arange(len(ours)), ours]
    return Check(
        signature=name,
        photos=len(photos),
        agreement=float((ours == theirs).mean()),
        agreement_or_tie=float((lead < TIE).mean()),
        largest=float(differences.max()),
        mean=float(differences.mean()),
        limit=limit,
        worst=photos[int(differences.argmax())].name,
        left_out=left_out or {},
    )


def milliseconds(model: Opened, replay: Replay) -> float:
    """The median time of an answer for one decoded photo, all cores working on it."""
    photos = [photo.pixels[None] for photo in replay.photos[:_TIMED_PHOTOS]]
    for photo in photos[:3]:
        model.probabilities(photo)
    seconds = []
    for i in range(_TIMED_PHOTOS):
        started = time.perf_counter()
        model.probabilities(photos[i % len(photos)])
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)) * 1000
