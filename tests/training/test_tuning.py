"""The parts of the fine-tuning stage on a tiny network with branches and BatchNorm."""

import errno
import json
import os

import numpy as np
import pytest
import runs_fixture
from built import built
from PIL import Image

from finetune_cli.config.load import load_config
from finetune_cli.config.schema import FineTuningConfig
from finetune_cli.errors import ConfigError, FinetuneError, StorageError
from finetune_cli.head.lbfgs import Head
from finetune_cli.keras_setup import import_keras
from finetune_cli.photos.augment import Augmenter
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.training.extract import FeatureRequest
from finetune_cli.training.tuning import activations, candidates, plan
from finetune_cli.training.tuning.activations import Lower, Pixels, Recomputed, Scratch, ScratchFile
from finetune_cli.training.tuning.cuts import cut
from finetune_cli.training.tuning.plan import Counts
from finetune_cli.training.tuning.upper import Labelled, Upper, UpperSettings, UpperState, interpolated

SIZE = 32


def network(inside: bool = False, shared: bool = False):
    """32 x 32 pixels -> 16 x 16 x 8 -> 8 x 8 x 6 with a branch -> 4 x 4 x 5 with a branch -> 5 features."""
    keras = import_keras()
    keras.utils.set_random_seed(3)
    layers = keras.layers

    def block(x, name, filters, again=None):
        x = layers.Conv2D(filters, 3, strides=2, padding="same", name=f"{name}_conv")(x)
        y = layers.BatchNormalization(name=f"{name}_bn")(x)
        y = (again or layers.Conv2D(filters, 1, activation="relu", name=f"{name}_branch"))(y)
        return layers.Add(name=f"{name}_add")([x, y])

    pixels = keras.Input((SIZE, SIZE, 3), name="pixels")
    twice = layers.Conv2D(6, 1, name="twice") if shared else None
    x = layers.Rescaling(1 / 127.5, -1, name="scale")(pixels)
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="stem")(x)
    x = block(x, "one", 6, twice)
    x = block(x, "two", 6 if shared else 5, twice)
    model = keras.Model(pixels, layers.GlobalAveragePooling2D(name="pool")(x), name="net")
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):  # statistics as of a training
            layer.set_weights([np.random.default_rng(5).uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    if inside:
        entry = keras.Input((SIZE, SIZE, 3))
        model = keras.Model(entry, model(entry))
    model.trainable = False
    return model


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3)).astype(np.float32)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("unfreeze", "below", "above", "shape"),
    [
        ("last_stage", "one_add", "two_conv", (8, 8, 6)),
        ("last_two_stages", "stem", "one_conv", (16, 16, 8)),
        ("two_conv", "one_add", "two_conv", (8, 8, 6)),
        ("one_conv", "stem", "one_conv", (16, 16, 8)),
        ("pool", "two_add", "pool", (4, 4, 5)),
        ("all", "pixels", "scale", (SIZE, SIZE, 3)),
    ],
)
def test_both_parts_together_are_the_network(photos, inside, unfreeze, below, above, shape):
    model = network(inside)
    found = cut(model, unfreeze)
    assert (found.below, found.above, found.shape) == (below, above, shape)
    middle = photos if found.lower is None else np.asarray(found.lower(photos))
    assert middle.shape[1:] == shape
    np.testing.assert_allclose(np.asarray(found.upper(middle)), np.asarray(model(photos)), rtol=1e-5, atol=1e-5)
    owned = {id(weight) for weight in model.weights}
    assert {id(weight) for weight in found.upper.weights} <= owned


