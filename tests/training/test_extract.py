"""The feature pass: every view once, through the cache, in order, whatever is missing, bad or changed."""

import hashlib
import resource
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune_cli.cache.features import FeatureStore
from finetune_cli.duplicates.thumbnails import SIDE
from finetune_cli.engines.engine import Local
from finetune_cli.errors import DataError, GateError, StorageError
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import Sample
from finetune_cli.training import extract as features

WIDTH = 5


class FakeAugmenter:
    """View i is the photo with i added to every pixel."""

    def __init__(self, views):
        self.views = views

    def key(self, view):
        return f"plus {view}" if view else ""

    def view(self, image, digest, view):
        return image + np.uint8(view)


class FakeRuntime:
    """Features that tell which pixels they were made from."""

    device = "cpu"
    precision = "float32"

    def __init__(self):
        self.photos = 0
        self.lock = threading.Lock()

    def infer(self, photos):
        assert photos.dtype == np.uint8
        with self.lock:
            self.photos += len(photos)
        means = photos.reshape(len(photos), -1).astype(np.float64).mean(axis=1)
        return (means[:, None] * np.arange(1, WIDTH + 1)).astype(np.float32)


def photos(folder, count):
    made = []
    for i in range(count):
        path = folder / f"{i}.png"
        Image.new("RGB", (40, 30), (5 * i + 1, 5 * i + 1, 5 * i + 1)).save(path)
        made.append(Sample(path, path.name, i % 2, hashlib.sha256(path.read_bytes()).hexdigest()))
    return made


def expected(i, view):
    return np.float32(5 * i + 1 + view) * np.arange(1, WIDTH + 1, dtype=np.float32)


@pytest.fixture
def run(tmp_path):
    runtime = FakeRuntime()
    advanced = []

    def extract(
        samples,
        views=3,
        fingerprint="f",
        precision="float32",
        batch_size=4,
        thumbnails=False,
        first=(),
        prove=lambda: None,
    ):
        runtime.photos = 0
        advanced.clear()
        request = features.FeatureRequest(
            ImageSettings(size=32), fingerprint, precision, FakeAugmenter(views) if views > 1 else None, thumbnails
        )
        with FeatureStore(tmp_path / "cache", prove=prove) as store:
            resources = features.Resources(store, lambda _p: runtime, tmp_path, Local(3), batch_size, first)
            return features.extract(samples, request, WIDTH, resources, advanced.append)

    extract.runtime, extract.advanced = runtime, advanced
    return extract


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_view_is_where_it_belongs(run, tmp_path, batch_size):
    found = run(photos(tmp_path, 10), batch_size=batch_size)
    assert found.array.shape == (10, 3, WIDTH)
    for i in range(10):
        for view in range(3):
            np.testing.assert_array_equal(found.array[i, view], expected(i, view))
    assert (found.computed, found.cached) == (30, 0)
    assert sum(run.advanced) == 10


def test_nothing_is_kept_of_a_backbone_that_is_not_proven(run, tmp_path):
    def refuse():
        raise GateError("the features differ", "take another backbone")

    samples = photos(tmp_path, 6)
    with pytest.raises(GateError):
        run(samples, prove=refuse)
    asked = []
    assert run(samples, prove=lambda: asked.append(1)).computed == 18
    assert asked
    run(samples, prove=refuse)  # nothing new to keep


def test_a_second_pass_computes_nothing(run, tmp_path):
    samples = photos(tmp_path, 6)
    first = run(samples)
    second = run(samples)
    assert run.runtime.photos == 0
    np.testing.assert_array_equal(first.array, second.array)
    assert (second.computed, second.cached) == (0, 18)
    assert sum(run.advanced) == 6


def test_only_what_is_new_is_computed(run, tmp_path):
    samples = photos(tmp_path, 8)
    run(samples[:5], views=2)
    found = run(samples, views=3)
    assert run.runtime.photos == 5 * 1 + 3 * 3
    assert (found.computed, found.cached) == (14, 10)
    np.testing.assert_array_equal(found.array[6, 2], expected(6, 2))


def test_thumbnails_come_with_the_first_view_and_from_the_cache(run, tmp_path):
    samples = photos(tmp_path, 6)
    broken = tmp_path / "broken.png"
    broken.write_bytes(samples[0].path.read_bytes()[:60])
    bad = Sample(broken, broken.name, 0, hashlib.sha256(broken.read_bytes()).hexdigest())
    for again in (False, True):
        found = run([*samples[:2], bad, *samples[2:], samples[1]], views=1, thumbnails=True)
        assert [photo.path for photo in found.bad] == [broken]
        assert found.thumbnails.shape == (7, SIDE, SIDE)
        assert [set(row.ravel().tolist()) for row in found.thumbnails] == [{5 * i + 1} for i in (0, 1, 2, 3, 4, 5, 1)]
        assert (found.computed, found.cached) == ((0, 6) if again else (6, 0))
    assert run(samples).thumbnails.size == 0


def test_thumbnails_of_photos_whose_features_are_known_need_no_inference(run, tmp_path):
    samples = photos(tmp_path, 4)
    run(samples)
    found = run(samples, thumbnails=True)
    assert run.runtime.photos == 0
    assert (found.computed, found.cached) == (0, 12)
    assert found.thumbnails[3].max() == 16


