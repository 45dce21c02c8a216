"""Configs in a folder, for tests of their loading."""

from pathlib import Path

import pytest

from finetune_cli.config.load import load_config
from finetune_cli.errors import ConfigError


def write_config(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def problem_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(folder, text), overrides)
    return caught.value.problem
