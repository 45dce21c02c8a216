"""Where things are: the repository, its tests, the programs that tests start, and the real photos beside it."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PROGRAMS = TESTS / "processes"
ROOT = TESTS.parent
SOURCE = ROOT / "src"
SHARED = ROOT.parent / "shared"
