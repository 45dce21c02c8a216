"""What is said about a training that ended too early."""

import pytest

from finetune_cli.training.fit import still_improving


def rows(*losses):
    return [{"epoch": i, "val_loss": loss} for i, loss in enumerate(losses, 1)]


def test_a_loss_that_still_falls_is_named_with_what_to_do():
    text = still_improving(rows(1.0, 0.8, 0.7, 0.6, 0.56), "adam", 5)
    assert text == (
        "adam was still improving when it stopped: the validation loss fell by 30.0% in the last 3 epochs of 5; "
        "try training.epochs=10, or a higher training.learning_rate"
    )
    assert "in the last 1 epoch of 2" in still_improving(rows(1.0, 0.9), "sgd", 2)


@pytest.mark.parametrize(
    ("losses", "epochs"),
    [
        ((1.0, 0.8, 0.7, 0.6, 0.61), 5),  # the best was before
        ((1.0, 0.5, 0.500, 0.4990, 0.4960), 5),  # 0.8 % in three epochs
        ((1.0, 0.9, 0.8), 5),  # ended for another reason
        ((1.0,), 1),  # one epoch says nothing
        ((), 5),
        ((0.0, 0.0, 0.0, 0.0), 4),
    ],
)
def test_nothing_is_said_of_others(losses, epochs):
    assert still_improving(rows(*losses), "adam", epochs) is None
