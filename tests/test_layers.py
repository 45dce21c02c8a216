"""The house: imports only go downwards, and commands do not import one another."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "finetune_cli"
# From the ground up; modules of one floor may import each other, except on the floor `commands`.
FLOORS = [
    {"errors", "text"},
    {"files", "signals", "observer", "parallel", "yamlfile"},
    {"metrics", "calibration", "folds", "tables"},
    {"photos"},
    {"config", "config_errors"},
    {"model"},
    {"runs"},
    {"exports", "reporting"},
    {"commands"},
    {"console", "render", "render_graph"},
    {"cli_app"},
    {"cli_tools"},
    {"cli"},
    {"__main__"},
]
MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))


def floor(module: str) -> int:
    found = [i for i, names in enumerate(FLOORS) if module.partition(".")[0] in names]
    assert found, f"{module} has no floor in this test"
    return found[0]


def imported(path: Path) -> set[str]:
    """The modules of this package that `path` imports, anywhere in it, without the package's own name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not used here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("finetune_cli.") for name in names if name.startswith("finetune_cli.")}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_downwards(module):
    if module == Path("__init__.py"):
        assert not imported(SOURCE / module)
        return
    own = ".".join(module.with_suffix("").parts)
    for name in imported(SOURCE / module) - {"__version__"}:
        assert floor(name) <= floor(own), f"{own} imports {name}, which is above it"
        if own.startswith("commands.") and name.startswith("commands."):
            pytest.fail(f"{own} imports {name}: commands do not import one another")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_files_do_one_job(module):
    assert len((SOURCE / module).read_text("utf-8").splitlines()) <= 350
