"""Ray on this machine: results in order, and once, whatever happens to the workers."""

import hashlib
import importlib.util
import io
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import engine_tasks
import numpy as np
import pytest
from engine_tasks import Times, until_noted
from paths import SOURCE
from PIL import Image

from finetune_cli import signals
from finetune_cli.cache.features import FeatureStore
from finetune_cli.engines import worker
from finetune_cli.engines.cluster import Cluster
from finetune_cli.engines.engine import Local
from finetune_cli.engines.session import Session
from finetune_cli.errors import ChangedPhoto, DataError, FinetuneError, Interrupted
from finetune_cli.inference.runtimes import OpenVinoRuntime, import_openvino, read_ir, save_ir
from finetune_cli.photos.augment import Augmenter
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Silent
from finetune_cli.training import extract

pytestmark = [
    pytest.mark.machines,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra test-ray is not installed"),
]

WORKERS = 2


@pytest.fixture(scope="module")
def observer():
    return Silent()


@pytest.fixture(scope="module")
def session():
    """One cluster for all tests of this module, because it takes seconds to start; engines use it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SOURCE), str(Path(engine_tasks.__file__).parent)]))
        with Session(None, WORKERS + 1, 1000) as opened:
            yield opened


@pytest.fixture(scope="module")
def cluster(session, observer):
    with Cluster(None, WORKERS, observer) as engine:
        yield engine


def test_results_are_those_of_threads_in_the_same_order(cluster):
    items = [("sleep", 0.05) if i % 37 == 0 else i for i in range(400)]
    assert list(cluster.map(Times(), items)) == list(Local(2).map(Times(), items))
    assert list(cluster.map(Times(), [])) == []


def test_two_workers_are_reported(cluster, observer):
    list(cluster.map(Times(), until_noted(observer, "2 workers on 1 machine")))
    assert "2 workers on 1 machine" in observer.notes


def test_a_block_whose_worker_is_killed_is_done_again_once(cluster, observer, tmp_path, record_property):
    before = cluster.retries
    items = [*range(100), ("kill", str(tmp_path / "killed")), *range(100, 200)]
    found = list(cluster.map(Times(), items))
    assert [*found[:100], *found[101:]] == [3 * i for i in range(200)]
    assert isinstance(found[100], int)
    assert cluster.retries == before + 1
    assert any("was lost; another one continues" in note for note in observer.notes)
    record_property("tries", 1)


def test_a_worker_killed_from_outside_loses_nothing(session, cluster, record_property):
    for _try in range(3):
        results = cluster.map(Times(), [("sleep", 0.02) if n % 3 == 0 else n for n in range(600)])
        found = [next(results) for _ in range(50)]
        place, _versions = session.ray.get(cluster._team.ready[-1].actor.versions.remote())
        os.kill(place.process, signal.SIGKILL)
        found += list(results)
        assert found == [0.02 if n % 3 == 0 else 3 * n for n in range(600)]
    record_property("tries", 3)


def test_items_that_kill_every_worker_are_named(cluster):
    items = [*range(20), ("always", "x.jpg"), *range(20)]
    with pytest.raises(FinetuneError, match=r"3 workers were lost with the same 1 photo: \('always', 'x\.jpg'\)"):
        list(cluster.map(Times(), items))
    assert list(cluster.map(Times(), range(5))) == [0, 3, 6, 9, 12]  # and it goes on


def test_an_error_comes_where_the_result_would_have_come(cluster):
    results = cluster.map(Times(), [*range(50), ("refuse", "a.jpg"), *range(50)])
    assert [next(results) for _ in range(50)] == [3 * i for i in range(50)]
    with pytest.raises(DataError, match=r"refused a\.jpg") as caught:
        next(results)
    assert caught.value.remedy == "try another"


def test_a_photo_that_changed_is_told_as_by_a_thread(cluster):
    with pytest.raises(ChangedPhoto) as caught:
        list(cluster.map(Times(), [1, ("changed", "a.jpg")]))
    assert caught.value.path == Path("a.jpg")


def test_a_bug_on_a_worker_is_reported_as_one(cluster):
    with pytest.raises(FinetuneError, match="failed: a bug with it") as caught:
        list(cluster.map(Times(), [("bug", "it")]))
    assert "this is a bug" in caught.value.remedy


def test_all_results_are_there_before_a_long_wait(cluster):
    counted = 0

    def items():
        for i in range(40):
            yield i
            if i % 10 == 9:
                yield None
                assert counted == i + 1

    for result in cluster.map(Times(), items()):
        assert result == 3 * counted
        counted += 1
    assert counted == 40


def test_few_items_are_taken_ahead(cluster):
    taken = 0

    def items():
        nonlocal taken
        for i in range(5000):
            taken = i
            yield i

    results = cluster.map(Times(), items())
    for n, _result in enumerate(results):
        assert taken - n <= 16 * (4 * WORKERS + 1)


def test_results_that_are_not_wanted_any_more_do_not_disturb_the_next(cluster):
    results = cluster.map(Times(), [("sleep", 0.05)] * 200)
    next(results)
    results.close()
    assert list(cluster.map(Times(), range(100))) == [3 * i for i in range(100)]


def test_a_worker_that_computes_otherwise_is_refused(session):
    with (
        Cluster(None, 1, Silent()) as engine,
        pytest.raises(FinetuneError, match=r"no machine of the cluster can be used: .* other step there than here"),
    ):
        list(engine.map(Times(there="other"), range(5)))


def test_what_may_differ_is_told(cluster, observer):
    assert list(cluster.map(Times(there="other", tolerated=("step",)), range(3))) == [0, 3, 6]
    assert any("gives other step than this one" in warning for warning in observer.warnings)


def test_another_version_is_refused_by_its_name(session, monkeypatch):
    ours = worker.versions()
    monkeypatch.setattr(worker, "versions", lambda: {**ours, "openvino": "1.2.3"})
    observer = Silent()
    with (
        Cluster(None, 1, observer) as engine,
        pytest.raises(FinetuneError, match=r"openvino is .* there and 1\.2\.3 here"),
    ):
        list(engine.map(Times(), range(5)))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A small network in OpenVINO's form, made without Keras: pixels -> 24 features."""
    ov = import_openvino()
    from openvino import opset8

    rng = np.random.default_rng(0)
    photos = opset8.parameter([-1, 32, 32, 3], np.float32)
    kernel = opset8.constant(rng.normal(0, 0.01, (24, 3, 5, 5)).astype(np.float32))
    channels_first = opset8.transpose(photos, opset8.constant([0, 3, 1, 2]))
    maps = opset8.relu(opset8.convolution(channels_first, kernel, [2, 2], [2, 2], [2, 2], [1, 1]))
    graph = tmp_path_factory.mktemp("backbone") / "backbone.xml"
    features = opset8.reduce_mean(maps, opset8.constant([2, 3]), False)
    save_ir(ov.Model([features], [photos], "small"), graph, graph.parent, 10_000)
    return graph


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """70 photos, of which one is a copy and one cannot be decoded."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for i in range(70):
        path = folder / f"{i:02}.jpg"
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), np.uint8)).save(path)
    (folder / "05.jpg").write_bytes((folder / "04.jpg").read_bytes())
    (folder / "33.jpg").write_bytes((folder / "33.jpg").read_bytes()[:300])
    return [
        Sample(path, path.name, 0, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(folder.iterdir())
    ]


def features(engine, photos, backbone, cache, precision="float32"):
    augmenter = Augmenter({"horizontal_flip": True, "rotation_range": 20.0}, 3, 0, 32)
    request = extract.FeatureRequest(ImageSettings(size=32), "small", precision, augmenter, thumbnails=True)

    def runtime(wanted):
        return OpenVinoRuntime(read_ir(backbone), wanted, 3)

    def contents():
        return backbone.read_bytes(), backbone.with_suffix(".bin").read_bytes()

    with FeatureStore(cache) as store:
        resources = extract.Resources(store, runtime, cache, engine, 4, files=contents)
        return extract.extract(photos, request, 24, resources, lambda _n: None)


@pytest.mark.parametrize("workers", [1, 2])
def test_features_are_those_of_threads_to_the_last_bit(session, photos, backbone, tmp_path, workers):
    found = []
    with Cluster(None, workers, Silent()) as engine:
        for name, each in (("one", Local(1)), ("three", Local(3)), ("ray", engine)):
            (tmp_path / name).mkdir()
            found.append(features(each, photos, backbone, tmp_path / name))
    for other in found[1:]:
        np.testing.assert_array_equal(other.array, found[0].array)
        np.testing.assert_array_equal(other.thumbnails, found[0].thumbnails)
        assert other.bad == found[0].bad
        assert [photo.name for photo in other.bad] == ["33.jpg"]
        assert (other.samples, other.computed, other.cached) == (found[0].samples, 68 * 3, 0)
    again = features(Local(1), photos, backbone, tmp_path / "ray")
    assert (again.computed, again.cached) == (0, 68 * 3)


def test_ray_takes_neither_signals_nor_the_terminal(session, capfd):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signals.catch()
    ours = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with Cluster(None, 1, Silent()) as engine:
            assert list(engine.map(Times(), range(3))) == [0, 3, 6]
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == ours
            threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            started = time.monotonic()
            with pytest.raises(Interrupted):
                list(engine.map(Times(), [("sleep", 30)]))
            assert time.monotonic() - started < 10
    finally:
        signals._received.clear()
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(number, handler)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert logging.getLogger("ray").level > logging.CRITICAL


def test_statistics_are_off_and_the_dashboard_is_not_there(session):
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    from ray._common.usage import usage_lib

    assert not usage_lib.usage_stats_enabled()
    assert not session.ray._private.worker._global_node.webui_url
    assert session._folder.stat().st_mode & 0o077 == 0


STRANGER = """
import ray, sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=5)
except Exception as exc:
    print(type(exc).__name__)
