"""Results as a person reads them: tables and lines on a `Console`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_cli.cli import render_tuning
from finetune_cli.cli.console import Console
from finetune_cli.text import counted, listed, shown

if TYPE_CHECKING:
    from finetune_cli.evaluation.evaluate import Result
    from finetune_cli.evaluation.explain import Explanation
    from finetune_cli.evaluation.judge import Judged
    from finetune_cli.exports.export import Result as ExportResult
    from finetune_cli.metrics.scores import Evaluation
    from finetune_cli.runs.run import Run
    from finetune_cli.training.check import Report
    from finetune_cli.training.reproduce import Reproduction


def trained(console: Console, run: "Run") -> None:
    """The end of `train`: how good, how long, and what to try next."""
    manifest = run.manifest
    names = {"val": "selection (validation)", "test": "test"}
    folder = _nearby(run.folder)
    console.print()
    console.title(f"{shown(folder)}: {shown(manifest.backbone.name)}, {len(run.classes)} classes")
    rows = [
        (
            names[split],
            f"{metrics.accuracy:.1%}",
            f"{metrics.accuracy_interval[0]:.1%} to {metrics.accuracy_interval[1]:.1%}",
            f"{metrics.baseline_accuracy:.1%}",
            metrics.photos,
        )
        for split, metrics in sorted(manifest.metrics.items())
    ]
    console.table(("", "accuracy", "95 % interval", "largest class alone", "photos"), rows, right=(1, 2, 3, 4))
    if manifest.fine_tuning is not None:
        render_tuning.fine_tuned(console, manifest.fine_tuning)
    console.table(("stage", "seconds"), [(k, f"{v:.1f}") for k, v in manifest.seconds.items()], right=(1,))
    console.print(
        f"views: {manifest.views.computed} computed, {manifest.views.cached} from the cache "
        f"({manifest.cache_bytes / 1e6:.0f} MB on disk)"
    )
    if manifest.bad_photos:
        console.print(f"skipped {len(manifest.bad_photos)} bad photos; they are listed in run.json")
    console.print("\ntry next:")
    console.print(f"  finetune predict PHOTO --run {shown(shlex.quote(str(folder)))}")
    console.print(f"  finetune evaluate --run {shown(shlex.quote(str(folder)))}")
    if manifest.fine_tuning is None:
        seconds = manifest.fine_tuning_seconds
        takes = (
            "add --dry-run to see how long that takes"
            if seconds is None
            else f"about {render_tuning.duration(seconds)} more"
        )
        console.print(f"  finetune train {shown(shlex.quote(str(folder / 'config.yaml')))} fine_tuning=auto")
        console.print(f"    (the backbone learns, too; kept only if it is better; {takes})")


def _nearby(path: Path) -> Path:
    """`path` as seen from the current folder if it lies in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def checked(console: Console, report: "Report") -> None:
    """The end of `check`: photos by class and split."""
    splits = [split for split in ("train", "val", "test") if any(row[split] for row in report.counts.values())]
    console.table(
        ("class", *splits),
        [(name, *(row[split] for split in splits)) for name, row in report.counts.items()],
        right=range(1, len(splits) + 1),
    )
    for photo in report.bad:
        console.print(f"would skip {shown(photo.path)}: {shown(photo.reason)}")
    console.print("every photo was decoded" if not report.bad else f"{len(report.bad)} bad photos would be skipped")


def reproduced(console: Console, found: "Reproduction") -> None:
    """The end of `check --reproduce`: what differs here from where a run was made."""
    folder = shown(_nearby(found.run.folder))
    if found.surroundings:
        rows = [(each.what, each.before or "-", each.now or "-") for each in found.surroundings]
        console.table(("", f"{folder} was made with", "here"), rows)
    for line in found.weights:
        console.print(shown(line))
    for line in found.photos:
        console.print(f"photos {shown(line)}")
    if found.photos_problem:
        console.print(f"the photos could not be compared: {shown(found.photos_problem)}")
    if found.same:
        console.print(
            f"nothing differs here from where {folder} was made; the same weights come from:\n"
            f"  finetune train {folder}/config.yaml"
        )
    else:
        console.print("so training again may give other weights")


