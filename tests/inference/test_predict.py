"""`predict` by itself, with a predictor that needs no model: the answers, their order and their forms."""

import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from photo_files import write_photo

from finetune_cli.cache.folder import CacheFolder
from finetune_cli.cli import predict as command
from finetune_cli.errors import Interrupted, MissingExtra, UsageError
from finetune_cli.inference import parquet as written_table
from finetune_cli.inference.predict import Flow, Limits, predict
from finetune_cli.photos import dataset
from finetune_cli.photos.dataset import DataSettings
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.progress import Silent
from finetune_cli.training import prepare


class Guess:
    """Answers 0.6 for the first class, and the rest for the second."""

    def __init__(self, classes: Sequence[str] = ("ant", "bee")) -> None:
        self.classes = classes
        self.settings = ImageSettings(32)
        self.calls: list[int] = []

    def probabilities(self, photos: np.ndarray) -> np.ndarray:
        self.calls.append(len(photos))
        return np.tile(np.float32([0.6, 0.4]), (len(photos), 1))


def test_a_class_named_unsure_is_not_mixed_up_with_the_answer(tmp_path):
    write_photo(tmp_path / "a.png", "a")
    [row] = predict(Guess(), [tmp_path / "a.png"], top_k=1, limits=Limits(min_confidence=0.7))
    assert row.label == "unsure"
    guess = Guess(("unsure", "bee"))
    with pytest.raises(UsageError, match="a class named unsure"):
        predict(guess, [tmp_path / "a.png"], top_k=1, limits=Limits(min_confidence=0.7))
    [row] = predict(guess, [tmp_path / "a.png"], top_k=1)  # such a model can still be used
    assert (row.label, row.probability) == ("unsure", pytest.approx(0.6))


@pytest.mark.parametrize(("name", "warned"), [("unsure", True), ("Unsure things", False)])
def test_training_warns_of_a_class_named_unsure(tmp_path, name, warned):
    for i in range(12):
        write_photo(tmp_path / "photos" / ("ant" if i % 2 else name) / f"{i}.png", str(i))
    observer = Silent()
    prepare.index(
        DataSettings(tmp_path / "photos", val_split=0.2), CacheFolder(tmp_path / "cache", tmp_path / "cache"), observer
    )
    assert any("--min-confidence" in text for text in observer.warnings) == warned


def rows_of(folder, names="a.png bad.png c.png"):
    for name in names.split():
        if name == "bad.png":
            (folder / name).write_bytes(b"no photo")
        else:
            write_photo(folder / name, name)
        yield folder / name


@pytest.mark.parametrize("at_once", [True, False])
def test_answers_come_in_order(tmp_path, at_once):
    paths = list(rows_of(tmp_path, "a.png bad.png c.png d.png e.png f.png"))
    guess = Guess()
    answers = list(predict(guess, paths, top_k=2, flow=Flow(at_once)))
    assert [answer.path for answer in answers] == list(map(str, paths))
    assert [answer.error is None for answer in answers] == [True, False, True, True, True, True]
    assert sum(guess.calls) == 5


def test_a_path_that_is_too_long_costs_no_other_answer(tmp_path):
    [photo] = rows_of(tmp_path, "a.png")
    paths = dataset.iter_photos([Path("x" * 6000), photo, Path("a\0b"), photo])
    answers = list(predict(Guess(), paths, top_k=1))
    assert [answer.error for answer in answers] == [
        "cannot be read: File name too long",
        None,
        "cannot be read: embedded null byte",
        None,
    ]


def written(tmp_path, form, names="a.png bad.png c.png", top_k=2):
    output = tmp_path / f"answers.{form}"
    answers = predict(Guess(("ant", "=bee")), rows_of(tmp_path, names), top_k)
    counts = command.write_predictions(answers, form, output, top_k)
    return output, counts


def test_json_is_one_array(tmp_path):
    output, counts = written(tmp_path, "json")
    assert counts == (3, 1)
    rows = json.loads(output.read_text())
    assert [row["label"] for row in rows] == ["ant", None, "ant"]
    assert rows[0]["top"][1]["label"] == "=bee"
    assert json.loads(written(tmp_path, "json", names="")[0].read_text()) == []


def test_parquet_is_read_by_others(tmp_path, monkeypatch):
    from pyarrow import parquet

    monkeypatch.setattr(written_table, "_ROW_GROUP", 2)
    output, counts = written(tmp_path, "parquet")
    assert counts == (3, 1)
    assert parquet.ParquetFile(output).metadata.num_row_groups == 2
    table = parquet.read_table(output)
    assert table.column_names == ["path", "label", "probability", "label_2", "probability_2", "error", "p_value"]
    rows = table.to_pylist()
    assert rows[0] == {
        "path": str(tmp_path / "a.png"),
        "label": "ant",
        "probability": pytest.approx(0.6),
        "label_2": "=bee",
        "probability_2": pytest.approx(0.4),
        "error": None,
        "p_value": None,
    }
    assert (rows[1]["label"], rows[1]["probability_2"]) == (None, None)
    assert rows[1]["error"]


def test_parquet_shows_a_name_that_is_not_utf8(tmp_path):
    from pyarrow import parquet

    photo = write_photo(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")))
    command.write_predictions(predict(Guess(), [photo], 1), "parquet", tmp_path / "o.parquet", 1)
    assert parquet.read_table(tmp_path / "o.parquet").to_pylist()[0]["path"] == f"{tmp_path}/\\udcff.png"


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra) as caught:
        written_table.import_pyarrow()
    assert "finetune-cli[parquet]" in caught.value.remedy


@pytest.mark.parametrize("form", ["csv", "json", "jsonl", "parquet", "table"])
def test_an_interrupted_file_is_absent(tmp_path, form):
    [photo] = rows_of(tmp_path, "a.png")

    def answers():
        yield from predict(Guess(), [photo], 1)
        raise Interrupted(15)

    with pytest.raises(Interrupted):
        command.write_predictions(answers(), form, tmp_path / f"o.{form}", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]


def test_every_row_is_flushed_on_standard_output(tmp_path, monkeypatch):
    seen = []

    class Stream(io.StringIO):
        def flush(self):
            seen.append(len(self.getvalue().splitlines()))

    monkeypatch.setattr(sys, "stdout", Stream())
    command.write_predictions(predict(Guess(), rows_of(tmp_path), 1), "jsonl", None, 1)
    assert seen == [1, 2, 3]
