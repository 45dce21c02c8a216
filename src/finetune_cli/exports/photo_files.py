"""The programs beside every exported model that prepare a photo for it as training did."""

from importlib import resources
from pathlib import Path

from finetune_cli import files

_PACKAGES = {"photo.py": "finetune_cli.photos", "photo.mjs": "finetune_cli.exports"}


def text(name: str) -> str:
    """The content of the file `name`."""
    return (resources.files(_PACKAGES[name]) / name).read_text("utf-8")


def write(folder: Path) -> None:
    """Write the files into `folder`, where `classes.json` tells them the size and the kind of resizing."""
    for name in _PACKAGES:
        files.write_text(folder / name, text(name))
