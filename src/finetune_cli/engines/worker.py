"""What runs in a worker process of a cluster: it proves that it computes what the driver computes, and then does it.

The driver asks in this order: `versions`, `prepare`, and then `run` for one block of items after another.
"""

import contextlib
import hashlib
import os
import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from finetune_cli import __version__, storage
from finetune_cli.engines.engine import Recipe, Work
from finetune_cli.errors import FinetuneError
from finetune_cli.parallel import ordered_map

# What decodes, augments and computes features.
_PACKAGES = ("numpy", "opencv-python-headless", "openvino", "pillow", "pillow-heif")


@dataclass(frozen=True)
class Place:
    """Where a worker runs, for messages."""

    host: str
    process: int


@dataclass(frozen=True)
class Ended:
    """What became of a block: the results of its items, up to the one that ended with `error`, if one did.

    retries: how often a store was asked again.
    """

    results: list[Any]
    error: FinetuneError | None = None
    retries: int = 0


def versions() -> dict[str, str]:
    """Name -> version of everything that a result depends on."""
    found = {"finetune-cli": __version__, "Python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


class Worker:
    """One process on one core. Its methods return what is pickled and sent to the driver."""

    def __init__(self) -> None:
        self._work: Work[Any, Any] | None = None

    def versions(self) -> tuple[Place, dict[str, str]]:
        """Where this is, and `versions`: nothing that depends on them has been received until now."""
        return Place(socket.gethostname(), os.getpid()), versions()

    def prepare(
        self, recipe: Recipe[Any, Any], digests: Mapping[str, str], *contents: bytes
    ) -> Mapping[str, str] | FinetuneError:
        """Get ready for the work of `recipe`; the probe, or why this machine cannot do it.

        digests: name -> SHA-256 of the file whose content stands at that place in `contents`.
        """
        self._work = None  # two models may not fit in the memory
        files = dict(zip(digests, contents, strict=True))
        for name, content in files.items():
            if hashlib.sha256(content).hexdigest() != digests[name]:
                return FinetuneError(f"{name} did not arrive as it was sent", "check the network and the memory")
        try:
            work = recipe.work(files)
            probe = work.probe()
        except FinetuneError as exc:
            return exc
        self._work = work
        return probe

    def run(self, items: Sequence[Any], threads: int = 1) -> Ended:
        """The results of a block of items, by more than one thread where they wait for a store."""
        assert self._work is not None
        results: list[Any] = []
        before, error = storage.retries(), None
        try:
            results.extend(ordered_map(self._work, items, threads))
        except FinetuneError as exc:
            error = exc
        return Ended(results, error, storage.retries() - before)
