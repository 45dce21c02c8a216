"""Views: the draws are those of Keras, what the fast warp makes of it, and that nobody notices the drawing."""

import hashlib
import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune_cli.config.generator import FILL_MODES, GENERATOR_DEFAULTS, REFUSED, problems
from finetune_cli.errors import ConfigError
from finetune_cli.photos.augment import Augmenter, Transform

SIZE = 96

# Each augmenting argument alone, in every form that Keras accepts, mild and wild; then together.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "horizontal_flip": {"horizontal_flip": True},
    "vertical_flip": {"vertical_flip": True},
    "both_flips": {"horizontal_flip": True, "vertical_flip": True},
    "width_shift_fraction": {"width_shift_range": 0.2},
    "width_shift_pixels": {"width_shift_range": 30},
    "width_shift_float_pixels": {"width_shift_range": 30.0},
    "width_shift_list": {"width_shift_range": [3, 17, 250]},
    "height_shift_fraction": {"height_shift_range": 0.2},
    "height_shift_pixels": {"height_shift_range": 30},
    "height_shift_list": {"height_shift_range": [0.1, 0.3]},
    "rotation": {"rotation_range": 20},
    "rotation_all_round": {"rotation_range": 180},
    "zoom": {"zoom_range": 0.2},
    "zoom_low_high": {"zoom_range": [0.3, 3.0]},
    "zoom_high_low": {"zoom_range": [1.3, 0.9]},
    "shear": {"shear_range": 15},
    "shear_wild": {"shear_range": 60},
    "brightness": {"brightness_range": [0.5, 1.5]},
    "brightness_wild": {"brightness_range": [0.0, 4.0]},
    "channel_shift": {"channel_shift_range": 20},
    "channel_shift_wild": {"channel_shift_range": 200.0},
    "cval": {"width_shift_range": 0.5, "cval": 127.4},
    "cval_toned": {"width_shift_range": 0.5, "cval": 200, "brightness_range": [0.5, 2], "channel_shift_range": 30},
    "classical": {"horizontal_flip": True, "width_shift_range": 0.2, "height_shift_range": 0.2},
    "everything": {
        "horizontal_flip": True,
        "vertical_flip": True,
        "width_shift_range": 0.2,
        "height_shift_range": 0.3,
        "rotation_range": 30,
        "zoom_range": 0.3,
        "shear_range": 20,
        "brightness_range": [0.4, 2.0],
        "channel_shift_range": 50,
        "cval": 99,
    },
}


def picture() -> NDArray[np.uint8]:
    """A photo at its hardest: fine noise, sharp edges, a ramp, all grey levels."""
    rng = np.random.default_rng(7)
    ramp = np.linspace(0, 255, SIZE)[:, None, None] + np.linspace(-60, 60, SIZE)[None, :, None]
    pixels = ramp + rng.normal(0, 40, (SIZE, SIZE, 3))
    pixels[20:50, 30:80] = [250, 30, 90]
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def generator_class() -> Any:
    from tensorflow.keras.preprocessing.image import ImageDataGenerator

    return ImageDataGenerator


# Keras calls affine_transform by a name that SciPy has moved; this package does not call it at all.
scipy_moved = pytest.mark.filterwarnings("ignore:.*scipy.ndimage.interpolation:DeprecationWarning")


@scipy_moved
@pytest.mark.parametrize("fill_mode", FILL_MODES)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_equals_the_generators_own_transform(name: str, fill_mode: str, generator_class: Any) -> None:
    arguments = {**ARGUMENTS[name], "fill_mode": fill_mode}
    augmenter, generator, image = Augmenter(arguments, 4, 0, SIZE), generator_class(**arguments), picture()
    changed = 0
    for number in range(12):
        transform = augmenter.draw(f"photo {number}", 1)
        wanted = generator.apply_transform(image.astype(np.float32), asdict(transform))
        seen = augmenter.apply(image, transform)
        assert seen.dtype == np.uint8
        assert seen.shape == image.shape
        assert np.abs(seen - wanted).mean() < 1.0
        changed += not np.array_equal(seen, image)
    assert changed > 0


@scipy_moved
@pytest.mark.parametrize("fill_mode", FILL_MODES)
def test_equals_the_generators_own_transform_on_photos(fill_mode: str, generator_class: Any, shared_data: Path) -> None:
    from PIL import Image

    arguments = {**ARGUMENTS["everything"], "fill_mode": fill_mode}
    augmenter, generator = Augmenter(arguments, 4, 0, 150), generator_class(**arguments)
    for path in sorted((shared_data / "scenes" / "train" / "forest").iterdir())[:5]:
        image = np.asarray(Image.open(path).convert("RGB").resize((150, 150)))
        transform = augmenter.draw(path.name, 1)
        wanted = generator.apply_transform(image.astype(np.float32), asdict(transform))
        assert np.abs(augmenter.apply(image, transform) - wanted).mean() < 1.0


