import os
from pathlib import Path

import pytest

from finetune_cli.text import address, brief, duration, first_line, listed, message_lines, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("forest <b>.jpg", "forest <b>.jpg"),
        ("日本é.jpg", "日本é.jpg"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\xe9.jpg"),
    ],
)
def test_only_what_cannot_be_seen_is_escaped(text, expected):
    assert shown(text) == expected
    assert shown(shown(text)) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("https://host/a.jpg", "https://host/a.jpg"),
        (Path("HTTP://host/a.jpg"), "HTTP://host/a.jpg"),
        (Path("/home/me/s3://bucket/photos"), "s3://bucket/photos"),
        ("https.jpg", None),
        ("notes about http: what is it.jpg", None),
        ("C:/photos/a.jpg", None),
        ("a/myhttp:/b.jpg", None),
    ],
)
def test_addresses_are_recognised_and_intact(path, expected):
    assert address(path) == expected


def test_the_middle_of_long_text_is_left_out():
    assert brief("a" * 100) == "a" * 100
    assert brief("a" * 60 + "\n" + "b" * 60, 20) == "a" * 10 + "…" + "b" * 9


def test_long_lists_are_cut():
    assert listed(["a", "b", "c"], 3) == "a, b, c"
    assert listed(["a", "b", "c", "d"], 3) == "a, b and 2 others"


@pytest.mark.parametrize(
    ("message", "expected"),
    [("\n  first\n\n last \n", ["first", "last"]), ("", ["ValueError"]), ("\n", ["ValueError"])],
)
def test_lines_of_an_exception(message, expected):
    assert message_lines(ValueError(message)) == expected


def test_the_first_line_of_an_exception():
    assert first_line(ValueError("\n  no such operator \nat converter.cc:12")) == "no such operator"
    assert first_line(ValueError("")) == "ValueError"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "a second"), (44, "44 seconds"), (200, "3 minutes"), (9000, "2 hours")]
)
def test_durations_are_told_in_fitting_units(seconds, words):
    assert duration(seconds) == words
