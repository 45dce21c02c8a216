"""The workers of a cluster: hired machine by machine, and given work only after they proved to compute what we do.

    hired -> answers with its versions -> gets the recipe and the files -> answers with its probe -> ready

A machine whose workers answer otherwise than this process would is left out, with the reason. Machines that join are
found, and a worker that was lost is replaced.
"""

import contextlib
import hashlib
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune_cli.engines import worker as remote
from finetune_cli.engines.engine import Task
from finetune_cli.engines.session import Session
from finetune_cli.engines.worker import Ended, Place
from finetune_cli.errors import FinetuneError
from finetune_cli.progress import Observer
from finetune_cli.text import brief, counted, listed, message_lines, shown

_LOOK = 5.0  # seconds from one look for machines that joined or left to the next
_ALONE = 60.0  # seconds without any machine, after which we give up
_STARTS = 3  # workers that may fail on a machine before they are ready
_QUIET = 30.0  # seconds without a worker, after which the user is told
_MACHINES = 5  # that are named in an error


@dataclass(eq=False)
class Block:
    """Items that a worker gets at once. `deaths`: workers that were lost with it; after the first, it goes alone."""

    items: list[Any]
    deaths: int = 0
    answer: Any = None  # the reference of its result, while a worker has it
    ended: Ended | None = None


@dataclass(eq=False)
class Member:
    """A worker. `answer`: the reference of what it was asked last, until it is ready. `blocks`: in order."""

    actor: Any
    node: str
    host: str
    answer: Any
    step: Literal["hired", "preparing", "ready"] = "hired"
    blocks: deque[Block] = field(default_factory=deque)


