"""The ImageNet weights that Keras publishes: found in Keras's own cache, or downloaded into it."""

import urllib.request
from pathlib import Path

from finetune_cli.backbones.registry import PublishedWeights
from finetune_cli.errors import WeightsError
from finetune_cli.files import atomic_path, has_digest
from finetune_cli.progress import Advance, ignore_progress

_TIMEOUT = 20.0  # seconds without an answer before a download is given up
_MEGABYTE = 10**6


def fetch(weights: PublishedWeights, advance: Advance = ignore_progress) -> Path:
    """The file of published weights: from Keras's cache, else downloaded into it; `advance` counts megabytes.

    Raises `WeightsError` naming the exact file and folder when there is no connection, and when the file there is not
    the one that Keras publishes.
    """
    path = weights.path
    if not path.exists():
        _download(weights, path, advance)
    elif not has_digest(path, weights.digest):
        # Keras would overwrite it; but it may be the only copy, and without a connection nothing would replace it.
        raise WeightsError(
            f"{path} is not the file that Keras publishes (its hash is not {weights.digest})",
            f"delete it to have it downloaded again, or use it as it is with model.weights: {path}",
        )
    return path


def _download(weights: PublishedWeights, path: Path, advance: Advance) -> None:
    try:
        response = urllib.request.urlopen(weights.url, timeout=_TIMEOUT)  # noqa: S310 - an https URL of our own table
    except OSError as exc:
        raise _unreachable(weights, path, exc) from exc
    with response, atomic_path(path) as temporary, temporary.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0) // _MEGABYTE or None
        megabytes = 0
        while True:
            try:
                chunk = response.read(_MEGABYTE)
            except OSError as exc:
                raise _unreachable(weights, path, exc) from exc
            if not chunk:
                break
            file.write(chunk)
            advance(file.tell() // _MEGABYTE - megabytes, total)
            megabytes = file.tell() // _MEGABYTE
        file.flush()
        if not has_digest(temporary, weights.digest):
            raise WeightsError(
                f"the download of {weights.url} is damaged (its hash is not {weights.digest})", "try again"
            )


def _unreachable(weights: PublishedWeights, path: Path, exc: OSError) -> WeightsError:
    known = f" (hash {weights.digest})" if weights.digest else ""
    return WeightsError(
        f"cannot download the ImageNet weights: {getattr(exc, 'reason', exc)}",
        f"save {weights.url}{known} as {path}, or set model.backbone: efficientnet_lite0, which is bundled",
    )
