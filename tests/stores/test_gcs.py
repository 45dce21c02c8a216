"""Photos in Google Cloud Storage, through gcsfs: a small server on the loopback that knows the JSON API's few requests.

Source: https://cloud.google.com/storage/docs/json_api/v1
"""

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from photo_files import write_photos

from finetune_cli import storage
from finetune_cli.cache.digests import DigestCache
from finetune_cli.errors import StorageError
from finetune_cli.photos import dataset
from finetune_cli.photos.dataset import DataSettings
from finetune_cli.places import place
from finetune_cli.progress import ignore_progress
from finetune_cli.storage import Patience

pytestmark = pytest.mark.machines

objects: dict[str, bytes] = {}
counts: Counter[str] = Counter()
failing: list[int] = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path, query = urlsplit(self.path).path, {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
        if failing:
            return self.answer(failing.pop(), b"{}")
        if path.endswith("/o"):
            names = sorted(name for name in objects if name.startswith(query.get("prefix", "")))
            prefix, folders = query.get("prefix", ""), set()
            if "delimiter" in query:
                folders = {prefix + name.removeprefix(prefix).partition("/")[0] + "/"
                           for name in names if "/" in name.removeprefix(prefix)}  # fmt: skip
                names = [name for name in names if "/" not in name.removeprefix(prefix)]
            start = int(query.get("pageToken", 0))
            page = {"kind": "storage#objects", "items": [self.facts(name) for name in names[start : start + 3]]}
            if start + 3 < len(names):
                page["nextPageToken"] = str(start + 3)
            if folders:
                page["prefixes"] = sorted(folders)
            return self.answer(200, json.dumps(page).encode())
        name = unquote(path.rpartition("/o/")[2])
        if name not in objects:
            return self.answer(404, b"{}")
        if query.get("alt") == "media" or path.startswith("/download"):
            counts["read"] += 1
            return self.answer(200, objects[name])
        return self.answer(200, json.dumps(self.facts(name)).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        boundary = self.headers["Content-Type"].partition("boundary=")[2].strip('"').encode()
        _, facts, content, _ = body.split(b"--" + boundary)
        name = json.loads(facts.partition(b"\n\n")[2] or facts.partition(b"\r\n\r\n")[2])["name"]
        objects[name] = content.partition(b"\n\n")[2].removesuffix(b"\n")
        return self.answer(200, json.dumps(self.facts(name)).encode())

    def facts(self, name):
        size, generation = len(objects[name]), abs(hash(objects[name]))
        return {"name": name, "bucket": "bucket", "size": str(size), "generation": str(generation), "etag": "x"}

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def gcs():
    fsspec_config = pytest.importorskip("fsspec.config")
    pytest.importorskip("google.auth")  # without importing gcsfs, which is for `storage` to do
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        options = {"token": "anon", "endpoint_url": f"http://127.0.0.1:{server.server_port}"}
        for protocol in ("gs", "gcs"):
            patch.setitem(fsspec_config.conf, protocol, options)
        patch.setattr(storage, "patience", Patience(1.0, 1.0, 10.0, (0.01, 0.02, 0.04)))
        storage._file_system.cache_clear()
        yield
        storage._file_system.cache_clear()
    server.shutdown()
    server.server_close()


def test_objects(gcs):
    objects.update({"o/a/1 ä.png": b"one", "o/empty": b"", "o/b": b"two"})
    assert storage.read("gs://bucket/o/a/1 ä.png") == b"one"
    assert storage.read("gs://bucket/o/empty") == b""
    assert [entry.name for entry in storage.entries("gs://bucket/o", deep=True)] == ["a/1 ä.png", "b", "empty"]
    assert storage.exists("gs://bucket/o/b")
    assert not storage.exists("gs://bucket/o/none")
    with pytest.raises(FileNotFoundError):
        storage.read("gs://bucket/o/none")


def test_failures(gcs):
    objects["f"] = b"x"
    before = storage.retries()
    failing[:] = [503, 500]
    assert storage.read("gs://bucket/f") == b"x"
    assert storage.retries() == before + 2
    failing[:] = [503] * 20
    with pytest.raises(StorageError, match="though it was tried again"):
        storage.read("gs://bucket/f")
    failing[:] = [403]
    with pytest.raises(StorageError, match="cannot be read"):
        storage.read("gs://bucket/f")
    failing.clear()


def test_photos(gcs, tmp_path):
    names = "a/1.png a/2.png b/1.png b/2.png"
    write_photos(tmp_path, names)
    for split in ("train", "val"):
        objects.update({f"set/{split}/{name}": (tmp_path / name).read_bytes() for name in names.split()})
    for reads in (8, 0):
        counts.clear()
        with DigestCache(tmp_path / "cache") as cache:
            found = dataset.load(DataSettings(place("gs://bucket/set")), cache, ignore_progress)
        assert [sample.name for sample in found.val] == names.split()
        assert counts["read"] == reads
