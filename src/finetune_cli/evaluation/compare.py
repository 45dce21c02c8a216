"""Two runs on the same photos: is the second one better, or is the difference chance?"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_cli.engines.engine import Engine
from finetune_cli.errors import DataError, UsageError
from finetune_cli.evaluation.answers import Answers, answer, out_of_fold
from finetune_cli.metrics import scores
from finetune_cli.metrics.scores import Comparison
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Advance
from finetune_cli.runs.run import Run


@dataclass(frozen=True, eq=False)
class Compared:
    """A second run on the photos whose class both runs have.

    classes: those that both runs have, in the order of the first run. left_out: those that only one of them has. rows:
    ``(n,)``, which of the first run's answers are compared. first, second: ``int64 (n,)``, the class that each run
    answers, as an index into `classes`, when it may choose among these only. out_of_fold: whether the
    second run has not learned from the photos because it was cross-validated on them.
    """

    run: Run
    classes: tuple[str, ...]
    left_out: tuple[str, ...]
    rows: NDArray[np.intp]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    comparison: Comparison
    out_of_fold: bool


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


def compare(run: Run, answers: Answers, other: Run, engine: Engine, advance: Advance) -> Compared:
    """Compare the `answers` of `run` with those of `other` on the photos of the classes that both have.

    Each run chooses among these classes only, which are matched by name: a run is not worse for a class that the other
    does not know. Photos that were cross-validated in `other` have the answers recorded there. Raises `DataError` when
    no such photo can be read any more.
    """
    shared = shared_classes(run, other)
    number = {name: i for i, name in enumerate(shared)}
    position = {id(sample): i for i, sample in enumerate(answers.samples)}
    samples = [sample for sample in answers.samples if run.classes[sample.label] in number]
    recorded = out_of_fold(other, samples)
    others = answer(other, samples, engine, advance) if recorded is None else recorded
    if not others.samples:
        raise DataError(f"no photo is left to compare with {other.folder}", "compare on photos that both runs can use")
    rows = np.array([position[id(sample)] for sample in others.samples], np.intp)
    first = answers.probabilities[rows][:, [run.classes.index(name) for name in shared]].argmax(axis=1)
    second = others.probabilities[:, [other.classes.index(name) for name in shared]].argmax(axis=1)
    labels = [number[run.classes[sample.label]] for sample in others.samples]
    return Compared(
        run=other,
        classes=shared,
        left_out=tuple(name for name in dict.fromkeys((*run.classes, *other.classes)) if name not in number),
        rows=rows,
        first=first.astype(np.int64),
        second=second.astype(np.int64),
        comparison=scores.compare(labels, first, second),
        out_of_fold=recorded is not None,
    )
