import numpy as np
import pytest

from finetune_cli.duplicates import neighbours


def unit(count, width, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("count", [2, 7, 40, 1000])
@pytest.mark.parametrize("block", [1 << 23, 3000])
def test_the_neighbours_are_those_of_all_products(count, workers, block, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK_NUMBERS", block)
    rows = unit(count, 16)
    index, values = neighbours.nearest(rows, rows, 4, workers)
    products = rows @ rows.T
    np.fill_diagonal(products, -np.inf)
    expected = -np.sort(-products, axis=1)[:, : min(4, count - 1)]
    assert np.allclose(values, expected, atol=1e-6)
    assert np.allclose(np.take_along_axis(products, index, axis=1), values, atol=1e-6)


def test_the_queries_may_be_other_rows():
    queries, rows = unit(50, 8, 1), unit(50, 8, 2)
    index, _values = neighbours.nearest(queries, rows, 1, 1)
    products = queries @ rows.T
    np.fill_diagonal(products, -np.inf)
    assert np.array_equal(index[:, 0], products.argmax(axis=1))


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows_have_no_neighbours(count):
    index, values = neighbours.nearest(unit(count, 4), unit(count, 4), 3, 1)
    assert index.shape == values.shape == (count, 0)


def test_directions_are_centred_unit_vectors():
    features = np.random.default_rng(0).normal(5, 1, (300, 20)).astype(np.float32)
    found = neighbours.directions(features)
    centred = features - features.mean(axis=0)
    assert np.allclose(found, centred / np.linalg.norm(centred, axis=1, keepdims=True), atol=1e-5)


def test_equal_photos_have_no_direction():
    assert np.all(neighbours.directions(np.ones((5, 8), np.float32)) == 0)


def test_many_photos_are_compared_in_fewer_dimensions_by_nearly_the_same_cosines():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(5000, 40)) @ rng.normal(size=(40, 600))
    features = (hidden + 0.1 * rng.normal(size=hidden.shape)).astype(np.float32)
    found = neighbours.directions(features)
    assert found.shape == (5000, 256)
    centred = features[:200] - features.mean(axis=0)
    exact = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    assert np.abs(found[:200] @ found[:200].T - exact @ exact.T).max() < 0.05


def test_pairs_are_ordered():
    index = np.array([[1, 2], [0, 2], [0, 1]])
    keep = np.array([[True, False], [True, True], [False, False]])
    assert sorted(set(neighbours.pairs(index, keep))) == [(0, 1), (1, 2)]
