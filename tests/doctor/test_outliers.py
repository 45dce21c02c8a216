import numpy as np

from finetune_cli.doctor.outliers import FEWEST, outliers


def test_strangers_are_found_also_in_a_small_group():
    rng = np.random.default_rng(0)
    usual = np.abs(rng.normal(size=(1, 40))) + 0.3 * np.abs(rng.normal(size=(300, 40)))
    strangers = np.abs(rng.normal(size=(1, 40))) * (np.arange(40) % 7 == 0) + 0.05 * np.abs(rng.normal(size=(4, 40)))
    found = outliers(np.concatenate([usual, strangers]).astype(np.float32), 2)
    assert {number for number, _cosine, _usual in found} >= {300, 301, 302, 303}
    assert len(found) <= 7
    assert [cosine for _number, cosine, _usual in found] == sorted(cosine for _number, cosine, _usual in found)
    assert all(cosine < median for _number, cosine, median in found)


def test_equal_photos_are_no_outliers():
    assert outliers(np.ones((50, 4), np.float32), 1) == []


def test_few_photos_are_not_judged():
    assert outliers(np.random.default_rng(0).normal(size=(FEWEST - 1, 4)).astype(np.float32), 1) == []
