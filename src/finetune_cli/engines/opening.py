"""The engine that a config or a command asks for."""

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Literal

from finetune_cli.engines.engine import Engine, Local
from finetune_cli.errors import MissingExtra, UsageError
from finetune_cli.parallel import worker_count
from finetune_cli.progress import Observer
from finetune_cli.text import shown

Name = Literal["local", "ray"]
ADDRESS = r"^(auto|ray://[^/@\s]+:[0-9]{1,5})$"


def check_address(address: str) -> None:
    """Raise `UsageError` for what is no address of a Ray cluster."""
    if not re.match(ADDRESS, address):
        raise UsageError(f"{shown(address)} is no address of a Ray cluster", "write auto or ray://HOST:10001")


@contextlib.contextmanager
def opened(name: Name, address: str | None, workers: int | Literal["auto"], observer: Observer) -> Iterator[Engine]:
    """The engine of `runtime.engine`; `address`, `workers`: as in the section `runtime` of a config.

    Nothing is started before there is something to do. Raises `MissingExtra` when Ray is asked for and not installed.
    """
    if name == "local":
        yield Local(worker_count(workers))
        return
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("runtime.engine: ray", "ray")
    from finetune_cli.engines import cluster

    with cluster.Cluster(address, workers, observer) as engine:
        yield engine
