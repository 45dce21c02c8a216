"""Labelled photos through a finished run, streaming: `Sample`s in, probabilities ``(n, C)`` and what they mean out.

A photo that cannot be used (gone, changed, undecodable) is listed with its reason, and the others are judged.
Neither TensorFlow nor SciPy is imported.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.errors import BadImage, ChangedPhoto, DataError, RunError, UsageError
from finetune_cli.inference.predictor import PHOTOS_A_CALL, InsightfulPredictor
from finetune_cli.metrics import scores
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.metrics.scores import CalibrationScores, Comparison, Evaluation
from finetune_cli.parallel import ordered_map
from finetune_cli.photos import dataset, scan
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import BadPhoto, Sample
from finetune_cli.progress import Advance
from finetune_cli.runs.run import Run

# So many rows of features are kept, evenly spread, however many photos there are: enough for any comparison.
_FEATURE_ROWS = 20_000
# About the least positive float32: a probability of 0 has no logit.
_SMALLEST = np.float32(1e-38)


@dataclass(frozen=True)
class Photos:
    """What is judged: `part` is a split of the run, or data; `source` says it to a person.

    places: where all photos of the run that were moved are now, by digest.
    """

    part: str
    source: str
    samples: tuple[Sample, ...]
    bad: tuple[BadPhoto, ...] = ()
    notes: tuple[str, ...] = ()
    places: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Answers:
    """What a run says about `samples`: probabilities ``float32 (n, C)``.

    features: ``float32 (m, D)``, what the head was applied to, of every `stride`-th photo: refits are judged by them.
    """

    samples: tuple[Sample, ...]
    probabilities: NDArray[np.float32]
    features: NDArray[np.float32]
    stride: int
    bad: tuple[BadPhoto, ...]

    @property
    def labels(self) -> NDArray[np.int64]:
        """``int64 (n,)``: the true class of every photo."""
        return np.array([sample.label for sample in self.samples], np.int64)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """``int64 (n,)``: the most probable class of every photo, the first of equals."""
        return np.asarray(self.probabilities.argmax(axis=1), np.int64)


@dataclass(frozen=True)
class Calibration:
    """How well the probabilities keep their word without (`before`) and with the model's temperature (`after`).

    `cross_fitted`: these are the photos that the temperature was fitted on, so that in `after` every photo has one
    that was fitted on others. `left_out`: among other photos, so many of those do not count here.
    """

    before: CalibrationScores
    after: CalibrationScores
    cross_fitted: bool
    left_out: int = 0


@dataclass(frozen=True, eq=False)
class Compared:
    """A second run on the photos whose class both runs have.

    classes: those that both runs have, in the order of the first run; `left_out`: those that one of them has. rows:
    ``(n,)``, which of the first run's answers are compared. first, second: ``int64 (n,)``, what each run answers when
    it may choose among `classes` only, as numbers of them.
    """

    run: Run
    classes: tuple[str, ...]
    left_out: tuple[str, ...]
    rows: NDArray[np.intp]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    comparison: Comparison


@dataclass(frozen=True, eq=False)
class Judged:
    """All that an evaluation found out; the run was trained on `seen` of the photos."""

    run: Run
    photos: Photos
    answers: Answers
    evaluation: Evaluation
    calibration: Calibration | None
    compared: Compared | None = None
    seen: int = 0

    @property
    def bad(self) -> tuple[BadPhoto, ...]:
        """The photos that could not be judged."""
        return (*self.photos.bad, *self.answers.bad)


def photos_of_run(run: Run, root: Path | None, workers: int, advance: Advance, part: str | None = None) -> Photos:
    """The photos of `run` in `part`, by default its test photos if it has some, else its validation photos.

    They are looked for where they were when the run was made or, with `root`, by their content anywhere below it.
    Raises `DataError` when none is there.
    """
    rows = run.split()
    if part is None:
        part = "test" if any(row.split == "test" for row in rows) else "val"
    names = {"train": "training", "val": "validation", "test": "test"}
    source = f"{names[part]} photos of the run"
    places = None if root is None else _by_digest(root, {row.digest for row in rows}, workers, advance)
    rows = [row for row in rows if row.split == part]
    folder = run.data_roots().get(part) if root is None else root
    if folder is None:
        raise RunError(f"{run.folder}/run.json does not say where the {source} are", "say it with --data FOLDER")
    label = {name: i for i, name in enumerate(run.classes)}
    samples, bad = [], []
    for row in rows:
        if row.label not in label:
            raise RunError(
                f"{run.folder}/split.csv names {row.label!r}, which is no class of the run",
                "restore the run from a copy",
            )
        path = folder / row.path if places is None else places.get(row.digest)
        if path is None or not path.is_file():
            bad.append(BadPhoto(folder / row.path, row.path, f"not found under {folder}"))
        else:
            samples.append(Sample(path, row.path, label[row.label], row.digest))
    if not samples:
        raise DataError(
            f"none of the {len(rows)} {source} is under {folder}",
            "say where they are with --data FOLDER (they are recognised by content); "
            "evaluate can judge other labelled photos, too",
        )
    return Photos(part, source, tuple(samples), tuple(bad), places=places or {})


def _by_digest(root: Path, wanted: set[str], workers: int, advance: Advance) -> dict[str, Path]:
    """Where the files with the `wanted` SHA-256 are below `root`."""
    if not root.is_dir():
        raise UsageError(f"--data {root} is not a folder", "name the folder that the photos are in now")

    def digest(path: Path) -> tuple[str | None, Path]:
        try:
            return files.sha256(path), path
        except OSError:
            return None, path

    found: dict[str, Path] = {}
    for content, path in ordered_map(digest, dataset.iter_photos([root]), workers):
        advance(1)
        if content in wanted:
            found.setdefault(content, path)
    return found


def answer(run: Run, samples: Sequence[Sample], workers: int, advance: Advance) -> Answers:
    """What `run` says about `samples`."""
    predictor = InsightfulPredictor(run, workers)
    stride = math.ceil(len(samples) / _FEATURE_ROWS) or 1
    kept: list[Sample] = []
    bad: list[BadPhoto] = []
    probabilities, features = [], []
    work = _worker(predictor)
    for good, refused, insight in ordered_map(work, _chunks(samples), workers):
        advance(len(good) + len(refused))
        bad += refused
        if insight is not None:
            features.append(insight[1][-len(kept) % stride :: stride])
            kept += good
            probabilities.append(insight[0])
    nothing = np.zeros((0, len(run.classes)), np.float32), np.zeros((0, len(predictor.end.kernel)), np.float32)
    return Answers(
        tuple(kept),
        np.concatenate([nothing[0], *probabilities]),
        np.concatenate([nothing[1], *features]),
        stride,
        tuple(bad),
    )


_Chunk = tuple[list[Sample], list[BadPhoto], tuple[NDArray[np.float32], NDArray[np.float32]] | None]


def _worker(predictor: InsightfulPredictor) -> Callable[[tuple[Sample, ...]], _Chunk]:
    def work(chunk: tuple[Sample, ...]) -> _Chunk:
        good: list[Sample] = []
        bad: list[BadPhoto] = []
        photos = []
        for sample in chunk:
            try:
                photos.append(pixels(sample, predictor.settings))
                good.append(sample)
            except BadImage as exc:
                bad.append(BadPhoto(sample.path, sample.name, exc.reason))
        if not photos:
            return good, bad, None
        insight = predictor.insight(np.stack(photos))
        return good, bad, (insight.probabilities, insight.features)

    return work


def pixels(sample: Sample, settings: ImageSettings) -> NDArray[np.uint8]:
    """The pixels ``uint8 (size, size, 3)`` of `sample`.

    Raises `BadImage` when it cannot be read or decoded, or when its bytes are not those of its digest.
    """
    try:
        return scan.decode_sample(sample, settings)
    except ChangedPhoto as exc:
        raise BadImage(sample.path, "the file is not the one that was indexed: its content has changed") from exc


def _chunks(samples: Iterable[Sample]) -> Iterator[tuple[Sample, ...]]:
    iterator = iter(samples)
    while chunk := tuple(itertools.islice(iterator, PHOTOS_A_CALL)):
        yield chunk


def judge(run: Run, photos: Photos, workers: int, advance: Advance) -> Judged:
    """Judge `run` by `photos`. Raises `DataError` when not one of them can be used."""
    answers = answer(run, photos.samples, workers, advance)
    if not answers.samples:
        bad = (*photos.bad, *answers.bad)
        first = f"; the first is {bad[0].path}: {bad[0].reason}" if bad else ""
        raise DataError(f"none of the {len(bad)} photos can be used{first}", "name a folder of readable photos")
    evaluation = scores.evaluate(answers.probabilities, answers.labels, run.classes)
    calibration = _calibration(run, answers, evaluation)
    if calibration is not None:
        evaluation = replace(evaluation, calibration=calibration.after)
    return Judged(run, photos, answers, evaluation, calibration, seen=seen_in_training(run, answers.samples))


def _calibration(run: Run, answers: Answers, evaluation: Evaluation) -> Calibration | None:
    """The effect of the model's temperature, never judged by photos that it was fitted on; None without one."""
    if run.temperature == 1.0:
        return None
    logits = run.temperature * np.log(np.maximum(answers.probabilities, _SMALLEST), dtype=np.float64)
    rows = run.split()
    fitted_on = {row.digest for row in rows if row.split == "val"}
    others = np.array([sample.digest not in fitted_on for sample in answers.samples])
    if not others.any():
        group_of = {row.digest: row.group for row in rows}
        groups = group_numbers((group_of.get(s.digest) or s.group, s.digest) for s in answers.samples)
        before, after = scores.cross_fitted_calibration(logits, answers.labels, groups)
        return Calibration(before, after, cross_fitted=True)
    labels = answers.labels[others]
    before = scores.calibration_scores(scores.softmax(logits[others]), labels)
    if others.all():
        return Calibration(before, evaluation.calibration, cross_fitted=False)
    after = scores.calibration_scores(answers.probabilities[others], labels)
    return Calibration(before, after, cross_fitted=False, left_out=int((~others).sum()))


