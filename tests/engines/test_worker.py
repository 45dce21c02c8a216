"""What a worker does before it gets work, without Ray; and the engine of threads."""

import hashlib

import pytest
from engine_tasks import FILES, Times

from finetune_cli.engines import opening, worker
from finetune_cli.engines.cluster import _Queue
from finetune_cli.engines.engine import Local
from finetune_cli.engines.team import Block
from finetune_cli.engines.worker import Ended, Worker
from finetune_cli.errors import DataError, FinetuneError, MissingExtra, UsageError
from finetune_cli.progress import Silent

DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


def test_a_worker_proves_what_it_computes_and_computes_it():
    found = Worker()
    assert found.prepare(Times(there="other"), DIGESTS, b"3") == {"step": "other"}
    assert found.run([1, 2]) == Ended([3, 6])


def test_an_error_ends_a_block_after_the_results_before_it():
    found = Worker()
    found.prepare(Times(), DIGESTS, b"3")
    ended = found.run([1, ("refuse", "x"), 2])
    assert ended.results == [3]
    assert isinstance(ended.error, DataError)


def test_a_file_that_is_not_the_one_that_was_sent_is_refused():
    refused = Worker().prepare(Times(), DIGESTS, b"4")
    assert isinstance(refused, FinetuneError)
    assert refused.problem == "factor did not arrive as it was sent"


def test_versions_name_what_results_depend_on():
    assert {"finetune-cli", "Python", "openvino", "opencv-python-headless", "pillow", "numpy"} <= set(worker.versions())


def test_threads_are_an_engine():
    assert list(Local(2).map(Times(), [1, None, 2])) == [3, 6]
    assert Local(2).retries == 0


def test_a_queue_gives_blocks_back_as_single_items_in_their_place():
    queue = _Queue(range(40))
    first, second, third = (queue.take(10) for _ in range(3))
    assert [len(block.items) for block in (first, second, third)] == [16, 16, 8]
    assert queue.take(10) is None
    second.deaths = 1
    queue.split([second])
    pieces = [queue.take(10) for _ in range(16)]
    assert [(piece.items, piece.deaths) for piece in pieces] == [([i], 1) for i in range(16, 32)]
    for block in (third, *reversed(pieces), first):
        assert list(queue.finished()) == []
        block.ended = Ended(block.items)
    assert [item for ended in queue.finished() for item in ended.results] == list(range(40))
    assert queue.is_empty


def test_a_queue_takes_no_more_than_is_wanted():
    queue = _Queue(range(100))
    assert [isinstance(queue.take(2), Block) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    "address", ["", "10.0.0.1", "ray://host", "ray://user:secret@host:10001", "http://host:1", "ray://a b:1"]
)
def test_what_is_no_address_of_a_cluster_is_refused(address):
    with pytest.raises(UsageError, match="is no address of a Ray cluster"):
        opening.check_address(address)


@pytest.mark.parametrize("address", ["auto", "ray://host:10001", "ray://[::1]:10001"])
def test_addresses_of_clusters(address):
    opening.check_address(address)


def test_ray_is_an_extra(monkeypatch):
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingExtra) as caught, opening.opened("ray", None, 1, Silent()):
        pass
    assert "finetune-cli[ray]" in caught.value.remedy


def test_threads_are_opened_without_ray():
    with opening.opened("local", None, 3, Silent()) as engine:
        assert engine == Local(3)
