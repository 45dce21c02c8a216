"""`evaluate`: labelled photos through a finished run; one new folder, by default under the run's `evaluations/`.

Neither TensorFlow nor SciPy nor matplotlib is imported.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_cli import files
from finetune_cli.cache.digests import DigestCache
from finetune_cli.engines.engine import Engine, Local
from finetune_cli.errors import GateError, StorageError, UsageError
from finetune_cli.evaluation import compare, judge
from finetune_cli.evaluation.answers import seen_in_training
from finetune_cli.evaluation.compare import Compared
from finetune_cli.evaluation.judge import Calibration, Judgement
from finetune_cli.evaluation.photos import LabelledPhotos, photos_of_run
from finetune_cli.inference.predictor import UNKNOWN
from finetune_cli.parallel import cores
from finetune_cli.photos import dataset
from finetune_cli.places import Place
from finetune_cli.progress import Observer, ignore_progress
from finetune_cli.runs.run import Run
from finetune_cli.tables import write_csv
from finetune_cli.training import outputs

_NAME = re.compile(r"\w[\w.-]{0,99}")


# Writes a report of the judgement into the folder.
ReportWriter = Callable[[Judgement, Path], object]


@dataclass(frozen=True)
class Result:
    """The results of an evaluation, and the folder that holds its files."""

    judged: Judgement
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
class EvaluationRequest:
    """What to evaluate on. data: labelled photos; by default the run's own test photos, else those that validated it.

    root: where the run's own photos are now, if they were moved. other: a second run to compare with. engine: what the
    photos go through, by default the threads of this process.
    """

    data: Place | None = None
    root: Place | None = None
    other: Run | None = None
    engine: Engine | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Where an evaluation goes: `output`, or the folder `name` under the run's `evaluations/`, or a numbered one."""

    name: str | None = None
    output: Path | None = None


def evaluate(
    run: Run,
    observer: Observer,
    request: EvaluationRequest = EvaluationRequest(),
    target: Target = Target(),
    write_report: ReportWriter | None = None,
) -> Result:
    """`judge_photos`, and write the results.

    Writes metrics.json, per_class.csv and predictions.csv to `target`, flipped.csv when the run is compared with
    another, unknown.csv when it can answer `unknown`, and what `write_report` writes into the folder that it is given:
    all of these, or nothing. Raises `UsageError` for a target that exists already, `StorageError` when nothing can be
    written there, and what `judge_photos` raises.
    """
    _check_target(run, target)
    found = judge_photos(run, observer, request)
    stem = found.photos.part if request.data is None else request.data.stem
    return Result(found, _write(found, target, stem, write_report))


def judge_photos(run: Run, observer: Observer, request: EvaluationRequest = EvaluationRequest()) -> Judgement:
    """Judge `run` by the photos that `request` names. Writes nothing.

    Photos that cannot be used are left out and listed in the result. Raises `DataError` when there is nothing to
    judge, `UsageError` when `request` does not fit together.
    """
    workers, other = cores(), request.other
    engine = request.engine or Local(workers)
    photos = _photos(run, request, workers, observer)
    if other is not None:
        compare.check_comparable(run, other, photos.samples)
    observer.note(f"evaluating on {len(photos.samples)} {photos.source}")
    for note in photos.notes:
        observer.note(note)
    with observer.stage("evaluating", len(photos.samples)) as advance:
        found = judge.judge(run, photos, engine, advance)
    _warn_of_seen(run, found.seen, observer)
    if other is not None:
        with observer.stage(f"evaluating {other.name}", len(found.answers.samples)) as advance:
            compared = compare.compare(run, found.answers, other, engine, advance)
        found = replace(found, compared=compared)
        if not compared.out_of_fold:
            _warn_of_seen(other, seen_in_training(other, found.answers.samples), observer)
    if found.calibration is not None and found.calibration.left_out:
        left_out = found.calibration.left_out
        observer.note(f"calibration leaves out {left_out} of these photos, on which the temperature was fitted")
    return found


def _warn_of_seen(run: Run, seen: int, observer: Observer) -> None:
    if seen:
        observer.warn(f"{run.name} was trained on {seen} of these photos: its result is too good")


def gate(result: Result, least: float) -> None:
    """Raise `GateError` when the accuracy is below `least`."""
    accuracy = result.judged.evaluation.accuracy.value
    if accuracy < least:
        raise GateError(
            f"the accuracy, {accuracy:.4f}, is below {least:g}", "see which photos are wrong in predictions.csv"
        )


def _photos(run: Run, request: EvaluationRequest, workers: int, observer: Observer) -> LabelledPhotos:
    data, root = request.data, request.root
    if data is not None and root is not None:
        raise UsageError(
            "DATA and --data exclude each other", "DATA: other labelled photos; --data: where the run's own photos are"
        )
    if data is not None:
        return _labelled(run, data, observer)
    if root is None:
        return photos_of_run(run, None, workers, ignore_progress)
    with observer.stage("looking for the photos", None, "files") as advance:
        return photos_of_run(run, root, workers, advance)


