"""Where the seconds of a training go: a row for each stage, with the core-seconds that it used, and its limit.

`measure.py stages` and `measure.py stages_many` print the tables. A training runs as `finetune train` does, in a
process of its own in which the clock of the stages reads core-seconds, too: those of all its threads and of the
processes that it started.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from finetune_cli import progress
from finetune_cli.parallel import cores

TICKS = os.sysconf("SC_CLK_TCK")


def core_seconds() -> float:
    """Core-seconds of this process, of those that it waited for, and of those that it started and that still run."""
    ended = os.times()
    return ended.user + ended.system + ended.children_user + ended.children_system + _of_children(os.getpid())


def _of_children(process: int) -> float:
    """Core-seconds of the running descendants of `process`; Linux alone tells them."""
    used = 0.0
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            for child in map(int, listed.read_text().split()):
                numbers = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                used += sum(map(int, numbers[11:15])) / TICKS + _of_children(child)
    return used


def train(target: Path, arguments: list[str]) -> None:
    """Run `finetune train ARGUMENTS` here, and write {stage: [seconds, core-seconds]} to `target`."""
    found: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
        started, used = time.perf_counter(), core_seconds()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            seconds[stage] = round(seconds.get(stage, 0.0) + took, 3)
            before = found.get(stage, [0.0, 0.0])
            found[stage] = [before[0] + took, before[1] + core_seconds() - used]

    progress.timed = timed  # before the modules that import it
    from finetune_cli.__main__ import main

    sys.argv = ["finetune", "train", *arguments]
    try:
        main()
    finally:
        target.write_text(json.dumps(found))


def measured(folder: Path, name: str, arguments: list[str]) -> tuple[dict[str, list[float]], dict]:
    """The stages of one training as the run `name` in `folder`, with `start and end` and `all`, and its run.json."""
    target = folder / f"{name}.json"
    places = [f"output.directory={folder}/runs", f"runtime.cache_dir={folder}/cache", "--name", name, "--quiet"]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, str(target), *arguments, *places], capture_output=True, text=True, check=False
    )
    took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"the training {name} failed:\n{done.stdout}{done.stderr}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    stages = {stage: values for stage, values in json.loads(target.read_text()).items() if values[0] >= 0.005}
    in_stages = [sum(column) for column in zip(*stages.values(), strict=True)]
    stages["start and end"] = [took - in_stages[0], max(0.0, used - in_stages[1])]
    stages["all"] = [took, used]
    return stages, json.loads((folder / "runs" / name / "run.json").read_text())


def print_header() -> None:
    print("| training | stage | seconds | core-seconds | of the cores | limit, s |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")


def print_table(title: str, stages: dict[str, list[float]], limits: dict[str, float]) -> None:
    """A row for each stage; its limit, unless `limits` has one, is its own core-seconds on all cores."""
    for stage, (seconds, used) in stages.items():
        limit = limits.get(stage, used / cores())
        print(
            f"| {title} | {stage} | {seconds:.2f} | {used:.2f} | {used / (cores() * seconds):.0%} | {limit:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2:])
