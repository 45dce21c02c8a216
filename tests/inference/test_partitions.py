"""Predictions as partitions: whole or absent, continued, refused for another question; read by other programs."""

import json

import pytest
from pyarrow import parquet

from finetune_cli.errors import StorageError, UsageError
from finetune_cli.inference import partitions
from finetune_cli.inference.predict import Limits, PredictionRow

ASKED = {"format": 1, "run": "a" * 64, "top_k": 2}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(partitions, "PHOTOS", 4)
    made = [tmp_path / "photos" / f"{i:02}.jpg" for i in range(10)]
    made[0].parent.mkdir()
    for path in made:
        path.write_bytes(b"a photo")
    return made


class Guess:
    """Answers, and remembers for what; stops when it has answered `most`."""

    def __init__(self, most=10**6):
        self.asked, self.most = [], most

    def __call__(self, photos):
        for photo in photos:
            if len(self.asked) == self.most:
                raise KeyboardInterrupt
            self.asked.append(photo)
            bad = photo.name == "05.jpg"
            top = () if bad else (("ant", 0.75), ("bee", 0.25))
            yield PredictionRow(str(photo), *(None, None) if bad else ("ant", 0.75), top, "broken" if bad else None)


def write(folder, photos, guess, force=False, asked=ASKED):
    partitions.begin(folder, asked, force)
    return partitions.write(folder, asked, photos, guess)


def rows(folder):
    return [row["path"] for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def test_partitions_hold_all_photos_in_order(tmp_path, photos):
    folder = tmp_path / "new" / "answers"
    assert write(folder, photos, Guess()) == partitions.Written(rows=10, failed=1, kept=0)
    assert sorted(path.name for path in folder.glob("*")) == [
        "_finetune", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet",
    ]  # fmt: skip
    assert rows(folder) == [str(path) for path in photos]
    assert json.loads((folder / "_finetune" / "complete.json").read_text()) == {
        "partitions": 3,
        "rows": 10,
        "failed": 1,
    }
    assert parquet.read_table(folder).num_rows == 10  # the records are left out


def test_a_repeated_command_does_nothing(tmp_path, photos):
    folder = tmp_path / "answers"
    write(folder, photos, Guess())
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    guess = Guess()
    assert write(folder, photos, guess) == partitions.Written(rows=10, failed=1, kept=10)
    assert not guess.asked
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")} == before


@pytest.mark.parametrize("most", range(11))
def test_it_goes_on_where_it_stopped(tmp_path, photos, most, record_property):
    folder = tmp_path / "answers"
    guess = Guess(most)
    try:
        write(folder, photos, guess)
    except KeyboardInterrupt:
        assert not (folder / "_finetune" / "complete.json").exists()
    done = most // 4 * 4 if most < 10 else 10
    assert len(rows(folder)) == done
    again = Guess()
    assert write(folder, photos, again) == partitions.Written(rows=10, failed=1, kept=done)
    assert again.asked == photos[done:]
    assert rows(folder) == [str(path) for path in photos]
    record_property("tries", 1)


@pytest.mark.parametrize("lost", ["part-00001.parquet", "_finetune/part-00001.json"])
def test_a_partition_without_its_record_or_its_file_is_made_again(tmp_path, photos, lost):
    folder = tmp_path / "answers"
    write(folder, photos, Guess())
    (folder / lost).unlink()
    guess = Guess()
    assert write(folder, photos, guess).kept == 6
    assert guess.asked == photos[4:8]
    assert rows(folder) == [str(path) for path in photos]


def test_a_partition_that_was_cut_is_made_again(tmp_path, photos):
    folder = tmp_path / "answers"
    write(folder, photos, Guess())
    part = folder / "part-00002.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-10])
    write(folder, photos, Guess())
    assert part.read_bytes() == whole


def test_another_question_is_refused_unless_forced(tmp_path, photos):
    folder = tmp_path / "answers"
    write(folder, photos, Guess())
    other = {**ASKED, "run": "b" * 64}
    with pytest.raises(UsageError, match="holds the predictions of another command: run differs"):
        partitions.begin(folder, other)
    guess = Guess()
    assert write(folder, photos[:5], guess, force=True, asked=other).rows == 5
    assert guess.asked == photos[:5]
    assert rows(folder) == [str(path) for path in photos[:5]]


@pytest.mark.parametrize("change", ["added", "removed first", "removed last", "rewritten"])
def test_other_photos_are_refused(tmp_path, photos, change):
    folder = tmp_path / "answers"
    write(folder, photos, Guess())
    now = list(photos)
    if change == "added":
        now.insert(2, tmp_path / "new.jpg")
    elif change == "removed first":
        del now[0]
    elif change == "removed last":
        del now[8:]
    else:
        now[5].write_bytes(b"another photo")
    with pytest.raises(UsageError, match="holds predictions for"):
        write(folder, now, Guess())


def test_a_folder_of_something_else_is_left_alone(tmp_path, photos):
    folder = tmp_path / "answers"
    folder.mkdir()
    (folder / "sales.parquet").write_bytes(b"precious")
    for force in (False, True):
        with pytest.raises(UsageError, match="Parquet files of another origin"):
            partitions.begin(folder, ASKED, force)
    assert [path.name for path in folder.iterdir()] == ["sales.parquet"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"photos": 1}', '{"photos": "' + "0" * 64 + '", "rows": -1}', "[" * 10**5]
)
def test_a_damaged_record_is_an_error(tmp_path, photos, content):
    folder = tmp_path / "answers"
    write(folder, photos, Guess())
    (folder / "_finetune" / "part-00000.json").write_text(content)
    with pytest.raises(StorageError, match=r"part-00000\.json is damaged"):
        write(folder, photos, Guess())


