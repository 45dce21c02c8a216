import contextlib
import hashlib
import os
import sqlite3
import threading
import time

import numpy as np
import pytest
from PIL import Image

from finetune_cli.cache.digests import DigestCache, Facts
from finetune_cli.cache.features import FeatureStore
from finetune_cli.errors import BadImage
from finetune_cli.photos.scan import examine

as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
FACTS = Facts("ab" * 32, 640, 480)


@pytest.fixture
def photo(tmp_path):
    """A photo that was last changed long ago, as far as the file system tells."""
    path = tmp_path / "photo.png"
    Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(20, 30, 3)).save(path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a cache goes; its clock is an hour ahead, so that files just written are old, and their ctime counts."""
    clock = time.time_ns
    monkeypatch.setattr("finetune_cli.cache.digests.time.time_ns", lambda: clock() + 3600 * 10**9)
    monkeypatch.setattr("finetune_cli.cache.mounts.ChangeTimes.trusted", lambda *_arguments: True)
    return tmp_path / "cache"


def store(folder, photo, facts=FACTS):
    with DigestCache(folder) as cache:
        cache.put(photo, photo.stat(), facts)
    return cache


def look_up(folder, photo):
    with DigestCache(folder) as cache:
        return cache.get([(photo, photo.stat())])[0]


def test_facts_are_those_of_the_file(photo):
    assert examine(photo) == Facts(hashlib.sha256(photo.read_bytes()).hexdigest(), 30, 20)


def test_a_file_that_is_not_a_photo_has_a_reason(tmp_path):
    (tmp_path / "text.jpg").write_text("words")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("text.jpg", "pipe.jpg", "missing.jpg", "."):
        with pytest.raises(BadImage):
            examine(tmp_path / name)


def test_facts_are_kept_from_run_to_run(folder, photo):
    assert look_up(folder, photo) is None
    assert store(folder, photo).warnings == []
    assert look_up(folder, photo) == FACTS


def test_paths_are_absolute_and_may_hold_any_bytes(folder, photo, monkeypatch):
    odd = photo.with_name(os.fsdecode(b"a\nb\xff'\".png"))
    photo.rename(odd)
    monkeypatch.chdir(odd.parent)
    store(folder, type(odd)(odd.name))
    assert look_up(folder, odd) == FACTS


@pytest.mark.parametrize("change", ["size", "mtime", "content with the old mtime", "device", "inode"])
def test_a_changed_file_is_forgotten(folder, photo, change):
    store(folder, photo)
    status = photo.stat()
    if change == "size":
        photo.write_bytes(photo.read_bytes() + b"x")
        os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "mtime":
        os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif change in {"device", "inode"}:
        numbers = list(status)
        numbers[{"inode": 1, "device": 2}[change]] += 1
        times = {name: getattr(status, name) for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")}
        with DigestCache(folder) as cache:
            assert cache.get([(photo, os.stat_result(numbers, times))]) == [None]
            assert cache.get([(photo, os.stat_result(list(status), times))]) == [FACTS]
        return
    else:
        time.sleep(0.02)
        photo.write_bytes(photo.read_bytes()[::-1])
        os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert look_up(folder, photo) is None


def test_a_file_written_just_now_is_not_kept(tmp_path, photo):
    store(tmp_path / "cache", photo)
    assert look_up(tmp_path / "cache", photo) is None


def test_no_folder_means_no_cache(photo):
    store(None, photo)
    assert look_up(None, photo) is None


def test_many_rows(folder, photo):
    status = photo.stat()
    with DigestCache(folder) as cache:
        for i in range(2500):
            cache.put(photo.with_name(str(i)), status, Facts(f"{i:064x}", i, 1))
    with DigestCache(folder) as cache:
        some = (0, 999, 5000, 1000, 2499)
        answers = [Facts(f"{i:064x}", i, 1) if i < 2500 else None for i in some]
        assert cache.get([(photo.with_name(str(i)), status) for i in some]) == answers
        assert cache.get([]) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("noise", "is damaged"),
        ("foreign", "was made by another program"),
        ("newer", "was made by another version of finetune-cli"),
        ("no table", "is damaged"),
        ("other table", "is damaged"),
        ("middle", "is damaged"),
        ("truncated", "is damaged"),
        ("link", "is a symbolic link"),
        ("pipe", "is not a regular file"),
        pytest.param("other owner", "belongs to another user", marks=as_root),
    ],
)
@pytest.mark.parametrize("name", ["digests.sqlite", "features.sqlite"])
def test_a_damaged_or_foreign_file_is_set_aside_and_replaced(folder, photo, name, damage, words):
    """Both caches recover in the same way, and once: the next run says nothing."""
    use = {"digests.sqlite": use_digests, "features.sqlite": use_features}[name]
    assert use(folder, photo) == []
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage in {"noise", "middle", "truncated"}:
        changed = {
            "noise": b"\x5a" * 5000,
            "middle": data[:4096] + b"\x5a" * (len(data) - 4096),
            "truncated": data[: len(data) // 2],
        }
        path.write_bytes(changed[damage])
    elif damage == "link":
        path.rename(folder / "elsewhere")
        path.symlink_to("elsewhere")
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif damage == "other owner":
        os.chown(path, 12345, 12345)
    else:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            table = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchone()[0]
            statement = {
                "foreign": "PRAGMA application_id = 77",
                "newer": "PRAGMA user_version = 77",
                "no table": f"DROP TABLE {table}",
                "other table": f"ALTER TABLE {table} ADD COLUMN more",
            }[damage]
            connection.execute(statement)
            connection.commit()
    old = os.readlink if damage == "link" else lambda path: b"" if damage == "pipe" else path.read_bytes()
    before = old(path)
    warnings = use(folder, photo)
    aside = folder / f"{name}.damaged-1"
    assert len(warnings) == 1
    assert f"{path} {words}; it was set aside as {aside.name}, and a new one is started" in warnings[0]
    assert old(aside) == before
    assert use(folder, photo) == []
    assert list(folder.glob(f"{name}.damaged-*")) == [aside]


def use_digests(folder, photo):
    """Store 1000 rows and read them; what of them was there already must be right. Returns the warnings."""
    status = photo.stat()
    photos = [(photo.with_name(str(i)), status) for i in range(1000)]
    with DigestCache(folder) as cache:
        assert set(cache.get(photos)) <= {None, FACTS}
        for path, _status in photos:
            cache.put(path, status, FACTS)
        assert cache.get(photos)[0] in {None, FACTS}
    with DigestCache(folder) as again:
        assert again.get(photos) == [FACTS] * 1000
        assert again.warnings == []
    return cache.warnings


def use_features(folder, _photo):
    items = [(i.to_bytes(32, "big"), np.full(100, i, np.float32)) for i in range(200)]
    with FeatureStore(folder) as cache:
        for key, array in cache.get([key for key, _array in items]).items():
            assert array.tolist() == [int.from_bytes(key, "big")] * 100
        cache.put(items)
        assert len(cache.get([key for key, _array in items])) == 200
    return cache.warnings


def test_a_flipped_bit_is_never_used(folder, photo):
    store(folder, photo)
    path = folder / "digests.sqlite"
    whole = path.read_bytes()
    place = whole.index(bytes.fromhex(FACTS.digest))
    for offset in range(-28, 40, 3):
        data = bytearray(whole)
        data[place + offset] ^= 4
        path.write_bytes(data)
        assert look_up(folder, photo) in {None, FACTS}
        if 0 <= offset < 32:
            assert look_up(folder, photo) is None


@pytest.mark.parametrize("damaged", [False, True])
def test_several_at_once(folder, photo, damaged):
    """Four threads open a missing or damaged file at once: one creates it, and the rows of all are stored."""
    status = photo.stat()
    for attempt in range(6):
        here = folder / str(attempt)
        here.mkdir(parents=True)
        path = here / "digests.sqlite"
        if damaged:
            path.write_bytes(b"\x5a" * 5000)
        warnings = []
        start = threading.Barrier(4)

        def work(first, here=here, start=start, warnings=warnings):
            start.wait()
            with DigestCache(here) as cache:
                for i in range(first, first + 1500):
                    cache.put(photo.with_name(str(i)), status, FACTS)
            warnings.extend(cache.warnings)

        threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = [
            f"the digest cache {path} is damaged; it was set aside as {path.name}.damaged-1, and a new one is started"
        ]
        assert warnings == (expected if damaged else [])
        with DigestCache(here) as cache:
            for first in range(0, 4500, 500):
                assert all(cache.get([(photo.with_name(str(i)), status) for i in range(first, first + 500)]))


def test_uses_the_new_file_when_another_process_set_the_old_one_aside(folder, photo):
    status = photo.stat()
    with DigestCache(folder) as cache:
        (folder / "digests.sqlite").replace(folder / "moved")
        cache.put(photo, status, FACTS)
    assert cache.warnings == []
    assert look_up(folder, photo) == FACTS


def test_a_file_that_cannot_be_used_is_done_without(tmp_path, photo):
    (tmp_path / "file").write_text("not a folder")
    cache = store(tmp_path / "file", photo)
    assert len(cache.warnings) == 1
    assert "cannot be written" in cache.warnings[0]
    (tmp_path / "cache" / "digests.sqlite").mkdir(parents=True)
    assert "it is a folder" in store(tmp_path / "cache", photo).warnings[0]


def test_rows_that_were_wrong_are_dropped_also_of_photos_that_are_bad_now(folder, photo):
    other = photo.with_name("other.png")
    other.write_bytes(photo.read_bytes())
    store(folder, photo)
    store(folder, other)
    with DigestCache(folder, fresh=True) as cache:
        assert cache.get([(photo, photo.stat())]) == [None]
    assert look_up(folder, photo) is None
    assert look_up(folder, other) == FACTS


def test_what_may_not_be_written_is_read(folder, photo):
    store(folder, photo)
    other = photo.with_name("other.png")
    other.write_bytes(photo.read_bytes())
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with DigestCache(folder, writable=False) as cache:
        assert cache.get([(photo, photo.stat())]) == [FACTS]
        cache.put(other, other.stat(), FACTS)
    assert cache.warnings == []
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with DigestCache(folder / "absent", writable=False) as cache:
        assert cache.get([(photo, photo.stat())]) == [None]
    assert not (folder / "absent").exists()
