"""The choice of l2 against scikit-learn, and the bound on its work."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from head_examples import blobs, many_classes

from finetune_cli.head import l2 as l2_module
from finetune_cli.head.data import HeadData
from finetune_cli.head.l2 import L2Search, choose_l2
from finetune_cli.head.lbfgs import Problem, fit_lbfgs, one_blas_thread


def cross_validated(x, y, l2, seed=0):
    """Log loss by scikit-learn in 5 other folds: where the minimum lies must not depend on the folds much."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    model = LogisticRegression(C=1 / (2 * l2 * len(y) * 0.8), max_iter=10_000)
    p = cross_val_predict(model, x, y, cv=StratifiedKFold(5, shuffle=True, random_state=seed), method="predict_proba")
    return -np.log(p[np.arange(len(y)), y]).mean()


@pytest.mark.parametrize("spread", [0.15, 0.6])
def test_choose_l2_finds_what_scikit_learn_finds(spread):
    x, y = blobs(photos=240, width=40, spread=spread)
    l2, tried = choose_l2(HeadData.of(x, y, 3), L2Search(calibrated=False))
    losses = dict(tried)
    assert losses[l2] < 1.005 * min(losses.values())
    with one_blas_thread():
        theirs = {value: np.mean([cross_validated(x, y, value, seed) for seed in range(3)]) for value in losses}
    assert theirs[l2] < min(theirs.values()) + 0.02
    assert losses[l2] == pytest.approx(theirs[l2], abs=0.04)


def test_choose_l2_does_not_depend_on_the_unit_of_the_features():
    x, y = blobs(photos=150)
    l2, tried = choose_l2(HeadData.of(x, y, 3))
    larger, also = choose_l2(HeadData.of(100 * x, y, 3))
    assert 0.3 < larger / (l2 * 1e4) < 3.3  # one step at most: the curve is flat
    before, after = ({round(2 * np.log10(value)): loss for value, loss in pairs} for pairs in (tried, also))
    common = [k for k in before if k + 8 in after]
    assert len(common) >= 3
    assert all(after[k + 8] == pytest.approx(before[k], abs=0.01) for k in common)
    assert l2_module._first_exponent(100 * x, 150) == l2_module._first_exponent(x, 150) + 8


def test_choose_l2_keeps_the_views_of_a_photo_together():
    # Pure noise, four copies of each photo: only who sees copies on both sides believes that it can be learnt.
    rng = np.random.default_rng(0)
    x, y = np.repeat(rng.normal(size=(60, 200)), 4, axis=0).astype(np.float32), np.repeat(np.arange(60) % 2, 4)
    together, honest = choose_l2(HeadData.of(x, y, 2, groups=np.repeat(np.arange(60), 4)))
    apart, fooled = choose_l2(HeadData.of(x, y, 2))
    assert min(loss for _, loss in honest) > 0.68
    assert min(loss for _, loss in fooled) < 0.4
    assert together > 30 * apart


def test_choose_l2_goes_to_stronger_values_when_the_first_is_best():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(100, 300)).astype(np.float32), np.arange(100) % 2
    l2, tried = choose_l2(HeadData.of(x, y, 2))
    assert l2 >= 10.0 ** (l2_module._first_exponent(x, 100) / 2)
    assert [value for value, _ in tried] == sorted(value for value, _ in tried)


def test_choose_l2_gives_the_same_twice_and_ignores_numpys_global_state():
    x, y = blobs(photos=90)
    np.random.seed(1)  # noqa: NPY002
    first = choose_l2(HeadData.of(x, y, 3), L2Search(seed=4))
    np.random.seed(2)  # noqa: NPY002
    assert choose_l2(HeadData.of(x, y, 3), L2Search(seed=4)) == first


def test_choose_l2_looks_at_a_part_of_many_rows_and_scales_the_answer(monkeypatch):
    x, y = blobs(photos=1200, width=20)
    whole, _ = choose_l2(HeadData.of(x, y, 3))
    monkeypatch.setattr(l2_module, "CV_ROWS", 300)
    part, tried = choose_l2(HeadData.of(x, y, 3))
    assert whole / 4 < part < whole * 4
    assert {round(np.log10(4 * value) * 2, 6) % 1 for value, _ in tried} <= {0.0}


def test_choose_l2_with_too_few_photos_to_hold_any_out():
    x, y = blobs(photos=2, classes=2)
    l2, tried = choose_l2(HeadData.of(x, y, 2))
    assert l2 > 0
    assert np.isfinite(fit_lbfgs(HeadData.of(x, y, 2), l2).kernel).all()
    assert all(loss == 0 for _, loss in tried)


def test_choose_l2_with_a_class_of_one_photo():
    x, y = blobs(photos=61, classes=2)
    y = np.where(np.arange(61) == 60, 2, y)
    _, tried = choose_l2(HeadData.of(x, y, 3))
    assert all(np.isfinite(loss) and loss < 3 for _, loss in tried)


