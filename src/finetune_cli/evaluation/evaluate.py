"""`evaluate`: labelled photos through a finished run; one new folder, by default under the run's `evaluations/`.

Neither TensorFlow nor SciPy nor matplotlib is imported.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli import files
from finetune_cli.cache.digests import DigestCache
from finetune_cli.errors import GateError, StorageError, UsageError
from finetune_cli.evaluation import judge as judged
from finetune_cli.evaluation.judge import Calibration, Compared, Judged, Photos
from finetune_cli.parallel import cores
from finetune_cli.photos import dataset
from finetune_cli.progress import Observer, ignore_progress
from finetune_cli.runs.run import Run
from finetune_cli.tables import write_csv
from finetune_cli.training import outputs

_NAME = re.compile(r"\w[\w.-]{0,99}")


Report = Callable[[Judged, Path], object]


@dataclass(frozen=True)
class Result:
    """What was found out, and the folder that holds it."""

    judged: Judged
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """What `--format json` prints: the content of metrics.json for the split, and where the files are."""
        report = self.folder / "report.html"
        return {
            "folder": str(self.folder),
            "report": str(report) if report.exists() else None,
            "split": self.judged.photos.part,
            **metrics_json(self.judged),
        }


@dataclass(frozen=True, slots=True)
class Target:
    """Where an evaluation goes: `output`, or the folder `name` under the run's `evaluations/`, or a numbered one."""

    name: str | None = None
    output: Path | None = None


def evaluate(
    run: Run,
    observer: Observer,
    data: Path | None = None,
    root: Path | None = None,
    target: Target = Target(),
    other: Run | None = None,
    report: Report | None = None,
) -> Result:
    """`judge`, and write what was found.

    Writes metrics.json, per_class.csv and predictions.csv to `target`, flipped.csv when the run is compared with an
    `other`, and what `report` writes into the folder that it is given: all of these, or nothing. Raises `UsageError`
    for a target that is taken, `StorageError` when nothing can be written there, and what `judge` raises.
    """
    _check_target(run, target)
    found = judge(run, observer, data, root, other)
    return Result(found, _write(found, target, found.photos.part if data is None else data.stem, report))


def judge(
    run: Run, observer: Observer, data: Path | None = None, root: Path | None = None, other: Run | None = None
) -> Judged:
    """Judge `run` by the labelled photos in `data`, else by its own test or validation photos (moved to `root`).

    Writes nothing. Photos that cannot be used are left out and listed in the result. Raises `DataError` when there is
    nothing to judge.
    """
    workers = cores()
    photos = _photos(run, data, root, workers, observer)
    if other is not None:
        judged.check_comparable(run, other, photos.samples)
    observer.note(f"evaluating on {len(photos.samples)} {photos.source}")
    for note in photos.notes:
        observer.note(note)
    with observer.stage("evaluating", len(photos.samples)) as advance:
        found = judged.judge(run, photos, workers, advance)
    if other is not None:
        with observer.stage(f"evaluating {other.name}", len(found.answers.samples)) as advance:
            found = judged.compare(found, other, workers, advance)
    seen = [(run, found.seen)]
    if other is not None:
        seen.append((other, judged.seen_in_training(other, found.answers.samples)))
    for one, count in seen:
        if count:
            observer.warn(f"{one.name} was trained on {count} of these photos: its result is too good")
    if found.calibration is not None and found.calibration.left_out:
        left_out = found.calibration.left_out
        observer.note(f"calibration leaves out {left_out} of these photos, on which the temperature was fitted")
    return found


def gate(result: Result, least: float) -> None:
    """Raise `GateError` when the accuracy is below `least`."""
    accuracy = result.judged.evaluation.accuracy.value
    if accuracy < least:
        raise GateError(
            f"the accuracy, {accuracy:.4f}, is below {least:g}", "see which photos are wrong in predictions.csv"
        )


def _photos(run: Run, data: Path | None, root: Path | None, workers: int, observer: Observer) -> Photos:
    if data is not None and root is not None:
        raise UsageError(
            "DATA and --data exclude each other", "DATA: other labelled photos; --data: where the run's own photos are"
        )
    if data is None and root is None:
        return judged.photos_of_run(run, None, workers, ignore_progress)
    if data is None:
        with observer.stage("looking for the photos", None, "files") as advance:
            return judged.photos_of_run(run, root, workers, advance)
    with observer.stage("preflight", None) as advance, DigestCache(None) as cache:
        labelled = dataset.load_labelled(data, run.classes, run.image_settings.max_pixels, cache, advance)
    present = {sample.label for sample in labelled.samples}
    notes = labelled.notes
    if len(present) < len(run.classes):
        names = ", ".join(run.classes[i] for i in sorted(present))
        notes = (*notes, f"they show {len(present)} of the {len(run.classes)} classes: {names}")
    return Photos("data", f"photos of {data}", labelled.samples, labelled.bad, notes)


