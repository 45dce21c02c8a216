"""Cross-validation of a head that Keras fits: all folds and the final head learn side by side, an epoch at a time.

After every epoch the photos of each fold are answered by the head that learned without them. The epoch in which these
answers have the lowest loss ends the training of all: so the number of epochs of the final head, which learns from
every photo and has none left to stop by, is chosen out of fold.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import FinetuneError
from finetune_cli.fields import Fields
from finetune_cli.head.data import HeadData, Ints, Rows
from finetune_cli.head.keras_fit import EpochState, KerasSettings, fit_epochs, history_row, is_last
from finetune_cli.head.lbfgs import Head
from finetune_cli.head.out_of_fold import numbers, without


@dataclass(frozen=True, eq=False)
class FoldsState:
    """Everything that the next epoch depends on, after `epoch` completed epochs.

    trainings: the state of each fold's training, in the order of their numbers, and last of the final head's. best:
    their heads after `best_epoch`, when the loss of the out-of-fold answers was the lowest, `best_loss`; `wait` counts
    the epochs since. A row of `history` has the columns of `EpochState.history`: loss and accuracy are the means of the
    folds' trainings, those of validation are of the out-of-fold answers, the seconds those of all trainings.
    """

    trainings: tuple[EpochState, ...]
    best: tuple[Head, ...]
    best_epoch: int
    best_loss: float
    wait: int
    history: tuple[dict[str, float], ...]

    @property
    def epoch(self) -> int:
        """Completed epochs."""
        return self.trainings[-1].epoch

    @property
    def is_best(self) -> bool:
        """Whether this epoch is the best so far."""
        return self.wait == 0

    @property
    def final(self) -> Head:
        """The head that learned from all photos, after the best epoch."""
        return self.best[-1]

    def heads(self, folds: Ints) -> dict[int, Head]:
        """By fold, the head that learned without it, after the best epoch."""
        return dict(zip(numbers(folds), self.best[:-1], strict=True))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The state's arrays by name; with `info`, all that `restore` needs."""
        named: dict[str, NDArray[Any]] = {}
        # A training's own best epoch is replaced by the common one: nothing depends on it.
        for i, (training, best) in enumerate(zip(self.trainings, self.best, strict=True)):
            named |= {f"{i}/{name}": array for name, array in replace(training, best=best).arrays().items()}
        return named

    def info(self) -> dict[str, Any]:
        """The rest of the state as plain JSON values."""
        return {
            "trainings": [training.info() for training in self.trainings],
            "best_epoch": self.best_epoch,
            "best_loss": self.best_loss,
            "wait": self.wait,
            "history": list(self.history),
        }

    @classmethod
    def restore(cls, arrays: Mapping[str, NDArray[Any]], info: Fields) -> "FoldsState":
        """The state that `arrays` and `info` were taken from.

        Raises `FieldError` when an array or a key is missing or of a wrong type.
        """
        trainings = tuple(
            EpochState.restore(
                {name.removeprefix(f"{i}/"): array for name, array in arrays.items() if name.startswith(f"{i}/")}, each
            )
            for i, each in enumerate(info.objects("trainings"))
        )
        if not trainings:
            raise info.wrong("trainings", "a list of trainings")
        return cls(
            trainings=trainings,
            best=tuple(training.best for training in trainings),
            best_epoch=info.integer("best_epoch", 1),
            best_loss=info.number("best_loss"),
            wait=info.integer("wait"),
            history=tuple(history_row(row) for row in info.objects("history")),
        )


def fit_folds_by_epochs(
    data: HeadData,
    held_out: Rows,
    settings: KerasSettings,
    start: Head | None = None,
    resume: FoldsState | None = None,
) -> Iterator[FoldsState]:
    """Train the folds' heads and the final head, and yield the state after each epoch; the last one has the result.

    data: features ``(n, views, D)`` with folds. held_out: what is answered, ``(n, D)``; see `out_of_fold.logits`. Every
    training is one of `fit_epochs`, from the same `start`, which must not have learned from these photos. It stops
    after `settings.patience` epochs without a lower loss of the out-of-fold answers. Given as `resume`, any state leads
    to a bit-identical result. Raises what `fit_epochs` raises.
    """
    assert data.folds is not None
    folds = numbers(data.folds)
    # The final head answers for photos that it knows; what it says of them is not looked at.
    learned_from = [*(without(data, fold) for fold in folds), data]
    answered = [*(np.flatnonzero(data.folds == fold) for fold in folds), np.flatnonzero(data.folds)]
    if resume is not None and len(resume.trainings) != len(learned_from):
        raise FinetuneError(
            f"the checkpoint has {len(resume.trainings)} trainings, and there are {len(folds)} folds", "train a new run"
        )
    one = replace(settings, patience=None)  # no training stops by its own photos
    trainings = [
        fit_epochs(
            train,
            HeadData.of(held_out[answered[i]], data.labels[answered[i]], data.n_classes),
            one,
            start,
            None if resume is None else resume.trainings[i],
        )
        for i, train in enumerate(learned_from)
    ]
    state = resume
    sizes = [len(photos) for photos in answered[:-1]]
    while state is None or not is_last(state, settings):
        state = _after([next(training) for training in trainings], sizes, state)
        yield state


def _after(trainings: Sequence[EpochState], sizes: Sequence[int], before: FoldsState | None) -> FoldsState:
    """The state after an epoch of all `trainings`; `sizes`: how many photos each fold has, `before`: the one before."""
    rows = [training.history[-1] for training in trainings]
    row = {
        "epoch": rows[0]["epoch"],
        **{name: float(np.mean([each[name] for each in rows[:-1]])) for name in ("loss", "accuracy")},
        **{
            name: float(np.average([each[name] for each in rows[:-1]], weights=sizes))
            for name in ("val_loss", "val_accuracy")
        },
        "seconds": round(sum(each["seconds"] for each in rows), 3),
    }
    best = before if before is not None and not row["val_loss"] < before.best_loss else None
    return FoldsState(
        trainings=tuple(trainings),
        best=best.best if best else tuple(training.head for training in trainings),
        best_epoch=best.best_epoch if best else trainings[0].epoch,
        best_loss=best.best_loss if best else row["val_loss"],
        wait=best.wait + 1 if best else 0,
        history=(*(before.history if before is not None else ()), row),
    )
