"""`cache info|clear|prune`: how large the cache of features, digests and backbones is, and how to make it smaller."""

import re
from pathlib import Path

from finetune_cli.cache import backbones, digests, features, sqlite_file
from finetune_cli.errors import UsageError
from finetune_cli.files import human_bytes
from finetune_cli.text import counted

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{infix}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("I", 1024))
}


def parse_size(text: str) -> int:
    """Bytes of a size like ``5GB`` (5 * 1000^3), ``512 MiB`` (512 * 1024^2), ``1.5tb`` or ``4096``.

    Raises `UsageError` for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.ASCII | re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"{text!r} is not a size", "write it like 500MB, 5GB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def info(folder: Path) -> list[str]:
    """What the cache in `folder` holds, as lines of text."""
    found = features.info(folder)
    lines = [f"feature cache {found.path}: {found.rows:,} features, {human_bytes(found.size)}"]
    if found.problem:
        lines.append(f"{found.problem}; the next run sets it aside and starts a new one")
    if found.aside:
        lines.append(
            f"{len(found.aside)} damaged file(s) set aside, {human_bytes(found.aside_size)}: "
            + ", ".join(path.name for path in found.aside)
        )
    if size := sqlite_file.size(_digest_files(folder)):
        lines.append(f"digest cache {folder / digests.KIND.name}: {human_bytes(size)}")
    count, size = backbones.size(folder)
    if count:
        lines.append(f"converted backbones {folder / backbones.NAME}: {count}, {human_bytes(size)}")
    return lines


def clear(folder: Path) -> str:
    """Remove all that the cache in `folder` holds; a line that says what was freed.

    Raises `StorageError` or `RunError`.
    """
    freed = features.clear(folder) + sqlite_file.remove(_digest_files(folder), folder) + backbones.clear(folder)
    return f"removed the cache in {folder}: {human_bytes(freed)} freed"


def _digest_files(folder: Path) -> list[Path]:
    return [*sqlite_file.companions(folder / digests.KIND.name), *sqlite_file.aside(folder, digests.KIND)]


def prune(folder: Path, max_size: str) -> str:
    """Shrink the cache in `folder` to `max_size` (see `parse_size`); a line that says what was freed.

    The oldest features go first, then the converted backbones that were not used for the longest. Digests stay: they
    are small, and count. Raises `UsageError`, `StorageError` or `RunError`.
    """
    limit = parse_size(max_size) - sqlite_file.size(_digest_files(folder))
    freed = features.prune(folder, max(0, limit - backbones.size(folder)[1]))
    left = features.info(folder)
    freed += backbones.prune(folder, max(0, limit - left.size))
    count, size = backbones.size(folder)
    return (
        f"{human_bytes(freed)} freed; {left.rows:,} features, {human_bytes(left.size)}, and "
        f"{counted(count, 'converted backbone')}, {human_bytes(size)}, are left in {folder}"
    )
