"""An ordered parallel map with bounded memory: the only way in which several threads process photos."""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_count(setting: int | Literal["auto"]) -> int:
    """Threads that decode and infer, by the setting `runtime.workers`: "auto" is one for each core."""
    return cores() if setting == "auto" else setting


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item | None], workers: int) -> Iterator[Result]:
    """Yield ``function(item)`` for every item, in the order of `items`, computed by `workers` threads.

    At most ``2 * workers`` items are in flight, so `items` may be endless and results may be large. An exception of
    `function` is raised where its result would have come, and what has not started is dropped.

    An item that is `None` means that the next one may take long: all results are yielded before it is requested.
    """
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="finetune")
    try:
        for item in items:
            if item is not None:
                pending.append(pool.submit(function, item))
            while pending and (item is None or len(pending) >= 2 * workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def groups_available(items: Iterable[Item], most: int) -> Iterator[tuple[Item, ...] | None]:
    """Groups of up to `most` of the `items` that are available; `None` when the next one is not available yet.

    For items that arrive slowly, such as lines that another program writes: each is in a group as soon as it arrives,
    and while they arrive fast the groups are full. They are read in a thread of its own, by at most 64 groups ahead; an
    exception in it is raised here.
    """
    ready: queue.Queue[tuple[Item] | None] = queue.Queue(64 * most)
    errors: list[Exception] = []
    # Nothing can end a thread that waits for input, so the end of the process must not wait for it.
    threading.Thread(target=_read, args=(items, ready, errors), name="finetune-input", daemon=True).start()
    group: list[Item] = []
    while True:
        if group and (len(group) == most or ready.empty()):
            yield tuple(group)
            group = []
        if ready.empty():
            yield None
        item = ready.get()
        if item is None:
            break
        group += item
    if group:
        yield tuple(group)
    if errors:
        raise errors[0]


def _read(items: Iterable[Item], ready: "queue.Queue[tuple[Item] | None]", errors: list[Exception]) -> None:
    """Put every item into `ready`, and `None` after the last; an exception goes to `errors`."""
    try:
        for item in items:
            ready.put((item,))
    except Exception as exc:  # noqa: BLE001 - it is raised in the other thread
        errors.append(exc)
    ready.put(None)