def test_the_last_stage_of_the_bundled_backbone_is_cut_where_it_is_narrow():
    found = cut(built("efficientnet_lite0", None, 224, 0).model, "last_stage")
    assert (found.below, found.above, found.shape) == ("block10_add", "block11_expand_conv", (14, 14, 112))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "last", "last_two"),
    [
        ("resnet50", ("conv4_block6_out", (14, 14, 1024)), ("conv3_block4_out", (28, 28, 512))),
        ("vgg16", ("block4_pool", (14, 14, 512)), ("block3_pool", (28, 28, 256))),
        ("densenet121", ("pool4_pool", (7, 7, 512)), ("pool3_pool", (14, 14, 256))),
        ("efficientnetb0", ("block5c_add", (14, 14, 112)), ("block3b_add", (28, 28, 40))),
        ("mobilenetv2", ("block_12_add", (14, 14, 96)), ("block_5_add", (28, 28, 32))),
    ],
)
def test_the_stages_of_well_known_networks(name, last, last_two):
    model = built(name, None, 224, 0).model
    for unfreeze, expected in (("last_stage", last), ("last_two_stages", last_two)):
        found = cut(model, unfreeze)
        assert (found.below, found.shape) == expected


def test_a_layer_in_a_branch_names_the_nearest_that_can_be_cut_at():
    with pytest.raises(ConfigError, match="below two_branch more than one tensor passes") as caught:
        cut(network(), "two_branch")
    assert "two_bn and pool" in caught.value.remedy


def test_an_unknown_layer_names_the_nearest():
    with pytest.raises(ConfigError, match="no layer 'two_cov'") as caught:
        cut(network(), "two_cov")
    assert "two_conv" in caught.value.remedy


def test_a_layer_used_twice_is_never_on_both_sides_of_a_cut():
    assert cut(network(shared=True), "last_stage").below == "one_conv"


@pytest.mark.parametrize(("dtype", "limit"), [(np.float16, 1e-3), (np.float32, 0), (np.uint8, 0)])
def test_the_scratch_file_gives_back_what_was_written(tmp_path, dtype, limit):
    rows = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 4, 5)).astype(np.float32)
    file = ScratchFile(tmp_path, rows.shape, dtype)
    for photo in range(3):
        for view in range(2):
            file.write(photo, view, rows[photo, view])
    chosen, views = np.array([2, 0, 2]), np.array([1, 0, 0])
    np.testing.assert_allclose(file.batch(chosen, views), rows[chosen, views], rtol=limit)
    assert not list(tmp_path.iterdir())


def test_numbers_beyond_float16_become_its_largest(tmp_path):
    file = ScratchFile(tmp_path, (1, 1, 1, 1, 2), np.float16)
    file.write(0, 0, np.array([[[1e6, -1e6]]], np.float32))
    assert file.batch(np.array([0]), np.array([0])).ravel().tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_a_damaged_scratch_file_is_an_error(tmp_path, damage):
    file = ScratchFile(tmp_path, (2, 1, 4, 4, 5), np.float32)
    for photo in range(2):
        file.write(photo, 0, np.full((4, 4, 5), photo, np.float32))
    file._file.flush()
    if damage == "changed":
        os.pwrite(file._file.fileno(), b"\x01", 4 * 80 + 17)
    else:
        os.ftruncate(file._file.fileno(), 4 * 80 + 17)
    assert file.batch(np.array([0]), np.array([0])).max() == 0
    with pytest.raises(StorageError, match="damaged") as caught:
        file.batch(np.array([1]), np.array([0]))
    assert "--resume" in caught.value.remedy


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space on a disk")
def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"no room for 1.6 kB of activations: No space left") as caught:
        ScratchFile(tmp_path, (10, 1, 4, 4, 5), np.float16)
    assert "scratch_gb" in caught.value.remedy


