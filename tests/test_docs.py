"""The documentation is true: help texts, file names, links, commands and keys that it mentions exist."""

import importlib.util
import re
import sys
import typing
from pathlib import Path

import pytest
import yaml
from paths import ROOT

from finetune_cli.cli.app import app
from finetune_cli.config.schema import Config, Section

README = (ROOT / "README.md").read_text("utf-8")
COMMANDS_PAGE = (ROOT / "docs" / "commands.md").read_text("utf-8")
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)
GROUPS = sorted(str(group.typer_instance.info.name) for group in app.registered_groups)


def load_tool(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, tool)  # its dataclasses look themselves up there
    spec.loader.exec_module(tool)
    return tool


def test_the_reliability_page_counts_tests_that_exist(monkeypatch):
    tool = load_tool("reliability_table", monkeypatch)
    for prefixes in (tool.FAULTS | tool.HOSTILE).values():
        for prefix in prefixes:
            module, _, test = prefix.partition("::")
            assert module in tool.MODULES
            code = (ROOT / tool.test_file(module)).read_text("utf-8")
            assert f"def {test or 'test_'}" in code, prefix


def test_the_help_texts_are_those_of_the_program(monkeypatch):
    tool = load_tool("update_docs", monkeypatch)
    assert tool.renewed(COMMANDS_PAGE) == COMMANDS_PAGE, "run: make docs"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command):
    assert f"<!-- help {command} -->" in COMMANDS_PAGE


def test_the_readme_fits_on_a_few_screens():
    assert len(README.splitlines()) <= 150


def config_block() -> str:
    """The YAML block that shows every key; it stands once in the documentation."""
    blocks = [block for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    (block,) = (block for block in blocks if "train: PATH" in block)
    return block


def documented_config() -> Config:
    """All defaults, with the sections that are off by default."""
    return Config(data={"train": Path("PATH")}, fine_tuning="auto", unknown="auto")


def test_the_config_block_holds_every_key_with_its_default_and_no_other():
    shown = yaml.safe_load(config_block())
    assert shown["data"].pop("train") == "PATH"
    assert Config(data={"train": Path("PATH")}).fine_tuning is None
    assert Config(data={"train": Path("PATH")}).unknown is None
    defaults = documented_config().model_dump(mode="json")
    del defaults["data"]["train"]
    assert shown.keys() == defaults.keys()
    for name, section in defaults.items():
        # As text, because 0 equals false and 0.0 in Python.
        assert sorted(map(repr, _items(shown[name]))) == sorted(map(repr, _items(section))), name


def _items(section):
    return section.items() if isinstance(section, dict) else [section]


def test_the_config_block_names_every_choice():
    sections = {name: type(value) for name, value in documented_config() if isinstance(value, Section)}
    lines, section = {}, None
    for line in config_block().splitlines():
        key = line.split(":")[0]
        if not line.startswith(" "):
            section = key
        lines[section, key.strip()] = line
    choices = 0
    for name, schema in [*sections.items(), (None, Config)]:
        for key, field in schema.model_fields.items():
            for choice in _choices(field.annotation):
                choices += 1
                line = lines[name or key, key]
                assert re.search(rf"\b{choice}\b", line.partition(":")[2]), f"{line!r} does not name {choice}"
    assert choices > 20


def _choices(annotation):
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    return [choice for part in typing.get_args(annotation) for choice in _choices(part)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_exist(page):
    for word in re.findall(r"\bfinetune ([a-z]+)\b", page.read_text("utf-8")):
        assert word in {*COMMANDS, *GROUPS}, word
