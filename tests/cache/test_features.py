import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from paths import SOURCE

from finetune_cli.cache import features
from finetune_cli.cache import maintenance as command_cache
from finetune_cli.cache.digests import DigestCache
from finetune_cli.cache.features import FeatureStore
from finetune_cli.errors import RunError, StorageError, UsageError
from finetune_cli.files import human_bytes

KEYS = [bytes([i]) * 32 for i in range(200)]
posix = pytest.mark.skipif(os.name == "nt", reason="open files cannot be renamed or removed there")


def row(i: int, width: int = 1280) -> np.ndarray:
    return np.random.default_rng(i).normal(size=width).astype(np.float32)


ITEMS = [(key, row(i)) for i, key in enumerate(KEYS)]


@pytest.fixture
def fast_path(tmp_path):
    """A folder in memory where there is one: a thousand new databases are thousands of fsyncs."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def assert_holds(store: FeatureStore, items=ITEMS):
    found = store.get([key for key, _array in items])
    assert len(found) == len(items)
    for key, array in items:
        np.testing.assert_array_equal(found[key], array, strict=True)


def fill(folder: Path, items=ITEMS) -> Path:
    with FeatureStore(folder) as store:
        store.put(items)
        assert store.warnings == []
    return folder / "features.sqlite"


def test_rows_come_back_as_they_were(tmp_path):
    path = fill(tmp_path / "new" / "folder")
    with FeatureStore(path.parent) as store:
        assert_holds(store)
        assert store.get([b"absent"]) == {}
        assert store.get([]) == {}
        assert store.has([KEYS[3], b"absent", KEYS[4]]) == {KEYS[3], KEYS[4]}
        assert store.get([KEYS[0], KEYS[0]]).keys() == {KEYS[0]}
        store.put([])
        store.put([(KEYS[0], row(7, 3)), (KEYS[1], np.zeros(0, np.float32))])
        assert_holds(store, [(KEYS[0], row(7, 3)), (KEYS[1], np.zeros(0, np.float32)), *ITEMS[2:]])
        store.put([(b"strided", np.arange(10, dtype=np.float32)[::2])])
        assert store.get([b"strided"])[b"strided"].tolist() == [0, 2, 4, 6, 8]
    assert store.warnings == []


def test_more_keys_than_one_query_takes(tmp_path):
    items = [(i.to_bytes(4, "big"), np.float32([i])) for i in range(2500)]
    fill(tmp_path, items)
    with FeatureStore(tmp_path) as store:
        assert_holds(store, items)
        assert len(store.has([key for key, _array in items])) == 2500


def test_the_file_is_as_documented(tmp_path):
    path = fill(tmp_path)
    connection = sqlite3.connect(path)
    pragmas = {
        name: connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_size", "journal_mode", "auto_vacuum", "user_version", "application_id")
    }
    assert pragmas == {
        "page_size": 4096,
        "journal_mode": "wal",
        "auto_vacuum": 2,  # incremental
        "user_version": 1,
        "application_id": int.from_bytes(b"FtFs", "big"),
    }
    key, crc, value = connection.execute("SELECT key, crc, value FROM features ORDER BY id LIMIT 1").fetchone()
    connection.close()
    assert key == KEYS[0]
    assert value == row(0).astype("<f4").tobytes()
    assert crc == zlib.crc32(key + value)


def test_it_costs_little_more_than_the_numbers(tmp_path):
    path = fill(tmp_path, [(i.to_bytes(32, "big"), row(i)) for i in range(2000)])
    assert path.stat().st_size / (2000 * 1280 * 4) < 1.09


# Damage


@pytest.mark.parametrize("column", ["key", "value", "crc"])
def test_a_damaged_row_is_not_returned_and_is_overwritten(tmp_path, column):
    path = fill(tmp_path)
    wrong = {
        "key": "key = x'00ff'",
        "value": "value = substr(value, 1, 99) || x'00' || substr(value, 101)",
        "crc": "crc = crc + 1",
    }[column]
    connection = sqlite3.connect(path)
    connection.execute(f"UPDATE features SET {wrong} WHERE id = 4")
    connection.commit()
    connection.close()
    with FeatureStore(tmp_path) as store:
        assert store.get(KEYS).keys() == set(KEYS) - {KEYS[3]}
        assert store.get([b"\x00\xff"]) == {}
        store.put([ITEMS[3]])
        assert_holds(store)
    assert store.warnings == []


@pytest.mark.parametrize("value", ["'text \udcff'", "NULL", "12", "x'010203'"])
def test_a_row_of_another_type_is_not_returned(tmp_path, value):
    path = fill(tmp_path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA ignore_check_constraints = ON")
    new = {"NULL": "zeroblob(0)", "'text \udcff'": "CAST(x'ff00ff00' AS TEXT)"}.get(value, value)
    connection.execute(f"UPDATE features SET value = {new} WHERE id = 4")
    connection.commit()
    connection.close()
    with FeatureStore(tmp_path) as store:
        assert store.get(KEYS).keys() == set(KEYS) - {KEYS[3]}
    assert store.warnings == []


@pytest.mark.parametrize("sixteenth", range(16))
def test_a_truncated_file_is_set_aside_or_read_as_far_as_it_goes(tmp_path, sixteenth):
    path = fill(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * sixteenth // 16])
    with FeatureStore(tmp_path) as store:
        found = store.get(KEYS)
        for key, array in found.items():
            np.testing.assert_array_equal(array, row(KEYS.index(key)))
        store.put(ITEMS)
        assert_holds(store)
    if sixteenth:
        assert len(store.warnings) == 1
        assert "is damaged; it was set aside as features.sqlite.damaged-1" in store.warnings[0]
        assert (tmp_path / "features.sqlite.damaged-1").stat().st_size == len(whole) * sixteenth // 16
    with FeatureStore(tmp_path) as store:
        assert_holds(store)
    assert store.warnings == []


def test_flipped_bits_never_give_a_wrong_row(fast_path, record_property):
    tmp_path = fast_path
    path = fill(tmp_path / "whole", ITEMS[:20])
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    # Everywhere in the header, often in the first pages, which hold the structure, and here and there in the rest.
    bits = [*range(8 * 100), *rng.choice(8 * 4096 * 3, 500, replace=False), *rng.choice(8 * len(whole), 200)]
    for number, bit in enumerate(bits):
        folder = tmp_path / str(number)
        folder.mkdir()
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / "features.sqlite").write_bytes(flipped)
        with FeatureStore(folder) as store:
            for key, array in store.get(KEYS[:20]).items():
                np.testing.assert_array_equal(array, row(KEYS.index(key)))
            store.put(ITEMS[:20])
            assert_holds(store, ITEMS[:20])
        shutil.rmtree(folder)
    record_property("tries", len(bits))


@pytest.mark.parametrize("content", ["text", "database", "newer", "trigger", "empty"])
def test_a_foreign_file_is_set_aside_whole(tmp_path, content):
    path = tmp_path / "features.sqlite"
    if content == "text":
        path.write_text("not a database " * 1000)
    else:
        if content in {"newer", "trigger"}:
            fill(tmp_path)
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = WAL")
        if content == "newer":
            connection.execute("PRAGMA user_version = 2")
        elif content == "trigger":
            connection.execute("CREATE TRIGGER t AFTER INSERT ON features BEGIN DELETE FROM features; END")
        elif content == "database":
            connection.execute("CREATE TABLE mine (a)")
            connection.execute("INSERT INTO mine VALUES (42)")
        connection.commit()
        connection.close()
    with FeatureStore(tmp_path) as store:
        store.put(ITEMS)
        assert_holds(store)
    aside = tmp_path / "features.sqlite.damaged-1"
    if content == "empty":
        assert not aside.exists()
        return
    words = {
        "text": "is damaged",
        "database": "was made by another program",
        "newer": "was made by another version",
        "trigger": "is damaged",
    }
    assert words[content] in store.warnings[0]
    if content == "database":
        connection = sqlite3.connect(aside)
        assert connection.execute("SELECT a FROM mine").fetchall() == [(42,)]
        connection.close()


@posix
def test_a_log_that_was_not_yet_merged_goes_aside_with_its_file(tmp_path):
    """Else it would be played into the new file, or someone else's newest rows would be lost."""
    path = tmp_path / "features.sqlite"
    script = f"""
import os, sqlite3
c = sqlite3.connect({str(path)!r}, isolation_level=None)
c.execute("PRAGMA journal_mode = WAL"); c.execute("CREATE TABLE mine (a)"); c.execute("INSERT INTO mine VALUES (42)")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "features.sqlite-wal").stat().st_size > 0
    fill_with_warning(tmp_path)
    connection = sqlite3.connect(tmp_path / "features.sqlite.damaged-1")
    assert connection.execute("SELECT a FROM mine").fetchall() == [(42,)]
    connection.close()
    with FeatureStore(tmp_path) as store:
        assert_holds(store)


def fill_with_warning(folder: Path) -> str:
    with FeatureStore(folder) as store:
        store.put(ITEMS)
        assert_holds(store)
    assert len(store.warnings) == 1
    return store.warnings[0]


@posix
def test_damage_while_open_is_met_by_a_new_file(tmp_path):
    fill(tmp_path, [(i.to_bytes(32, "big"), row(i)) for i in range(2000)])
    path = tmp_path / "features.sqlite"
    with FeatureStore(tmp_path) as store:
        os.truncate(path, path.stat().st_size // 4)
        keys = [i.to_bytes(32, "big") for i in range(2000)]
        for key, array in store.get(keys).items():
            np.testing.assert_array_equal(array, row(int.from_bytes(key, "big")))
        store.put(ITEMS)
        assert_holds(store)
    assert ["set aside" in warning for warning in store.warnings] == [True]
    with FeatureStore(tmp_path) as store:
        assert_holds(store)
    assert store.warnings == []


@posix
def test_two_that_find_the_same_damage_set_it_aside_once(tmp_path):
    fill(tmp_path, [(i.to_bytes(32, "big"), row(i)) for i in range(2000)])
    path = tmp_path / "features.sqlite"
    first, second = FeatureStore(tmp_path), FeatureStore(tmp_path)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))
    keys = [i.to_bytes(32, "big") for i in range(2000)]
    assert first.get(keys) == {}
    first.put(ITEMS[:100])
    assert second.get(keys) == {}
    second.put(ITEMS[100:])
    assert_holds(first)
    assert_holds(second)
    first.close()
    second.close()
    assert len(list(tmp_path.glob("*damaged-?"))) == 1
    with FeatureStore(tmp_path) as store:
        assert_holds(store)


@posix
def test_who_still_has_the_old_file_open_does_not_harm_the_new_one(tmp_path):
    """SQLite removes the log by name when it closes: it must not be that of the file which took the name over."""
    fill(tmp_path, ITEMS[:1])
    old = FeatureStore(tmp_path)
    old.put(ITEMS[:50])
    features.clear(tmp_path)
    with FeatureStore(tmp_path) as new:
        new.put(ITEMS[50:])
        assert_holds(old, ITEMS[:50])
        old.put(ITEMS[:10])
        old.close()
        assert_holds(new, ITEMS[50:])
        with FeatureStore(tmp_path) as third:
            assert_holds(third, ITEMS[50:])
            third.put(ITEMS[:50])
    with FeatureStore(tmp_path) as store:
        assert_holds(store)
    assert store.warnings == []


# Several users


def test_threads_may_share_a_store(tmp_path):
    faults = []

    def work(number: int) -> None:
        try:
            for i in range(number, 200, 4):
                store.put([ITEMS[i]])
                assert_holds(store, [ITEMS[i]])
        except BaseException as exc:
            faults.append(exc)

    with FeatureStore(tmp_path) as store:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        assert_holds(store)
    assert store.warnings == []


def test_a_reader_sees_what_was_there_while_another_writes(tmp_path):
    fill(tmp_path, ITEMS[:100])
    with FeatureStore(tmp_path) as reader:
        writer = sqlite3.connect(tmp_path / "features.sqlite", isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM features")
        assert_holds(reader, ITEMS[:100])
        writer.execute("COMMIT")
        assert reader.get(KEYS) == {}
        writer.close()
    assert reader.warnings == []


def test_a_locked_file_costs_rows_and_not_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_cli.cache.sqlite_file.BUSY_SECONDS", 0.1)
    fill(tmp_path, ITEMS[:100])
    with FeatureStore(tmp_path) as store:
        blocker = sqlite3.connect(tmp_path / "features.sqlite", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        store.put(ITEMS[100:])
        assert_holds(store, ITEMS[:100])
        blocker.execute("COMMIT")
        blocker.close()
        store.put(ITEMS[150:])
        assert_holds(store, [*ITEMS[:100], *ITEMS[150:]])
    assert len(store.warnings) == 1
    assert "was locked" in store.warnings[0]


def test_a_killed_writer_blocks_nobody_and_loses_no_more_than_its_batch(tmp_path):
    script = """
