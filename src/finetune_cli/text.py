"""Text that is safe to show: file names and messages from files may hold anything."""

import re
from collections.abc import Sequence

# `pathlib` and `os.path.normpath` make one slash of two.
_ADDRESS = re.compile(r"(?:^|/)(https?|ftp|s3|gs)(:/+)(?=[^/])", re.IGNORECASE)


def shown(text: object) -> str:
    """`text` on one line with every control, bidirectional or undecodable character as a visible escape."""
    whole = str(text)
    return whole if whole.isprintable() else "".join(map(_visible, whole))


def brief(text: object, most: int = 100) -> str:
    """`text` as `shown`, with the middle of what is longer than `most` characters left out."""
    whole = shown(text)
    half = most // 2
    return whole if len(whole) <= most else f"{whole[:half]}…{whole[half + 1 - most :]}"


def address(path: object) -> str | None:
    """The web address that `path` was typed as, such as ``https://host/photo.jpg``, though `Path` took a slash of it.

    None for what looks like a path. A path below a folder counts, too, because paths in a config are made absolute.
    """
    text = str(path)
    found = _ADDRESS.search(text)
    return None if found is None else f"{found[1]}://{text[found.end() :]}"


def counted(number: int, noun: str) -> str:
    """`number` and `noun`, whose plural ends in s: ``1 photo``, ``2 photos``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """`seconds` in the unit that people would use."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"


def message_lines(exc: BaseException) -> list[str]:
    """The lines of an exception's message that are not empty, without indentation; else the name of its type."""
    return [line.strip() for line in str(exc).splitlines() if line.strip()] or [type(exc).__name__]


def first_line(exc: BaseException) -> str:
    """The first line of `message_lines`."""
    return message_lines(exc)[0]


def _visible(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")


def listed(names: Sequence[str], most: int) -> str:
    """`names` with commas; of more than `most`, the first ones and how many others there are."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} others"
