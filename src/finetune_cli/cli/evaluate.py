"""`finetune evaluate`: how good a run is on labelled photos."""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.cli.options import (
    DataOption,
    DebugOption,
    EngineOption,
    QuietOption,
    RayAddressOption,
    ResultFormat,
    RunOption,
    find_run,
    new_console,
    opened_engine,
)
from finetune_cli.errors import DataError
from finetune_cli.text import counted, listed, shown

if TYPE_CHECKING:
    from finetune_cli.cli.console import Console
    from finetune_cli.evaluation.evaluate import Result
    from finetune_cli.evaluation.judge import Judgement
    from finetune_cli.metrics.scores import Evaluation

_MATRIX_CLASSES = 12  # of the largest confusion matrix that is shown
_MOST_ROWS = 20


def evaluate(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="Labelled photos: a folder of class folders, or a table. [default: the run's test photos if it has "
            "some, else those that validated it]",
            show_default=False,
        ),
    ] = None,
    run: RunOption = None,
    root: DataOption = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The evaluation's name.", show_default=False)] = None,
    compare: Annotated[Path | None, typer.Option(metavar="RUN2", help="Compare with RUN2 on the same photos.")] = None,
    fail_under: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="X", help="Exit with 4 when the accuracy is below X.")
    ] = None,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Also write report.html.")] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the evaluation to this new or empty folder. [default: one under the run's evaluations/]",
            show_default=False,
        ),
    ] = None,
    format: Annotated[ResultFormat, typer.Option(help="How to write the result.")] = ResultFormat.table,  # noqa: A002
    engine: EngineOption = None,
    ray_address: RayAddressOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Evaluate a run on labelled photos. Exits with 3 when some could not be read; the others are evaluated."""
    from finetune_cli.evaluation import evaluate as evaluation
    from finetune_cli.places import place
    from finetune_cli.runs.run import Run, located

    console = new_console(quiet)
    loaded = find_run(console, run)
    other = Run.load(located(compare)) if compare is not None else None
    write_report = None
    if report:
        from finetune_cli.report import html

        write_report = functools.partial(html.report, observer=console)
    where, moved_to = (None if text is None else place(text) for text in (data, root))
    target = evaluation.Target(name, output)
    with opened_engine(engine, ray_address, console) as opened:
        request = evaluation.EvaluationRequest(where, moved_to, other, opened)
        result = evaluation.evaluate(loaded, console, request, target, write_report)
    if format == ResultFormat.json:
        console.print(json.dumps(result.to_json(), indent=2))
    else:
        print_result(console, result)
    if fail_under is not None:
        evaluation.gate(result, fail_under)
    if bad := len(result.judged.bad):
        problem = f"{bad} of {bad + result.judged.evaluation.photos} photos were left out; see above"
        raise DataError(problem, "repair or remove them to evaluate all photos")


def print_result(console: "Console", result: "Result") -> None:
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
        ("target accuracy", "accept from probability", "share accepted", "photos"),
        [
            (f"{row.target:.0%}", "never" if row.threshold is None else f"{row.threshold:.4f}", f"{row.coverage:.1%}",
             row.accepted)
            for row in evaluation.coverage
        ],
        right=(0, 1, 2, 3),
    )  # fmt: skip
    console.print()
    if judged.refused is not None:
        _refused(console, judged)
    elif judged.run.manifest.unknown is not None:
        console.print("unknown: cross-validated predictions have no p-values; evaluate other photos\n")
    if judged.compared is not None:
        _compared(console, judged)
    for photo in judged.bad[:_MOST_ROWS]:
        console.print(f"left out {shown(photo.path)}: {shown(photo.reason)}")
    if len(judged.bad) > _MOST_ROWS:
        console.print(f"... and {len(judged.bad) - _MOST_ROWS} more; all are in metrics.json")
    report = result.folder / "report.html"
    console.print(f"wrote {report if report.exists() else result.folder}")


def _scores(console: "Console", judged: "Judgement") -> None:
    evaluation, calibration = judged.evaluation, judged.calibration
    shares = [("accuracy", evaluation.accuracy)]
    if (others := evaluation.without_near_duplicates) is not None:
        shares += [(f"accuracy on the {others[0]} that are no near-duplicates of training photos", others[1])]
    shares += [(f"top-{k} accuracy", share) for k, share in evaluation.top_k.items()]
    shares += [(f"majority-class baseline: {shown(evaluation.baseline_class)}", evaluation.baseline)]
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


def _classes(console: "Console", evaluation: "Evaluation") -> None:
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
        console.print(f"classes with neither photos nor predictions here: {len(evaluation.classes) - len(present)}")


def _confusion(console: "Console", evaluation: "Evaluation") -> None:
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
    console.table(("true", "predicted", "photos"), rows, right=(2,))
    if len(most) < len(pairs):
        console.print(f"... and {len(pairs) - len(most)} more pairs; all photos are in predictions.csv")


def _refused(console: "Console", judged: "Judgement") -> None:
    refused = judged.refused
    assert refused is not None
    if refused.share is not None:
        share = refused.share
        line = (
            f"unknown: {share.value:.1%} ({share.low:.1%} to {share.high:.1%}) of {counted(refused.counted, 'photo')}"
        )
    else:
        line = (
            f"unknown: {counted(int(refused.photos.sum()), 'photo')}, which proves nothing, because all of these were "
            "trained on, chose the score or set its threshold"
        )
    rate = f"expected: approximately {refused.rate:.1%}"
    if not refused.approximate:
        rate = f"promised: at most {refused.rate:.1%} on average"
    console.print(f"{line}; {rate}; all are in unknown.csv")
    if refused.right is not None:
        console.print(f"accuracy on the others: {refused.right.value:.1%}")
    console.print()


def _compared(console: "Console", judged: "Judgement") -> None:
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
    verdict = "the difference is not significant" if p >= 0.05 else "the difference is significant"
    console.print(f"{verdict} (McNemar's exact test, p = {p:.2g}); the photos are in flipped.csv\n")