_MATRIX_CLASSES = 12
_MOST_ROWS = 20


def evaluated(console: Console, result: "Result") -> None:
    """The end of `evaluate`: how good, how sure, where it fails, and where the files are."""
    judged, evaluation = result.judged, result.judged.evaluation
    console.print()
    console.title(f"{judged.run.folder} on {evaluation.photos} {judged.photos.source}")
    _scores(console, judged)
    console.print()
    _classes(console, evaluation)
    console.print()
    _confusion(console, evaluation)
    console.print()
    console.table(
        ("to be right on", "accept answers from", "share accepted", "photos"),
        [
            (f"{row.target:.0%}", "never" if row.threshold is None else f"{row.threshold:.4f}", f"{row.coverage:.1%}",
             row.accepted)
            for row in evaluation.coverage
        ],
        right=(0, 1, 2, 3),
    )  # fmt: skip
    console.print()
    if judged.compared is not None:
        _compared(console, judged)
    for photo in judged.bad[:_MOST_ROWS]:
        console.print(f"left out {shown(photo.path)}: {shown(photo.reason)}")
    if len(judged.bad) > _MOST_ROWS:
        console.print(f"... and {len(judged.bad) - _MOST_ROWS} more; all are in metrics.json")
    report = result.folder / "report.html"
    console.print(f"wrote {report if report.exists() else result.folder}")


def _scores(console: Console, judged: "Judged") -> None:
    evaluation, calibration = judged.evaluation, judged.calibration
    shares = [("accuracy", evaluation.accuracy)]
    shares += [(f"right among the first {k}", share) for k, share in evaluation.top_k.items()]
    shares += [(f"always {shown(evaluation.baseline_class)}", evaluation.baseline)]
    rows = [(name, f"{share.value:.1%}", f"{share.low:.1%} to {share.high:.1%}") for name, share in shares]
    rows += [
        ("balanced accuracy", f"{evaluation.balanced_accuracy:.1%}", ""),
        ("macro F1", f"{evaluation.macro_f1:.4f}", ""),
        ("weighted F1", f"{evaluation.weighted_f1:.4f}", ""),
    ]
    console.table(("", "", "95 % interval"), rows, right=(1, 2))
    console.print()
    scores = [("none", evaluation.calibration)]
    if calibration is not None:
        after = "with (cross-fitted)" if calibration.cross_fitted else "with"
        scores = [("without", calibration.before), (after, calibration.after)]
    console.table(
        ("temperature", "log loss", "Brier score", "calibration error"),
        [(n, f"{s.log_loss:.4f}", f"{s.brier_score:.4f}", f"{s.expected_calibration_error:.4f}") for n, s in scores],
        right=(1, 2, 3),
    )


def _classes(console: Console, evaluation: "Evaluation") -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    present = [row for row in evaluation.per_class if row.support or row.predicted]
    rows = sorted(present, key=lambda row: row.f1 or 0.0)[:_MOST_ROWS] if len(present) > _MOST_ROWS else present
    console.table(
        ("class", "precision", "recall", "F1", "photos"),
        [(row.name, number(row.precision), number(row.recall), number(row.f1), row.support) for row in rows],
        right=(1, 2, 3, 4),
    )
    if len(rows) < len(present):
        console.print(
            f"the {len(rows)} classes with the lowest F1, and {len(present) - len(rows)} more in per_class.csv"
        )
    if len(present) < len(evaluation.classes):
        console.print(f"classes with neither photos nor answers here: {len(evaluation.classes) - len(present)}")


