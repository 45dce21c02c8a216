"""CSV files: odd names survive, formulas are defused, other tables are refused."""

import csv

import pytest

from finetune_cli import tables

ODD = ["=cmd()", "+1", "-x", "@a", "'quoted", "'=both", "a,b", 'a"b', "a\nb", "\udcff.jpg", "a\rb", "", " ", "ü", "\tx"]


def test_odd_names_survive(tmp_path):
    rows = [[name, other] for name, other in zip(ODD, reversed(ODD), strict=True)]
    for header in (("one", "two"), ("-1", "@a")):
        tables.write_csv(tmp_path / "t.csv", header, rows)
        assert tables.read_csv(tmp_path / "t.csv", header) == rows


def test_lines_end_as_unix_tools_like_it(tmp_path):
    tables.write_csv(tmp_path / "t.csv", ("a", "b"), [("x", 1)])
    assert (tmp_path / "t.csv").read_bytes() == b"a,b\nx,1\n"


def test_formulas_are_defused_and_numbers_are_not(tmp_path):
    tables.write_csv(tmp_path / "t.csv", ("a", "b"), [("=1+1", -0.5)])
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["'=1+1", "-0.5"]


@pytest.mark.parametrize("text", ["", "other,table\n1,2\n", "one,two\n1\n", "one,two\n1,2,3\n"])
def test_another_table_is_refused(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match="columns one, two"):
        tables.read_csv(tmp_path / "t.csv", ("one", "two"))


def test_a_table_of_numbers_may_have_empty_cells():
    assert tables.parse_numbers(b"epoch,loss,val_loss\n1,0.5,0.25\n2,0.5,\n") == [
        {"epoch": 1, "loss": 0.5, "val_loss": 0.25},
        {"epoch": 2, "loss": 0.5},
    ]
    with pytest.raises(ValueError, match="could not convert"):
        tables.parse_numbers(b"epoch,loss\n1,x\n")