def test_flips_and_whole_pixel_shifts_are_exact() -> None:
    image = picture()
    augmenter = Augmenter({"horizontal_flip": True, "fill_mode": "constant", "cval": 9}, 4, 0, SIZE)
    assert np.array_equal(augmenter.apply(image, Transform(flip_horizontal=True)), image[:, ::-1])
    assert np.array_equal(augmenter.apply(image, Transform(flip_vertical=True)), image[::-1])
    assert np.array_equal(
        augmenter.apply(image, Transform(flip_horizontal=True, flip_vertical=True)), image[::-1, ::-1]
    )
    shifted = augmenter.apply(image, Transform(tx=10, ty=-4))
    wanted = np.full_like(image, 9)
    wanted[4:, :-10] = image[:-4, 10:]
    assert np.array_equal(shifted, wanted)


def dot() -> NDArray[np.uint8]:
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    image[SIZE // 2, SIZE // 2] = 255
    return image


def position(image: NDArray[Any]) -> tuple[int, int]:
    """Row and column of the brightest pixel."""
    row, column = np.unravel_index(np.argmax(image[..., 0]), image.shape[:2])
    return int(row), int(column)


def test_shifts_go_the_way_that_their_names_say() -> None:
    centre = SIZE // 2
    for number in range(8):
        wide = Augmenter({"width_shift_range": [10]}, 2, 0, SIZE).view(dot(), str(number), 1)
        high = Augmenter({"height_shift_range": [10]}, 2, 0, SIZE).view(dot(), str(number), 1)
        assert position(wide) in {(centre, centre - 10), (centre, centre + 10)}
        assert position(high) in {(centre - 10, centre), (centre + 10, centre)}


@scipy_moved
def test_keras_still_swaps_the_shifts(generator_class: Any) -> None:
    """When this fails, Keras is fixed: say so where `augment.py` describes the swap."""
    centre = SIZE // 2
    generator = generator_class(width_shift_range=[10])
    moved = generator.apply_transform(dot().astype(np.float32), generator.get_random_transform((SIZE, SIZE, 3), seed=1))
    assert position(moved) in {(centre - 10, centre), (centre + 10, centre)}


def test_whole_numbers_lists_and_fractions_mean_what_keras_says() -> None:
    def drawn(value: Any) -> set[float]:
        augmenter = Augmenter({"width_shift_range": value}, 2, 0, 200)
        return {augmenter.draw(str(number), 1).tx for number in range(200)}

    assert drawn(3) == {-2, -1, 0, 1, 2}
    assert drawn([5, 20]) == {-20, -5, 5, 20}
    assert drawn([0.1, 0.5]) == {-100, -20, 20, 100}
    fractions, pixels = drawn(0.1), drawn(3.0)
    assert max(fractions) <= 20
    assert max(fractions) > 18
    assert max(pixels) <= 3
    assert max(pixels) > 2.7
    assert any(value != round(value) for value in pixels)


def test_draws_come_from_seed_digest_and_view_alone() -> None:
    augmenter = Augmenter({"rotation_range": 30}, 4, 5, SIZE)
    expected = np.random.RandomState(int.from_bytes(hashlib.sha256(b"5/abc/2").digest()[:4], "big")).uniform(-30, 30)
    assert augmenter.draw("abc", 2).theta == expected
    augmenter.draw("other", 1)
    assert augmenter.draw("abc", 2).theta == expected
    others = [
        augmenter.draw("abc", 1),
        augmenter.draw("abd", 2),
        Augmenter({"rotation_range": 30}, 4, 6, SIZE).draw("abc", 2),
    ]
    assert all(other.theta != expected for other in others)


def test_threads_draw_what_one_thread_draws() -> None:
    augmenter = Augmenter(ARGUMENTS["everything"], 4, 0, SIZE)
    alone = [augmenter.draw(str(number), 1) for number in range(2000)]
    fresh = Augmenter(ARGUMENTS["everything"], 4, 0, SIZE)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda number: fresh.draw(str(number), 1), range(2000)))
    assert together == alone


def test_threads_apply_what_one_thread_applies() -> None:
    augmenter, image = Augmenter(ARGUMENTS["everything"], 4, 0, SIZE), picture()
    alone = [augmenter.view(image, str(number), 1) for number in range(100)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda number: augmenter.view(image, str(number), 1), range(100)))
    assert np.array_equal(together, alone)


def test_numpys_global_state_is_left_alone() -> None:
    augmenter = Augmenter(ARGUMENTS["everything"], 4, 0, SIZE)
    legacy = np.random.mtrand._rand  # what np.random.normal and its like draw from
    legacy.seed(3)
    wanted = legacy.normal(size=5)
    legacy.seed(3)
    first = legacy.normal()  # leaves a second normal value waiting in the state
    augmenter.draw("abc", 1)
    assert np.array_equal([first, *legacy.normal(size=4)], wanted)