def _check_target(run: Run, target: Target) -> None:
    """Find out before the work whether the evaluation can be written. Raises `UsageError` or `StorageError`."""
    if target.output is not None:
        _check_output(target)
        return
    if target.name is not None:
        if not _NAME.fullmatch(target.name):
            raise UsageError(
                f"--name {target.name!r} cannot be used", "take letters, digits, dots, hyphens and underscores"
            )
        folder = run.folder / "evaluations" / target.name
        if os.path.lexists(folder):
            raise UsageError(f"{folder} exists already", "choose another --name, or remove that folder")
    try:
        files.check_writable(run.folder / "evaluations", run.folder)
    except StorageError as exc:
        exc.remedy = "write the evaluation to another folder: --output DIR"
        raise


def _check_output(target: Target) -> None:
    output = target.output
    assert output is not None
    if target.name is not None:
        raise UsageError("--name and --output exclude each other", "--name: under the run; --output: anywhere")
    if output.name in ("", "..") or output.is_mount():
        raise UsageError(f"--output {output} cannot be replaced", "name a new folder in it")
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file", "name a new or empty folder")
    try:
        is_empty = not output.is_dir() or next(output.iterdir(), None) is None
    except OSError as exc:
        raise files.storage_error(exc, output) from exc
    if not is_empty:
        raise UsageError(f"--output {output} is not empty", "name a new or empty folder")
    files.check_writable(output.absolute().parent)


def _write(found: Judged, target: Target, stem: str, report: Report | None = None) -> Path:
    """Write the evaluation to `target`, by default to `stem` with the next free number, and return its folder.

    What takes a name is the finished folder, moved there; another evaluation may be faster, then the next number is
    tried.
    """
    if target.output is not None:
        try:
            with contextlib.suppress(FileNotFoundError):
                target.output.rmdir()  # it was empty: the finished folder is moved there
        except OSError as exc:
            raise files.storage_error(exc, target.output) from exc
        _write_files(target.output, found, report)
        return target.output
    stem = re.sub(r"[^\w.-]+", "-", stem)[:50].strip("-.") or "data"
    numbers = itertools.count(1)
    while True:
        folder = found.run.folder / "evaluations" / (target.name or f"{stem}-{next(numbers)}")
        if target.name is None and os.path.lexists(folder):
            continue
        try:
            _write_files(folder, found, report)
            return folder
        except StorageError:
            if target.name is not None or not os.path.lexists(folder):
                raise


def _write_files(folder: Path, found: Judged, report: Report | None) -> None:
    """Write all files of the evaluation as the new folder `folder`, or none. Raises `StorageError`."""
    answers, part = found.answers, found.photos.part
    # A person chooses a folder of any name for --output; in a run, nothing may be a link.
    root = found.run.folder if folder.is_relative_to(found.run.folder) else None
    with files.atomic_folder(folder, root=root) as temporary:
        try:
            table = outputs.Judged(part, answers.samples, answers.probabilities, found.evaluation)
            outputs.write_tables(temporary, found.run.classes, [table])
            files.write_json(temporary / "metrics.json", {part: metrics_json(found)})
            if found.compared is not None:
                header = ("path", "true", "first", "second")
                write_csv(temporary / "flipped.csv", header, flipped(found, found.compared))
            if report is not None:
                report(found, temporary)
        except StorageError as exc:
            exc.problem = exc.problem.replace(str(temporary), str(folder))  # nobody knows the other name
            raise


def metrics_json(found: Judged) -> dict[str, Any]:
    """What metrics.json says of the photos: the keys of `Evaluation.to_json`, and more."""
    return {
        **found.evaluation.to_json(),
        "run": found.run.name,
        "source": found.photos.source,
        "seen_in_training": found.seen,
        "calibration": _calibration(found.calibration),
        "bad_photos": [{"path": photo.name, "reason": photo.reason} for photo in found.bad],
        "comparison": None if found.compared is None else _comparison(found.compared),
    }


def _comparison(compared: Compared) -> dict[str, Any]:
    return {
        "run": compared.run.name,
        "photos": len(compared.rows),
        "classes": list(compared.classes),
        "classes_left_out": list(compared.left_out),
        **compared.comparison.to_json(),
    }


def _calibration(calibration: Calibration | None) -> dict[str, Any] | None:
    if calibration is None:
        return None
    return {
        "before": calibration.before.to_json(),
        "after": calibration.after.to_json(),
        "cross_fitted": calibration.cross_fitted,
        "left_out": calibration.left_out,
    }


def flipped(found: Judged, compared: Compared) -> Sequence[tuple[str, str, str, str]]:
    """The photos that one run has right and the other has not: name, true class, first run's, second run's answer."""
    rows = []
    for row, *answers in zip(compared.rows, compared.first, compared.second, strict=True):
        sample = found.answers.samples[row]
        true = found.run.classes[sample.label]
        first, second = (compared.classes[i] for i in answers)
        if (first == true) != (second == true):
            rows.append((sample.name, true, first, second))
    return rows