class Team:
    """All workers of a session. limit: how many at most, `None` for one on each core of the cluster."""

    def __init__(self, session: Session, limit: int | None, observer: Observer) -> None:
        self._session, self._ray = session, session.ray
        self._limit, self._observer = limit, observer
        self._members: list[Member] = []
        self._left_out: dict[str, str] = {}  # node -> why
        self._failed: Counter[str] = Counter()
        self._told: set[tuple[str, str]] = set()
        self._reported = 0
        self._looked = float("-inf")
        self._alive = self._joined = time.monotonic()  # when there last was a machine, and a worker
        self._versions = remote.versions()
        self._class = self._ray.remote(remote.Worker)

    def begin(self, task: Task[Any, Any], files: Mapping[str, bytes]) -> None:
        """Prepare all workers, and those that join, for `task` and its `files`."""
        recipe = task.recipe()
        self._tolerated = set(recipe.tolerated)
        self._digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        self._sent = [self._ray.put(recipe), *(self._ray.put(content) for content in files.values())]
        for member in self._members:
            member.blocks.clear()
            if member.step != "hired":
                self._prepare(member)
        self._joined, self._looked = time.monotonic(), float("-inf")
        self.look()
        self._expected: Mapping[str, str] = task.work().probe()  # while the workers start

    @property
    def ready(self) -> list[Member]:
        """The workers that can get blocks."""
        return [member for member in self._members if member.step == "ready"]

    def waiting(self) -> dict[Any, Member]:
        """What is waited for: the reference of a worker's answer or of its oldest block -> the worker."""
        found = {}
        for member in self._members:
            if member.step != "ready":
                found[member.answer] = member
            elif member.blocks:
                found[member.blocks[0].answer] = member
        return found

    def look(self) -> None:
        """Hire workers on the cores that have none, every few seconds.

        Raises `FinetuneError` when no machine is left.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return
        self._looked = now
        nodes = {
            str(node["NodeID"]): (int(node["Resources"].get("CPU", 0)), str(node["NodeManagerHostname"]))
            for node in self._ray.nodes()
            if node["Alive"]
        }
        able = {node: cores for node, (cores, _host) in nodes.items() if cores}
        usable = {node: cores for node, cores in able.items() if node not in self._left_out}
        if usable or self._members:
            self._alive = now
        elif able:
            raise self._nobody(self._left_out[node] for node in able)
        elif now - self._alive > _ALONE:
            raise self._session.lost(TimeoutError(f"it has had no machine for {_ALONE:.0f} s"))
        if self.ready:
            self._joined = now
        elif now - self._joined > _QUIET:
            self._joined = now
            self._observer.note("no worker is ready yet: the cores of the cluster are busy, or the machines slow")
        taken = Counter(member.node for member in self._members)
        while usable and (self._limit is None or len(self._members) < self._limit):
            node = max(usable, key=lambda node: usable[node] - taken[node])
            if taken[node] >= usable[node]:
                break
            taken[node] += 1
            self._members.append(self._hire(node, nodes[node][1]))

    def _hire(self, node: str, host: str) -> Member:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(node, soft=False)
        actor = self._class.options(num_cpus=1, max_restarts=0, max_task_retries=0, scheduling_strategy=here).remote()
        return Member(actor, node, host, actor.versions.remote())

    def _prepare(self, member: Member) -> None:
        recipe, *files = self._sent
        member.step, member.answer = "preparing", member.actor.prepare.remote(recipe, self._digests, *files)

    def answered(self, member: Member) -> None:
        """Take what a worker that is not yet ready has answered, and ask the next thing. Raises `FinetuneError`."""
        self._take(member)
        self._report()  # also when the last one that was waited for was lost

    def _take(self, member: Member) -> None:
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(member.answer)
        except errors.RayTaskError as exc:
            self._leave_out(member, last_line(exc))
            return
        except errors.RayError as exc:
            self._failed[member.node] += 1
            self.remove(member)
            reason = last_line(exc)
            if "ModuleNotFoundError" in str(exc) or self._failed[member.node] >= _STARTS:
                self._leave_out(member, f"a worker cannot start there: {reason}")
            return
        if member.step == "hired":
            place, versions = answer
            self._greet(member, place, versions)
        elif isinstance(answer, FinetuneError):
            self._leave_out(member, answer.problem)
        else:
            self._compare(member, answer)

    def _greet(self, member: Member, place: Place, versions: Mapping[str, str]) -> None:
        member.host = place.host
        names = dict.fromkeys((*self._versions, *versions))
        different = [
            f"{name} is {versions.get(name, 'missing')} there and {self._versions.get(name, 'missing')} here"
            for name in names
            if versions.get(name) != self._versions.get(name)
        ]
        if different:
            self._leave_out(member, ", ".join(different))
        else:
            self._prepare(member)

    def _compare(self, member: Member, probe: Mapping[str, str]) -> None:
        different = [step for step, digest in self._expected.items() if probe.get(step) != digest]
        if refused := [step for step in different if step not in self._tolerated]:
            self._leave_out(member, f"the same photo gives other {refused[0]} there than here")
            return
        for step in different:
            if (member.node, step) not in self._told:
                self._told.add((member.node, step))
                self._observer.warn(
                    f"the processor of {shown(member.host)} gives other {step} than this one: they differ by rounding, "
                    "and a second run may differ from this one"
                )
        member.step = "ready"

    def _report(self) -> None:
        """Say how many workers there are when it has changed, and no other answer is to come."""
        ready = self.ready
        if len(ready) == len(self._members) != self._reported and ready:
            self._reported = len(ready)
            machines = len({member.node for member in ready})
            self._observer.note(f"{counted(len(ready), 'worker')} on {counted(machines, 'machine')}")

    def remove(self, member: Member) -> None:
        """Forget a worker that was lost; `look` replaces it."""
        self._members.remove(member)
        self._looked = float("-inf")
        with contextlib.suppress(Exception):  # it is dead, or will be when its machine is heard of again
            self._ray.kill(member.actor)

    def _leave_out(self, member: Member, reason: str) -> None:
        """Use no worker on that machine. Raises `FinetuneError` when it was the last machine."""
        text = f"{shown(member.host)}: {reason}"
        if member.node not in self._left_out:
            self._left_out[member.node] = text
            self._observer.warn(f"a machine of the cluster is not used; {text}")
        for each in [each for each in self._members if each.node == member.node]:
            self.remove(each)

    @staticmethod
    def _nobody(reasons: Iterable[str]) -> FinetuneError:
        problem = f"no machine of the cluster can be used: {listed(list(reasons), _MACHINES)}"
        return FinetuneError(
            problem,
            "install the same versions on all machines, and start the command on one whose processor is like theirs",
        )


def last_line(exc: BaseException) -> str:
    """The line of a worker's traceback that says what is wrong."""
    return brief(next((line for line in reversed(message_lines(exc)) if "Error" in line), message_lines(exc)[0]), 200)
