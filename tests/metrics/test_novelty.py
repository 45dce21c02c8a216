"""Novelty scores and their p-values, against the definitions."""

import numpy as np
import pytest
from scipy.special import logsumexp

from finetune_cli.metrics import novelty
from finetune_cli.metrics.novelty import NoveltyScore


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("count", [3, 5, 40])
def test_the_distance_is_that_to_the_fifth_nearest(count, monkeypatch):
    monkeypatch.setattr(novelty, "_BLOCK_NUMBERS", 64)  # several blocks
    x, references = drawn(9, 6), drawn(count, 6, seed=1)
    cosines = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in references] for a in x])
    expected = np.sort(1 - cosines, axis=1)[:, min(5, count) - 1]
    np.testing.assert_allclose(novelty.distances(x, novelty.unit(references)), expected, atol=1e-6)


def test_features_of_length_zero_are_as_far_as_can_be_seen():
    assert novelty.distances(np.zeros((1, 6), np.float32), novelty.unit(drawn(8, 6)))[0] == 1


def test_the_energy_is_that_of_the_logits():
    logits = 200 * drawn(9, 4)  # exp would overflow
    np.testing.assert_allclose(novelty.energies(logits), -logsumexp(logits.astype(float), axis=1), rtol=1e-12)


def test_the_score_adds_the_energy_by_its_weight():
    x, logits, references = drawn(9, 6), drawn(9, 3), novelty.unit(drawn(8, 6, seed=1))
    distance = NoveltyScore(references, 0.0)(x, logits)
    np.testing.assert_allclose(distance, novelty.distances(x, references))
    np.testing.assert_allclose(NoveltyScore(references, 0.5)(x, logits), distance + novelty.energies(logits) / 2)


def test_the_p_value_counts_held_out_photos_that_score_as_high():
    held_out = np.array([1.0, 2.0, 2.0, 4.0])
    assert novelty.p_values(np.array([0.0, 2.0, 3.0, 5.0]), held_out).tolist() == [1.0, 4 / 5, 2 / 5, 1 / 5]


@pytest.mark.parametrize(("photos", "rate"), [(40, 0.05), (37, 0.05), (100, 0.01), (20, 0.05), (60, 0.3)])
def test_of_photos_that_are_alike_no_more_are_refused_than_promised(photos, rate):
    # Each of them is as likely to be the new one: of all ways to choose it, at most the rate refuses.
    scores = drawn(photos)
    refused = [
        novelty.p_values(scores[[i]], np.sort(np.delete(scores, i).astype(float)))[0] <= rate for i in range(photos)
    ]
    assert sum(refused) == int(rate * photos + 1e-9)


@pytest.mark.parametrize(("rate", "least"), [(0.05, 19), (0.01, 99), (0.5, 1), (0.3, 3), (1, 1), (0.07, 14)])
def test_the_least_number_of_held_out_photos(rate, least):
    assert novelty.least_held_out(rate) == least
    assert 1 / (least + 1) <= rate
    assert least == 1 or 1 / least > rate
