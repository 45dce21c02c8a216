"""Bring odd, broken and hostile image files into the folder `bad-images`, for tests/photos/test_bad_images.py.

    python tools/fetch_bad_images.py

From Pillow's own source distribution (the version that is installed) its test images, and from Debian's sources of Go
the test images of its decoders. Only pip and apt-get are asked, wherever they are set up to look. What is there
already is kept; what cannot be brought is named, and the exit code is 1.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "bad-images"
GO_PACKAGE = "golang-1.19-src"


def fetch_pillow(work: Path) -> Path:
    """The folder Tests/images of Pillow's source distribution."""
    wanted = f"pillow=={version('pillow')}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "pillow", wanted]
    subprocess.run(command, cwd=work, check=True)
    (archive,) = work.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        members = [member for member in tar if "/Tests/images/" in member.name]
        tar.extractall(work, members, filter="data")
    (images,) = work.glob("*/Tests/images")
    return images


def fetch_go(work: Path) -> Path:
    """The folder src/image of Go's sources."""
    subprocess.run(["apt-get", "--quiet=2", "download", GO_PACKAGE], cwd=work, check=True)
    (package,) = work.glob("*.deb")
    subprocess.run(["dpkg", "-x", package.name, "unpacked"], cwd=work, check=True)
    (images,) = work.glob("unpacked/usr/share/go-*/src/image")
    return images


def main() -> int:
    """Bring both sets; 1 if one is missing afterwards."""
    missing = 0
    for name, fetch in ((f"pillow-{version('pillow')}", fetch_pillow), (GO_PACKAGE, fetch_go)):
        target = TARGET / name
        if not target.is_dir():
            TARGET.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=TARGET, prefix=".fetching-") as work:
                try:
                    found = fetch(Path(work))
                except (OSError, ValueError, subprocess.CalledProcessError, tarfile.TarError) as exc:
                    print(f"{name}: could not be brought: {exc}", file=sys.stderr)
                    missing = 1
                    continue
                shutil.move(found, target)
        print(f"{target}: {sum(path.is_file() for path in target.rglob('*'))} files")
    return missing


if __name__ == "__main__":
    sys.exit(main())