def _confusion(console: Console, evaluation: "Evaluation") -> None:
    """The confusion matrix of a few classes, or the most frequent confusions of many."""
    classes, matrix = evaluation.classes, evaluation.confusion
    if len(classes) <= _MATRIX_CLASSES:
        console.table(
            ("true \\ predicted", *classes),
            [(name, *row) for name, row in zip(classes, matrix.tolist(), strict=True)],
            right=range(1, len(classes) + 1),
        )
        return
    pairs = [(n, t, p) for t, row in enumerate(matrix.tolist()) for p, n in enumerate(row) if n and t != p]
    most = sorted(pairs, key=lambda pair: -pair[0])[:_MOST_ROWS]
    rows = [(classes[t], classes[p], n) for n, t, p in most]
    console.table(("true", "taken for", "photos"), rows, right=(2,))
    if len(most) < len(pairs):
        console.print(f"... and {len(pairs) - len(most)} more pairs; all photos are in predictions.csv")


def _compared(console: Console, judged: "Judged") -> None:
    compared = judged.compared
    assert compared is not None
    first, second, comparison = judged.run.name, compared.run.name, compared.comparison
    if compared.left_out:
        console.print(
            f"compared on the {counted(len(compared.rows), 'photo')} of the {len(compared.classes)} classes that both "
            f"runs have, choosing among these; left out: {shown(listed(compared.left_out, _MOST_ROWS))}"
        )
    difference, p = comparison.difference, comparison.p_value
    console.print(
        f"{second} against {first}: {difference.value:+.1%} "
        f"({difference.low:+.1%} to {difference.high:+.1%}); "
        f"only {first} is right on {counted(comparison.only_first, 'photo')}, only {second} on {comparison.only_second}"
    )
    verdict = "the difference is no more than chance" if p >= 0.05 else "chance alone would hardly do that"
    console.print(f"{verdict} (McNemar's exact test, p = {p:.2g}); the photos are in flipped.csv\n")


def explained(console: Console, explanation: "Explanation") -> None:
    """The end of `explain`: the evidence for every class, in logits."""
    rows = explanation.evidence[:_MOST_ROWS]
    rows += tuple(row for row in explanation.evidence[_MOST_ROWS:] if row.name == explanation.name)
    console.table(
        ("class", "probability", "places for", "places against", "bias", "logit"),
        [
            (row.name, f"{row.probability:.1%}", *(f"{x:+.3f}" for x in (row.supporting, row.opposing, row.bias)),
             f"{row.logit:+.3f}")
            for row in rows
        ],
        right=(1, 2, 3, 4, 5),
    )  # fmt: skip
    if len(rows) < len(explanation.evidence):
        console.print(f"... and {len(explanation.evidence) - len(rows)} less probable classes")
    if explanation.temperature != 1:
        console.print(
            f"the logits, divided by the run's temperature of {explanation.temperature:.3f}, give the probabilities"
        )
    console.print(f"wrote {explanation.output}: red speaks for {shown(explanation.name)}, blue against")


def exported(console: Console, result: "ExportResult") -> None:
    """The end of `export`: how far each form is from the run, its size and its speed, and where it is."""
    console.print()
    console.title(f"compared with the run on {result.photos} validation photos")
    checks = [(one.form, check) for one in result.exports for check in one.checks]
    console.table(
        ("format", "input", "photos", "top-1 agrees", "largest difference", "mean", "allowed"),
        [
            (form, check.signature, check.photos, f"{check.agreement:.1%}", f"{check.largest:.1e}", f"{check.mean:.1e}",
             check.rule())
            for form, check in checks
        ],
        right=(2, 3, 4, 5),
    )  # fmt: skip
    for form, check in checks:
        for note in check.notes:
            console.print(f"{form}, {check.signature}: {note}")
    console.table(
        ("format", "options", "MB", "ms a photo", "folder"),
        [
            (one.form, " ".join(one.options.values()), f"{one.size / 1e6:.1f}", f"{one.milliseconds:.1f}", one.folder)
            for one in result.exports
        ],
        right=(2, 3),
    )
    console.print("try next:")
    for one in result.exports:
        console.print(f"  finetune predict PHOTO --model {one.folder}")
