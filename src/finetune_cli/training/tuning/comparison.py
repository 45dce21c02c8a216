"""Frozen against tuned, on the same photos: numbers for the manifest, and tables and curves of the stage.

tuning.csv         a row for each epoch of each training
tuning_curves.png  the training that was kept, or the first, as a picture
flipped.csv        the photos whose answer differs between the frozen and the kept model
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_cli.drawing import figures
from finetune_cli.errors import RunError
from finetune_cli.metrics import scores
from finetune_cli.runs.run import MANIFEST, Run
from finetune_cli.tables import write_csv, write_records
from finetune_cli.training.outputs import ScoredSplit

HISTORY, FLIPPED, CURVES = "tuning.csv", "flipped.csv", "tuning_curves.png"
FLIPPED_HEADER = ("split", "path", "true", "frozen", "kept")


def compared(before: Sequence[ScoredSplit], after: Sequence[ScoredSplit]) -> dict[str, Any]:
    """By split: accuracy and log loss of the frozen and the kept model, and McNemar's exact test between them."""
    found = {}
    for frozen, kept in zip(before, after, strict=True):
        labels = [sample.label for sample in kept.samples]
        test = scores.compare(labels, frozen.probabilities.argmax(axis=1), kept.probabilities.argmax(axis=1))
        found[kept.split] = {
            "photos": len(labels),
            "frozen": _scores(frozen),
            "kept": _scores(kept),
            "only_frozen_right": test.only_first,
            "only_kept_right": test.only_second,
            "p_value": test.p_value,
        }
    return found


def trained_from(run: Run) -> str | None:
    """The first layer that learned in the training that `run` kept; None when its backbone is the frozen one.

    Raises `RunError` when the manifest does not say so as it should.
    """
    facts = run.manifest.fine_tuning
    try:
        if facts is None:
            return None
        kept = next(each for each in facts["candidates"] if each["kept"])
        return None if kept["training"] is None else str(facts["trainings"][kept["training"]]["first_trained"])
    except (LookupError, TypeError, StopIteration) as exc:
        raise RunError(
            f"{run.folder / MANIFEST} does not describe its fine-tuning: {exc}", "restore the run from a copy"
        ) from exc


def _scores(judged: ScoredSplit) -> dict[str, float]:
    return {"accuracy": judged.evaluation.accuracy.value, "log_loss": judged.evaluation.log_loss}


def write_history(folder: Path, history: Sequence[Mapping[str, float | None]], kept: int | None) -> list[str]:
    """Write the epochs of all trainings into `folder`, and draw those of the training `kept`, by default the first.

    Returns the names of the files: none if every training diverged. Raises `StorageError`.
    """
    if not history:
        return []
    write_records(folder / HISTORY, history)
    drawn = history[0]["training"] if kept is None else kept
    figures.curves(folder / CURVES, [row for row in history if row["training"] == drawn])
    return [HISTORY, CURVES]


def write_flipped(
    folder: Path, classes: Sequence[str], before: Sequence[ScoredSplit], after: Sequence[ScoredSplit]
) -> list[str]:
    """Write the table of the changed answers into `folder`; returns its name. Raises `StorageError`."""
    write_csv(
        folder / FLIPPED,
        FLIPPED_HEADER,
        (
            (kept.split, sample.name, classes[sample.label], classes[int(first)], classes[int(second)])
            for frozen, kept in zip(before, after, strict=True)
            for sample, first, second in zip(
                kept.samples,
                frozen.probabilities.argmax(axis=1),
                kept.probabilities.argmax(axis=1),
                strict=True,
            )
            if first != second
        ),
    )
    return [FLIPPED]
