"""The head in Keras: the same objective as the solver's, exact resuming, growth, and the finished model."""

import dataclasses
import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

import finetune_cli
from finetune_cli.errors import FinetuneError, RunError
from finetune_cli.fields import Fields
from finetune_cli.head import keras_fit
from finetune_cli.head.classifier import build, glorot, grow, read
from finetune_cli.head.data import HeadData
from finetune_cli.head.keras_fit import EpochState, KerasSettings, fit_epochs
from finetune_cli.head.lbfgs import Head, fit_lbfgs
from finetune_cli.keras_setup import import_keras

LITE0 = Path(finetune_cli.__file__).parent / "assets" / "efficientnet_lite0.keras"


def views(seed=0, photos=60, count=3, width=12, classes=3, spread=0.7):
    """Features float32 (photos, count, width) of overlapping classes, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(photos) % classes
    centres = np.random.default_rng(99).normal(0, spread, (classes, width))
    x = 1 + centres[labels][:, None] + rng.normal(0, 1, (photos, 1, width)) + rng.normal(0, 0.3, (photos, count, width))
    return x.astype(np.float32), labels


def states(settings, data=None, val=None, weights=None, **options):
    """The states of a training, epoch by epoch."""
    x, y = data or views()
    val_x, val_y = val or views(seed=1, photos=30)
    classes = int(y.max()) + 1
    train, validation = HeadData.of(x, y, classes, weights), HeadData.of(val_x[:, 0], val_y, classes)
    return fit_epochs(train, validation, settings, **options)


def train(settings, **options):
    """The last state of a training, or the one that it was to be resumed from."""
    last = options.get("resume")
    for state in states(settings, **options):
        last = state
    return last


def objective(head, x, y, weights, l2, smoothing):
    """The documented objective, written out photo by photo."""
    total, classes = 0.0, len(head.bias)
    for features, label, w in zip(x.astype(float), y, weights, strict=True):
        z = features @ head.kernel.astype(float) + head.bias
        target = (np.arange(classes) == label) * (1 - smoothing) + smoothing / classes
        total += w * (np.log(np.exp(z).sum()) - target @ z)
    return total / weights.sum() + l2 * (head.kernel.astype(float) ** 2).sum()


def assert_same(one: EpochState, other: EpochState) -> None:
    """Bit for bit, but for the seconds."""
    a, b = one.arrays(), other.arrays()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert np.array_equal(a[name], b[name]), name
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in s.history] for s in (one, other)]
    assert rows[0] == rows[1]
    assert {**one.info(), "history": 0} == {**other.info(), "history": 0}


def through_files(state: EpochState) -> EpochState:
    """What a checkpoint makes of a state."""
    file = io.BytesIO()
    names = list(state.arrays())
    np.savez(file, **{str(i): array for i, array in enumerate(state.arrays().values())})
    stored = np.load(io.BytesIO(file.getvalue()), allow_pickle=False)
    arrays = {name: stored[str(i)] for i, name in enumerate(names)}
    return EpochState.restore(arrays, Fields(json.loads(json.dumps(state.info(), allow_nan=False))))


def killed_after(epoch, settings, **options) -> EpochState:
    """The state that a run had left when it was killed after `epoch`."""
    state = next(state for state in states(settings, **options) if state.epoch == epoch)
    return through_files(state)


def test_the_loss_is_the_documented_objective():
    x, y = views(count=1)
    val_x, val_y = views(seed=1, photos=30)
    weights = np.random.default_rng(5).uniform(0.2, 3, len(y))
    start = Head(
        np.random.default_rng(6).normal(0, 0.3, (12, 3)).astype(np.float32), np.array([0.5, 0, -1], np.float32)
    )
    settings = KerasSettings(epochs=1, batch_size=100, label_smoothing=0.1, l2=0.01)
    state = train(settings, data=(x, y), weights=weights, start=start)
    row = state.history[0]
    # One batch: the loss that Keras reports is that of the weights before the step, the validation loss after it.
    assert row["loss"] == pytest.approx(objective(start, x[:, 0], y, weights, 0.01, 0.1), rel=1e-5)
    assert row["val_loss"] == pytest.approx(objective(state.head, val_x[:, 0], val_y, np.ones(30), 0.01, 0.1), rel=1e-5)
    assert row["val_accuracy"] == pytest.approx((state.head.logits(val_x[:, 0]).argmax(axis=1) == val_y).mean())


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 0.03), ("sgd", 0.3)])
def test_keras_ends_where_lbfgs_ends(optimizer, rate):
    x, y = views(count=1)
    weights = np.random.default_rng(5).uniform(0.2, 3, len(y))
    settings = KerasSettings(
        optimizer, epochs=400, batch_size=100, learning_rate=rate, patience=None, label_smoothing=0.1, l2=0.01
    )
    slow = train(settings, data=(x, y), weights=weights).head
    exact = fit_lbfgs(HeadData.of(x[:, 0], y, 3, weights), 0.01, 0.1)
    losses = [objective(head, x[:, 0], y, weights, 0.01, 0.1) for head in (slow, exact)]
    assert losses[1] <= losses[0] + 1e-6
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert np.abs(slow.kernel - exact.kernel).max() < 0.02


def test_every_epoch_visits_each_photo_once_and_all_views_in_turn():
    photos, count = 23, 3
    x = np.stack(np.meshgrid(np.arange(photos), np.arange(count), indexing="ij"), axis=-1).astype(np.float32)
    settings = KerasSettings(batch_size=5)
    weights = np.linspace(1, 3, photos)
    batches = keras_fit._batches(HeadData.of(x, np.arange(photos) % 2, 2, weights), settings)
    epochs = []
    for epoch in range(6):
        chosen = list(batches(epoch))
        assert sorted(len(rows) for rows, _, _ in chosen) == [4, 4, 5, 5, 5]
        seen = np.concatenate([rows for rows, _, _ in chosen]).astype(int)
        assert sorted(seen[:, 0]) == list(range(photos))
        targets, scaled = (np.concatenate([batch[i] for batch in chosen]) for i in (1, 2))
        assert (targets.argmax(axis=1) == seen[:, 0] % 2).all()
        assert scaled == pytest.approx(weights[seen[:, 0]] / weights.mean())
        epochs.append(dict(seen.tolist()))
    assert all(sorted(epoch[photo] for epoch in epochs) == [0, 0, 1, 1, 2, 2] for photo in range(photos))
    assert len({tuple(epoch) for epoch in epochs}) == 6  # the order changes


DROPOUT = KerasSettings(epochs=8, batch_size=16, learning_rate=0.01, dropout=0.3, patience=None, l2=1e-4, seed=3)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_killed_training_ends_bit_for_bit_as_if_it_had_not_been(optimizer):
    settings = dataclasses.replace(DROPOUT, optimizer=optimizer)
    whole = train(settings)
    assert whole.epoch == 8
    assert_same(train(settings), whole)
    assert_same(train(settings, resume=killed_after(3, settings)), whole)


def test_dropout_draws_resume_where_they_stopped():
    # The test above would pass without the generator's state, if dropout did nothing.
    state = killed_after(3, DROPOUT)
    reset = EpochState.restore({**state.arrays(), "dropout/000": np.zeros_like(state.dropout[0])}, Fields(state.info()))
    assert not np.array_equal(train(DROPOUT, resume=reset).head.kernel, train(DROPOUT).head.kernel)


def test_more_epochs_can_be_asked_for():
    shorter = dataclasses.replace(DROPOUT, epochs=4)
    assert_same(train(DROPOUT, resume=through_files(train(shorter))), train(DROPOUT))


def test_resuming_keeps_the_epochs_waited_so_far():
    # Labels of the validation photos that contradict the training ones: the loss can only rise.
    settings = KerasSettings(epochs=30, batch_size=16, learning_rate=0.02, patience=4, dropout=0.2)
    val_x, val_y = views(seed=1, photos=30)
    val = val_x, (val_y + 1) % 3
    seen = list(states(settings, val=val))
    whole = seen[-1]
    assert whole.epoch == whole.best_epoch + 4 < 30
    assert whole.wait == 4
    losses = [row["val_loss"] for row in whole.history]
    assert whole.best_loss == min(losses) == losses[whole.best_epoch - 1]
    assert np.array_equal(whole.best.kernel, seen[whole.best_epoch - 1].head.kernel)
    assert [state.is_best for state in seen].count(True) >= 1
    assert seen[whole.best_epoch - 1].is_best
    stopped = killed_after(whole.best_epoch + 2, settings, val=val)
    assert stopped.wait == 2
    assert_same(train(settings, val=val, resume=stopped), whole)
    # Already over: nothing more happens, also with more epochs.
    assert train(settings, val=val, resume=whole) is whole


def test_a_memory_map_of_features_will_do(tmp_path):
    x, y = views()
    stored = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    stored[:] = x
    settings = KerasSettings(epochs=2, batch_size=16)
    assert_same(train(settings, data=(stored, y)), train(settings, data=(x, y)))


def test_training_begins_with_the_given_head():
    start = Head(np.full((12, 3), 0.25, np.float32), np.array([1, 2, 3], np.float32))
    state = train(KerasSettings(epochs=1, learning_rate=1e-9), start=start)
    assert np.allclose(state.head.kernel, 0.25)
    assert np.allclose(state.head.bias, [1, 2, 3])


def test_a_diverging_learning_rate_is_reported():
    with pytest.raises(FinetuneError, match="diverged") as caught:
        train(KerasSettings(epochs=3, learning_rate=1e38))
    assert "learning_rate" in caught.value.remedy


def test_glorot_draws_have_the_published_range():
    head = glorot(400, 8, seed=1)
    limit = (6 / 408) ** 0.5
    assert head.kernel.dtype == np.float32
    assert 0.98 * limit < np.abs(head.kernel).max() <= limit
    assert head.kernel.std() == pytest.approx(limit / 3**0.5, rel=0.05)
    assert not head.bias.any()
    assert np.array_equal(glorot(400, 8, seed=1).kernel, head.kernel)


def test_growing_copies_the_columns_of_known_classes():
    old = Head(np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32), np.array([1, -2, 4], np.float32))
    grown, kept, new = grow(old, ["city", "forest", "sea"], ["alp", "city", "sea", "zoo"], seed=0)
    assert kept == ("city", "sea")
    assert new == ("alp", "zoo")
    assert np.array_equal(grown.kernel[:, [1, 2]], old.kernel[:, [0, 2]])
    assert grown.bias[[1, 2]].tolist() == [1, 4]
    assert not np.array_equal(grown.kernel[:, 0], grown.kernel[:, 3])
    assert np.array_equal(
        grow(old, ["city", "forest", "sea"], ["alp", "city", "sea", "zoo"], 0)[0].kernel, grown.kernel
    )


def test_what_a_new_class_starts_with_does_not_depend_on_the_heads_free_constant():
    # Adding one vector to all columns, one number to all biases, leaves a head's probabilities alone.
    old = Head(np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32), np.array([1, -1], np.float32))
    shifted = Head(old.kernel + np.linspace(-5, 5, 50, dtype=np.float32)[:, None], old.bias + 100)
    x = np.random.default_rng(1).normal(1, 1, (20, 50)).astype(np.float32)
    logits = [grow(head, ["a", "b"], ["a", "b", "c"], 0)[0].logits(x).astype(float) for head in (old, shifted)]
    chances = [np.exp(z - z.max(axis=1, keepdims=True)) for z in logits]
    chances = [p / p.sum(axis=1, keepdims=True) for p in chances]
    assert np.abs(chances[0] - chances[1]).max() < 1e-3


def test_growing_without_a_class_in_common_starts_afresh():
    grown, kept, new = grow(glorot(10, 2, 0), ["a", "b"], ["c", "d"], seed=5)
    assert (kept, new) == ((), ("c", "d"))
    assert np.array_equal(grown.kernel, glorot(10, 2, 5).kernel)


def test_two_classes_grown_to_three_keep_what_they_know():
    x, y = views(classes=3, photos=90, spread=2)
    two = y < 2
    settings = KerasSettings(epochs=12, batch_size=16, learning_rate=0.02)
    val_x, val_y = views(seed=1, photos=30, spread=2)
    old = train(settings, data=(x[two], y[two]), val=(val_x[val_y < 2], val_y[val_y < 2])).best
    grown, _, _ = grow(old, ["a", "b"], ["a", "b", "c"], seed=0)
    before = (grown.logits(val_x[val_y < 2][:, 0]).argmax(axis=1) == val_y[val_y < 2]).mean()
    assert before > 0.9
    after = train(settings, data=(x, y), val=(val_x, val_y), start=grown).best
    assert (after.logits(val_x[:, 0]).argmax(axis=1) == val_y).mean() > 0.9


@pytest.fixture(scope="module")
def lite0():
    return import_keras().models.load_model(LITE0, safe_mode=True, compile=False)


@pytest.fixture(scope="module")
def finished(lite0):
    rng = np.random.default_rng(0)
    head = Head(rng.normal(0, 0.2, (1280, 3)).astype(np.float32), rng.normal(0, 1, 3).astype(np.float32))
    pixels = rng.integers(0, 256, (4, 224, 224, 3)).astype(np.float32)
    features = np.asarray(lite0(pixels, training=False))
    z = (features.astype(float) @ head.kernel + head.bias) / 1.7
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return build(lite0, head, 1.7, ["a", "b", "c"]), head, pixels, p / p.sum(axis=1, keepdims=True)


def test_the_finished_model_answers_as_the_arithmetic_says(finished):
    model, _, pixels, expected = finished
    assert np.abs(np.asarray(model(pixels)) - expected).max() < 1e-5
    # Whatever a later user does, the backbone stays in inference mode.
    assert np.abs(np.asarray(model(pixels, training=True)) - expected).max() < 1e-5
    assert [layer.name for layer in model.layers][-3:] == ["logits", "temperature", "probabilities"]
    assert all(layer.dtype == "float32" for layer in model.layers[-3:])
    assert not model.trainable_variables


def test_the_saved_model_needs_nothing_of_this_package(finished, tmp_path):
    model, head, pixels, expected = finished
    model.save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        assert b"finetune" not in archive.read("config.json")
    loaded = import_keras().models.load_model(tmp_path / "model.keras", safe_mode=True)
    assert np.abs(np.asarray(loaded(pixels)) - expected).max() < 1e-5
    found = read(tmp_path / "model.keras")
    assert np.array_equal(found.kernel, head.kernel)
    assert np.array_equal(found.bias, head.bias)


def test_a_file_without_a_head_is_refused():
    with pytest.raises(RunError, match="no head"):
        read(LITE0)


def test_a_head_that_does_not_fit_is_refused(lite0):
    with pytest.raises(ValueError, match="does not fit"):
        build(lite0, glorot(1280, 3, 0), 1.0, ["a", "b"])


def test_the_memory_of_batches_does_not_grow_with_photos_times_classes():
    photos, classes = 20_000, 500
    data = HeadData.of(np.zeros((photos, 1, 2), np.float32), np.arange(photos) % classes, classes)
    tracemalloc.start()
    try:
        x, target, weights = next(keras_fit._batches(data, KerasSettings())(0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(x) == len(target) == len(weights)
    assert (target.sum(axis=1) == 1).all()
    assert peak < 4 * photos * classes / 10


def test_photos_are_validated_in_blocks_with_the_same_result(monkeypatch):
    x, y = views()
    head, data = glorot(x.shape[2], 3, 0), HeadData.of(x[:, 0], y, 3)
    settings = KerasSettings(l2=0.01, label_smoothing=0.1)
    whole = keras_fit._validate(head, data, settings)
    monkeypatch.setattr(keras_fit, "_VALIDATED_ROWS", 7)
    assert keras_fit._validate(head, data, settings) == pytest.approx(whole, rel=1e-6)
