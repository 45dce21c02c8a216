"""Folds and the final head that Adam trains side by side: stopped together, and resumed to the same bits."""

from dataclasses import replace

import numpy as np
import pytest
from head_examples import blobs

from finetune_cli.errors import FinetuneError
from finetune_cli.fields import FieldError, Fields
from finetune_cli.head.data import HeadData
from finetune_cli.head.keras_fit import KerasSettings, fit_epochs
from finetune_cli.head.keras_folds import FoldsState, fit_folds_by_epochs
from finetune_cli.head.out_of_fold import logits

SETTINGS = KerasSettings(epochs=6, batch_size=8, learning_rate=0.02, patience=None, dropout=0.2, l2=0.001)


@pytest.fixture(scope="module")
def data():
    x, y = blobs(photos=48, width=10, spread=0.9)
    noise = np.random.default_rng(1).normal(0, 0.3, (48, 2, 10))
    folds = 1 + np.arange(48) // 3 % 3
    folds[0] = 0
    return replace(HeadData.of((x[:, None] + noise).astype(np.float32), y, 3), folds=folds)


def held_out(data):
    return data.features[:, 0]


@pytest.fixture(scope="module")
def states(data):
    return list(fit_folds_by_epochs(data, held_out(data), SETTINGS))


def test_every_training_is_one_of_its_own(data, states):
    for i, fold in enumerate((1, 2, 3)):
        rest, own = data.part(data.folds != fold), data.folds == fold
        val = HeadData.of(held_out(data)[own], data.labels[own], 3)
        *_, alone = fit_epochs(rest, val, SETTINGS)
        losses = [state.trainings[i].history[-1]["val_loss"] for state in states]
        assert len(losses) == len(alone.history)
        # The order of the photos differs, because it is drawn for other numbers of them; what is learned is alike.
        assert losses[-1] == pytest.approx(alone.history[-1]["val_loss"], abs=0.1)


def test_the_final_head_is_that_of_the_best_epoch_on_all_photos(data, states):
    last = states[-1]
    rows = [state.history[-1]["val_loss"] for state in states]
    assert last.best_epoch == int(np.argmin(rows)) + 1
    alone = [state.head for state in fit_epochs(data, HeadData.of(held_out(data), data.labels, 3), SETTINGS)]
    assert np.array_equal(last.final.kernel, alone[last.best_epoch - 1].kernel)


def test_the_loss_is_that_of_the_out_of_fold_answers(data, states):
    found = logits(states[-1].heads(data.folds), data.folds, held_out(data))
    assert np.isnan(found[0]).all()
    right = found[1:].argmax(axis=1) == data.labels[1:]
    best = states[states[-1].best_epoch - 1].history[-1]
    assert best["val_accuracy"] == pytest.approx(right.mean())


def test_any_state_leads_to_the_same_bits(data, states):
    middle = states[2]
    restored = FoldsState.restore(middle.arrays(), Fields(middle.info()))
    *_, last = fit_folds_by_epochs(data, held_out(data), SETTINGS, resume=restored)
    for one, other in zip(last.best, states[-1].best, strict=True):
        assert np.array_equal(one.kernel, other.kernel)
        assert np.array_equal(one.bias, other.bias)
    seconds = {"seconds": 0}
    assert [row | seconds for row in last.history] == [row | seconds for row in states[-1].history]
    assert not list(fit_folds_by_epochs(data, held_out(data), SETTINGS, resume=states[-1]))


def test_patience_counts_epochs_without_a_better_out_of_fold_loss(data):
    hasty = replace(SETTINGS, learning_rate=3.0, patience=2, epochs=30)
    *_, last = fit_folds_by_epochs(data, held_out(data), hasty)
    assert last.wait == 2
    assert last.epoch == last.best_epoch + 2 < 30


def test_a_state_of_other_folds_or_without_trainings_is_refused(data, states):
    fewer = replace(data, folds=np.minimum(data.folds, 2))
    with pytest.raises(FinetuneError, match="4 trainings, and there are 2 folds"):
        next(fit_folds_by_epochs(fewer, held_out(data), SETTINGS, resume=states[0]))
    with pytest.raises(FieldError, match="trainings"):
        FoldsState.restore({}, Fields({**states[0].info(), "trainings": []}))
