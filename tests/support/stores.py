"""Object stores on this machine: an S3 server in a process of its own."""

import contextlib
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SECRETS = {"AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKE0001", "AWS_SECRET_ACCESS_KEY": "fake-secret/with+signs=0002"}
PROCESSES = Path(__file__).parents[1] / "processes"


@dataclass(frozen=True)
class S3:
    """A running server; `variables` is what a process needs in its environment to use it."""

    url: str

    @property
    def variables(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            **SECRETS,
        }

    def ask(self, path: str) -> str:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def spoil(self, kind: str, every: int = 1, count: int = 10**9) -> None:
        """Let requests for objects fail, see `processes/s3_server.py`."""
        self.ask(f"spoil/{kind}/{every}/{count}")

    def reads(self) -> int:
        """How many objects were asked for until now, bytes and all."""
        return int(self.ask("count/GET"))

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()

    def put(self, folder: Path, bucket: str, prefix: str = "") -> None:
        """Copy all files below `folder` to a bucket."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put_object(bucket, prefix + path.relative_to(folder).as_posix(), path.read_bytes())

    def put_object(self, bucket: str, key: str, data: bytes) -> None:
        quoted = urllib.request.quote(key)
        request = urllib.request.Request(
            f"{self.url}/{bucket}/{quoted}", data, {"Content-Type": "application/octet-stream"}, method="PUT"
        )
        urllib.request.urlopen(request, timeout=30).close()


@contextlib.contextmanager
def s3_server() -> Iterator[S3]:
    process = subprocess.Popen(
        [sys.executable, PROCESSES / "s3_server.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        yield S3(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
