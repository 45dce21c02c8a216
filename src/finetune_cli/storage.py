"""Objects in a store, named by addresses such as ``s3://bucket/photos/a.jpg``: read, write, list.

The stores are those of fsspec, which is imported when the first address is used; ``s3://`` and ``gs://`` come with
extras of the same package. Credentials are found by the store's own library in its usual places (environment variables,
its files, the machine's own role) and are never part of an address, a message or a file of ours.

An operation is tried again when the store is busy, answers with a server error, breaks off or is silent; it ends after
a known time, whatever the store does. An object is written whole or not at all, because stores show it only then.
"""

import contextlib
import errno
import functools
import importlib.util
import os
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from finetune_cli import signals
from finetune_cli.errors import FinetuneError, MissingExtra, StorageError, UsageError
from finetune_cli.text import brief, first_line, shown

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
# Everything before the first slash, with a password in it; `container@account` without one is Azure's way to name both.
_PASSWORD = re.compile(r"[^/]*:[^/]*@")
_WEB = frozenset(("http", "https", "ftp"))
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_NOT_SIGNED_IN = (
    "check the credentials: environment variables, the files of the store's own tools, or the machine's role"
)
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_LOGGERS = ("fsspec", "s3fs", "gcsfs", "botocore", "aiobotocore", "google")

_GLANCE = 0.5  # seconds between two looks whether a signal came

MOST_BYTES = 1 << 30  # of an object that is read: a photo of 100 megapixels at 16 bits a channel has 600 MB

Result = TypeVar("Result")


@dataclass(frozen=True)
class Patience:
    """How long a store is waited for, in seconds, and how often an operation is tried.

    silence: without a single byte. operation: for all tries together. pauses: before the second try and the next ones.
    """

    connect: float = 10.0
    silence: float = 20.0
    operation: float = 300.0
    pauses: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)


patience = Patience()


@dataclass(frozen=True, slots=True)
class Stored:
    """An object, or a folder if `name` ends with a slash. `name` is relative to the folder that was listed.

    version: another text whenever the object was written again; None where the store does not tell.
    """

    name: str
    size: int = 0
    version: str | None = None


def is_address(text: object) -> bool:
    """Whether `text` names something in a store rather than in the file system."""
    return isinstance(text, str) and _ADDRESS.match(text) is not None


def check(address: str) -> None:
    """Raise `UsageError` for an address that cannot be used, without repeating a password that is in it."""
    protocol, rest = _parts(address)
    if _PASSWORD.match(rest) or (protocol in _EXTRAS and "@" in rest.partition("/")[0]):
        raise UsageError(
            f"an address that starts with {protocol}:// holds credentials",
            "leave out everything up to the @; credentials come from the usual places alone (docs/addresses.md)",
        )
    if protocol in _WEB:
        raise UsageError(
            f"{shown(address)} is an address of the web, not of a store", "download it, and name the file or folder"
        )
    if protocol in ("file", "local"):  # fsspec would wait for a pipe forever, and follow every link
        raise UsageError(f"{shown(address)} is on this machine", "write its path, without what is before it")
    if not rest.strip("/") and protocol != "memory":
        raise UsageError(f"{shown(address)} names no bucket", f"write {protocol}://bucket/folder")
    if "\0" in address:
        raise UsageError(f"{shown(address)} holds a NUL character", "correct the address")


def masked(address: str) -> str:
    """`address` without the user and the password that it may hold: for messages and tables."""
    protocol, slashes, rest = address.partition("://")
    authority, at, path = rest.partition("@")
    return f"{protocol}{slashes}***@{path}" if at and "/" not in authority and is_address(address) else address


def join(folder: str, name: str) -> str:
    """The address of what is called `name` below `folder`."""
    return f"{folder.rstrip('/')}/{name}"


def read(address: str, most: int = MOST_BYTES) -> bytes:
    """The whole content of an object, in one request.

    Raises `FileNotFoundError`, an `OSError` for an object of more than `most` bytes, and `StorageError` when the store
    does not give it.
    """

    def whole(system: Any, path: str) -> bytes:
        return bytes(_call(system, "cat_file", path, start=0, end=most + 1))

    try:
        data = _tried(address, "read", whole)
    except _EmptyRange:
        return b""
    if len(data) > most:
        raise OversizedError(most, address)
    return data


