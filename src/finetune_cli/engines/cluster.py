"""The engine that uses the workers of a Ray cluster: blocks of items out, results back, in order, whatever happens.

    items -> blocks -> at most two with each worker -> results, kept until it is their turn

A worker that dies loses nothing: the items that it had are given to others, one at a time, so that one which ends
workers is found. Results are taken once, from the worker that has the block, so nothing is counted twice. The driver
holds a few blocks for each worker, however many items there are.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Self

from finetune_cli import signals, storage
from finetune_cli.engines.engine import Item, Result, Task
from finetune_cli.engines.session import Session
from finetune_cli.engines.team import Block, Member, Team, last_line
from finetune_cli.engines.worker import Ended
from finetune_cli.errors import FinetuneError
from finetune_cli.parallel import worker_count
from finetune_cli.progress import Observer
from finetune_cli.text import brief, counted, first_line, listed, shown

_ITEMS = 16  # of a block: about half a second of work, so that little is done again, and messages cost little
_IN_FLIGHT = 2  # blocks that a worker has, so that it never waits for the driver
_AHEAD = 4  # blocks for each worker that may be finished before it is their turn
_DEATHS = 3  # workers that a block may take with it
_NAMED = 20


class Cluster:
    """See `Engine`; a context manager. Ray is started, or connected to, when there is something to do.

    address, workers: as `runtime.ray_address` and `runtime.workers`. With `auto`, every core of the cluster is a
    worker.
    """

    def __init__(self, address: str | None, workers: int | Literal["auto"], observer: Observer) -> None:
        self._address, self._workers, self._observer = address, workers, observer
        self._session: Session | None = None
        self._team: Team | None = None
        self.retries = 0

    def __enter__(self) -> Self:
        """Nothing is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Disconnect; what the workers were doing is dropped."""
        if self.retries and kind is None:
            self._observer.note(f"{counted(self.retries, 'block')} of photos done again, because workers were lost")
        if self._session is not None:
            self._session.__exit__(kind, value, traceback)
            self._session = self._team = None

    def map(self, task: Task[Item, Result], items: Iterable[Item | None], stored: bool = False) -> Iterator[Result]:
        """See `Engine.map`.

        Raises `FinetuneError` when no worker is left, when three workers died of the same items, and when a worker
        raises what it should not.
        """
        try:
            yield from self._map(task, items, storage.readers(1) if stored else 1)
        except KeyboardInterrupt:
            signals.check()  # Ray makes a plain one of ours
            raise

    def _map(self, task: Task[Item, Result], items: Iterable[Item | None], threads: int) -> Iterator[Result]:
        files = task.files()
        if self._session is None:
            self._session = Session(self._address, worker_count(self._workers), sum(map(len, files.values())))
        if self._team is None:
            limit = None if self._workers == "auto" else self._workers
            self._team = Team(self._session, limit, self._observer)
        self._team.begin(task, files)
        queue, team = _Queue(items), self._team
        while True:
            for ended in queue.finished():
                yield from ended.results
                if ended.error is not None:
                    raise ended.error
            team.look()
            self._hand_out(queue, team, threads)
            if queue.is_empty:
                return
            self._receive(queue, team, task)

    def _hand_out(self, queue: "_Queue", team: Team, threads: int) -> None:
        """Give blocks to the workers that have the fewest, until each has enough."""
        while True:
            free = [member for member in team.ready if _room(member)]
            block = queue.take(_AHEAD * len(team.ready)) if free else None
            if block is None:
                return
            member = min(free, key=lambda member: len(member.blocks))
            if block.deaths and member.blocks:  # it goes alone, so that it is known which block a worker dies of
                queue.give_back([block])
                return
            member.blocks.append(block)
            block.answer = member.actor.run.remote(block.items, threads)

    def _receive(self, queue: "_Queue", team: Team, task: Task[Any, Any]) -> None:
        """Wait for answers, for a second at most, so that a signal or a new machine is not kept waiting."""
        assert self._session is not None
        ray, waiting = self._session.ray, team.waiting()
        try:
            if not waiting:
                time.sleep(0.2)
                return
            answers, _ = ray.wait(list(waiting), timeout=1.0)
            if answers:  # all that have come by now
                answers, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        except (ray.exceptions.RayError, ConnectionError) as exc:
            raise self._session.lost(exc) from exc
        for answer in answers:
            member = waiting[answer]
            if member.step != "ready":
                team.answered(member)
            elif (lost := self._take(member)) is not None:
                self._lose(member, queue, team, task, lost)

    def _take(self, member: Member) -> BaseException | None:
        """Take the result of the oldest block of `member`; why there is none, if the worker is lost."""
        assert self._session is not None
        ray, block = self._session.ray, member.blocks[0]
        try:
            block.ended = ended = ray.get(block.answer)
            storage.add_retries(ended.retries)
        except ray.exceptions.RayTaskError as exc:
            raise FinetuneError(
                f"a worker on {shown(member.host)} failed: {brief(first_line(exc.cause), 200)}",
                "this is a bug; run again with --debug and report it",
            ) from exc
        except ray.exceptions.RayError as exc:
            lost: BaseException = exc
            return lost
        member.blocks.popleft()
        return None

    def _lose(self, member: Member, queue: "_Queue", team: Team, task: Task[Any, Any], why: BaseException) -> None:
        """Let others do what `member` had. Raises `FinetuneError` for a block that took too many workers with it."""
        assert self._session is not None
        ray = self._session.ray
        while member.blocks and ray.wait([member.blocks[0].answer], timeout=0)[0] and self._take(member) is None:
            pass  # it was finished before the worker was lost
        team.remove(member)
        signals.check()
        if not member.blocks:
            return
        self.retries += 1
        names: list[str] = []
        for block in member.blocks:
            block.deaths += 1
            if block.deaths >= _DEATHS:
                names += [name for item in block.items for name in task.names(item)]
        if names:
            raise FinetuneError(
                f"{_DEATHS} workers were lost with the same {counted(len(names), 'photo')}: {listed(names, _NAMED)}",
                "one of them may need more memory than a worker has, or end the program that decodes it: "
                "leave them out one by one, or give workers more memory",
            )
        self._observer.note(f"a worker on {shown(member.host)} was lost; another one continues ({last_line(why)})")
        queue.split(member.blocks)


def _room(member: Member) -> bool:
    """Whether a worker can get another block."""
    return len(member.blocks) < _IN_FLIGHT and not any(block.deaths for block in member.blocks)


class _Queue:
    """Items on their way: in blocks, some of which no worker has, and all of which are yielded in order."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._source = _blocks(items)
        self._unfinished: deque[Block] = deque()
        self._waiting: deque[Block] = deque()
        self._paused = self._ended = False

    @property
    def is_empty(self) -> bool:
        """Whether all results were yielded, and no item is left."""
        return self._ended and not self._unfinished

    def take(self, most: int) -> Block | None:
        """A block that no worker has; None when there is none, or when `most` are not yielded yet."""
        if self._waiting:
            return self._waiting.popleft()
        while not self._ended and len(self._unfinished) < most and not (self._paused and self._unfinished):
            try:
                block = next(self._source)
            except StopIteration:
                self._ended = True
                break
            self._paused = block is None
            if block is not None:
                self._unfinished.append(block)
                return block
        return None

    def give_back(self, blocks: Iterable[Block]) -> None:
        """They are the next to be taken, in this order."""
        self._waiting.extendleft(reversed(list(blocks)))

    def split(self, blocks: Iterable[Block]) -> None:
        """Give back single items in place of `blocks`, so that one which ends a worker is found."""
        pieces: list[Block] = []
        for block in blocks:
            parts = [Block([item], block.deaths) for item in block.items]
            where = self._unfinished.index(block)
            del self._unfinished[where]
            for part in reversed(parts):
                self._unfinished.insert(where, part)
            pieces += parts
        self.give_back(pieces)

    def finished(self) -> Iterator[Ended]:
        """The results whose turn it is."""
        while self._unfinished and (ended := self._unfinished[0].ended) is not None:
            self._unfinished.popleft()
            yield ended


def _blocks(items: Iterable[Any]) -> Iterator[Block | None]:
    """`items` in blocks; `None` where one of them is: what comes next may take long."""
    block: list[Any] = []
    for item in items:
        if item is not None:
            block.append(item)
        if block and (item is None or len(block) == _ITEMS):
            yield Block(block)
            block = []
        if item is None:
            yield None
    if block:
        yield Block(block)
