"""The check of an export: validation photos of the run through the exported model, compared with the run's answers.

Up to 64 photos, half of them the hardest (those with the least margin between the two best classes, where a small
difference changes the answer) and half spread over the others. The run answers through its own `inference/` form.

Forms that are not exact are judged by the share of photos with the same answer, and a few photos say little about that
share: with 95 % demanded, 23 of 24 would pass and one more miss would not. So a form is refused only when its 95 %
interval lies below 95 %: when so many differences cannot be chance. That is at 21 or more of 24 photos, and 58 of 64.

Signatures that decode or resize by themselves also get what people will send: the files, and pixels at the size of the
files. Exceptions (PNG copies of files that a signature does not read, fewer photos) are in the notes of the check.
"""

import io
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli import places
from finetune_cli.errors import BadImage, DataError, GateError
from finetune_cli.evaluation import photos as run_photos
from finetune_cli.exports.forms import Floats, Opened, Pixels, Signature
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.metrics.scores import Proportion, wilson
from finetune_cli.parallel import cores, ordered_map
from finetune_cli.photos.codecs import opened as opened_image
from finetune_cli.photos.decode import decode_whole
from finetune_cli.photos.scan import Sample
from finetune_cli.places import Place
from finetune_cli.progress import Observer
from finetune_cli.runs.run import Run
from finetune_cli.tables import parse_csv
from finetune_cli.training import outputs

MOST_PHOTOS = 64
CALIBRATION_PHOTOS = 200
LEAST_AGREEMENT = 0.95
# Two classes whose probabilities are closer than this are a tie, and either may win in a form that is not exact.
TIE = 0.1
_A_BATCH = 5  # an odd number, so that the last batch has another size: both must be right
# So many pixels at full size go through a signature: all photos of a web shop, a few of a camera, in some seconds.
_FULL_SIZE_PIXELS = 50_000_000
_TIMED_PHOTOS = 20
_ORIENTATION = 0x0112  # Exif 2.32


@dataclass(frozen=True, eq=False)
class Photo:
    """One photo to replay: `pixels` uint8 (size, size, 3); `area`: its own pixels, as many as `max_pixels` at most.

    `foreign`: what it is, if an exported model cannot decode its file as the run does.
    """

    path: Place
    name: str
    pixels: Pixels
    area: int
    max_pixels: int
    foreign: str | None

    def whole(self) -> Pixels:
        """Its pixels at full size, ``uint8 (h, w, 3)``. Raises `BadImage`."""
        return decode_whole(self.path, self.max_pixels)

    def encoded(self) -> bytes:
        """Its file, or a PNG copy of one that is foreign. Raises `BadImage`."""
        if self.foreign is None:
            return places.read(self.path)
        from PIL import Image

        copy = io.BytesIO()
        Image.fromarray(self.whole()).save(copy, "PNG", compress_level=1)
        return copy.getvalue()


@dataclass(frozen=True, eq=False)
class Replay:
    """The photos and the run's probabilities ``float32 (n, C)`` for them; `missing` validation photos were not found.

    `measured`: the largest difference from predictions.csv, which was written when the run was trained; None for a run
    that was cross-validated, where predictions.csv has the answers of other heads.
    """

    photos: tuple[Photo, ...]
    reference: Floats
    missing: int
    measured: float | None