def test_recomputed_activations_are_the_stored_ones(tmp_path):
    for i in range(5):
        (tmp_path / "photos" / "a").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "a" / f"{i}.png")
    samples = runs_fixture.samples_of(tmp_path / "photos", ("a",))
    augmenter = Augmenter({"horizontal_flip": True, "rotation_range": 30}, 3, 0, SIZE)
    lower = Lower(FeatureRequest(ImageSettings(SIZE), "x", "float32", augmenter), Pixels(), (SIZE, SIZE, 3), 2, 4)
    advanced = []
    stored = activations.stored(samples, lower, Scratch(tmp_path, 3, np.uint8), advanced.append)
    assert sum(advanced) == 5
    again = Recomputed(samples, lower)
    assert again.shape == stored.shape == (5, 3, SIZE, SIZE, 3)
    every_view = np.divmod(np.arange(3, 12), 3)  # as the features of all views are asked for
    np.testing.assert_array_equal(again.batch(*every_view), stored.batch(*every_view))
    photos, views = np.array([4, 0, 2]), np.array([1, 0, 2])
    np.testing.assert_array_equal(again.batch(photos, views), stored.batch(photos, views))
    other = stored.batch(photos, np.array([2, 1, 0]))
    assert not np.array_equal(stored.batch(photos, views), other)


def test_a_part_of_a_source_has_its_photos():
    whole = Held(np.arange(24, dtype=np.float32).reshape(4, 2, 1, 1, 3))
    part = activations.Part(whole, np.array([3, 1]))
    assert part.shape == (2, 2, 1, 1, 3)
    found = part.batch(np.array([0, 1, 0]), np.array([1, 0, 0]))
    np.testing.assert_array_equal(found, whole.array[[3, 1, 3], [1, 0, 0]])