def _labelled(run: Run, data: Place, observer: Observer) -> LabelledPhotos:
    """The photos of `data`, with labels that are classes of `run`."""
    with observer.stage("preflight", None) as advance, DigestCache(None) as cache:
        labelled = dataset.load_labelled(data, run.classes, run.image_settings.max_pixels, cache, advance)
    present = {sample.label for sample in labelled.samples}
    notes = labelled.notes
    if len(present) < len(run.classes):
        names = ", ".join(run.classes[i] for i in sorted(present))
        notes = (*notes, f"they show {len(present)} of the {len(run.classes)} classes: {names}")
    return LabelledPhotos("data", f"photos of {data}", labelled.samples, labelled.bad, notes)


def _check_target(run: Run, target: Target) -> None:
    """Check before the work that the evaluation can be written. Raises `UsageError` or `StorageError`."""
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


def _write(found: Judgement, target: Target, stem: str, write_report: ReportWriter | None = None) -> Path:
    """Write the evaluation to `target`, by default to `stem` with the next free number, and return its folder.

    The folder is finished under a temporary name and then moved. If another evaluation has taken the number by then,
    the next one is tried.
    """
    if target.output is not None:
        try:
            with contextlib.suppress(FileNotFoundError):
                target.output.rmdir()  # it was empty: the finished folder is moved there
        except OSError as exc:
            raise files.storage_error(exc, target.output) from exc
        _write_files(target.output, found, write_report)
        return target.output
    stem = re.sub(r"[^\w.-]+", "-", stem)[:50].strip("-.") or "data"
    numbers = itertools.count(1)
    while True:
        folder = found.run.folder / "evaluations" / (target.name or f"{stem}-{next(numbers)}")
        if target.name is None and os.path.lexists(folder):
            continue
        try:
            _write_files(folder, found, write_report)
            return folder
        except StorageError:
            if target.name is not None or not os.path.lexists(folder):
                raise


def _write_files(folder: Path, found: Judgement, write_report: ReportWriter | None) -> None:
    """Write all files of the evaluation as the new folder `folder`, or none. Raises `StorageError`."""
    answers, part = found.answers, found.photos.part
    # --output may be any folder that a person chooses; inside a run, nothing may be a link.
    root = found.run.folder if folder.is_relative_to(found.run.folder) else None
    with files.atomic_folder(folder, root=root) as temporary:
        try:
            table = outputs.ScoredSplit(part, answers.samples, answers.probabilities, found.evaluation)
            outputs.write_tables(temporary, found.run.classes, [table])
            files.write_json(temporary / "metrics.json", {part: metrics_json(found)})
            if found.compared is not None:
                header = ("path", "true", "first", "second")
                write_csv(temporary / "flipped.csv", header, flipped(found, found.compared))
            if found.refused is not None:
                write_csv(temporary / "unknown.csv", ("path", "true", "predicted", "p_value", "answer"), unknown(found))
            if write_report is not None:
                write_report(found, temporary)
        except StorageError as exc:
            exc.problem = exc.problem.replace(
                str(temporary), str(folder)
            )  # the temporary name would mean nothing to the person
            raise


def metrics_json(found: Judgement) -> dict[str, Any]:
    """The content of metrics.json for the photos: the keys of `Evaluation.to_json`, and more."""
    return {
        **found.evaluation.to_json(),
        "run": found.run.name,
        "source": found.photos.source,
        "seen_in_training": found.seen,
        "calibration": _calibration(found.calibration),
        "bad_photos": [{"path": photo.name, "reason": photo.reason} for photo in found.bad],
        "comparison": None if found.compared is None else _comparison(found.compared),
        "unknown": None if found.refused is None else found.refused.to_json(),
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


def unknown(found: Judgement) -> Iterator[tuple[str, str, str, str, str]]:
    """Name, true class, most probable class, p-value and answer of every photo."""
    answers, classes = found.answers, found.run.classes
    assert answers.p_values is not None
    assert found.refused is not None
    for sample, predicted, p, refused in zip(
        answers.samples, answers.predicted, answers.p_values, found.refused.photos, strict=True
    ):
        answer = UNKNOWN if refused else classes[predicted]
        yield sample.name, classes[sample.label], classes[predicted], f"{p:.6g}", answer


def flipped(found: Judgement, compared: Compared) -> Sequence[tuple[str, str, str, str]]:
    """The photos that only one of the runs classifies correctly: name, true class, first and second run's answer."""
    rows = []
    for row, *answers in zip(compared.rows, compared.first, compared.second, strict=True):
        sample = found.answers.samples[row]
        true = found.run.classes[sample.label]
        first, second = (compared.classes[i] for i in answers)
        if (first == true) != (second == true):
            rows.append((sample.name, true, first, second))
    return rows
