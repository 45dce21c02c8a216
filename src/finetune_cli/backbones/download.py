"""The ImageNet weights that Keras publishes: found in Keras's own cache, or downloaded into it; and any download."""

import urllib.request
from dataclasses import dataclass
from pathlib import Path

from finetune_cli.backbones.registry import PublishedWeights
from finetune_cli.errors import WeightsError
from finetune_cli.files import atomic_path, has_digest
from finetune_cli.progress import Advance, ignore_progress

_TIMEOUT = 20.0  # seconds without an answer before a download is given up
_MEGABYTE = 10**6


@dataclass(frozen=True, slots=True)
class Published:
    """A file on the web. digest: its MD5 or SHA-256 in hexadecimal, None if it is not known. what: its name in errors.

    otherwise: what else a user can do who cannot download it.
    """

    url: str
    digest: str | None
    what: str
    otherwise: str


def fetch(weights: PublishedWeights, advance: Advance = ignore_progress) -> Path:
    """The file of published weights: from Keras's cache, else downloaded into it; `advance` counts megabytes.

    Raises `WeightsError` naming the exact file and folder when there is no connection, and when the file there is not
    the one that Keras publishes.
    """
    path = weights.path
    if not path.exists():
        otherwise = "set model.backbone: efficientnet_lite0, which is bundled"
        download(Published(weights.url, weights.digest, "the ImageNet weights", otherwise), path, advance)
    elif not has_digest(path, weights.digest):
        # Keras would overwrite it; but it may be the only copy, and without a connection nothing would replace it.
        raise WeightsError(
            f"{path} is not the file that Keras publishes (its hash is not {weights.digest})",
            f"delete it to have it downloaded again, or use it as it is with model.weights: {path}",
        )
    return path


def download(file: Published, path: Path, advance: Advance = ignore_progress) -> None:
    """Download `file` to `path`; `advance` counts megabytes.

    Raises `WeightsError` when there is no connection, and when the content has another hash.
    """
    try:
        response = urllib.request.urlopen(file.url, timeout=_TIMEOUT)  # noqa: S310 - an https URL of our own tables
    except OSError as exc:
        raise _unreachable(file, path, exc) from exc
    with response, atomic_path(path) as temporary, temporary.open("wb") as stream:
        total = int(response.headers.get("Content-Length") or 0) // _MEGABYTE or None
        megabytes = 0
        while True:
            try:
                chunk = response.read(_MEGABYTE)
            except OSError as exc:
                raise _unreachable(file, path, exc) from exc
            if not chunk:
                break
            stream.write(chunk)
            advance(stream.tell() // _MEGABYTE - megabytes, total)
            megabytes = stream.tell() // _MEGABYTE
        stream.flush()
        if not has_digest(temporary, file.digest):
            raise WeightsError(f"the download of {file.url} is damaged (its hash is not {file.digest})", "try again")


def _unreachable(file: Published, path: Path, exc: OSError) -> WeightsError:
    known = f" (hash {file.digest})" if file.digest else ""
    return WeightsError(
        f"cannot download {file.what}: {getattr(exc, 'reason', exc)}",
        f"save {file.url}{known} as {path}, or {file.otherwise}",
    )
