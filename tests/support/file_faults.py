"""Faults of a file system, injected from inside or by ending the process; for tests of what writes files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import PROGRAMS, SOURCE

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE)}
INJECTION = PROGRAMS / "exit_injection.py"

posix = pytest.mark.skipif(os.name == "nt", reason="forks, signals and permission bits are POSIX")


def failing(error: int):
    def fail(*args, **kwargs):
        raise OSError(error, os.strerror(error))

    return fail


def write_half(path: Path, error: BaseException):
    path.write_bytes(b"half")
    raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def inject(action: str, start: Path, work: Path) -> int:
    """Number of steps of `action`, each of which ended a process; see exit_injection.py."""
    answer = subprocess.run(
        [sys.executable, INJECTION, action, start, work], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return int(answer.stdout)
