"""The house: imports only go downwards, and nothing imports itself in a circle, inside a package neither."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest
from paths import ROOT, SOURCE

PACKAGE = SOURCE / "finetune_cli"
# From the ground up: a package or module may import those before it, and modules of its own package.
FLOORS = [
    *("errors", "devices", "text", "fields", "streams", "signals", "progress", "parallel"),
    *("safe_open", "files", "storage", "places", "tables", "keras_setup", "engines"),
    *("metrics", "config", "untrusted", "cache", "photos", "practice"),
    "duplicates",
    *("runs", "backbones", "inference", "head", "drawing", "inspection"),
    *("training", "evaluation", "report", "doctor", "exports"),
    *("cli", "api", "__main__"),
]


def modules() -> dict[str, Path]:
    """Every module by its name below `finetune_cli`; a package's `__init__` by the package's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """The modules of this package that `path` imports, anywhere in it, without the package's own name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not used here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole.removeprefix("finetune_cli.") in MODULES else str(node.module))
    return {name.removeprefix("finetune_cli.") for name in names if name.startswith("finetune_cli.")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_downwards(module):
    if not module:
        return
    floor = FLOORS.index(module.partition(".")[0])
    for name in imported(MODULES[module]):
        assert FLOORS.index(name.partition(".")[0]) <= floor, f"{module} imports {name}, which is above it"


def test_nothing_imports_itself_in_a_circle():
    graph = {module: imported(path) - {module} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(f"a circle of imports: {' -> '.join(exc.args[1])}")


def walks():
    """The walks that the documentation shows, each a list of modules."""
    text = " ".join((ROOT / "docs" / "architecture.md").read_text("utf-8").split())
    step = r"`([a-z_/]+)\.py`"
    return [re.findall(step, walk[0]) for walk in re.finditer(f"{step}(?: → {step})+", text)]


def test_the_documented_walks_only_go_down():
    assert len(walks()) > 15
    for walk in walks():
        names = [module.replace("/", ".") for module in walk]
        assert set(names) <= set(MODULES), walk
        floors = [FLOORS.index(name.partition(".")[0]) for name in names]
        assert floors == sorted(floors, reverse=True), walk
        for name, below in pairwise(names):
            assert below in imported(MODULES[name]), f"{name} does not import {below}"
