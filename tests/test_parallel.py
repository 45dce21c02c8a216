"""The ordered parallel map: order, bounded memory, errors, clean-up."""

import os
import subprocess
import sys
import threading
import time

import pytest

from finetune_cli.parallel import cores, groups_available, ordered_map


def test_results_come_in_order():
    assert list(ordered_map(lambda n: time.sleep(0.002 * (n % 3)) or n * n, range(50), 4)) == [n * n for n in range(50)]


def test_an_endless_source_is_read_as_far_as_needed():
    taken = 0

    def source():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    results = ordered_map(lambda n: n, source(), 3)
    assert [next(results) for _ in range(10)] == list(range(1, 11))
    assert taken <= 10 + 2 * 3
    results.close()


def test_an_error_comes_where_its_result_would():
    def work(n):
        if n == 3:
            raise ValueError("three")
        return n

    results = ordered_map(work, range(10), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_no_thread_is_left_behind():
    before = threading.active_count()
    results = ordered_map(lambda n: n, range(1000), 4)
    next(results)
    results.close()
    assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to cores")
def test_a_process_that_is_bound_to_one_core_has_one():
    """As in a container or under taskset, where counting the machine's cores would start too many threads."""
    code = """
import os
from finetune_cli.parallel import cores
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(cores())
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout == "1\n"


def test_where_a_process_cannot_be_bound_all_cores_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)  # unknown
    assert cores() == 1


def test_nothing_is_held_back_while_the_source_waits():
    more = threading.Event()

    def source():
        yield 1
        yield 2
        assert more.wait(30)
        yield 3

    results = ordered_map(sum, groups_available(source(), 8), 4)
    assert next(results) in {1, 3}
    more.set()
    assert sum(results) in {3, 5}


def test_what_is_there_already_comes_in_full_groups():
    go, read = threading.Event(), threading.Event()

    def source():
        assert go.wait(30)
        yield from range(20)
        read.set()

    groups = groups_available(source(), 8)
    assert next(groups) is None
    go.set()
    assert read.wait(30)
    assert [group for group in groups if group] == [tuple(range(8)), tuple(range(8, 16)), tuple(range(16, 20))]


def test_a_slow_reader_holds_the_source_back():
    taken = 0

    def source():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    groups = groups_available(source(), 2)
    assert any(next(groups) for _ in range(3))
    time.sleep(0.05)
    assert taken <= 64 * 2 + 2 * 3 + 2


def test_an_error_of_the_source_comes_after_what_came_before_it():
    def source():
        yield 1
        raise OSError("gone")

    groups = groups_available(source(), 8)
    assert next(filter(None, groups)) == (1,)
    with pytest.raises(OSError, match="gone"):
        list(groups)