def read_version(address: str, most: int = MOST_BYTES) -> tuple[bytes, str | None]:
    """As `read`, with the version of just what was read; None where the store does not tell it with the content."""
    protocol, rest = _parts(address)
    if protocol not in ("s3", "s3a"):
        return read(address, most), None
    bucket, _, key = rest.partition("/")
    try:
        return _tried(address, "read", functools.partial(_s3_object, bucket, key, most))
    except _EmptyRange:
        return b"", None


def tells_version(address: str) -> bool:
    """Whether `read_version` gives a version."""
    return _parts(address)[0] in ("s3", "s3a")


def readers(workers: int) -> int:
    """How many threads read objects where `workers` would read files: most of the time, each waits for an answer."""
    return workers + min(7 * workers, 32)  # each that infers holds a few MB of activations


def write(address: str, data: bytes) -> None:
    """Write an object; what had that address is replaced. Raises `StorageError`."""
    try:
        _tried(address, "written", lambda system, path: _write(system, path, data))
    except FileNotFoundError as exc:
        raise StorageError(f"{shown(address)} cannot be written: there is no such bucket", "check the address") from exc


def status(address: str) -> Stored:
    """What the store knows of an object; its name is empty. Raises `FileNotFoundError` and `StorageError`."""
    found = _tried(address, "found", lambda system, path: _call(system, "info", path))
    if found.get("type") == "directory":
        raise FileNotFoundError(errno.ENOENT, "there is no such object", address)
    return _stored("", found)


def exists(address: str) -> bool:
    """Whether there is an object of that address. Raises `StorageError`."""
    try:
        status(address)
    except FileNotFoundError:
        return False
    return True


def is_folder(address: str) -> bool:
    """Whether there is an object below that address. Raises `StorageError`."""
    return next(entries(address), None) is not None


def entries(folder: str, deep: bool = False) -> Iterator[Stored]:
    """The objects and folders in `folder`, or with `deep` all objects below it, in bytewise order of their names.

    S3 is asked for a page of 1,000 at a time, when they are needed; other stores for all of a folder. A folder that
    does not exist is empty. Raises `StorageError`.
    """
    protocol = _parts(folder)[0]
    if protocol in ("s3", "s3a"):
        yield from _s3_pages(folder, deep)
        return
    try:
        found = _tried(folder, "listed", functools.partial(_listing, deep=deep))
    except FileNotFoundError:
        return
    yield from sorted(found, key=lambda entry: entry.name.encode("utf-8", "surrogateescape"))


def retries() -> int:
    """How often an operation was tried again, by this process and by the workers that reported it."""
    return _counter.count


def add_retries(number: int) -> None:
    """Count what a worker has tried again."""
    _counter.add(number)


