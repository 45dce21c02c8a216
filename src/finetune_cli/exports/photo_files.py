"""The programs beside every exported model that prepare a photo for it as training did."""

from importlib import resources
from pathlib import Path

from finetune_cli import files

PYTHON = "photo.py"
_SOURCES = {PYTHON: "finetune_cli.photos"}


def write(folder: Path) -> None:
    """Write the files into `folder`, where `classes.json` tells them the size and the kind of resizing."""
    for name, package in _SOURCES.items():
        files.write_text(folder / name, (resources.files(package) / name).read_text("utf-8"))
