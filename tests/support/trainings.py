"""A small training by the real command, for `training/test_faults.py`: seconds long, and every file of it reproducible.

The photos are those of `runs_fixture`; the backbone is wide enough for the model to be the largest file of a run.
"""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runs_fixture
from paths import SOURCE

EPOCHS = 40
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(SOURCE),
    "PYTHONDONTWRITEBYTECODE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# What must be the same to the last bit; a .keras file carries the time in its zip entries.
SAME = (
    "inference/model.bin", "inference/model.xml", "predictions.csv", "metrics.json", "per_class.csv", "split.csv",
    "curves.png", "confusion_matrix.png", "config.yaml", "environment.json",
)  # fmt: skip


@dataclass
class Ended:
    """A process that has ended: its code, its standard error, and when each of its lines came."""

    code: int
    errors: str
    lines: list[tuple[float, str]]

    def when(self, beginning: str) -> float:
        """Seconds from the start to the first line that begins so."""
        return next(seconds for seconds, line in self.lines if line.startswith(beginning))


class Command:
    """`finetune ARGUMENTS` in `folder`; standard error is read line by line."""

    def __init__(self, folder: Path, *arguments: object, **options: Any) -> None:
        self.started = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "finetune_cli", *map(str, arguments)],
            cwd=folder,
            env={**ENVIRONMENT, **options.pop("variables", {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def wait_for(self, beginning: str) -> bool:
        """Read until a line begins so; false when the process ends before."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic() - self.started, line))
            if line.startswith(beginning):
                return True
        return False

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def end(self) -> Ended:
        self.wait_for("\0")
        self.process.stderr.close()
        return Ended(self.process.wait(), "".join(line for _seconds, line in self.lines), self.lines)


class Workshop:
    """Photos, a backbone and a warm feature cache; `begin` trains in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.photos, self.cache, self.backbone = folder / "x", folder / "cache", folder / "tiny.keras"
        runs_fixture.draw_photos(self.photos, ("ant", "bee", "wasp"))
        build_backbone(self.backbone)
        self.reference_folder = folder / "reference"
        command = self.begin(self.reference_folder)
        self.reference = command.end()
        assert self.reference.code == 0, self.reference.errors

    def begin(self, folder: Path, *overrides: str, **options: Any) -> Command:
        """A new training as `folder/runs/x-1`."""
        folder.mkdir(exist_ok=True)
        settings = {
            "data": {"train": str(self.photos / "train")},
            "image": {"size": runs_fixture.SIZE},
            "model": {"backbone": str(self.backbone), "dropout": 0.3},
            "augmentation": {"views": 2, "horizontal_flip": True},
            "training": {"solver": "adam", "epochs": EPOCHS, "batch_size": 16, "early_stopping_patience": None},
            "runtime": {"cache_dir": str(self.cache), "feature_precision": "float32", "device": "cpu"},
        }
        (folder / "x.yaml").write_text(json.dumps(settings))  # JSON is YAML
        return Command(folder, "train", "x.yaml", *overrides, **options)

    def resume_or_begin(self, folder: Path) -> Command:
        """Resume the run in `folder`, or begin one."""
        if list(folder.glob("runs/*/split.csv")):
            return Command(folder, "train", "--resume")
        return self.begin(folder)

    def unfinished(self, folder: Path, *overrides: str) -> Path:
        """A run in `folder` that was killed between its epochs 7 and `EPOCHS`."""
        command = self.begin(folder, *overrides)
        assert command.wait_for("epoch 7/"), command.end().errors
        command.send(signal.SIGKILL)
        assert command.end().code == -signal.SIGKILL
        run = folder / "runs" / "x-1"
        assert not (run / "run.json").exists()
        return run

    def assert_equal(self, run: Path, *besides: str, litter: bool = False) -> None:
        """`run` ended with the same bits as the reference, which nothing interrupted; `besides`: but for these."""
        ours, theirs = contents(run), contents(self.reference_folder / "runs" / "x-1")
        assert len(ours["history.csv"]) == EPOCHS
        different = {name for name in ours if ours[name] != theirs[name]}
        assert different <= set(besides)
        assert litter or not [path for path in run.rglob("*") if ".tmp" in path.name]
        assert litter or not (run / "checkpoints").exists()


def contents(run: Path) -> dict[str, Any]:
    """Hashes by file; of history.csv the rows without the column of seconds."""
    listed = json.loads((run / "run.json").read_text())["files"]
    found = {name: listed.get(name) for name in SAME}
    if "history.csv" in listed:
        rows = list(csv.DictReader((run / "history.csv").read_text().splitlines()))
        found["history.csv"] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return found


def build_backbone(path: Path) -> None:
    from finetune_cli.keras_setup import import_keras

    keras = import_keras()
    keras.utils.set_random_seed(1)
    inputs = keras.Input((runs_fixture.SIZE, runs_fixture.SIZE, 3))
    x = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    x = keras.layers.Conv2D(16, 5, strides=4, padding="same", activation="relu")(x)
    x = keras.layers.Conv2D(32, 3, strides=2, padding="same", activation="relu")(x)
    x = keras.layers.Conv2D(512, 3, strides=2, padding="same", activation="relu")(x)
    keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x)).save(path)


def kill(command: Command, phase: str, rng: random.Random, reference: Ended) -> Ended:
    """SIGKILL at a random moment: while it is `preparing`, between its `epochs`, or while it is `saving`."""
    first, last, end = reference.when("preflight"), reference.when("head (adam)"), reference.lines[-1][0]
    if phase == "preparing":
        time.sleep(rng.uniform(0, 0.7) * (last - first))
    elif phase == "epochs":
        for _epoch in range(rng.randrange(1, 7)):
            command.wait_for("epoch ")
        time.sleep(rng.uniform(0, 0.1))
    else:
        command.wait_for("head (adam)")
        time.sleep(rng.uniform(0, 0.7) * (end - last))
    command.send(signal.SIGKILL)
    return command.end()


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
