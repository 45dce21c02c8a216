"""Out-of-fold logits: each from a head that was fitted by itself on the other folds."""

from dataclasses import replace

import numpy as np
import pytest
from head_examples import blobs

from finetune_cli.head import out_of_fold
from finetune_cli.head.data import HeadData
from finetune_cli.head.lbfgs import fit_lbfgs
from finetune_cli.head.out_of_fold import fit_folds, logits, numbers


def data(photos=60, views=2):
    x, y = blobs(photos=photos, width=12)
    noise = np.random.default_rng(1).normal(0, 0.2, (photos, views, 12))
    folds = 1 + np.arange(photos) // 3 % 4
    folds[:2] = 0
    return HeadData.of((x[:, None] + noise).astype(np.float32), y, 3, np.linspace(1, 2, photos)), folds


def test_each_fold_is_answered_by_a_head_that_was_fitted_on_the_others():
    whole, folds = data()
    held_out = whole.features[:, 0] + np.float32(0.01)
    found = logits(fit_folds(replace(whole, folds=folds), 0.01, 0.1), folds, held_out)
    assert np.isnan(found[:2]).all()
    assert numbers(folds) == [1, 2, 3, 4]
    for fold in (1, 2, 3, 4):
        head = fit_lbfgs(whole.part(folds != fold).rows(), 0.01, 0.1)
        assert found[folds == fold] == pytest.approx(head.logits(held_out[folds == fold]), abs=2e-3)


def test_the_answer_for_a_photo_does_not_depend_on_its_label_or_its_features():
    whole, folds = data()
    own = np.flatnonzero(folds == 2)
    before = logits(fit_folds(replace(whole, folds=folds), 0.01), folds, whole.features[:, 0])
    features, labels = whole.features.copy(), whole.labels.copy()
    features[own], labels[own] = 7, (labels[own] + 1) % 3
    other = replace(whole, features=features, labels=labels, folds=folds)
    after = logits(fit_folds(other, 0.01), folds, whole.features[:, 0])
    assert after[own] == pytest.approx(before[own], abs=2e-3)
    assert np.abs(after - before)[folds == 3].max() > 0.1


def test_photos_are_answered_in_blocks_and_heads_are_fitted_side_by_side(monkeypatch):
    whole, folds = data()
    rows = replace(whole, folds=folds)
    expected = logits(fit_folds(rows, 0.01), folds, whole.features[:, 0])
    monkeypatch.setattr(out_of_fold, "_BLOCK_PHOTOS", 4)
    monkeypatch.setattr(out_of_fold, "cores", lambda: 3)
    done = []
    found = logits(fit_folds(rows, 0.01, advance=done.append), folds, whole.features[:, 0])
    assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)  # a product's bits depend on its number of rows
    assert done == [1, 1, 1, 1]
