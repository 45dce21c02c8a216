"""A practice set that needs no photos: small `city` and `forest` scenes, drawn by the computer.

In: an empty folder. Out: ``city/*.jpg`` and ``forest/*.jpg`` of about 320 x 240 pixels, and a README that says what
they are. Each picture depends on the seed, its class and its number alone.
"""

import contextlib
import io
import random
from pathlib import Path

from finetune_cli import files
from finetune_cli.errors import UsageError
from finetune_cli.progress import Advance, ignore_progress

CLASSES = ("city", "forest")

README = """\
These pictures are drawings, not photos. `finetune sample` drew them by computer, to practise with and to try
finetune-cli without a collection of photos. A model that is trained on them knows these drawings; what it says about
real photos means nothing. They are free for any use (CC0).
"""


def draw(folder: Path, photos_per_class: int = 60, seed: int = 0, advance: Advance = ignore_progress) -> list[Path]:
    """Draw `photos_per_class` scenes of each class into `folder`, which must be new or empty; return their paths.

    The same seed draws the same pictures. `advance` counts them. Raises `UsageError` for a folder that
    holds anything and `StorageError` when it cannot be written.
    """
    from finetune_cli.practice import city, forest

    _refuse_used(folder)
    names = []
    # Whole or absent: half a set, left by a kill, would be mistaken for a complete one.
    with contextlib.nullcontext(folder) if folder.exists() else files.atomic_folder(folder) as target:
        files.write_text(target / "README.txt", README)
        for name, paint in zip(CLASSES, (city.paint, forest.paint), strict=True):
            for number in range(1, photos_per_class + 1):
                picture = paint(random.Random(f"{seed}/{name}/{number}"))  # noqa: S311 - scenery, not secrets
                buffer = io.BytesIO()
                picture.save(buffer, "JPEG", quality=88)
                names.append(f"{name}/{name}-{number:03}.jpg")
                files.write_bytes(target / names[-1], buffer.getvalue())
                advance(1)
    return [folder / name for name in names]


def _refuse_used(folder: Path) -> None:
    try:
        used = any(folder.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError as exc:
        raise UsageError(f"{folder} is a file", "name a new folder") from exc
    except OSError as exc:
        raise files.storage_error(exc, folder) from exc
    if used:
        raise UsageError(f"{folder} is not empty", "name a new folder; nothing is ever overwritten")