class Held:
    """Activations in memory."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def batch(self, photos, views):
        return self.array[photos, views]


@pytest.fixture(scope="module")
def material():
    """Activations (24, 2, 8, 8, 6) and (9, 1, 8, 8, 6) whose classes differ by what is left and what is right."""
    rng = np.random.default_rng(1)

    def drawn(n, views):
        labels = np.arange(n) % 3
        array = rng.normal(0, 1, (n, views, 8, 8, 6)).astype(np.float32)
        array[labels == 1, :, :, :4, 0] += 2
        array[labels == 2, :, :, 4:, 0] += 2
        return Labelled(Held(array), labels, np.ones(n))

    return drawn(24, 2), drawn(9, 1)


HEAD = Head(np.random.default_rng(2).normal(0, 0.1, (5, 3)).astype(np.float32), np.zeros(3, np.float32))


def settings(**changes):
    values = {
        "epochs": 4, "batch_size": 8, "learning_rate": 0.02, "weight_decay": 0.01, "label_smoothing": 0.0, "seed": 0,
    }  # fmt: skip
    return UpperSettings(**{**values, **changes})


def begin():
    model = network()
    return model, Upper(cut(model, "last_stage").upper, HEAD)


def test_training_changes_the_upper_weights_and_no_statistics(material):
    train, val = material
    model, upper = begin()
    before = {weight.path: np.array(weight.numpy()) for weight in model.weights}
    np.testing.assert_array_equal(
        upper.features(val.source, 1)[:, 0], np.asarray(upper.model(val.source.array[:, 0], training=False))
    )
    states = list(upper.train(train, val, settings(epochs=12)))
    assert [state.epoch for state in states] == list(range(1, 13))
    changed = {path for path, value in before.items() for w in model.weights
               if w.path == path and not np.array_equal(w.numpy(), value)}  # fmt: skip
    assert {path.rpartition("/")[0].rpartition("/")[2] or path for path in changed} == {
        "two_conv", "two_bn", "two_branch",
    }  # fmt: skip
    assert not [path for path in changed if "moving" in path]
    history = states[-1].history
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    logits = upper.head().logits(upper.features(val.source, 1)[:, 0]).astype(float)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(9), val.labels]
    assert history[-1]["val_loss"] == pytest.approx(losses.mean(), rel=1e-4)
    assert history[-1]["val_accuracy"] == pytest.approx((logits.argmax(axis=1) == val.labels).mean())


@pytest.fixture(scope="module")
def whole(material):
    """The states of a training that nothing interrupts."""
    return list(begin()[1].train(*material, settings()))


def test_a_resumed_training_ends_with_the_same_bits(material, whole):
    train, val = material
    half = whole[1]
    stored = UpperState.restore(half.epoch, half.arrays(), list(half.history))
    resumed = list(begin()[1].train(train, val, settings(), stored))
    assert [state.epoch for state in resumed] == [3, 4]
    for name, value in whole[-1].arrays().items():
        np.testing.assert_array_equal(resumed[-1].arrays()[name], value)
    other = next(begin()[1].train(train, val, settings(seed=1)))
    assert not np.array_equal(other.weights[0], whole[0].weights[0])


def test_a_training_without_validation_photos_learns_the_same(material, whole):
    train, _val = material
    *_, last = begin()[1].train(train, None, settings())
    for name, value in whole[-1].arrays().items():
        np.testing.assert_array_equal(last.arrays()[name], value)
    assert list(last.history[0]) == ["epoch", "loss", "accuracy", "batch_size", "seconds"]


def no_room_for(upper, most, after=0):
    """Let the steps of `upper` raise what TensorFlow raises, for batches of more than `most` after so many steps."""
    import tensorflow as tf

    step, taken = upper._classifier.train_on_batch, []

    def limited(rows, *arguments):
        if len(rows) > most and len(taken) >= after:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        taken.append(len(rows))
        return step(rows, *arguments)

    upper._classifier.train_on_batch = limited


def test_a_batch_that_does_not_fit_is_halved(material):
    train, val = material
    upper, warnings = begin()[1], []
    no_room_for(upper, 2)
    *_, last = upper.train(train, val, settings(epochs=1), warn=warnings.append)
    assert warnings == [
        "8 photos at once do not fit in the memory; going on with batches of 4",
        "4 photos at once do not fit in the memory; going on with batches of 2",
    ]
    *_, small = begin()[1].train(train, val, settings(epochs=1, batch_size=2))
    for name, value in small.arrays().items():
        np.testing.assert_array_equal(last.arrays()[name], value)


def test_a_batch_that_no_longer_fits_is_halved_from_that_epoch_on_and_resumed_so(material, whole):
    train, val = material
    upper = begin()[1]
    no_room_for(upper, 4, after=4)  # the second step of the second epoch
    halved = list(upper.train(train, val, settings()))
    assert [row["batch_size"] for row in halved[-1].history] == [8, 4, 4, 4]
    np.testing.assert_array_equal(halved[0].weights[0], whole[0].weights[0])
    *_, resumed = begin()[1].train(train, val, settings(), halved[1])
    for name, value in halved[-1].arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[name], value)


def test_a_photo_that_does_not_fit_is_an_error(material):
    upper = begin()[1]
    no_room_for(upper, 0)
    with pytest.raises(FinetuneError, match="not even one photo fits in the memory") as caught:
        list(upper.train(*material, settings()))
    assert "image.size" in caught.value.remedy


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_is_for_the_steps_alone(material, whole, policy):
    train, val = material
    model, upper = begin()
    states = list(upper.train(train, val, settings(policy=policy)))
    last, exact = states[-1], whole[-1]
    assert {array.dtype for array in last.weights} == {np.dtype(np.float32)}
    assert last.history[-1]["loss"] != exact.history[-1]["loss"]
    assert last.history[-1]["loss"] == pytest.approx(exact.history[-1]["loss"], rel=0.1)
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
    measured = np.asarray(upper.model(val.source.array[:, 0], training=False))
    np.testing.assert_allclose(upper.features(val.source, 1)[:, 0], measured, rtol=1e-5)
    if policy == "mixed_float16":  # in which gradients below 6e-8 would be zero
        assert upper._classifier.optimizer.dynamic_scale > 1000
    *_, resumed = begin()[1].train(train, val, settings(policy=policy), states[-2])
    for name, value in last.arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[name], value)


def test_the_whole_network_with_a_frozen_part_learns_as_the_upper_part_does(photos):
    """As on a GPU, where photos go in, against the activations of the same photos."""
    labels, head = np.arange(9) % 3, HEAD
    model, other = network(), network()
    part, same = cut(model, "last_stage"), cut(other, "last_stage")
    whole, upper = Upper(part.whole, head, part.upper.layers), Upper(same.upper, head)
    frozen = [np.array(w) for w in part.lower.weights]

    def labelled(array):
        return Labelled(Held(array[:, None]), labels, np.ones(9))

    pixels, activations_of_them = labelled(photos), labelled(np.asarray(same.lower(photos)))
    few = settings(epochs=1, learning_rate=0.001)
    *_, from_photos = whole.train(pixels, pixels, few)
    *_, from_activations = upper.train(activations_of_them, activations_of_them, few)
    assert len(from_photos.weights) == len(from_activations.weights)
    for ours, theirs in zip(from_photos.weights, from_activations.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for before, weight in zip(frozen, part.lower.weights, strict=True):
        np.testing.assert_array_equal(before, np.array(weight))


def test_two_trainings_at_different_cuts_keep_their_own_weights(material):
    """The second one freezes what the first one had learn."""
    model = network()
    deep = Upper(cut(model, "last_two_stages").upper, HEAD)
    start = deep.weights()
    shallow = Upper(cut(model, "last_stage").upper, HEAD)
    assert len(shallow.weights()) < len(start)
    shallow.assign(tuple(array + 1 for array in shallow.weights()))
    deep.assign(start)
    for before, after in zip(start, deep.weights(), strict=True):
        np.testing.assert_array_equal(before, after)


def test_vectors_do_not_decay(material):
    """With a learning rate and a decay but no gradient, kernels shrink, and biases and BatchNorm stay as they are."""
    train, val = material
    zero = Labelled(train.source, train.labels, train.weights)
    model = network()
    silent = Head(np.zeros((5, 3), np.float32), np.zeros(3, np.float32))  # no gradient goes below this head
    upper = Upper(cut(model, "last_stage").upper, silent)
    before = upper.weights()
    next(upper.train(zero, val, settings(epochs=1, batch_size=24, weight_decay=0.5, learning_rate=0.1)))
    for start, end in zip(before[:-2], upper.weights()[:-2], strict=True):
        if start.ndim > 1:
            np.testing.assert_allclose(end, start * (1 - 0.1 * 0.5), rtol=1e-5)
        else:
            np.testing.assert_array_equal(end, start)


def test_a_diverging_training_says_so(material):
    train, val = material
    broken = Labelled(Held(train.source.array * np.float32(np.inf)), train.labels, train.weights)
    with pytest.raises(FinetuneError, match="diverged") as caught:
        list(begin()[1].train(broken, val, settings(epochs=1)))
    assert "fine_tuning.learning_rate" in caught.value.remedy


def test_the_ends_of_an_interpolation_are_the_models():
    start, end = (np.array([1.0, 2.0], np.float32),), (np.array([3.0, -2.0], np.float32),)
    np.testing.assert_array_equal(interpolated(start, end, 0.0)[0], start[0])
    np.testing.assert_array_equal(interpolated(start, end, 1.0)[0], end[0])
    np.testing.assert_array_equal(interpolated(start, end, 0.25)[0], [1.5, 1.0])


def scored(losses, training=0, refitted=False, folds=None):
    logits = np.zeros((len(losses), 2), np.float32)
    return candidates.Candidate(training, 1.0, refitted, logits, np.array(losses), 0.5, 1.0, folds)


def test_the_lowest_log_loss_wins():
    frozen = scored([1.0, 1.1, 0.9, 1.0], None)
    worse, better = scored([0.8, 0.7, 0.9, 0.8]), scored([0.3, 0.2, 0.4, 0.3])
    assert candidates.choose(frozen, [worse, better]) is better


def test_frozen_wins_what_may_be_chance():
    """Differences 2, -1, 1, -1, 0.4: mean 0.28, standard error 0.58."""
    frozen = scored([3.0, 1.0, 2.0, 1.0, 1.4], None)
    other = scored([1.0, 2.0, 1.0, 2.0, 1.0])
    gain, error = candidates.compared(frozen, other)
    assert (gain, error) == (pytest.approx(0.28), pytest.approx(np.sqrt(6.768 / 4 / 5)))
    assert candidates.choose(frozen, [other]) is frozen


def test_out_of_fold_a_gain_must_be_larger():
    """Differences 2, -1, 2, -1, 2, 1: mean 5/6, standard error 0.60; in 2 folds larger by the root of 1 + 2 / 1."""
    frozen, other = [3.0, 1.0, 3.0, 1.0, 3.0, 2.0], [1.0, 2.0, 1.0, 2.0, 1.0, 1.0]
    error = candidates.compared(scored(frozen, None), scored(other))[1]
    assert error == pytest.approx(np.std([2, -1, 2, -1, 2, 1], ddof=1) / np.sqrt(6))
    assert candidates.compared(scored(frozen, None, folds=2), scored(other, folds=2))[1] == pytest.approx(
        np.sqrt(3) * error
    )


def test_of_tuned_models_that_tie_the_one_with_the_new_head_is_kept():
    frozen = scored([3.0, 2.0, 3.0, 2.0], None)
    tuned, tied = scored([0.1, 0.2, 0.1, 0.2]), scored([0.3, 0.1, 0.1, 0.2], refitted=True)
    assert candidates.choose(frozen, [tuned, tied]) is tied
    better = scored([0.2, 0.1, 0.1, 0.2], training=1, refitted=True)
    assert candidates.choose(frozen, [tuned, tied, better]) is better
    worse = scored([0.5, 0.6, 0.5, 0.7], refitted=True)
    assert candidates.choose(frozen, [tuned, worse]) is tuned
    # It ties with the best, but not even with chance on its side does it beat the frozen model.
    uncertain = scored([0.1, 0.1, 0.1, 6.0], refitted=True)
    assert candidates.choose(frozen, [tuned, uncertain]) is tuned


def test_a_single_validation_photo_decides_nothing():
    frozen, other = scored([3.0], None), scored([0.1])
    assert candidates.choose(frozen, [other]) is frozen
    assert json.loads(json.dumps(other.to_json(frozen, kept=False), allow_nan=False))["gain_error"] is None


def test_a_gain_that_is_sure_and_tiny_is_not_worth_it():
    frozen = scored([1.0, 1.2, 0.8, 1.0], None)
    assert candidates.choose(frozen, [scored([0.995, 1.195, 0.795, 0.995])]) is frozen
    assert candidates.choose(frozen, [other := scored([0.985, 1.185, 0.785, 0.985])]) is other


def test_equal_models_stay_frozen():
    frozen = scored([1.0, 2.0], None)
    assert candidates.choose(frozen, [scored([1.0, 2.0])]) is frozen


def test_a_photo_takes_no_part_in_its_own_temperature():
    """Logits that are far too large: the plain loss is huge, and the temperature of the others makes it small."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    features = np.where(labels == 1, 1.0, -1.0)[:, None] * 50
    features[:6] *= -1
    head = Head(np.array([[-1.0, 1.0]], np.float32), np.zeros(2, np.float32))
    with_temperature, without = (
        candidates.Validation(labels, np.arange(60), calibrated).candidate(head.logits(features.astype(np.float32)))
        for calibrated in (True, False)
    )
    least = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))  # of a model that is right nine times in ten, and knows it
    assert without.log_loss > 3 > 0.6 > with_temperature.log_loss > least
    assert with_temperature.temperature > 10
    assert without.temperature == 1
    assert without.accuracy == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("section", "photos", "expected"),
    [
        ({}, 2_000, [("last_stage", 0.001, 20), ("last_stage", 0.0003, 6)]),
        ({}, 2_001, [("last_stage", 0.001, 10), ("last_stage", 0.0003, 4)]),
        ({}, 30_000, [("last_stage", 0.001, 5)]),
        ({"epochs": 7}, 500, [("last_stage", 0.001, 7), ("last_stage", 0.0003, 7)]),
        ({"learning_rate": 0.01}, 500, [("last_stage", 0.01, 20)]),
        ({"unfreeze": "last_two_stages"}, 500, [("last_two_stages", 0.001, 20)]),
        ({"unfreeze": "all", "epochs": 3, "learning_rate": 0.1}, 10, [("all", 0.1, 3)]),
    ],
)
def test_the_list_of_trainings_depends_on_config_and_photos_alone(section, photos, expected):
    found = plan.trials(FineTuningConfig(**section), photos)
    assert [(trial.unfreeze, trial.learning_rate, trial.epochs) for trial in found] == expected


