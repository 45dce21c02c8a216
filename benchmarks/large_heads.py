"""Fits heads on up to a million rows: core-seconds, memory, log loss; prints the table of docs/training.md.

    python benchmarks/large_heads.py FOLDER [rows [classes [ways]]]

`rows` and `classes` are numbers with commas between them; the ways are `lbfgs` and `adam:EPOCHS`. FOLDER gets the
drawn features, 5 GB for a million rows, and keeps them. They have the spectrum of the bundled backbone's on photos; the
labels are drawn from the probabilities of a random head. 10,000 further rows validate (for Adam) and test. Every way
runs in a process of its own. Memory: the most that is not backed by a file, above what it was before the fit.
"""

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from finetune_cli.head.data import HeadData
from finetune_cli.head.keras_fit import KerasSettings, fit_epochs
from finetune_cli.head.l2 import choose_l2
from finetune_cli.head.lbfgs import Head, fit_lbfgs
from finetune_cli.keras_setup import import_keras
from finetune_cli.metrics.calibration import calibration_scores, softmax32

WIDTH, TEST, BLOCK = 1280, 10_000, 10_000
SPREAD = np.sqrt(20 / np.arange(1, WIDTH + 1)).astype(np.float32)  # standard deviations; on photos of scenes, about so


def features(folder: Path, rows: int) -> np.memmap:
    """The first `rows` drawn features, after those that test."""
    path = folder / "features.f32"
    size = 4 * WIDTH * (TEST + rows)
    if not path.exists() or path.stat().st_size < size:
        with path.open("wb") as file:
            for i in range((TEST + rows) // BLOCK):
                file.write(SPREAD * np.random.default_rng(i).standard_normal((BLOCK, WIDTH), np.float32))
    return np.memmap(path, np.float32, "r", shape=(TEST + rows, WIDTH))


def drawn_labels(x: np.ndarray, classes: int) -> np.ndarray:
    """A label for each row of `x`, from the probabilities of a random head."""
    teacher = np.random.default_rng(2**32 - 1).normal(0, 0.3, (WIDTH, classes)).astype(np.float32)
    noise = np.random.default_rng(classes)
    blocks = (x[i : i + BLOCK] @ teacher + noise.gumbel(size=(BLOCK, classes)) for i in range(0, len(x), BLOCK))
    return np.concatenate([block.argmax(axis=1) for block in blocks])


def anonymous_mb() -> float:
    """Memory of this process that is not backed by a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@contextmanager
def peak_memory(found: dict[str, float]) -> Iterator[None]:
    """Put the most that `anonymous_mb` rises in the block into `found`, looking every 50 ms."""
    before, most, ended = anonymous_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            most[0] = max(most[0], anonymous_mb() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        found["memory"] = most[0]


def core_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, rows: int, classes: int, way: str) -> dict[str, float]:
    x = features(folder, rows)
    labels = drawn_labels(x, classes)
    train, test = HeadData.of(x[TEST:], labels[TEST:], classes), HeadData.of(x[:TEST], labels[:TEST], classes)
    found: dict[str, float] = {}
    solver, _, epochs = way.partition(":")
    if solver == "adam":
        import_keras()
    with peak_memory(found):
        began, started = core_seconds(), time.perf_counter()
        l2 = choose_l2(train)[0]
        found["search"], begun = core_seconds() - began, core_seconds()
        passes: list[int] = []
        if solver == "lbfgs":
            head = fit_lbfgs(train, l2, progress=lambda done, _total=None: passes.append(done))
        else:
            by_photo = HeadData.of(train.features[:, None], train.labels, classes)
            for state in fit_epochs(by_photo, test, KerasSettings("adam", epochs=int(epochs), l2=l2)):
                passes.append(1)
                head = state.best
        found["fit"], found["seconds"] = core_seconds() - begun, time.perf_counter() - started
    return {**found, "passes": len(passes), "l2": l2, **scores(head, test)}


def scores(head: Head, test: HeadData) -> dict[str, float]:
    logits = head.logits(test.features)
    accuracy = float((logits.argmax(axis=1) == test.labels).mean())
    return {"log_loss": calibration_scores(softmax32(logits), test.labels).log_loss, "accuracy": accuracy}


def main() -> None:
    if sys.argv[1] == "--measure":
        folder, rows, classes, way = sys.argv[2:]
        print(json.dumps(measure(Path(folder), int(rows), int(classes), way)))
        return
    given = [*sys.argv[2:], *("100000,300000,1000000", "10,100", "lbfgs,adam:30")[len(sys.argv) - 2 :]]
    print(
        "| rows | classes | way | search, core-s | fit, core-s | passes | memory, MB | log loss | accuracy | seconds |"
    )
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for rows in sorted(map(int, given[0].split(",")), reverse=True):
        for classes in given[1].split(","):
            for way in given[2].split(","):
                command = [sys.executable, __file__, "--measure", sys.argv[1], str(rows), classes, way]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                each = json.loads(done.stdout)
                numbers = f"{each['search']:.1f} | {each['fit']:.1f} | {each['passes']} | {each['memory']:.0f}"
                quality = f"{each['log_loss']:.4f} | {each['accuracy']:.2%} | {each['seconds']:.0f}"
                print(f"| {rows:,} | {classes} | {way} | {numbers} | {quality} |", flush=True)


if __name__ == "__main__":
    main()