def test_choose_l2_takes_fewer_of_many_classes_and_says_so(monkeypatch):
    problem = many_classes()
    notes, fits = [], []
    whole, _ = choose_l2(problem, note=notes.append)
    assert notes == []
    monkeypatch.setattr(l2_module, "_CV_CLASSES", 10)
    monkeypatch.setattr(
        l2_module, "CV_WORK", 160 * 20 * 40 * l2_module.FOLDS * (l2_module._WEAKER + l2_module._STRONGER)
    )
    part, tried = choose_l2(problem, note=notes.append, progress=fits.append)
    assert notes == ["l2 is chosen on 160 of 480 views of 20 of the 60 classes, to bound the time of the search"]
    assert len(fits) == l2_module.FOLDS * len(tried)
    assert 160 * 20 * 40 * len(fits) <= l2_module.CV_WORK
    assert whole / 4 < part < whole * 4
    assert choose_l2(problem) == (part, tried)  # whatever the time of day


@pytest.mark.parametrize(("rows", "classes", "width"), [(4000, 200, 2048), (30_000, 200, 2048), (3_000, 470, 1280)])
def test_ordinary_sets_are_searched_with_all_their_classes(rows, classes, width):
    labels = np.arange(rows) % classes
    mask, searched = l2_module._searched(labels, np.arange(rows), width, 0)
    assert searched is None
    assert mask.sum() == pytest.approx(min(rows, l2_module.CV_ROWS), rel=0.1)


@pytest.mark.parametrize("photos", [2, 20, 1000])
@pytest.mark.parametrize("width", [1280, 100_000])
@pytest.mark.parametrize("views", [1, 4])
def test_the_work_of_the_search_is_bounded(photos, width, views):
    labels = np.repeat(np.arange(1000), photos * views)
    mask, searched = l2_module._searched(labels, np.arange(len(labels)) // views, width, 0)
    fits = l2_module.FOLDS * (l2_module._WEAKER + l2_module._STRONGER)
    assert searched is not None
    assert len(searched) >= l2_module._CV_CLASSES
    assert set(labels[mask]) <= set(searched.tolist())
    assert mask.sum() * width * len(searched) * fits <= 1.2 * l2_module.CV_WORK  # whole groups are not cut
    assert mask.sum() <= 1.2 * l2_module.CV_ROWS


def test_a_model_that_gets_a_temperature_may_have_a_stronger_penalty():
    x, y = blobs(photos=240, width=40, spread=0.4)
    plain, raw = choose_l2(HeadData.of(x, y, 3), L2Search(calibrated=False))
    strong, corrected = choose_l2(HeadData.of(x, y, 3), L2Search(calibrated=True))
    assert strong >= plain
    both = set(dict(raw)) & set(dict(corrected))
    assert len(both) >= 3
    assert all(dict(corrected)[l2] < dict(raw)[l2] + 1e-3 for l2 in both)


def test_choose_l2_holds_out_the_folds_of_the_data():
    # Pure noise in pairs of equal rows: only folds that divide the pairs believe that it can be learned.
    rng = np.random.default_rng(0)
    x, y = np.repeat(rng.normal(size=(60, 200)), 2, axis=0).astype(np.float32), np.repeat(np.arange(60) % 2, 2)
    rows = HeadData.of(x, y, 2)
    _, honest = choose_l2(replace(rows, folds=1 + np.arange(120) // 2 % 3))
    _, fooled = choose_l2(replace(rows, folds=1 + np.arange(120) % 2))
    assert min(loss for _, loss in honest) > 0.68
    assert min(loss for _, loss in fooled) < 0.4


def test_choose_l2_does_not_judge_rows_without_a_fold():
    x, y = blobs(photos=30, classes=2)
    _, tried = choose_l2(replace(HeadData.of(x, y, 2), folds=np.zeros(30, np.int64)))
    assert all(loss == 0 for _, loss in tried)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_choose_l2_gives_the_same_with_any_number_of_threads(monkeypatch, threads):
    x, y = blobs(photos=150)
    expected = choose_l2(HeadData.of(x, y, 3))
    monkeypatch.setattr(l2_module, "cores", lambda: threads)
    assert choose_l2(HeadData.of(x, y, 3)) == expected


def test_a_fold_goes_on_while_another_is_still_fitted(monkeypatch):
    x, y = blobs(photos=150)
    seen, went_on, waited = set(), threading.Event(), []
    plain = Problem.minimise

    def minimise(self, l2, *arguments, **options):
        seen.add(l2)
        if len(seen) > 1:
            went_on.set()
        elif start_of(self) == max(starts):
            waited.append(went_on.wait(20))
        return plain(self, l2, *arguments, **options)

    def start_of(problem):
        return problem.labels.ctypes.data

    made = l2_module._CrossValidation.__init__
    starts = []

    def record(self, *arguments):
        made(self, *arguments)
        starts.extend(start_of(problem) for problem in self.problems)

    monkeypatch.setattr(l2_module._CrossValidation, "__init__", record)
    monkeypatch.setattr(Problem, "minimise", minimise)
    monkeypatch.setattr(l2_module, "cores", lambda: 2)
    choose_l2(HeadData.of(x, y, 3))
    assert waited == [True]


def test_what_was_begun_in_vain_ends_with_the_search(monkeypatch):
    x, y = blobs(photos=150)
    plain = Problem.minimise
    running = []

    def minimise(self, *arguments, **options):
        running.append(1)
        try:
            return plain(self, *arguments, **options)
        finally:
            running.pop()

    monkeypatch.setattr(Problem, "minimise", minimise)
    before = threading.active_count()
    choose_l2(HeadData.of(x, y, 3))
    assert not running
    assert threading.active_count() == before