class _Counter:
    """A number that many threads raise."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self, number: int = 1) -> None:
        with self._lock:
            self.count += number


_counter = _Counter()
_making = threading.Lock()  # of the file system of a process, which many threads want at once


class OversizedError(OSError):
    """An object that is larger than what may be read."""

    def __init__(self, most: int, address: str) -> None:
        super().__init__(errno.EFBIG, f"it has more than {most:,} bytes", address)


class _EmptyRange(Exception):
    """The answer of a store that is asked for the first bytes of an object that has none."""


def _parts(address: str) -> tuple[str, str]:
    match = _ADDRESS.match(address)
    assert match is not None
    return match[1].lower(), address[match.end() :]


def _tried(address: str, done: str, operation: Callable[[Any, str], Result]) -> Result:
    """The result of `operation` on the file system of `address` and the path in it.

    done: what could not be done, for the message. Raises `FileNotFoundError`, `_EmptyRange` and `StorageError`.
    """
    check(address)
    protocol, rest = _parts(address)
    with _making:
        system = _file_system(os.getpid(), protocol)
    path = rest.rstrip("/") if protocol in _EXTRAS else f"{protocol}://{rest}"
    end = time.monotonic() + patience.operation
    for pause in (*patience.pauses, None):
        signals.check()
        try:
            with _deadline(end):
                return operation(system, path)
        except (FinetuneError, OversizedError):
            raise
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", address) from None
        except Exception as exc:  # noqa: BLE001 - each store has exceptions of its own
            code = _http_status(exc)
            if code == 416:
                raise _EmptyRange from None
            # `from None`: what the store's library puts into its messages is out of our hands.
            if _refused(exc, code):
                raise StorageError(f"{shown(address)} cannot be {done}: {_reason(exc)}", _NOT_SIGNED_IN) from None
            permanent = isinstance(exc, ValueError | TypeError | NotImplementedError | IsADirectoryError)
            if permanent or (code is not None and 400 <= code < 500 and code not in (408, 409, 425, 429)):
                raise StorageError(f"{shown(address)} cannot be {done}: {_reason(exc)}", "check the address") from None
            if pause is None or time.monotonic() + pause >= end:
                raise StorageError(
                    f"{shown(address)} cannot be {done}, though it was tried again: {_reason(exc)}",
                    "check that the store can be reached, then run the same command again",
                ) from None
            _counter.add()
            time.sleep(pause)
    raise AssertionError("unreachable")


_end = threading.local()


@contextlib.contextmanager
def _deadline(end: float) -> Iterator[None]:
    """Let `_call` give up at `end`, on the clock of `time.monotonic`."""
    _end.at = end
    try:
        yield
    finally:
        _end.at = None


def _call(system: Any, method: str, *args: Any, **options: Any) -> Any:
    """Call a method of a file system of fsspec; an asynchronous one is given up at the deadline."""
    if not system.async_impl:
        return getattr(system, method)(*args, **options)
    return _awaited(system, getattr(system, f"_{method}")(*args, **options))


def _awaited(system: Any, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work` in the thread of a file system; it is given up at the deadline, or when a signal came."""
    import asyncio

    future = asyncio.run_coroutine_threadsafe(work, system.loop)
    try:
        while True:
            try:
                return future.result(timeout=_GLANCE)
            except TimeoutError:
                if future.done() or time.monotonic() >= _end.at:
                    raise
                signals.check()
    finally:
        future.cancel()


@functools.cache
def _file_system(_process: int, protocol: str) -> Any:
    """The file system of fsspec for `protocol`; one for each process, because it holds connections and a thread."""
    import logging

    for name in _LOGGERS:  # they log what we report ourselves
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False
    try:
        import fsspec
        from fsspec.config import conf

        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if protocol in ("s3", "s3a"):
            options["config_kwargs"] = {
                "connect_timeout": patience.connect,
                "read_timeout": patience.silence,
                "max_pool_connections": 64,
                **conf.get(protocol, {}).get("config_kwargs", {}),
                "retries": {"total_max_attempts": 1},  # see `_try_once`
            }
        elif protocol in ("gs", "gcs"):
            import aiohttp

            # What gcsfs calls experimental opens a connection of its own, with waits and retries that we do not know.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            options["requests_timeout"] = aiohttp.ClientTimeout(
                total=None, sock_connect=patience.connect, sock_read=patience.silence
            )
        system = fsspec.filesystem(protocol, **options)
    except ImportError as exc:
        if protocol in _EXTRAS or importlib.util.find_spec("fsspec") is None:
            raise MissingExtra(f"addresses that start with {protocol}://", _EXTRAS.get(protocol, "s3")) from exc
        raise UsageError(f"addresses that start with {protocol}:// need another package", first_line(exc)) from exc
    except ValueError as exc:
        raise UsageError(
            f"addresses that start with {shown(protocol)}:// are not known", "see docs/addresses.md for those that are"
        ) from exc
    _try_once(system)
    return system


def _try_once(system: Any) -> None:
    """Switch off that s3fs and gcsfs try again by themselves: `_tried` does, counts it, and knows the end."""
    system.retries = 1
    plain = getattr(getattr(type(system), "_request", None), "__wrapped__", None)  # gcsfs decorates this method
    if plain is not None:
        system._request = functools.partial(plain, system)


def _write(system: Any, path: str, data: bytes) -> None:
    if not system.async_impl:
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
    _call(system, "pipe_file", path, data)