else:
    print("welcome")
"""


@pytest.mark.parametrize(("token", "answer"), [(None, "AuthenticationError"), ("right", "welcome")])
def test_only_who_has_the_token_can_talk_to_the_cluster(session, token, answer):
    address = session.ray.get_runtime_context().gcs_address
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    if token is None:
        own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    else:
        own = dict(os.environ)
    found = subprocess.run(
        [sys.executable, "-c", STRANGER, address], check=False, env=own, capture_output=True, text=True, timeout=90
    )
    assert answer in found.stdout, found.stderr


def test_ray_changes_nothing_about_reading_parquet(cluster):
    """An extension type of Ray's would be made from what the file says, once by a pickle: CVE-2026-41486."""
    list(cluster.map(Times(), range(3)))
    import pyarrow as pa
    from pyarrow import parquet

    assert "ray.data" not in sys.modules
    for name in ("ray.data.arrow_tensor", "ray.data.arrow_tensor_v2", "ray.data.arrow_pickled_object"):
        metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": "cos\nsystem\n(S'false'\ntR."}
        schema = pa.schema([pa.field("a", pa.binary(), metadata=metadata)])
        file = io.BytesIO()
        parquet.write_table(pa.table([[b"x"]], schema=schema), file)
        assert parquet.read_table(file).schema.field("a").type == pa.binary()