def test_no_photos_leave_no_record_of_an_end(tmp_path):
    assert write(tmp_path / "answers", [], Guess()).rows == 0
    assert not (tmp_path / "answers" / "_finetune" / "complete.json").exists()


def test_the_question_holds_all_that_rows_depend_on(tiny_run):
    first = partitions.question(tiny_run.run, 3, Limits(0.5))
    assert first == partitions.question(tiny_run.run, 3, Limits(0.5))
    assert first != partitions.question(tiny_run.run, 2, Limits(0.5))
    assert first != partitions.question(tiny_run.run, 3, Limits(0.6))
    assert first != partitions.question(tiny_run.run, 3, Limits(0.5, 0.1))
    assert json.loads(json.dumps(first)) == first


@pytest.mark.machines
def test_pandas_and_duckdb_read_the_folder(tmp_path, photos):
    duckdb, pandas = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    folder = tmp_path / "answers"
    write(folder, photos, Guess())
    assert list(pandas.read_parquet(folder).path) == [str(path) for path in photos]
    query = (
        f"SELECT label, count(*), avg(probability) FROM '{folder}/*.parquet' GROUP BY label ORDER BY label NULLS LAST"
    )
    assert duckdb.sql(query).fetchall() == [("ant", 9, 0.75), (None, 1, None)]


@pytest.mark.machines
def test_a_folder_in_a_store(photos):
    fsspec = pytest.importorskip("fsspec")
    from finetune_cli.places import Address

    folder = Address("memory://answers/partitions")
    with pytest.raises(KeyboardInterrupt):
        write(folder, photos, Guess(6))
    guess = Guess()
    assert write(folder, photos, guess).kept == 4
    assert guess.asked == photos[4:]
    store = fsspec.filesystem("memory")
    assert len(store.glob("/answers/partitions/*.parquet")) == 3
    with pytest.raises(UsageError, match="objects in a store are never removed"):
        write(folder, photos, Guess(), force=True, asked={**ASKED, "run": "b" * 64})
