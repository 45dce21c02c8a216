"""The state of a head's training in Keras, as a checkpoint of the run holds it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune_cli.errors import CheckpointError, RunError
from finetune_cli.fields import FieldError, Fields
from finetune_cli.head.keras_fit import EpochState
from finetune_cli.head.keras_folds import FoldsState
from finetune_cli.progress import Observer
from finetune_cli.runs import checkpoints
from finetune_cli.runs.checkpoints import Checkpoint

FOLDER = "checkpoints"
# Of one training, or of those of all folds.
State = TypeVar("State", EpochState, FoldsState)


@dataclass(frozen=True, eq=False)
class HeadState:
    """The state after an epoch, with what it belongs to: `training_id` is that of `runs/start.py`."""

    epoch: EpochState | FoldsState
    classes: tuple[str, ...]
    l2: float
    training_id: str

    def save(self, folder: Path) -> None:
        """Write it as a checkpoint of the run `folder`. Raises `StorageError`."""
        facts: dict[str, Any] = {
            **self.epoch.info(),
            "classes": list(self.classes),
            "l2": self.l2,
            "training_id": self.training_id,
        }
        checkpoints.save(folder / FOLDER, self.epoch.epoch, self.epoch.arrays(), facts, self.epoch.is_best)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, kind: type[EpochState] | type[FoldsState]) -> "HeadState":
        """The state of `kind` in `checkpoint`.

        Raises `CheckpointError` when a key or an array is missing or of a wrong type.
        """
        try:
            fields = Fields(checkpoint.state)
            return cls(
                epoch=kind.restore(checkpoint.arrays, fields),
                classes=fields.names("classes", 2),
                l2=fields.number("l2", 0),
                training_id=fields.sha256("training_id"),
            )
        except FieldError as exc:
            raise CheckpointError(f"{checkpoint.path} is damaged: {exc}", f"remove {checkpoint.path}") from exc


def load_latest(
    folder: Path, classes: tuple[str, ...], training_id: str, observer: Observer, kind: type[State]
) -> tuple[State, float] | None:
    """The state of `kind` after the last epoch in the run `folder`, with its l2; `None` before the first.

    Raises `CheckpointError` when no checkpoint is whole, `RunError` when the last belongs to another training.
    """
    last = checkpoints.latest_of(folder / FOLDER, training_id, observer)
    if last is None:
        return None
    state = HeadState.from_checkpoint(last, kind)
    if state.classes != classes:
        raise RunError(f"{last.path} has other classes: {', '.join(state.classes)}", "train a new run")
    observer.note(f"resuming after epoch {last.epoch}")
    assert isinstance(state.epoch, kind)
    return state.epoch, state.l2
