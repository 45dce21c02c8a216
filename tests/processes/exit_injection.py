"""Ends a process at every single step of an operation on files; `test_files.py` and others look at what is left.

    python exit_injection.py ACTION START WORK    prints how many steps there were

`START` is a folder that the operation begins with. For step n it is copied to `WORK/n`, and a forked child runs the
action there and leaves by `os._exit`, which no `finally` sees, just before its n-th call of one of the functions below.
A write of bytes (`os.write`) counts as two steps: before it, and when half of the bytes are there.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

STEPS = ("open", "close", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir")


def exit_at(last: int) -> None:
    """Make the `last`-th step (from 1) end this process."""
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        if count == last:
            os._exit(9)

    def counted(function):
        def wrapper(*args, **kwargs):
            step()
            return function(*args, **kwargs)

        return wrapper

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    written = os.write

    def write(handle: int, data) -> int:
        step()
        half = len(data) // 2
        written(handle, data[:half])
        step()
        return half + written(handle, data[half:])

    os.write = write

    def write_bytes(path: Path, data: bytes) -> int:
        step()
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            step()
            return len(data) // 2 + file.write(data[len(data) // 2 :])

    Path.write_bytes = write_bytes


def write_file(folder: Path) -> None:
    from finetune_cli import files

    files.write_bytes(folder / "file.json", b"new" * 100)


def write_folder(folder: Path) -> None:
    from finetune_cli import files

    with files.atomic_folder(folder / "deep" / "model") as temporary:
        (temporary / "a").write_bytes(b"a" * 100)
        (temporary / "b").write_bytes(b"b" * 100)


def save_checkpoint(folder: Path) -> None:
    import numpy as np

    from finetune_cli.runs import checkpoints

    checkpoints.save(folder, 5, {"kernel": np.full((3, 2), 5.0)}, {"score": 5}, best=False)


ACTIONS = {"file": write_file, "folder": write_folder, "checkpoint": save_checkpoint}


def count_steps(start: Path, work: Path, action: Callable[[Path], object]) -> int:
    """Run `action` in copies of `start` in `work`, ended at its first step, its second, ...; how many there are."""
    for last in range(1, 1000):
        folder = work / str(last)
        shutil.copytree(start, folder)
        child = os.fork()
        if child == 0:
            exit_at(last)
            action(folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return last - 1
        assert code == 9, f"step {last} ended with {code}"
    raise AssertionError("the action never ends")


def main(action: str, start: Path, work: Path) -> int:
    import numpy as np  # noqa: F401 - before the steps are counted

    from finetune_cli import files  # noqa: F401
    from finetune_cli.runs import checkpoints  # noqa: F401

    return count_steps(start, work, ACTIONS[action])


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
