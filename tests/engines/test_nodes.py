"""A cluster of several machines, each a process here: machines leave and join while items are processed."""

import importlib.util
import os
import threading
import time
from pathlib import Path

import engine_tasks
import pytest
from engine_tasks import Times, until_noted
from paths import SOURCE

from finetune_cli.engines import session, team
from finetune_cli.engines.cluster import Cluster
from finetune_cli.errors import FinetuneError
from finetune_cli.progress import Silent

pytestmark = [
    pytest.mark.machines,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra test-ray is not installed"),
]


@pytest.fixture
def machines(monkeypatch):
    """A head without cores for workers, and two machines with one each."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SOURCE), str(Path(engine_tasks.__file__).parent)]))
    session.import_ray(own=True)
    from ray.cluster_utils import Cluster as Machines

    found = Machines(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
    try:
        found.two = [found.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(2)]
        yield found
    finally:
        found.shutdown()


def test_a_machine_that_is_removed_and_one_that_joins(machines, record_property):
    observer = Silent()
    items = [("sleep", 0.02) if n % 2 else n for n in range(800)]
    wanted = [0.02 if n % 2 else 3 * n for n in range(800)]
    with Cluster(machines.address, "auto", observer) as engine:
        assert set(engine.map(Times(), until_noted(observer, "2 workers on 2 machines"))) == {0.05}
        assert "2 workers on 2 machines" in observer.notes
        results = engine.map(Times(), items)
        found = [next(results) for _ in range(30)]
        machines.remove_node(machines.two[0], allow_graceful=False)
        found += [next(results) for _ in range(100)]
        machines.add_node(num_cpus=2, object_store_memory=100_000_000)
        found += list(results)
        assert found == wanted
        assert engine.retries >= 1
        assert set(engine.map(Times(), until_noted(observer, "3 workers on 2 machines"))) == {0.05}
        assert "3 workers on 2 machines" in observer.notes
    record_property("tries", 1)


def test_a_cluster_whose_machines_are_all_gone(machines, monkeypatch):
    monkeypatch.setattr(team, "_ALONE", 3.0)
    with Cluster(machines.address, "auto", Silent()) as engine:
        results = engine.map(Times(), [("sleep", 0.05)] * 500)
        next(results)
        for node in machines.two:
            machines.remove_node(node, allow_graceful=False)
        with pytest.raises(FinetuneError, match="does not answer any more: it has had no machine") as caught:
            list(results)
    assert "run the same command again" in caught.value.remedy


def test_a_driver_whose_cluster_ends(machines):
    with Cluster(machines.address, "auto", Silent()) as engine:
        results = engine.map(Times(), [("sleep", 0.05)] * 500)
        next(results)
        threading.Timer(1.0, machines.two[1].kill_raylet).start()
        time.sleep(0.1)
        assert len(list(results)) == 499
