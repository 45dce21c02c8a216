"""Typed reading of untrusted JSON objects: every value is checked when it is read.

Each error is one line that names the key, such as ``image.size must be a whole number from 32 to 1024, not "big"``.
Unknown keys are ignored, so that a later version can add keys without a new format.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar

T = TypeVar("T")
Choice = TypeVar("Choice", bound=str)

_SHOWN = 60  # characters of a wrong value in a message
_SHA256 = re.compile("[0-9a-f]{64}")


class FieldError(ValueError):
    """A key that is missing, or whose value has the wrong type or is out of range."""


class Fields:
    """The JSON object `document`; `key` is its position in the file, empty for the whole file.

    Every method raises `FieldError` when the key `name` is missing or its value is not what the method returns.
    """

    def __init__(self, document: object, key: str = "") -> None:
        if not isinstance(document, dict):
            raise FieldError(f"{key or 'the file'} must be an object, not {_shown(document)}")
        self.document: Mapping[str, Any] = document
        self._key = key

    def path(self, name: str) -> str:
        """The key `name` as messages show it: with its parent keys."""
        return f"{self._key}.{name}" if self._key else name

    def wrong(self, name: str, expected: str) -> FieldError:
        """The error for a `name` that is not `expected`."""
        return FieldError(f"{self.path(name)} must be {expected}, not {_shown(self.document.get(name))}")

    def value(self, name: str) -> Any:
        """Any value."""
        if name not in self.document:
            raise FieldError(f"{self.path(name)} is missing")
        return self.document[name]

    def text(self, name: str) -> str:
        """A text that is not empty."""
        found = self.value(name)
        if not isinstance(found, str) or not found:
            raise self.wrong(name, "a text")
        return found

    def choice(self, name: str, choices: Collection[Choice]) -> Choice:
        """One of `choices`."""
        found = self.value(name)
        for choice in choices:
            if found == choice:
                return choice
        raise self.wrong(name, " or ".join(choices))

    def flag(self, name: str) -> bool:
        """True or false."""
        found = self.value(name)
        if not isinstance(found, bool):
            raise self.wrong(name, "true or false")
        return found

    def integer(self, name: str, low: int = 0, high: int | None = None) -> int:
        """A whole number from `low` to `high`."""
        found = self.value(name)
        if type(found) is not int or found < low or (high is not None and found > high):
            limits = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise self.wrong(name, f"a whole number {limits}")
        return found

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number from `low` to `high`."""
        found = self.value(name)
        # An int is compared first: beyond the range of a float it has no finite value.
        finite = type(found) in (int, float) and -1e308 <= found <= 1e308
        if not finite or not low <= found <= high:
            limits = (
                "" if low == -math.inf else f" of at least {low:g}" if high == math.inf else f" {low:g} to {high:g}"
            )
            raise self.wrong(name, f"a finite number{limits}")
        return float(found)

    def positive(self, name: str) -> float:
        """A finite number above 0."""
        if (found := self.number(name)) <= 0:
            raise self.wrong(name, "a finite number above 0")
        return found

    def sha256(self, name: str) -> str:
        """A SHA-256: 64 hexadecimal digits in lower case."""
        found = self.value(name)
        if not isinstance(found, str) or not _SHA256.fullmatch(found):
            raise self.wrong(name, "a SHA-256 of 64 hexadecimal digits")
        return found

    def sha256s(self, name: str) -> tuple[str, ...]:
        """A list of SHA-256s."""
        items = Fields({f"[{i}]": item for i, item in enumerate(self._list(name))}, self.path(name))
        return tuple(items.sha256(key) for key in items.document)

    def optional(self, name: str, read: Callable[[str], T]) -> T | None:
        """What `read`, a method of this class, makes of `name`; None where the value is null."""
        return None if self.value(name) is None else read(name)

    def object(self, name: str) -> "Fields":
        """An object."""
        return Fields(self.value(name), self.path(name))

    def objects(self, name: str) -> "list[Fields]":
        """A list of objects."""
        return [Fields(item, f"{self.path(name)}[{i}]") for i, item in enumerate(self._list(name))]

    def mapping(self, name: str, read: "Callable[[Fields, str], T]") -> dict[str, T]:
        """An object of any keys, with what `read` makes of each: a method of this class, such as ``Fields.integer``."""
        inner = self.object(name)
        return {key: read(inner, key) for key in inner.document}

    def names(self, name: str, least: int) -> tuple[str, ...]:
        """A list of at least `least` different texts, none of them empty."""
        found = self._list(name)
        for i, item in enumerate(found):
            if not isinstance(item, str) or not item:
                raise FieldError(f"{self.path(name)}[{i}] must be a name, not {_shown(item)}")
        if len(set(found)) < len(found):
            twice = next(item for i, item in enumerate(found) if item in found[:i])
            raise FieldError(f"{self.path(name)} holds {_shown(twice)} twice")
        if len(found) < least:
            raise FieldError(f"{self.path(name)} must hold at least {least} names, not {len(found)}")
        return tuple(found)

    def listed_files(self, name: str) -> dict[str, str]:
        """File name -> SHA-256. The names are relative, with slashes, and stay in the folder of the JSON file."""
        found = self.mapping(name, Fields.sha256)
        for file in found:
            path = PurePosixPath(file)
            inside = not path.is_absolute() and ".." not in path.parts and path.as_posix() == file != "."
            if not inside or any(character in file for character in "\\:\0"):
                raise FieldError(f"{self.path(name)} names {_shown(file)}, which is outside its folder")
        return found

    def _list(self, name: str) -> list[Any]:
        found = self.value(name)
        if not isinstance(found, list):
            raise self.wrong(name, "a list")
        return found


def _shown(value: object) -> str:
    """`value` as JSON in one short line."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