import os, sys
from pathlib import Path
import numpy as np
from finetune_cli.cache.features import FeatureStore
from finetune_cli.cache.digests import DigestCache
store = FeatureStore(Path(sys.argv[1]))
for i in range(100):
    store.put([(bytes([i]) * 32, np.random.default_rng(i).normal(size=1280).astype(np.float32))])
store._file._connection.execute("BEGIN IMMEDIATE")
store._file._connection.execute("DELETE FROM features")
os._exit(9)
"""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    assert subprocess.run([sys.executable, "-c", script, tmp_path], env=environment, check=False).returncode == 9
    with FeatureStore(tmp_path) as store:
        assert_holds(store, ITEMS[:100])
    assert store.warnings == []


# Full and forbidden disks


def test_a_full_disk_ends_writing_with_a_warning_and_reading_continues(tmp_path):
    fill(tmp_path, ITEMS[:100])
    with FeatureStore(tmp_path) as store:
        store._file._connection.execute("PRAGMA max_page_count = 1")  # SQLite's own word for a full disk
        store.put(ITEMS[100:])
        assert_holds(store, ITEMS[:100])
        store.put(ITEMS[100:])
        assert store.get(KEYS[100:]) == {}
    assert len(store.warnings) == 1
    assert "database or disk is full; at least 515 kB more are needed" in store.warnings[0]
    fill(tmp_path)


def test_a_folder_in_the_files_place_costs_no_run(tmp_path):
    (tmp_path / "features.sqlite").mkdir()
    with FeatureStore(tmp_path) as store:
        assert store.get(KEYS) == {}
        store.put(ITEMS)
        assert store.get(KEYS) == {}
    assert len(store.warnings) == 1
    assert "nothing new is stored for other runs" in store.warnings[0]


def test_a_file_in_the_folders_place_costs_no_run(tmp_path):
    (tmp_path / "cache").write_bytes(b"")
    with FeatureStore(tmp_path / "cache") as store:
        assert store.get(KEYS) == {}
        store.put(ITEMS)
    assert len(store.warnings) == 1


# Upkeep


def test_info_counts_and_changes_nothing(tmp_path):
    nothing = features.info(tmp_path / "absent")
    assert (nothing.rows, nothing.size, nothing.aside, nothing.problem) == (0, 0, (), "")
    assert list(tmp_path.iterdir()) == []
    path = fill(tmp_path)
    size = path.stat().st_size
    before = path.read_bytes()
    assert (features.info(tmp_path).rows, features.info(tmp_path).size) == (200, size)
    assert path.read_bytes() == before
    path.write_bytes(b"nonsense" * 1000)
    found = features.info(tmp_path)
    assert (found.rows, found.size) == (0, 8000)
    assert found.problem.endswith("features.sqlite is damaged")
    fill_with_warning(tmp_path)
    found = features.info(tmp_path)
    assert found.rows == 200
    assert [path.name for path in found.aside] == ["features.sqlite.damaged-1"]
    assert found.aside_size == 8000


def test_clear_leaves_only_the_lock(tmp_path):
    assert features.clear(tmp_path / "absent") == 0
    path = fill(tmp_path)
    (tmp_path / "features.sqlite.damaged-1").write_bytes(b"12345")
    (tmp_path / "digests.sqlite").write_bytes(b"mine")
    size = path.stat().st_size
    assert features.clear(tmp_path) == size + 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "digests.sqlite"]


def test_prune_removes_the_oldest_and_gives_the_space_back(tmp_path):
    items = [(i.to_bytes(32, "big"), row(i)) for i in range(3000)]
    path = fill(tmp_path, items)
    (tmp_path / "features.sqlite.damaged-1").write_bytes(b"12345")
    before = path.stat().st_size
    freed = features.prune(tmp_path, 6_000_000)
    after = path.stat().st_size
    assert freed == before - after + 5
    assert 5_500_000 < after <= 6_000_000
    with FeatureStore(tmp_path) as store:
        kept = store.get([key for key, _array in items])
        assert kept.keys() == {key for key, _array in items[-len(kept) :]}
        assert_holds(store, items[-len(kept) :])
    assert not (tmp_path / "features.sqlite.damaged-1").exists()
    assert features.prune(tmp_path, 6_000_000) == 0
    features.prune(tmp_path, 0)
    assert features.info(tmp_path).rows == 0
    assert path.stat().st_size <= 5 * 4096
    assert features.prune(tmp_path / "absent", 0) == 0


def test_prune_while_a_run_reads_and_writes(tmp_path):
    items = [(i.to_bytes(32, "big"), row(i)) for i in range(2000)]
    fill(tmp_path, items)
    with FeatureStore(tmp_path) as store:
        assert_holds(store, items)
        features.prune(tmp_path, 2_000_000)
        store.put(ITEMS)
        assert_holds(store)
        assert len(store.get([key for key, _array in items])) < 2000
    assert store.warnings == []


def test_prune_of_a_damaged_file_says_what_to_do(tmp_path):
    (tmp_path / "features.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(StorageError, match=r"cannot be pruned: is damaged\n.*remove it with: finetune cache clear"):
        features.prune(tmp_path, 10)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5tb", 15 * 10**11), ("2GiB", 2**31), ("4096", 4096), ("0", 0),
     ("1kB", 1000), (" 7 B ", 7)],
)  # fmt: skip
def test_sizes_that_people_write(text, size):
    assert command_cache.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "5G B", "1e9", "\u0665GB", "5GB6", "nan"])
def test_sizes_that_mean_nothing(text):
    with pytest.raises(UsageError, match="is not a size"):
        command_cache.parse_size(text)


def test_the_commands_say_what_they_did(tmp_path):
    fill(tmp_path)
    assert command_cache.info(tmp_path) == [f"feature cache {tmp_path / 'features.sqlite'}: 200 features, 1.1 MB"]
    assert command_cache.prune(tmp_path, "2MB").startswith("0 bytes freed; 200 features, 1.1 MB, and 0 ")
    assert command_cache.clear(tmp_path) == f"removed the cache in {tmp_path}: 1.1 MB freed"


def test_the_digest_cache_is_counted_and_cleared(tmp_path):
    with DigestCache(tmp_path):
        pass
    (tmp_path / "digests.sqlite.damaged-1").write_bytes(b"12345")
    size = (tmp_path / "digests.sqlite").stat().st_size + 5
    line = command_cache.info(tmp_path)[1]
    assert line == f"digest cache {tmp_path / 'digests.sqlite'}: {human_bytes(size)}"
    command_cache.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@posix
def test_clear_waits_for_whoever_is_opening_the_file(tmp_path, monkeypatch):
    from finetune_cli import files

    monkeypatch.setattr("finetune_cli.cache.sqlite_file.BUSY_SECONDS", 0.1)
    fill(tmp_path)
    with files.lock(tmp_path), pytest.raises(RunError, match=f"in use by process {os.getpid()}"):
        features.clear(tmp_path)
    assert features.info(tmp_path).rows == 200
