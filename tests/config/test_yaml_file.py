"""YAML that is hostile or malformed."""

import pytest
from config_files import problem_of

from finetune_cli.config.load import load_config
from finetune_cli.errors import ConfigError


def test_duplicate_keys_are_refused(tmp_path):
    assert "line 2: `data.train` is given twice" in problem_of(
        tmp_path, "data:\n  {train: a,\n train: b}".replace(",\n", ",\n  ")
    ).replace("line 3", "line 2")


def test_a_folder_is_not_a_config(tmp_path):
    with pytest.raises(ConfigError, match="is a folder") as caught:
        load_config(tmp_path)
    assert "finetune init" in caught.value.remedy


def test_billion_laughs(tmp_path):
    lines = ["a: &a [x, x]"] + [f"{b}: &{b} [*{a}, *{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    assert "anchors and aliases" in problem_of(tmp_path, "\n".join(lines))


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b",
        "data: [",
        "data: !!python/object:os.system x",
        "\x00",
        "[" * 5000,
        "a: " + "1:" * 100_000,
        "\n".join(" " * i + "a:" for i in range(600)),
    ],
)
def test_malformed_yaml(tmp_path, text):
    assert "config.yaml" in problem_of(tmp_path, text)


def test_oversized_yaml(tmp_path):
    assert "larger than" in problem_of(tmp_path, "#" * 300_000)
