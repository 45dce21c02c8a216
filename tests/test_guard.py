"""Nothing calls home, and nothing is written but the run, the cache and the output.

Python's audit events show every connection, process and write that Python code makes, from the interpreter's first
moment. What native code does is seen from outside: a network of its own without any route, whose counters show every
attempt, and the folders that it could write to, compared before and after.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import PROGRAMS, SOURCE

from finetune_cli.practice import sample

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces and /proc")

# Local questions: which commit, which processor, which fonts.
PROCESSES = {"git", "uname", "fc-list", "lscpu", "ldconfig", "/sbin/ldconfig"}


@dataclass
class Place:
    """An empty home, an empty folder for temporary files, a cache, and a folder to work in."""

    folder: Path

    def __post_init__(self) -> None:
        for name in ("home", "tmp", "cache", "work"):
            (self.folder / name).mkdir()

    def run(self, *arguments: object) -> list[list[str]]:
        """Run Python with `arguments`; the events that were seen, attempts to reach the network among them."""
        log = self.folder / "events"
        log.write_text("")
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.pathsep.join([str(PROGRAMS / "guard_site"), str(SOURCE)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "GUARD_LOG": str(log),
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
        }
        command = [sys.executable, *map(str, arguments)]
        if alone := without_network():
            command = [
                *alone,
                "sh",
                "-c",
                '"$@"; code=$?; cat /proc/net/snmp > "$0"; exit $code',
                str(self.folder / "snmp"),
                *command,
            ]
        answer = subprocess.run(
            command, cwd=self.folder / "work", env=environment, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr
        events = [json.loads(line) for line in log.read_text().splitlines()]
        if alone:
            events += [["attempt", name] for name in attempts((self.folder / "snmp").read_text())]
        return events

    def written(self) -> set[str]:
        """Everything in the watched folders, relative to `folder`."""
        found = self.folder.rglob("*") if self.folder.exists() else ()
        return {path.relative_to(self.folder).as_posix() for path in found} - {
            "home",
            "tmp",
            "cache",
            "work",
            "events",
            "snmp",
        }


def without_network() -> list[str]:
    """The command that gives a process a network without routes; empty where that is not allowed."""
    command = ["unshare", "-n"]
    allowed = shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if allowed and allowed.returncode == 0 else []


def attempts(snmp: str) -> list[str]:
    """The counters in /proc/net/snmp that count attempts to send, and are not zero."""
    lines = [line.split() for line in snmp.splitlines()]
    counters = {}
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        counters |= {names[0] + name: int(value) for name, value in zip(names[1:], values[1:], strict=True)}
    return [
        name for name in ("Ip:OutRequests", "Ip:OutNoRoutes", "Tcp:ActiveOpens", "Udp:OutDatagrams") if counters[name]
    ]


def assert_quiet(events: list[list[str]], allowed: list[Path]) -> None:
    """No connection, no process but the local questions and Keras's own, no file opened for writing outside `allowed`.

    Keras's processes are watched as well.
    """
    for event, *arguments in events:
        if event == "open":
            path = Path(arguments[0])
            assert any(path.is_relative_to(folder) for folder in (*allowed, Path(os.devnull))), arguments
        elif event == "subprocess.Popen":
            keras = arguments[0] == sys.executable and "keras_tasks.serve(" in arguments[1]
            assert keras or Path(arguments[0]).name in PROCESSES or arguments[0] in PROCESSES, arguments
        elif arguments[-1] != "('::1', 0)":  # urllib3 tries on import whether the machine knows IPv6
            pytest.fail(f"{event} {arguments}")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


CONNECT = """
import socket
for kind, port in ((socket.SOCK_STREAM, 80), (socket.SOCK_DGRAM, 53)):
    with socket.socket(socket.AF_INET, kind) as one:
        try:
            one.connect(("192.0.2.1", port))
            one.send(b"x")
        except OSError:
            pass
"""


def test_the_guard_sees_a_connection_a_process_and_a_file(place):
    events = place.run("-c", CONNECT)
    assert [event for event, *_ in events].count("socket.connect") == 2
    if without_network():
        assert ["attempt", "Ip:OutNoRoutes"] in events
    events = place.run("-c", "import subprocess; subprocess.run(['true']); open('here', 'w').close()")
    assert ["subprocess.Popen", "true", "['true']"] in events
    assert ["open", str(place.folder / "work" / "here")] in events
    assert place.written() == {"work/here"}


@pytest.mark.slow
def test_train_predict_and_evaluate_call_nobody_and_write_nothing_else(place):
    photos = place.folder / "photos"
    sample.draw(photos, 8, 0, lambda _n: None)
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    work, cache = place.folder / "work", place.folder / "cache"
    allowed = [work, cache, place.folder / "tmp"]  # and what stays there is compared below
    settings = [
        "data.train=../photos",
        "model.backbone=efficientnet_lite0",
        "image.size=64",
        "runtime.cache_dir=../cache",
    ]
    for solver in (["training.solver=adam", "training.epochs=2"], ["training.solver=lbfgs"]):
        assert_quiet(place.run("-m", "finetune_cli", "train", *settings, *solver), allowed)
    assert_quiet(
        place.run("-m", "finetune_cli", "predict", photos, "--output", "answers.csv", "--format", "csv"), allowed
    )
    assert_quiet(place.run("-m", "finetune_cli", "evaluate"), allowed)
    tops = {path.split("/")[0] + "/" + path.split("/")[1] for path in place.written() if "/" in path}
    assert {top for top in tops if not top.startswith(("photos/", "cache/"))} == {"work/runs", "work/answers.csv"}
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_default_cache_is_the_one_folder_in_the_home(place):
    photos = place.folder / "photos"
    sample.draw(photos, 4, 0, lambda _n: None)
    place.run(
        "-m", "finetune_cli", "train", "data.train=../photos", "model.backbone=efficientnet_lite0", "image.size=64"
    )
    in_home = {path.removeprefix("home/") for path in place.written() if path.startswith("home/")}
    assert in_home - {".cache"} == {path for path in in_home if path.startswith(".cache/finetune-cli")}
    assert not [path for path in place.written() if path.startswith("tmp/")]