@pytest.mark.parametrize(
    ("limit", "storage", "views", "size"),
    [
        (10**9, "float16", 4, 2 * 384 * 100 * 4 + 4 * 384 * 20),
        (2 * 384 * 100 * 3 + 4 * 384 * 20, "float16", 3, 2 * 384 * 100 * 3 + 4 * 384 * 20),
        (2 * 384 * 100 + 4 * 384 * 20 - 1, "recomputed", 4, 0),
        (0, "recomputed", 4, 0),
    ],
)
def test_activations_are_stored_within_the_limit(limit, storage, views, size):
    found = plan.store(cut(network(), "last_stage"), 20, "cpu", Counts(100, 4, 20), limit)
    assert (found.storage, found.views, found.bytes) == (storage, views, size)


@pytest.mark.parametrize(
    ("stored", "photos", "views", "expected"),
    [(8, 269, 8, 8), (2, 269, 8, 2), (20, 269, 8, 8), (7, 30_000, 8, 3), (1, 500_000, 1, 1)],
)
def test_the_head_is_fitted_again_on_no_more_rows_than_needed(stored, photos, views, expected):
    assert plan.views_again(plan.Store("float16", stored, 0), Counts(photos, views, 1)) == expected


def test_pixels_are_stored_as_they_are():
    assert plan.store(cut(network(), "all"), 20, "cpu", Counts(10, 2, 1), 10**9).storage == "uint8"


