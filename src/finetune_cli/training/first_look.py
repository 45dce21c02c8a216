"""The first reading of a photo in a store: its bytes, its facts and its pixels, for whatever is computed of them.

A store is slow and paid by the request, so the reading that finds out a photo's digest is the one that computes its
features, too. The features go into the cache under that digest, where the steps that follow find them.
"""

import io

import numpy as np
from numpy.typing import NDArray

from finetune_cli.cache.digests import Facts
from finetune_cli.photos import objects, scan
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import Sample
from finetune_cli.places import Address


def read(sample: Sample, settings: ImageSettings) -> tuple[str, NDArray[np.uint8], NDArray[np.float32]]:
    """Read `sample`, which has no digest yet: its digest, its pixels, and its facts as `unpacked` reads them.

    Raises `BadImage` when it cannot be read or decoded, and `StorageError`.
    """
    assert isinstance(sample.path, Address)
    data, version = objects.read(sample.path)
    pixels = scan.decode_bytes(sample, data, settings)
    facts = objects.facts_of(io.BytesIO(data))
    return facts.digest, pixels, packed(facts, version)


def packed(facts: Facts, version: str | None) -> NDArray[np.float32]:
    """Facts and version as a row like those of features: their bytes, not their numbers."""
    text = f"{facts.digest} {facts.width} {facts.height} {version or ''}".encode()
    return np.frombuffer(text.ljust(-len(text) % 4 + len(text)), "<f4")


def unpacked(row: NDArray[np.float32]) -> tuple[Facts, str | None]:
    """What `packed` was given."""
    digest, width, height, *version = row.tobytes().decode().split()
    return Facts(digest, int(width), int(height)), " ".join(version) or None
