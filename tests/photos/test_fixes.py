"""fixes.csv: what a person decided about photos."""

from pathlib import Path

import pytest

from finetune_cli.errors import DataError
from finetune_cli.photos import fixes
from finetune_cli.photos.fixes import Fix
from finetune_cli.photos.scan import Sample

A, B = "a" * 64, "b" * 64
HEADER = "path,digest,problem,evidence,suggestion,action\n"


def read(tmp_path, text):
    path = tmp_path / "fixes.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return fixes.read(path)[1]


def problem(tmp_path, text):
    with pytest.raises(DataError) as caught:
        read(tmp_path, text)
    return str(caught.value)


def test_only_actions_do_anything(tmp_path):
    text = HEADER + f"1.jpg,{A},label,,,keep\n2.jpg,{A},label,,,\n3.jpg,{A},quality,,,Drop\n"
    text += f"4.jpg,{A},label,,,relabel: bee \n5.jpg,{B},outlier,,,GROUP:p7: left\n\n"
    assert read(tmp_path, text) == (
        Fix("3.jpg", A, drop=True),
        Fix("4.jpg", A, label="bee"),
        Fix("5.jpg", B, group="p7: left"),
    )


def test_a_spreadsheet_may_have_saved_it(tmp_path):
    text = f"\ufeffAction;note;Digest;path\r\nrelabel: ant;I am sure;{A.upper()};'=1.jpg\r\n"
    assert read(tmp_path, text) == (Fix("=1.jpg", A, label="ant"),)


def test_what_was_read_is_kept_as_it_is(tmp_path):
    content = (HEADER + f"1.jpg,{A},label,,,drop\n").encode()
    (tmp_path / "fixes.csv").write_bytes(content)
    assert fixes.read(tmp_path / "fixes.csv")[0] == content


def test_lines_about_one_photo_add_up(tmp_path):
    text = HEADER + f"1.jpg,{A},label,,,relabel: bee\n1.jpg,{A},near-duplicate,,,group: g\n1.jpg,{A},quality,,,keep\n"
    assert read(tmp_path, text) == (Fix("1.jpg", A, label="bee", group="g"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column"),
        ("path,digest\n", "no column action"),
        (HEADER + f"1.jpg,{A},label,,,delete\n", "line 2: 'delete' is not an action"),
        (HEADER + f"1.jpg,{A},label,,,relabel:\n", "line 2: 'relabel:' is not an action"),
        (HEADER + f"1.jpg,{A},label,,,drop: it\n", "line 2: 'drop: it' is not an action"),
        (HEADER + "1.jpg,abc,label,,,drop\n", "line 2: its digest is not a SHA-256"),
        (HEADER + f"1.jpg,{A}\n", "line 2 has 2 columns, the first line 6"),
        (HEADER + f"1.jpg,{A},label,,,drop\n1.jpg,{A},label,,,relabel: x\n", "line 3: it contradicts"),
        (HEADER + f"1.jpg,{A},label,,,relabel: y\n1.jpg,{A},label,,,relabel: x\n", "line 3: it contradicts"),
        (HEADER + f"1.jpg,{A},label,,,drop\n1.jpg,{B},label,,,drop\n", "line 3: it contradicts"),
        (HEADER + f'"1.jpg,{A},label,,,drop\n', "not a table of fixes"),
        (b"\xff\xfe\0\0", "not a table of fixes"),
    ],
)
def test_wrong_tables_are_refused_with_the_line(tmp_path, text, message):
    assert message in problem(tmp_path, text)


def test_all_wrong_lines_are_told(tmp_path):
    text = problem(tmp_path, HEADER + f"1.jpg,{A},label,,,x\n" * 25)
    assert text.count("is not an action") == 20
    assert "and 5 more" in text


def test_a_missing_table(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        fixes.read(tmp_path / "nothing.csv")


ROOT = Path("/data")


def samples():
    return {
        "train": [
            Sample(ROOT / "train/a/1.jpg", "a/1.jpg", 0, A),
            Sample(ROOT / "train/b/2.jpg", "b/2.jpg", 1, B, "g"),
        ],
        "val": [Sample(ROOT / "val/a/1.jpg", "a/1.jpg", 0, A)],
    }


def apply(*wanted):
    return fixes.apply(wanted, samples(), [ROOT / "train", ROOT / "val"], ("a", "b"))


def test_fixes_find_their_photo_in_its_split():
    fixed, notes = apply(Fix("val/a/1.jpg", A, drop=True), Fix("train/a/1.jpg", A, label="b", group="h"))
    assert fixed["val"] == []
    assert [(s.name, s.label, s.group) for s in fixed["train"]] == [("a/1.jpg", 1, "h"), ("b/2.jpg", 1, "g")]
    assert notes == ["data.fixes: 1 photo dropped, 1 photo relabelled, 1 photo put into a group"]


def test_photos_that_are_gone_are_told():
    fixed, notes = apply(Fix("train/a/9.jpg", A, drop=True))
    assert fixed == samples()
    assert notes == ["data.fixes: nothing to do", "data.fixes: 1 photo that it names are not there, or cannot be used"]


@pytest.mark.parametrize(
    ("fix", "message"),
    [
        (Fix("train/a/1.jpg", B, drop=True), "changed since its fix was written"),
        (Fix("train/a/1.jpg", A, label="B"), "is not a class; did you mean"),
        (Fix("train/a/1.jpg", A, label="zebra"), "zebra is not a class"),
    ],
)
def test_fixes_that_do_not_fit_are_refused(fix, message):
    if "did you mean" in message:
        fix = Fix(fix.path, fix.digest, label="bb")
    with pytest.raises(DataError) as caught:
        apply(fix)
    assert message in str(caught.value)


def test_one_root_is_the_root():
    assert fixes.data_root([ROOT / "x"]) == ROOT / "x"
    assert fixes.name_below(ROOT / "x", ROOT / "x" / "a" / "1.jpg") == "a/1.jpg"
    assert fixes.name_below(ROOT / "x", ROOT / "y" / "1.jpg") == "../y/1.jpg"