def shared_classes(run: Run, other: Run) -> tuple[str, ...]:
    """The classes that both runs have, in the order of `run`."""
    return tuple(name for name in run.classes if name in set(other.classes))


def check_comparable(run: Run, other: Run, samples: Iterable[Sample]) -> None:
    """Raise `UsageError` when there is nothing to compare: fewer than two shared classes, or no photo of them."""
    shared = shared_classes(run, other)
    remedy = "compare runs that have classes in common, on photos of these"
    if len(shared) < 2:
        raise UsageError(f"{other.folder} and {run.folder} have {len(shared) or 'no'} class in common", remedy)
    if not any(run.classes[sample.label] in shared for sample in samples):
        raise UsageError(f"no photo shows a class that {other.folder} has, too", remedy)


def compare(judged: Judged, other: Run, workers: int, advance: Advance) -> Judged:
    """`judged` with a comparison: the photos of the classes that both runs have, through `other`, too.

    Each run chooses among these classes only, which are matched by name: a run is not worse for a class that the other
    does not know. Raises `DataError` when no such photo can be read any more.
    """
    ours, theirs, shared = judged.run.classes, other.classes, shared_classes(judged.run, other)
    number = {name: i for i, name in enumerate(shared)}
    position = {id(sample): i for i, sample in enumerate(judged.answers.samples)}
    answers = answer(other, [s for s in judged.answers.samples if ours[s.label] in number], workers, advance)
    if not answers.samples:
        raise DataError(f"no photo is left to compare with {other.folder}", "compare on photos that both runs can use")
    rows = np.array([position[id(sample)] for sample in answers.samples], np.intp)
    first = judged.answers.probabilities[rows][:, [ours.index(name) for name in shared]].argmax(axis=1)
    second = answers.probabilities[:, [theirs.index(name) for name in shared]].argmax(axis=1)
    labels = [number[ours[sample.label]] for sample in answers.samples]
    return replace(
        judged,
        compared=Compared(
            run=other,
            classes=shared,
            left_out=tuple(name for name in dict.fromkeys((*ours, *theirs)) if name not in number),
            rows=rows,
            first=first.astype(np.int64),
            second=second.astype(np.int64),
            comparison=scores.compare(labels, first, second),
        ),
    )


def seen_in_training(run: Run, samples: Iterable[Sample]) -> int:
    """How many of `samples` are, byte for byte, among the training photos of `run`."""
    seen = {row.digest for row in run.split() if row.split == "train"}
    return sum(sample.digest in seen for sample in samples)