@dataclass(frozen=True)
class Check:
    """How far one signature is from the run on `photos` photos.

    agreement: share with the same most probable class; agreement_or_tie: share where that, or where the run itself
    held both classes within `TIE`, with its 95 % interval. largest, mean: of a photo's largest difference of a
    probability. `limit`: the largest one allowed; None: judged by the interval of agreement_or_tie. `worst`: the photo
    with the largest difference.
    """

    signature: str
    photos: int
    agreement: float
    agreement_or_tie: Proportion
    largest: float
    mean: float
    limit: float | None
    worst: str
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit; NaN never is."""
        if self.limit is not None:
            return self.largest <= self.limit
        return self.agreement_or_tie.high >= LEAST_AGREEMENT and math.isfinite(self.largest)

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {
            "signature": self.signature,
            "photos": self.photos,
            "top1_agreement": self.agreement,
            "top1_agreement_or_tie": self.agreement_or_tie.value,
            "top1_agreement_or_tie_interval": [self.agreement_or_tie.low, self.agreement_or_tie.high],
            "largest_difference": self.largest if math.isfinite(self.largest) else None,
            "mean_difference": self.mean if math.isfinite(self.mean) else None,
            "worst_photo": self.worst,
            "limit": self.rule(),
            "passed": self.passed,
            "notes": list(self.notes),
        }

    def rule(self) -> str:
        """The limit in words."""
        if self.limit is not None:
            return f"<= {self.limit:g}"
        return f"interval reaches {LEAST_AGREEMENT:.0%}"


def collect(run: Run, root: Place | None, observer: Observer) -> Replay:
    """Choose, find, read and decode the photos of `run` (moved ones below `root`) and let the run answer for them.

    Raises `DataError` when not one of them can be found with its old content.
    """
    part = "val" if run.manifest.photos.get("val") else "train"  # of a run that was cross-validated
    with observer.stage("looking for validation photos", None, "files") as advance:
        found = run_photos.photos_of_run(run, root, cores(), advance, part)
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
            "name the folder with the unchanged ones: --data ROOT",
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
    """Validation photo -> the probabilities that were measured when the run was trained, by `folds` out of fold."""
    rows = parse_csv(run.read("predictions.csv"), ("split", "path", "true", "predicted", *run.classes))
    return {row[1]: np.array(row[4:], np.float32) for row in rows if row[0] in ("val", "folds")}


def _margins(run: Run) -> dict[str, float]:
    best = {name: np.sort(row)[-2:] for name, row in _predictions(run).items()}
    return {name: float(row[1] - row[0]) for name, row in best.items()}


def _from_measured(run: Run, photos: Sequence[Photo], reference: Floats) -> float | None:
    if "folds" in run.manifest.metrics:
        return None
    measured = _predictions(run)
    known = [
        (row, measured[photo.name]) for photo, row in zip(photos, reference, strict=True) if photo.name in measured
    ]
    return max((float(np.abs(now - then).max()) for now, then in known), default=0.0)


def _read(sample: Sample, run: Run) -> Photo | None:
    settings = run.image_settings
    try:
        pixels = run_photos.pixels(sample, settings)
        with opened_image(sample.path, settings.max_pixels) as image:
            foreign, area = _foreign(image), image.width * image.height
    except BadImage:
        return None
    return Photo(sample.path, sample.name, pixels, area, settings.max_pixels, foreign)


def _foreign(image: Any) -> str | None:
    """Why `tf_photos.py` decodes this image differently from `photos/decode.py`; None if it does not."""
    if image.format in {"JPEG", "MPO"}:
        return None
    if image.format != "PNG":
        return f"{image.format} files"
    try:
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
    except Exception:  # noqa: BLE001 - damaged Exif data raise anything; `photos/decode.py` ignores them, too
        turned = False
    return "PNG files with an orientation" if turned else None


def calibration_photos(run: Run, root: Place | None, observer: Observer) -> Iterator[Pixels]:
    """Up to `CALIBRATION_PHOTOS` training photos ``uint8 (size, size, 3)``, evenly spread; unreadable ones left out."""
    with observer.stage("looking for training photos", None, "files") as advance:
        samples = run_photos.photos_of_run(run, root, cores(), advance, part="train").samples
    chosen = np.linspace(0, len(samples) - 1, min(len(samples), CALIBRATION_PHOTOS)).astype(int)
    for i in chosen:
        try:
            yield run_photos.pixels(samples[i], run.image_settings)
        except BadImage:
            continue


def compare(
    model: Opened, replay: Replay, exact: bool, advance: Callable[[int], None] = lambda _n: None
) -> tuple[Check, ...]:
    """Replay the photos through every signature of `model`; `exact`: whether pixels must give equal probabilities.

    Calls `advance` with the number of photos after every batch.
    """
    photos, checks = replay.photos, []
    for signature in model.signatures():
        if signature.takes == "bytes":
            answers = _answers(signature, photos, Photo.encoded, advance)
            checks.append(_check(signature.name, replay, answers, None, _copies(photos)))
            continue
        answers = _answers(signature, photos, lambda photo: photo.pixels, advance)
        limit = outputs.PARITY_LIMIT if exact else None
        checks.append(_check(signature.name, replay, answers, limit))
        if signature.any_size:
            checks.append(_compare_full_size(signature, replay, advance))
    return tuple(checks)


def _copies(photos: Sequence[Photo]) -> tuple[str, ...]:
    """Notes about the photos that were not given as the file on the disk."""
    counts = Counter(photo.foreign for photo in photos if photo.foreign is not None)
    return tuple(
        f"{count} {what} given as PNG copies of what the run decodes, because it does not read them as the run does"
        for what, count in counts.items()
    )


def _compare_full_size(signature: Signature, replay: Replay, advance: Callable[[int], None]) -> Check:
    """Replay photos at the size of their files: how far the resizing in the export is from that of the run."""
    areas = np.array([photo.area for photo in replay.photos])
    rows = np.flatnonzero(np.cumsum(areas) <= _FULL_SIZE_PIXELS)
    if not len(rows):
        rows = np.array([areas.argmin()])
    part = replace(replay, photos=tuple(replay.photos[i] for i in rows), reference=replay.reference[rows])
    answers = []
    for photo in part.photos:
        answers.append(signature.answer(photo.whole()[None]))
        advance(1)
    fewer = f"{len(rows)} of {len(areas)} photos, {areas[rows].sum() / 1e6:.1f} megapixels"
    notes = (fewer,) if len(rows) < len(areas) else ()
    return _check(f"{signature.name}, full size", part, np.concatenate(answers), None, notes)


def _answers(
    signature: Signature, photos: Sequence[Photo], given: Callable[[Photo], Any], advance: Callable[[int], None]
) -> Floats:
    """The answers of `signature` to what is `given` of each photo; one batch is in memory at a time."""
    rows = []
    for start in range(0, len(photos), _A_BATCH):
        batch = [given(photo) for photo in photos[start : start + _A_BATCH]]
        rows.append(signature.answer(batch if signature.takes == "bytes" else np.stack(batch)))
        advance(len(batch))
    return np.concatenate(rows)


def _check(name: str, replay: Replay, answers: Floats, limit: float | None, notes: tuple[str, ...] = ()) -> Check:
    """Compare the `answers` of the signature `name` with those of the run."""
    photos, reference = replay.photos, replay.reference
    if answers.shape != reference.shape:
        problem = f"{name} answers {answers.shape[1:]} numbers a photo, the run {reference.shape[1:]}"
        raise GateError(problem, "choose another --format, and report this")
    differences: NDArray[np.float32] = np.abs(answers - reference).max(axis=1)
    ours, theirs = answers.argmax(axis=1), reference.argmax(axis=1)
    lead = reference.max(axis=1) - reference[np.arange(len(ours)), ours]
    return Check(
        signature=name,
        photos=len(photos),
        agreement=float((ours == theirs).mean()),
        agreement_or_tie=wilson(int((lead < TIE).sum()), len(lead)),
        largest=float(differences.max()),
        mean=float(differences.mean()),
        limit=limit,
        worst=photos[int(differences.argmax())].name,
        notes=notes,
    )


def milliseconds(model: Opened, replay: Replay) -> float:
    """The median time of an answer for one decoded photo, on all cores."""
    photos = [photo.pixels[None] for photo in replay.photos[:_TIMED_PHOTOS]]
    for photo in photos[:3]:
        model.probabilities(photo)
    seconds = []
    for i in range(_TIMED_PHOTOS):
        started = time.perf_counter()
        model.probabilities(photos[i % len(photos)])
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)) * 1000
