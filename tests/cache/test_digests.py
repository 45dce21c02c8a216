import hashlib
import os
import sqlite3
import threading
import time

import numpy as np
import pytest
from PIL import Image

from finetune_cli.cache.digests import DigestMemory, Facts
from finetune_cli.errors import BadImage
from finetune_cli.photos.scan import examine

FACTS = Facts("ab" * 32, 640, 480)


@pytest.fixture
def photo(tmp_path):
    """A photo that was last changed long ago, as far as the file system tells."""
    path = tmp_path / "photo.png"
    Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(20, 30, 3)).save(path)
    return path


@pytest.fixture
def memory_file(tmp_path, monkeypatch):
    """Where a memory goes; its clock is an hour ahead, so that files just written are old."""
    clock = time.time_ns
    monkeypatch.setattr("finetune_cli.cache.digests.time.time_ns", lambda: clock() + 3600 * 10**9)
    return tmp_path / "cache" / "digests.sqlite"


def remember(memory_file, photo, facts=FACTS):
    with DigestMemory(memory_file) as memory:
        memory.put(photo, photo.stat(), facts)
    return memory


def recall(memory_file, photo):
    with DigestMemory(memory_file) as memory:
        return memory.get([(photo, photo.stat())])[0]


def test_facts_are_those_of_the_file(photo):
    assert examine(photo) == Facts(hashlib.sha256(photo.read_bytes()).hexdigest(), 30, 20)


def test_what_is_no_photo_has_a_reason(tmp_path):
    (tmp_path / "text.jpg").write_text("words")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("text.jpg", "pipe.jpg", "missing.jpg", "."):
        with pytest.raises(BadImage):
            examine(tmp_path / name)


def test_remembers_from_run_to_run(memory_file, photo):
    assert recall(memory_file, photo) is None
    assert remember(memory_file, photo).warnings == []
    assert recall(memory_file, photo) == FACTS


def test_paths_are_absolute_and_may_hold_any_bytes(memory_file, photo, monkeypatch):
    odd = photo.with_name(os.fsdecode(b"a\nb\xff'\".png"))
    photo.rename(odd)
    monkeypatch.chdir(odd.parent)
    remember(memory_file, type(odd)(odd.name))
    assert recall(memory_file, odd) == FACTS


@pytest.mark.parametrize("change", ["size", "mtime", "content with the old mtime"])
def test_a_changed_file_is_forgotten(memory_file, photo, change):
    remember(memory_file, photo)
    status = photo.stat()
    if change == "size":
        photo.write_bytes(photo.read_bytes() + b"x")
        os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif change == "mtime":
        os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    else:
        time.sleep(0.02)
        photo.write_bytes(photo.read_bytes()[::-1])
        os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert recall(memory_file, photo) is None


def test_a_file_written_just_now_is_not_remembered(tmp_path, photo):
    remember(tmp_path / "digests.sqlite", photo)
    assert recall(tmp_path / "digests.sqlite", photo) is None


def test_no_file_means_no_memory(photo):
    remember(None, photo)
    assert recall(None, photo) is None


def test_many_rows(memory_file, photo):
    status = photo.stat()
    with DigestMemory(memory_file) as memory:
        for i in range(2500):
            memory.put(photo.with_name(str(i)), status, Facts(f"{i:064x}", i, 1))
    with DigestMemory(memory_file) as memory:
        some = (0, 999, 5000, 1000, 2499)
        answers = [Facts(f"{i:064x}", i, 1) if i < 2500 else None for i in some]
        assert memory.get([(photo.with_name(str(i)), status) for i in some]) == answers
        assert memory.get([]) == []


@pytest.mark.parametrize("damage", ["noise", "foreign", "newer", "middle", "truncated"])
def test_a_damaged_or_foreign_file_is_set_aside_and_begun_anew(memory_file, photo, damage):
    status = photo.stat()
    with DigestMemory(memory_file) as memory:
        for i in range(1000):
            memory.put(photo.with_name(str(i)), status, FACTS)
    data = bytearray(memory_file.read_bytes())
    if damage == "noise":
        data = bytearray(b"\x5a" * 5000)
    elif damage == "middle":
        data[4096:] = b"\x5a" * (len(data) - 4096)
    elif damage == "truncated":
        del data[len(data) // 2 :]
    if damage in {"foreign", "newer"}:
        with sqlite3.connect(memory_file) as connection:
            connection.execute(f"PRAGMA {'application_id' if damage == 'foreign' else 'user_version'} = 77")
        connection.close()
    else:
        memory_file.write_bytes(data)
    old = memory_file.read_bytes()
    with DigestMemory(memory_file) as memory:
        for i in range(1000):
            assert memory.get([(photo.with_name(str(i)), status)])[0] in {None, FACTS}
        memory.put(photo, status, FACTS)
    aside = memory_file.with_name("digests.sqlite.damaged")
    assert [str(aside) in warning for warning in memory.warnings] == [True]
    assert aside.read_bytes() == old
    assert recall(memory_file, photo) == FACTS


def test_a_flipped_bit_is_never_used(memory_file, photo):
    remember(memory_file, photo)
    whole = memory_file.read_bytes()
    place = whole.index(bytes.fromhex(FACTS.digest))
    for offset in range(-28, 40, 3):
        data = bytearray(whole)
        data[place + offset] ^= 4
        memory_file.write_bytes(data)
        assert recall(memory_file, photo) in {None, FACTS}
        if 0 <= offset < 32:
            assert recall(memory_file, photo) is None


@pytest.mark.parametrize("damaged", [False, True])
def test_several_at_once(memory_file, photo, damaged):
    """A missing or damaged file that four begin at the same moment: one does it, and the rows of all are kept."""
    status = photo.stat()
    for attempt in range(20):
        folder = memory_file.parent / str(attempt)
        folder.mkdir(parents=True)
        path = folder / memory_file.name
        if damaged:
            path.write_bytes(b"\x5a" * 5000)
        warnings = []
        start = threading.Barrier(4)

        def work(first, path=path, start=start, warnings=warnings):
            start.wait()
            with DigestMemory(path) as memory:
                for i in range(first, first + 1500):
                    memory.put(photo.with_name(str(i)), status, FACTS)
            warnings.extend(memory.warnings)

        threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = [f"the memory of photo digests was damaged: set aside as {path}.damaged, and begun anew"]
        assert warnings == (expected if damaged else [])
        with DigestMemory(path) as memory:
            for first in range(0, 4500, 500):
                assert all(memory.get([(photo.with_name(str(i)), status) for i in range(first, first + 500)]))


def test_goes_on_in_the_new_file_when_another_process_set_the_old_one_aside(memory_file, photo):
    status = photo.stat()
    with DigestMemory(memory_file) as memory:
        memory_file.replace(memory_file.with_name("moved"))
        memory.put(photo, status, FACTS)
    assert memory.warnings == []
    assert recall(memory_file, photo) == FACTS


def test_a_file_that_cannot_be_used_is_done_without(tmp_path, photo):
    (tmp_path / "file").write_text("not a folder")
    memory = remember(tmp_path / "file" / "digests.sqlite", photo)
    assert "is not used" in memory.warnings[0]
    assert len(memory.warnings) == 1
