"""Photos that several commands read."""

import shutil

import pytest


@pytest.fixture
def photos(tiny_run, tmp_path):
    """A folder with two photos that can be read and one that cannot."""
    source = min((tiny_run.photos / "test").rglob("*.*"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a" + source.suffix, "b" + source.suffix):
        shutil.copy(source, folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
    return folder