def test_view_0_of_an_earlier_pass_is_not_computed_again(run, tmp_path):
    samples = photos(tmp_path, 6)
    first = run(samples[:4], views=1)
    (tmp_path / "cache" / "features.sqlite").unlink()
    found = run(samples[::-1], first=[first])
    assert run.runtime.photos == 4 * 2 + 2 * 3
    assert (found.computed, found.cached) == (14, 0)
    for row, i in zip(found.array, range(5, -1, -1), strict=True):
        for view in range(3):
            np.testing.assert_array_equal(row[view], expected(i, view))


@pytest.mark.parametrize("change", [{"fingerprint": "g"}, {"precision": "bfloat16"}])
def test_another_backbone_or_precision_shares_nothing(run, tmp_path, change):
    samples = photos(tmp_path, 2)
    run(samples)
    run(samples, **change)
    assert run.runtime.photos == 6


def test_another_resize_or_size_shares_nothing():
    key = features.FeatureRequest(ImageSettings(), "f", "float32").key("00", 0)
    for settings in (ImageSettings(size=128), ImageSettings(resize="pad")):
        assert features.FeatureRequest(settings, "f", "float32").key("00", 0) != key
    assert features.FeatureRequest(ImageSettings(), "f", "float32", FakeAugmenter(4)).key("00", 0) == key


def test_a_bad_photo_is_left_out_and_costs_nothing_else(run, tmp_path):
    samples = photos(tmp_path, 7)
    bad = samples[3].path
    data = bad.read_bytes()[:-40]
    bad.write_bytes(data)
    samples[3] = replace(samples[3], digest=hashlib.sha256(data).hexdigest())
    found = run(samples)
    assert [photo.path for photo in found.bad] == [bad]
    assert found.bad[0].reason
    assert len(found.samples) == 6
    assert found.array.shape == (6, 3, WIDTH)
    np.testing.assert_array_equal(found.array[3, 1], expected(4, 1))
    assert sum(run.advanced) == 7
    assert (found.computed, found.cached) == (18, 0)
    again = run(samples)
    assert len(again.bad) == 1
    assert again.cached == 18


@pytest.mark.parametrize("cached", [False, True])
def test_copies_of_a_photo_share_its_features(run, tmp_path, cached):
    samples = photos(tmp_path, 3)
    for name, source in (("copy-a.png", 0), ("copy-b.png", 2), ("copy-c.png", 0)):
        data = samples[source].path.read_bytes()
        (tmp_path / name).write_bytes(data)
        samples.append(Sample(tmp_path / name, name, source % 2, hashlib.sha256(data).hexdigest()))
    if cached:
        run(samples[:1])
    found = run(samples)
    for row, i in enumerate((0, 1, 2, 0, 2, 0)):
        for view in range(3):
            np.testing.assert_array_equal(found.array[row, view], expected(i, view))
    assert run.runtime.photos == (6 if cached else 9)
    assert (found.computed, found.cached) == ((6, 3) if cached else (9, 0))
    assert sum(run.advanced) == 6


def test_copies_of_a_bad_photo_are_bad(run, tmp_path):
    samples = photos(tmp_path, 2)
    data = b"\xff\xd8\xff nothing"
    for name in ("x.jpg", "y.jpg"):
        (tmp_path / name).write_bytes(data)
        samples.append(Sample(tmp_path / name, name, 0, hashlib.sha256(data).hexdigest()))
    assert [photo.name for photo in run(samples).bad] == ["x.jpg", "y.jpg"]


def test_an_interrupted_pass_keeps_what_it_computed(run, tmp_path, monkeypatch):
    samples = photos(tmp_path, 8)
    (tmp_path / "7.png").write_bytes(b"changed")
    with pytest.raises(DataError):
        run(samples, views=1, batch_size=1)
    found = run(samples[:7], views=1)
    assert found.cached >= 1


def test_a_missing_photo_is_a_bad_one(run, tmp_path):
    samples = photos(tmp_path, 2)
    samples[1].path.unlink()
    assert "there is no such file" in run(samples).bad[0].reason


def test_a_photo_that_changes_meanwhile_stops_the_pass(run, tmp_path):
    samples = photos(tmp_path, 2)
    Image.new("RGB", (9, 9)).save(samples[1].path)
    with pytest.raises(DataError, match="changed while"):
        run(samples)


def test_no_photos(run):
    assert run([]).array.shape == (0, 3, WIDTH)


def test_no_room_for_the_scratch_file_is_an_error_at_once(tmp_path):
    with pytest.raises(StorageError, match="no room for"):
        features.scratch_array(tmp_path, (1 << 40, 1000))
    with pytest.raises(StorageError, match="no room for"):
        features.scratch_array(tmp_path / "absent", (2, 2))


def test_the_scratch_file_has_no_name(tmp_path):
    array = features.scratch_array(tmp_path, (3, 4))
    assert not list(tmp_path.iterdir())
    assert not array.any()
    array[1, 2] = 7
    assert array.sum() == 7


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux tells the memory of a process this way")
def test_released_memory_is_given_back_and_no_number_lost(tmp_path):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    array = features.scratch_array(tmp_path, (20_000, 1_000))
    array[:] = np.arange(20_000)[:, None]
    before = resident()
    features.release(array)
    assert resident() < before - 70_000_000
    np.testing.assert_array_equal(array[:, 500], np.arange(20_000))
    features.release(np.zeros(3, np.float32))  # nothing to give back