@pytest.mark.parametrize(("configured", "views"), [(1, 1), (2, 20), (30, 30)])
def test_on_a_gpu_every_epoch_has_views_of_its_own(configured, views):
    found = plan.store(cut(network(), "last_stage"), 20, "gpu", Counts(100, configured, 20), 10**9)
    assert (found.storage, found.views, found.bytes) == ("none", views, 0)


@pytest.mark.parametrize("value", ["auto", "{}"])
def test_auto_is_the_section_with_its_defaults(tmp_path, value):
    loaded = load_config(None, [f"data.train={tmp_path}", f"fine_tuning={value}"])
    assert loaded.fine_tuning == FineTuningConfig()
    written = loaded.dump(tmp_path)
    assert written["fine_tuning"]["unfreeze"] == "auto"
    (tmp_path / "x.yaml").write_text(json.dumps(written))
    assert load_config(tmp_path / "x.yaml").fine_tuning == loaded.fine_tuning


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("fine_tuning=deep", "`fine_tuning` is 'deep': write its keys below it, or auto, or null"),
        ("fine_tuning.epoch=3", "its name is `fine_tuning.epochs`"),
        ("fine_tuning.lr=3", "its name is `fine_tuning.learning_rate`"),
        ("fine_tuning.unfreez=all", "did you mean `fine_tuning.unfreeze`?"),
        ("fine_tuning.epochs=0", "`fine_tuning.epochs` is 0: input should be greater than or equal to 1"),
        ("freeze=10", "its name is `fine_tuning.unfreeze`"),
    ],
)
def test_wrong_keys_are_named(tmp_path, override, text):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"data.train={tmp_path}", override])
    assert text in caught.value.problem