def test_view_0_is_the_photo_itself() -> None:
    image = picture()
    before = image.copy()
    augmenter = Augmenter({"rotation_range": 30}, 3, 0, SIZE)
    assert augmenter.view(image, "abc", 0) is image
    assert not np.array_equal(augmenter.view(image, "abc", 1), image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
    ("arguments", "active"),
    [
        ({}, False),
        (GENERATOR_DEFAULTS, False),
        ({"fill_mode": "wrap", "cval": 9}, False),
        ({"zoom_range": [1.0, 1.0]}, False),
        ({"width_shift_range": [0]}, False),
        ({"zoom_range": 0.1}, True),
        ({"height_shift_range": [0, 3]}, True),
        ({"brightness_range": [0.9, 1.1]}, True),
        ({"vertical_flip": True}, True),
    ],
)
def test_without_an_active_transform_there_is_one_view(arguments: dict[str, Any], active: bool) -> None:
    augmenter = Augmenter(arguments, 7, 0, SIZE)
    assert augmenter.active is active
    assert augmenter.views == (7 if active else 1)


def test_another_number_of_views_leaves_each_view_as_it_is() -> None:
    few = Augmenter({"zoom_range": 0.1, "fill_mode": "wrap"}, 4, 3, SIZE)
    many = few.with_views(9)
    assert (few.views, many.views) == (4, 9)
    assert [many.key(view) for view in range(9)][:4] == [few.key(view) for view in range(4)]
    assert many.draw("abc", 3) == few.draw("abc", 3)
    assert Augmenter({}, 4, 3, SIZE).with_views(9).views == 1


def test_keys_tell_views_apart() -> None:
    plain = Augmenter({"zoom_range": 0.1}, 4, 0, SIZE)
    assert plain.key(0) == ""
    assert plain.key(1) == Augmenter({**GENERATOR_DEFAULTS, "zoom_range": 0.1}, 9, 0, SIZE).key(1)
    different = {
        plain.key(1),
        plain.key(2),
        Augmenter({"zoom_range": 0.1}, 4, 1, SIZE).key(1),
        Augmenter({"zoom_range": 0.2}, 4, 0, SIZE).key(1),
        Augmenter({"zoom_range": 0.1, "fill_mode": "wrap"}, 4, 0, SIZE).key(1),
        Augmenter({"width_shift_range": 2}, 4, 0, SIZE).key(1),
        Augmenter({"width_shift_range": 2.0}, 4, 0, SIZE).key(1),
    }
    assert len(different) == 7


def test_every_argument_of_the_generator_is_taken_or_refused(generator_class: Any) -> None:
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(generator_class.__init__).parameters.items()
        if name != "self"
    }
    assert not GENERATOR_DEFAULTS.keys() & REFUSED.keys()
    assert GENERATOR_DEFAULTS.keys() | REFUSED.keys() == parameters.keys()
    assert {name: parameters[name] for name in GENERATOR_DEFAULTS} == GENERATOR_DEFAULTS


@pytest.mark.parametrize("name", REFUSED)
def test_refused_arguments_say_why(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` is refused: ") as caught:
        Augmenter({name: 1}, 4, 0, SIZE)
    assert REFUSED[name] in caught.value.problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotation": 3}, "`rotation` is unknown; known are: horizontal_flip, "),
        ({"fill_mode": "mirror"}, "`fill_mode` is 'mirror', not one of nearest, constant, reflect, wrap"),
        ({"cval": 300}, "`cval` is 300, not a grey level between 0 and 255"),
        ({"zoom_range": 1.5}, "`zoom_range` is 1.5: the smallest factor, -0.5, must be above 0"),
        ({"zoom_range": [2, 0]}, r"`zoom_range` is \[2, 0\]: the smallest factor, 0, must be above 0"),
        ({"brightness_range": [-1, 1]}, r"`brightness_range` is \[-1, 1\]: factors below 0 have no meaning"),
    ],
)
def test_senseless_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augmenter(arguments, 4, 0, SIZE)


def test_all_problems_are_reported_at_once() -> None:
    assert len(problems({"rescale": 2, "cval": -1, "zoom_range": 0.2, "hflip": True})) == 3


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_draws_are_those_of_keras_to_the_last_bit(generator_class: Any, name: str) -> None:
    generator, augmenter = generator_class(**ARGUMENTS[name]), Augmenter(ARGUMENTS[name], 2, 0, SIZE)
    state = np.random.mtrand._rand.get_state()
    try:
        for number in range(50):
            seed = int.from_bytes(hashlib.sha256(f"0/{number}/1".encode()).digest()[:4], "big")
            keras = generator.get_random_transform((SIZE, SIZE, 3), seed=seed)
            keras["tx"], keras["ty"] = keras["ty"], keras["tx"]
            assert asdict(augmenter.draw(str(number), 1)) == keras
    finally:
        np.random.mtrand._rand.set_state(state)


def test_a_draw_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from finetune_cli.photos.augment import Augmenter\n"
        "Augmenter({'rotation_range': 3}, 4, 0, 224).draw('abc', 1)\n"
        "print(sorted({'tensorflow', 'keras', 'scipy', 'cv2', 'PIL'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
