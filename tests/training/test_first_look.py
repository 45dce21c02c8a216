"""The first reading of photos in a store gives their facts, and the features that the feature pass would compute."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from finetune_cli import storage
from finetune_cli.cache.digests import Facts
from finetune_cli.cache.features import FeatureStore
from finetune_cli.engines.engine import Local
from finetune_cli.errors import StorageError
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.listing import ListedPhoto
from finetune_cli.photos.scan import Sample
from finetune_cli.places import Address
from finetune_cli.training import extract, first_look


class Runtime:
    """Features that tell which pixels they were made from."""

    def infer(self, photos):
        means = photos.reshape(len(photos), -1).astype(np.float32).mean(axis=1)
        return means[:, None] * np.arange(1, 4, dtype=np.float32)


class Augmenter:
    """View i is the photo with i and with the first byte of the digest added."""

    views = 3

    def key(self, view):
        return f"plus {view}" if view else ""

    def view(self, image, digest, view):
        return image + np.uint8(view) + np.uint8(int(digest[:1], 16))


@pytest.fixture
def store(monkeypatch, tmp_path):
    """Address -> content; the last one is no photo. `reads` counts."""
    content, reads = {}, Counter()
    for i in range(7):
        Image.new("RGB", (40, 30), (9 * i, i, 200)).save(tmp_path / "x.png")
        content[f"s3://b/{i}.png"] = (tmp_path / "x.png").read_bytes()
    content["s3://b/7.png"] = b"no photo"

    def read_version(address, most=0):
        reads[address] += 1
        return content[address], f"v {len(content[address])} 1"

    monkeypatch.setattr(storage, "read_version", read_version)
    monkeypatch.setattr(storage, "read", lambda address, most=0: read_version(address)[0])
    return content, reads


def request(thumbnails=True):
    return extract.FeatureRequest(ImageSettings(size=32), "f", "float32", Augmenter(), thumbnails)


def resources(cache, folder):
    return extract.Resources(cache, lambda _precision: Runtime(), folder, Local(2), 4)


def test_facts_and_versions_come_back():
    facts = Facts(hashlib.sha256(b"x").hexdigest(), 4000, 3)
    for version in (None, "abc 7 1795579296", "1"):
        assert first_look.unpacked(first_look.packed(facts, version)) == (facts, version)


def test_one_reading_gives_facts_and_features(store, tmp_path):
    content, reads = store
    listed = [ListedPhoto(address, address[-5:], "a") for address in content]
    with FeatureStore(tmp_path / "cache") as cache:
        found = list(extract.look(listed, request(), resources(cache, tmp_path)))
    assert set(reads.values()) == {1}
    assert found[-1] == ("not an image in a supported format", None)
    samples = []
    for (facts, version), (address, data) in zip(found[:-1], content.items(), strict=False):
        assert facts == Facts(hashlib.sha256(data).hexdigest(), 40, 30)
        assert version == f"v {len(data)} 1"
        samples.append(Sample(Address(address), address, 0, facts.digest))
    passes = []
    for name in ("cache", "another"):
        with FeatureStore(tmp_path / name) as cache:
            passes.append(extract.extract(samples, request(), 3, resources(cache, tmp_path), lambda _n: None))
    looked, computed = passes
    assert (looked.computed, looked.cached) == (0, 21)
    assert (computed.computed, computed.cached) == (21, 0)
    np.testing.assert_array_equal(looked.array, computed.array)
    np.testing.assert_array_equal(looked.thumbnails, computed.thumbnails)


def test_what_was_read_before_a_fault_is_kept(store, tmp_path, monkeypatch):
    content, _reads = store
    listed = [ListedPhoto(address, address[-5:], "a") for address in list(content)[:7]]
    read = storage.read_version

    def failing(address, most=0):
        if address == "s3://b/5.png":
            raise StorageError("the store does not answer", "try again")
        return read(address)

    monkeypatch.setattr(storage, "read_version", failing)
    yielded = []
    with FeatureStore(tmp_path / "cache") as cache:
        with pytest.raises(StorageError):
            yielded.extend(found for found in extract.look(listed, request(), resources(cache, tmp_path)))
        keys = [request().key(hashlib.sha256(data).hexdigest(), 0) for data in content.values()]
        assert len(cache.has(keys)) >= 4


def test_nothing_is_kept_of_a_backbone_that_is_not_proved(store, tmp_path):
    content, _reads = store
    listed = [ListedPhoto(next(iter(content)), "0.png", "a")]

    def refuse():
        raise StorageError("not proved", "")

    with FeatureStore(tmp_path / "cache", prove=refuse) as cache:
        with pytest.raises(StorageError, match="not proved"):
            list(extract.look(listed, request(), resources(cache, tmp_path)))
        digest = hashlib.sha256(next(iter(content.values()))).hexdigest()
        assert not cache.has([request().key(digest, 0)])
        assert not cache.has([replace(request(), thumbnails=False).key(digest, 1)])