def _listing(system: Any, path: str, deep: bool) -> list[Stored]:
    root = system._strip_protocol(path).strip("/")
    found = _call(system, "find", path, detail=True).values() if deep else _call(system, "ls", path, detail=True)
    listed = []
    for entry in found:
        name = str(entry["name"]).strip("/").removeprefix(root).lstrip("/")
        if name:
            listed.append(_stored(f"{name}/" if entry["type"] == "directory" else name, entry))
    return listed


def _s3_pages(folder: str, deep: bool) -> Iterator[Stored]:
    bucket, _, key = _parts(folder)[1].rstrip("/").partition("/")
    prefix = f"{key}/" if key else ""
    asked = {"Bucket": bucket, "Prefix": prefix, **({} if deep else {"Delimiter": "/"})}
    token: dict[str, str] = {}
    while True:
        try:
            page = _tried(folder, "listed", functools.partial(_s3_page, {**asked, **token}))
        except FileNotFoundError as exc:
            raise StorageError(f"there is no bucket {shown(bucket)}", "check the address") from exc
        objects = [_stored(entry["Key"].removeprefix(prefix), entry) for entry in page.get("Contents", ())]
        folders = [Stored(entry["Prefix"].removeprefix(prefix)) for entry in page.get("CommonPrefixes", ())]
        listed = [entry for entry in (*objects, *folders) if entry.name]
        yield from sorted(listed, key=lambda entry: entry.name.encode()) if folders else listed
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def _s3_object(bucket: str, key: str, most: int, system: Any, _path: str) -> tuple[bytes, str | None]:
    async def whole() -> tuple[bytes, str | None]:
        answer = await system._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes=0-{most}")
        async with answer["Body"] as body:
            data = await body.read()
        return data, _version(answer.get("ETag"), len(data), answer.get("LastModified"))

    data, version = _awaited(system, whole())
    if len(data) > most:
        raise OversizedError(most, f"s3://{bucket}/{key}")
    return data, version


def _s3_page(asked: dict[str, str], system: Any, _path: str) -> Any:
    return _call(system, "call_s3", "list_objects_v2", **asked)


def _stored(name: str, facts: dict[str, Any]) -> Stored:
    """What a store says of an object, in whatever names it has for that."""
    size = int(facts.get("size", facts.get("Size", 0)) or 0)
    if "generation" in facts:  # of Google Cloud Storage: a new one for every write
        return Stored(name, size, f"{facts['generation']} {size}")
    return Stored(name, size, _version(facts.get("ETag"), size, facts.get("LastModified")))


def _version(tag: str | None, size: int, modified: Any) -> str | None:
    """What changes when an object of S3 is written; None without a time, or with a weak tag (RFC 9110, 8.8.3)."""
    if not tag or tag.startswith("W/") or not hasattr(modified, "timestamp"):
        return None
    return f"{tag.strip(chr(34))} {size} {int(modified.timestamp())}"


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    for _ in range(5):
        if exc is None:
            return
        yield exc
        exc = exc.__cause__


def _http_status(exc: BaseException) -> int | None:
    """The HTTP status that a store answered with, if the exception of its library tells."""
    for each in _causes(exc):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            code = getattr(each, "status", None) or getattr(each, "code", None)
        if str(code).isdecimal():
            return int(str(code))
    return None


def _refused(exc: BaseException, code: int | None) -> bool:
    """Whether the store, or its library, refused for want of the right credentials."""
    if isinstance(exc, PermissionError) or code in (401, 403) or str(exc).startswith("Forbidden"):  # gcsfs says so
        return True
    names = {type(each).__name__ for each in _causes(exc)}
    return bool(names & {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError"})


def _reason(exc: BaseException) -> str:
    """Why an operation failed, in a line without credentials."""
    if isinstance(exc, TimeoutError) or "Timeout" in type(exc).__name__:
        return "the store does not answer"
    text = re.sub(r"//[^/@\s]*@", "//", first_line(exc))
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    code = _http_status(exc)
    return brief(f"{text} (HTTP status {code})" if code is not None and str(code) not in text else text, 300)
