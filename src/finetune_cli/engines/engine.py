"""One function for many items, in order: what every engine does, and the engine that uses threads of this process.

An engine knows nothing about photos. It gets a `Task`, which it runs here as a `Work`, or sends elsewhere as a
`Recipe` and the files that the recipe needs. The recipe makes the same `Work` there, so that there is one
implementation of what is done with an item, whichever engine does it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from finetune_cli import storage
from finetune_cli.parallel import ordered_map

Item = TypeVar("Item")
Result = TypeVar("Result")
Item_contra = TypeVar("Item_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


class Work(Protocol[Item_contra, Result_co]):
    """The function that is applied to items; several threads may call it at once."""

    def __call__(self, item: Item_contra, /) -> Result_co:
        """The result of an item."""
        ...

    def probe(self) -> Mapping[str, str]:
        """What a known photo gives in this process, step by step: the name of the step -> SHA-256 of the result."""
        ...


class Recipe(Protocol[Item_contra, Result_co]):
    """Makes the same `Work` in any process that has this package; small, and can be pickled.

    `tolerated`: steps of the probe that may differ between processors; the user is told of it.
    """

    @property
    def tolerated(self) -> Sequence[str]:
        """Names of steps, as in `Work.probe`."""
        ...

    def work(self, files: Mapping[str, bytes]) -> Work[Item_contra, Result_co]:
        """`files`: those of the task. Raises `FinetuneError` when this machine cannot do the work."""
        ...


class Task(Protocol[Item_contra, Result_co]):
    """What is done with items, for any engine."""

    def work(self) -> Work[Item_contra, Result_co]:
        """For this process."""
        ...

    def recipe(self) -> Recipe[Item_contra, Result_co]:
        """For other processes."""
        ...

    def files(self) -> Mapping[str, bytes]:
        """What the recipe needs: name -> content."""
        ...

    def names(self, item: Item_contra) -> Sequence[str]:
        """What an item is called in a message."""
        ...


class Engine(Protocol):
    """Applies tasks to items. `retries`: how many blocks of items had to be done again until now."""

    @property
    def retries(self) -> int:
        """Blocks that were done again because their worker was lost."""
        ...

    def map(self, task: Task[Item, Result], items: Iterable[Item | None], stored: bool = False) -> Iterator[Result]:
        """The result of every item, in the order of `items`, with bounded memory.

        stored: the photos are read from a store, so a thread waits for answers most of the time.

        An item that is `None` means that the next one may take long: all results are yielded before it is requested.
        An exception is raised where the result of its item would have come.
        """
        ...


@dataclass(frozen=True)
class Local:
    """Threads of this process; the task is compiled for as many."""

    workers: int

    @property
    def retries(self) -> int:
        """Threads are not lost."""
        return 0

    def map(self, task: Task[Item, Result], items: Iterable[Item | None], stored: bool = False) -> Iterator[Result]:
        """See `Engine.map`."""
        return ordered_map(task.work(), items, storage.readers(self.workers) if stored else self.workers)
