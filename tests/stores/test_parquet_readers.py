"""Predictions in Parquet, as others read them: DuckDB, pandas and pyarrow."""

import pytest
from command_line import run

pytestmark = pytest.mark.machines


def test_predictions_in_parquet_are_read_by_others(tiny_run, tmp_path):
    duckdb, pandas = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    from pyarrow import parquet

    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "broken, 'one'.png").write_bytes(b"no photo")
    file = tmp_path / "answers.parquet"
    answer = run("predict", tiny_run.photos / "test", tmp_path / "odd", "--run", tiny_run.run.folder, "--output", file)
    assert answer.exit_code == 3  # of the broken one
    rows = parquet.read_table(file).to_pylist()
    assert rows == duckdb.sql(f"SELECT * FROM '{file}'").to_arrow_table().to_pylist()
    frame = pandas.read_parquet(file)
    assert list(frame.columns) == list(rows[0])
    assert frame["label"].notna().sum() == frame["probability"].notna().sum() == len(rows) - 1
    count = duckdb.sql(f"SELECT label, count(*), avg(probability) FROM '{file}' WHERE error IS NULL GROUP BY label")
    assert sum(row[1] for row in count.fetchall()) == len(rows) - 1
    (failed,) = duckdb.sql(f"SELECT path, error FROM '{file}' WHERE error IS NOT NULL").fetchall()
    assert failed[0].endswith("broken, 'one'.png")
