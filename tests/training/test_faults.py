"""Kills, signals, full disks, forbidden folders, races and changed photos against the real `finetune train`.

Each test ends by comparing every file of the run with those of one that nothing interrupted. `test_faults.py` does the
same to the parts alone, and many more times.
"""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import trainings
from PIL import Image
from trainings import Command, Workshop, copied, kill

from finetune_cli.config.load import load_config
from finetune_cli.errors import FinetuneError, Interrupted, RunError
from finetune_cli.progress import Silent
from finetune_cli.runs import checkpoints
from finetune_cli.training import pipeline as command_train

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="POSIX signals, limits and users")]

NOBODY = 65534


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def killed(shop, tmp_path_factory):
    """The folder of an unfinished run `runs/x-1`; to be copied."""
    folder = tmp_path_factory.mktemp("killed") / "folder"
    shop.unfinished(folder)
    return folder


@pytest.fixture
def started(killed, tmp_path):
    """A copy of the folder of an unfinished run."""
    return copied(killed, tmp_path / "copy")


# Kills and signals


@pytest.mark.parametrize("seed", range(3))
def test_sigkill_at_random_moments(shop, tmp_path, seed, record_property):
    rng, kills = random.Random(seed), 0
    phases = ("preparing", "epochs", "saving", "epochs", "saving", "saving", "epochs", "preparing")
    for phase in 2 * phases:  # kills that come too late on a noisy machine are tried again
        ended = kill(shop.resume_or_begin(tmp_path), phase, rng, shop.reference)
        kills += ended.code == -signal.SIGKILL
        for run in tmp_path.glob("runs/*"):
            last = checkpoints.load_latest(run / "checkpoints")
            assert last is None or not last.warnings
        for finished in list(tmp_path.glob("runs/*/run.json")):  # the kill came too late
            shop.assert_equal(finished.parent, litter=ended.code != 0)
            shutil.rmtree(tmp_path / "runs")
        if kills == 4:
            break
    record_property("tries", kills)
    assert kills == 4
    ended = shop.resume_or_begin(tmp_path).end()
    assert ended.code == 0, ended.errors
    assert "damaged" not in ended.errors
    assert "the environment is not" not in ended.errors
    shop.assert_equal(next(tmp_path.glob("runs/*/run.json")).parent)


