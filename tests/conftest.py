"""Fixtures that several test files share."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from paths import SHARED

if TYPE_CHECKING:
    from runs_fixture import TinyRun

    from finetune_cli.exports.export import Result

SHARED_DATA = SHARED / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real photos beside the repository; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real photos: {SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> "TinyRun":
    """A finished run of a tiny network with its photos and its feature cache; not to be changed by a test."""
    import runs_fixture

    return runs_fixture.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def exported(tiny_run: "TinyRun", tmp_path_factory: pytest.TempPathFactory) -> "Result":
    """All five exported forms of the tiny run, made in one call; not to be changed by a test."""
    from finetune_cli.exports.export import ExportRequest, export
    from finetune_cli.progress import Silent

    names = ("savedmodel", "keras", "onnx", "litert", "openvino")
    return export(
        tiny_run.run, ExportRequest(names, tmp_path_factory.mktemp("exports") / "models" / "scenes"), Silent()
    )
