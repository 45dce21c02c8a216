"""A checkpoint whose sums fit but whose content does not: refused by its key, in one line."""

import numpy as np
import pytest

from finetune_cli.errors import CheckpointError, RunError
from finetune_cli.head.keras_fit import EpochState
from finetune_cli.head.lbfgs import Head
from finetune_cli.progress import Silent
from finetune_cli.runs import checkpoints
from finetune_cli.training import head_state
from finetune_cli.training.head_state import HeadState

TRAINING = "a" * 64
ROW = {"epoch": 1, "loss": 0.5, "accuracy": 0.5, "val_loss": 0.25, "val_accuracy": 0.75, "seconds": 0.1}


def state():
    head = Head(np.ones((3, 2), np.float32), np.zeros(2, np.float32))
    epoch = EpochState(1, head, head, 1, 0.25, 0, (ROW,), (np.int64(7),), ())
    return HeadState(epoch, ("ant", "bee"), 0.01, TRAINING)


def load(folder, classes=("ant", "bee"), training_id=TRAINING):
    return head_state.load_latest(folder, classes, training_id, Silent(), EpochState)


def test_what_is_saved_is_loaded(tmp_path):
    assert load(tmp_path) is None
    state().save(tmp_path)
    found, l2 = load(tmp_path)
    assert l2 == 0.01
    assert found.history == (ROW,)
    assert (found.epoch, found.best_epoch, found.best_loss, found.wait) == (1, 1, 0.25, 0)
    assert np.array_equal(found.head.kernel, np.ones((3, 2)))
    assert [int(value) for value in found.optimizer] == [7]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epoch", "1"),
        ("best_epoch", 0),
        ("best_loss", float("nan")),
        ("wait", -1),
        ("history", {}),
        ("history", [{"epoch": 1}]),
        ("classes", ["ant", "ant"]),
        ("l2", -1),
        ("l2", ...),
        ("training_id", 5),
        ("training_id", ...),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_its_key(tmp_path, key, value):
    saved = {**state().epoch.info(), "classes": ["ant", "bee"], "l2": 0.01, "training_id": TRAINING, key: value}
    saved = {name: content for name, content in saved.items() if content is not ...}
    checkpoints.save(tmp_path / "checkpoints", 1, state().epoch.arrays(), saved, best=True)
    with pytest.raises(CheckpointError, match=rf"epoch-0001 is damaged: {key}") as caught:
        load(tmp_path)
    assert len(caught.value.problem.splitlines()) == 1


def test_a_missing_array_is_refused_by_its_name(tmp_path):
    arrays = {name: array for name, array in state().epoch.arrays().items() if name != "best/bias"}
    saved = {**state().epoch.info(), "classes": ["ant", "bee"], "l2": 0.01, "training_id": TRAINING}
    checkpoints.save(tmp_path / "checkpoints", 1, arrays, saved, best=True)
    with pytest.raises(CheckpointError, match="the array best/bias is missing"):
        load(tmp_path)


def test_the_checkpoint_of_another_training_is_refused(tmp_path):
    state().save(tmp_path)
    with pytest.raises(RunError, match="has other classes: ant, bee"):
        load(tmp_path, classes=("ant", "wasp"))
    with pytest.raises(RunError, match="belongs to another training"):
        load(tmp_path, training_id="b" * 64)
