"""A connection to a Ray cluster, or a cluster of this machine alone that lasts as long as the command.

Ray is imported here and nowhere else, and only when it is asked for. It sends no usage statistics, its dashboard is
off, its messages stay out of the terminal, and SIGINT and SIGTERM stay ours: whatever Ray does with signals, it does
only in the main thread, so it is started in another one. A cluster that is started here has a token of its own, without
which no process of another user can talk to it.
"""

import concurrent.futures
import contextlib
import logging
import os
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from finetune_cli import signals
from finetune_cli.errors import FinetuneError, MissingExtra, UsageError
from finetune_cli.text import brief, first_line, shown

Result = TypeVar("Result")
# Before that, the extension types that Ray registers for Arrow ran a pickle out of a Parquet file (CVE-2026-41486).
_OLDEST = (2, 55)
_LONGEST_FOLDER = 36  # the path of a socket in it has about 70 characters more, of at most 107
_BESIDES_FILES = 300_000_000  # bytes of the object store for results on their way
_LOST = "what was finished is kept; when the cluster runs again, run the same command again"


def import_ray(own: bool) -> Any:
    """The package `ray`; `own`: to start a cluster with it.

    Raises `MissingExtra`, and `UsageError` for a version that is not safe.
    """
    # All of these are read when Ray is imported, and by every process that it starts.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if own:
        _take_token()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
            import ray.exceptions
            import ray.util.scheduling_strategies
    except ImportError as exc:
        raise MissingExtra("runtime.engine: ray", "ray") from exc
    if tuple(map(int, ray.__version__.split(".")[:2])) < _OLDEST:
        raise UsageError(
            f"Ray {ray.__version__} is too old", "pip install 'finetune-cli[ray]', here and on all machines"
        )
    logging.getLogger("ray").setLevel(logging.CRITICAL + 1)
    # There is no option for the thread that prints on standard output which workers died: `Cluster` says so itself.
    ray._private.worker.print_to_stdstream = lambda *_data, **_options: None
    return ray


def _take_token() -> None:
    """Choose the token of the clusters that this process starts."""
    if os.environ.get("RAY_AUTH_MODE") != "token" and "ray" in sys.modules:
        raise UsageError(
            "Ray was imported without token authentication, so every user of this machine could use the cluster",
            "set RAY_AUTH_MODE=token in the environment before Ray is imported",
        )
    os.environ["RAY_AUTH_MODE"] = "token"
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


class Session:
    """Ray, connected; a context manager. `ray`: the package.

    address: None to start a cluster here, `auto` for the one that this machine belongs to, or ``ray://host:port``.
    cores: how many workers a cluster that is started here has room for. room: bytes of the files that are sent to them.
    Raises what `import_ray` raises, and `FinetuneError` when there is no such cluster.
    """

    def __init__(self, address: str | None, cores: int, room: int) -> None:
        self.ray = import_ray(own=address is None)
        self._folder: Path | None = None
        # For the life of the session: what Ray starts dies with the thread that started it (PR_SET_PDEATHSIG).
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="finetune-ray")
        self._started = not (address is None and self.ray.is_initialized())  # a program may have connected before
        if not self._started:
            return
        if address is not None:
            self._connect({"address": address}, f"there is no Ray cluster at {shown(address)}", address)
            return
        self._folder = _folder()
        options = {
            "address": "local",
            "num_cpus": cores,
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": 2 * room + _BESIDES_FILES,
            "_temp_dir": str(self._folder / "ray"),  # Ray opens this folder to everybody, but not the one around it
        }
        self._connect(options, "Ray cannot be started here", None)

    def __enter__(self) -> Self:
        """Connected already."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Disconnect; a cluster that was started here ends, and its files are removed."""
        if self._started:
            with _quiet():  # a signal that came before is on its way already, and says what to do next
                self._thread.submit(self.ray.shutdown).result()
        self._thread.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _connect(self, options: dict[str, Any], problem: str, address: str | None) -> None:
        try:
            self._call(self.ray.init, **options, log_to_driver=False, configure_logging=False)
        except Exception as exc:  # of gRPC, of sockets, and of Ray itself
            self.__exit__()
            remedy = (
                "see docs/scaling.md" if address is None else "start one with: ray start --head; see docs/scaling.md"
            )
            if "token" in str(exc).lower() and address is not None:
                remedy = (
                    "set RAY_AUTH_MODE=token and the cluster's token: RAY_AUTH_TOKEN_PATH=FILE; see docs/scaling.md"
                )
            raise FinetuneError(f"{problem}: {brief(first_line(exc), 200)}", remedy) from exc
        except BaseException:
            self.__exit__()
            raise

    def _call(self, function: Callable[..., Result], **options: Any) -> Result:
        """The result of `function`, in the thread of the session; a signal is raised when it has ended."""
        with signals.deferred(), _quiet():
            return self._thread.submit(function, **options).result()

    def lost(self, exc: BaseException) -> FinetuneError:
        """The error for a connection that broke."""
        return FinetuneError(f"the Ray cluster does not answer any more: {brief(first_line(exc), 200)}", _LOST)


def _folder() -> Path:
    """A new folder, for this user alone, whose name is short enough for sockets."""
    folder = tempfile.mkdtemp(prefix="finetune-ray-")
    if len(folder) <= _LONGEST_FOLDER:
        return Path(folder)
    Path(folder).rmdir()
    return Path(tempfile.mkdtemp(prefix="finetune-ray-", dir="/tmp"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, and nothing on standard error: Ray's native code writes there until it has a file of its own."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