def test_sigint_and_sigterm_save_what_is_whole(shop, tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        command = shop.resume_or_begin(tmp_path)
        assert command.wait_for("epoch ")
        assert command.wait_for("epoch ")
        command.send(number)
        ended = command.end()
        assert ended.code == code, ended.errors
        assert "Traceback" not in ended.errors
        assert "resume with: finetune train --resume" in ended.errors
    ended = shop.resume_or_begin(tmp_path).end()
    assert ended.code == 0, ended.errors
    shop.assert_equal(tmp_path / "runs" / "x-1")


def test_sigterm_at_random_moments(shop, tmp_path, record_property):
    rng, tries = random.Random(0), 0
    finished = False
    while tries < 4 and not finished:
        command = shop.resume_or_begin(tmp_path)
        time.sleep(rng.uniform(0.1, 0.8) * shop.reference.lines[-1][0])
        command.send(signal.SIGTERM)
        ended = command.end()
        tries += 1
        # On a machine that has become quicker since the reference, the run may be finished before the signal.
        finished = bool(list(tmp_path.glob("runs/*/run.json")))
        # In the first instant, before the program has started, it ends by the signal itself.
        assert ended.code in {143, -signal.SIGTERM} | ({0} if finished else set()), ended.errors
        assert "Traceback" not in ended.errors
    record_property("tries", tries)
    if not finished:
        ended = shop.resume_or_begin(tmp_path).end()
        assert ended.code == 0, ended.errors
    shop.assert_equal(next(tmp_path.glob("runs/*/run.json")).parent)


def test_a_second_signal_ends_at_once(shop, tmp_path):
    command = shop.begin(tmp_path)
    assert command.wait_for("epoch 2/")
    command.send(signal.SIGINT)
    command.send(signal.SIGTERM)
    started = time.monotonic()
    ended = command.end()
    assert ended.code in {130, 143}
    assert time.monotonic() - started < 5
    assert checkpoints.load_latest(tmp_path / "runs" / "x-1" / "checkpoints").epoch >= 2


# Resuming


def test_more_epochs_equal_a_run_that_had_them_from_the_start(shop, tmp_path):
    run = shop.unfinished(tmp_path, "training.epochs=15")
    ended = Command(tmp_path, "train", "--resume", run, f"training.epochs={trainings.EPOCHS}").end()
    assert ended.code == 0, ended.errors
    shop.assert_equal(run)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(shop, started, record_property):
    run = started / "runs" / "x-1"
    newest = max((run / "checkpoints").glob("epoch-*"))
    flip(newest / "arrays.npz", 12345)
    ended = Command(started, "train", "--resume").end()
    assert ended.code == 0, ended.errors
    assert (
        f"warning: runs/x-1/checkpoints/{newest.name} is damaged: SHA256SUMS does not match arrays.npz" in ended.errors
    )
    shop.assert_equal(run)


def test_when_no_checkpoint_is_whole_nothing_starts_over(started):
    for path in started.glob("runs/x-1/checkpoints/*/state.json"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FinetuneError, match="no checkpoint is whole"):
        resume(started / "runs" / "x-1")


def test_photos_may_move_between_a_kill_and_the_resume(shop, started):
    photos = copied(shop.photos, started / "photos")
    ended = Command(started, "train", "--resume", f"data.train={photos / 'train'}").end()
    assert ended.code == 0, ended.errors
    shop.assert_equal(started / "runs" / "x-1", "config.yaml")


def delete(photos: Path) -> str:
    (photos / "train" / "bee" / "bee-03.png").unlink()
    return "gone or changed train/bee: bee/bee-03.png"


def change(photos: Path) -> str:
    Image.fromarray(np.full((90, 80, 3), 77, np.uint8)).save(photos / "val" / "ant" / "ant-01.png")
    return "new or changed val/ant: ant/ant-01.png"


def add(photos: Path) -> str:
    Image.fromarray(np.full((90, 80, 3), 77, np.uint8)).save(photos / "train" / "ant" / "new.png")
    return "new or changed train/ant: ant/new.png"


def rename_class(photos: Path) -> str:
    for split in ("train", "val", "test"):
        (photos / split / "wasp").rename(photos / split / "hornet")
    return "gone or changed test/wasp"


@pytest.mark.parametrize("how", [delete, change, add, rename_class])
def test_other_photos_are_refused_by_name(shop, started, how):
    photos, run = copied(shop.photos, started / "photos"), started / "runs" / "x-1"
    message = how(photos)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock-holder"}
    with pytest.raises(RunError, match="the photos are not those") as caught:
        resume(run, f"data.train={photos / 'train'}")
    assert message in caught.value.problem
    for path, content in before.items():
        assert path.read_bytes() == content


def test_other_settings_are_refused_by_name(started):
    path = started / "runs" / "x-1" / "config.yaml"
    path.write_text(path.read_text().replace("dropout: 0.3", "dropout: 0.4").replace("seed: 0", "seed: 3"))
    with pytest.raises(RunError, match="the settings are not those") as caught:
        resume(started / "runs" / "x-1")
    assert "  model.dropout was 0.3, is 0.4\n  training.seed was 0, is 3" in caught.value.problem


@pytest.mark.parametrize("name", ["config.yaml", "split.csv", "environment.json", "checkpoints/start.json"])
def test_a_damaged_record_is_refused_or_means_the_same(shop, killed, tmp_path, name, record_property):
    whole = (killed / "runs" / "x-1" / name).read_bytes()
    damaged = [whole[: len(whole) * i // 16] for i in range(16)] + [flipped(whole, bit) for bit in (99, 1234, 3333)]
    refused = 0
    for i, content in enumerate(damaged):
        folder = copied(killed, tmp_path / str(i))
        (folder / "runs" / "x-1" / name).write_bytes(content)
        try:
            resume(folder / "runs" / "x-1")
        except FinetuneError:
            refused += 1
        else:
            shop.assert_equal(folder / "runs" / "x-1")
        shutil.rmtree(folder)
    record_property("tries", len(damaged))
    assert refused >= len(damaged) - 4  # the end of config.yaml holds what the defaults say, too


def test_a_kill_between_the_record_of_more_epochs_and_the_config(started):
    run = started / "runs" / "x-1"
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(Interrupted):
        resume(run, "training.epochs=50", observer=InterruptedAtOnce())
    (run / "config.yaml").write_bytes(before)
    with pytest.raises(Interrupted):
        resume(run, observer=InterruptedAtOnce())


class InterruptedAtOnce(Silent):
    def note(self, text: str) -> None:
        if text.startswith("epoch "):
            raise Interrupted(2)


def resume(run: Path, *overrides: str, observer: Silent | None = None) -> None:
    command_train.resume(run, load_config(run / "config.yaml", overrides), observer or Silent())


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8 % len(content)] ^= 1 << bit % 8
    return bytes(changed)


def flip(path: Path, bit: int) -> None:
    path.write_bytes(flipped(path.read_bytes(), bit))


# Races


def test_two_trainings_with_one_name_and_one_new_cache(shop, tmp_path):
    options = ("--name", "same", f"runtime.cache_dir={tmp_path / 'cache'}")
    ended = [command.end() for command in [shop.begin(tmp_path, *options) for _ in range(2)]]
    assert sorted(each.code for each in ended) == [0, 2], [each.errors for each in ended]
    loser = max(ended, key=lambda each: each.code)
    assert "same exists already, and runs are never overwritten" in loser.errors
    assert "feature cache" not in "".join(each.errors for each in ended), "one of them could not use it"
    shop.assert_equal(tmp_path / "runs" / "same", "config.yaml")


def test_two_processes_do_not_resume_one_run(shop, started):
    ended = [command.end() for command in [Command(started, "train", "--resume") for _ in range(2)]]
    assert sorted(each.code for each in ended) == [0, 1], [each.errors for each in ended]
    assert "runs/x-1 is in use by process" in max(ended, key=lambda each: each.code).errors
    shop.assert_equal(started / "runs" / "x-1")


# Limits and full disks


def test_a_limit_on_the_size_of_files(shop, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (350_000, 350_000))  # Python itself ignores SIGXFSZ

    ended = shop.begin(tmp_path, preexec_fn=limit).end()
    run = tmp_path / "runs" / "x-1"
    assert ended.code == 1, ended.errors
    weights = 1216 + 4640 + 147_968 + 1539  # three convolutions and the head
    assert f"model.keras would be larger than the system allows ({4 * weights // 1000} kB are needed)" in ended.errors
    assert not (run / "model.keras").exists()
    assert checkpoints.load_latest(run / "checkpoints").epoch == trainings.EPOCHS
    ended = shop.resume_or_begin(tmp_path).end()
    assert ended.code == 0, ended.errors
    shop.assert_equal(run)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a small disk can only be mounted by root")
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_loses_nothing(shop, tmp_path, small_disk):
    ballast = small_disk / "ballast"
    command = shop.begin(tmp_path, f"output.directory={small_disk / 'runs'}")
    assert command.wait_for("epoch 5/")
    fill_up(ballast)
    ended = command.end()
    assert ended.code == 1, ended.errors
    assert "no space left to write" in ended.errors
    assert "are needed)" in ended.errors
    run = small_disk / "runs" / "x-1"
    last = checkpoints.load_latest(run / "checkpoints")
    assert last.epoch >= 5
    assert last.warnings == ()

    refused = Command(tmp_path, "train", "--resume", run).end()
    assert refused.code == 1
    assert "needs 2." in refused.errors
    assert "MB of disk space, and 0 bytes are free" in refused.errors

    ballast.unlink()
    ended = Command(tmp_path, "train", "--resume", run).end()
    assert ended.code == 0, ended.errors
    shop.assert_equal(run, "config.yaml")


def fill_up(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


# Permissions

AS_NOBODY = """
    import os, sys
    from finetune_cli.cli import console
    from finetune_cli.cli.app import app
    from finetune_cli.config.load import load_config
    from finetune_cli.training import pipeline  # what is imported late is imported now: root may own Python's files
    from finetune_cli.training import prepare
    import encodings.utf_8_sig, filelock, rich.text

    if os.geteuid() == 0:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    app(["train", *sys.argv[1:]])
"""


@pytest.fixture
def open_folder(shop, killed):
    """A folder that every user may write in, with photos, a cache's folder and a run that was killed."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are private
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(killed / "runs", folder / "runs")
        shutil.copytree(shop.photos, folder / "photos")
        (folder / "cache").mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        yield folder
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)


def train_as_nobody(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    script = textwrap.dedent(AS_NOBODY)
    command = [sys.executable, "-c", script, *arguments, "data.train=photos/train", "runtime.cache_dir=cache"]
    return subprocess.run(command, cwd=folder, env=trainings.ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("forbidden", ["runs", "runs/x-1"])
def test_a_forbidden_folder_is_reported_before_the_work(open_folder, forbidden):
    (open_folder / forbidden).chmod(0o555)
    first = ["--resume", "runs/x-1"] if forbidden == "runs/x-1" else ["model.backbone=efficientnet_lite0"]
    started = time.monotonic()
    answer = train_as_nobody(open_folder, *first)
    assert answer.returncode == 1, answer.stderr
    other = ", or set output.directory to another folder" if forbidden == "runs" else ""
    words = rf"no permission to write \S*{forbidden}\ntry: give yourself permission to write there{other}\n"
    assert re.search(words, answer.stderr), answer.stderr
    assert "preflight" not in answer.stderr
    assert time.monotonic() - started < 30
    assert [path.name for path in open_folder.glob("runs/*")] == ["x-1"]
