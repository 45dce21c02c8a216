"""The documentation is true: help texts, file names, links, commands and keys that it mentions exist."""

import importlib.util
import re

import pytest
from paths import ROOT

from finetune_cli.cli.main import app
from finetune_cli.config import messages
from finetune_cli.config.schema import Config

README = (ROOT / "README.md").read_text("utf-8")
COMMANDS_PAGE = (ROOT / "docs" / "commands.md").read_text("utf-8")
CONFIG_PAGE = (ROOT / "docs" / "config.md").read_text("utf-8")
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)
GROUPS = sorted(str(group.typer_instance.info.name) for group in app.registered_groups)


def test_the_help_texts_are_those_of_the_program():
    spec = importlib.util.spec_from_file_location("update_docs", ROOT / "tools" / "update_docs.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.renewed(COMMANDS_PAGE) == COMMANDS_PAGE, "run: make docs"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command):
    assert f"<!-- help {command} -->" in COMMANDS_PAGE


def test_the_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("key", sorted(messages.known_keys(Config)))
def test_every_key_is_documented(key):
    assert re.search(rf"\b{key.split('.')[-1]}\b", CONFIG_PAGE), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_exist(page):
    for word in re.findall(r"\bfinetune ([a-z]+)\b", page.read_text("utf-8")):
        assert word in {*COMMANDS, *GROUPS}, word
