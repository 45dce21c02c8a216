"""`fixes.csv`: what is wrong with photos, as `finetune doctor` found it, and what a person decided to do about it.

    path, digest, problem, evidence, suggestion, action

`path` is relative to the folder that holds all photos of the config, `digest` the SHA-256 of the photo. Only `action`
does anything: `keep` or nothing, `drop`, `relabel: NAME`, `group: NAME`. Spreadsheets may have saved the table: its
columns may be in another order, separated by semicolons, and have others beside them. Photos are never changed.
"""

import csv
import difflib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_cli import files, places
from finetune_cli.errors import DataError
from finetune_cli.photos.scan import Sample
from finetune_cli.places import Address, Place
from finetune_cli.tables import undo_defuse
from finetune_cli.text import counted, shown

COLUMNS = ("path", "digest", "problem", "evidence", "suggestion", "action")
KEEP, DROP = "keep", "drop"
_NAMED = ("relabel", "group")
_SHOWN = 20
_REMEDY = "an action is keep, drop, relabel: NAME or group: NAME; the other columns are as finetune doctor wrote them"


@dataclass(frozen=True, slots=True)
class Fix:
    """What to do with the photo at `path`: drop it, or give it a label, a group, or both."""

    path: str
    digest: str
    drop: bool = False
    label: str | None = None
    group: str | None = None


def read(path: Path) -> tuple[bytes, tuple[Fix, ...]]:
    """The table at `path`, as it is and as the fixes in it. Raises `DataError` that lists all wrong lines."""
    try:
        content = files.read_regular(path)
    except OSError as exc:
        raise DataError(f"{shown(path)} cannot be read: {exc.strerror or exc}", "check data.fixes") from exc
    try:
        rows = _rows(content)
    except (ValueError, csv.Error) as exc:
        raise DataError(f"{shown(path)} is not a table of fixes: {shown(exc)}", _REMEDY) from exc
    found: dict[str, Fix] = {}
    problems = []
    for line, row in rows:
        try:
            if fix := _fix(row):
                found[fix.path] = _both(found.get(fix.path), fix)
        except ValueError as exc:
            problems.append(f"line {line}: {exc}")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise DataError("\n  ".join([f"{shown(path)} has wrong lines", *problems[:_SHOWN], *more]), _REMEDY)
    return content, tuple(found.values())


def _rows(content: bytes) -> list[tuple[int, dict[str, str]]]:
    """The lines of the table by the names of the columns, with their numbers."""
    text = content.decode("utf-8-sig", "surrogateescape")
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    header = [undo_defuse(cell).strip().lower() for cell in next(reader, [])]
    if missing := {"path", "digest", "action"} - set(header):
        raise ValueError(f"it has no column {min(missing)}")
    found = []
    for cells in reader:
        if any(cells):
            if len(cells) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(cells)} columns, the first line {len(header)}")
            found.append((reader.line_num, dict(zip(header, map(undo_defuse, cells), strict=True))))
    return found


def _fix(row: Mapping[str, str]) -> Fix | None:
    """What a line asks for; `None` if that is nothing. Raises `ValueError`."""
    path, digest, action = row["path"], row["digest"].strip().lower(), row["action"].strip()
    word, colon, name = (part.strip() for part in action.partition(":"))
    word = word.lower()
    if not action or (word == KEEP and not colon):
        return None
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError("its digest is not a SHA-256")
    if word == DROP and not colon:
        return Fix(path, digest, drop=True)
    if word in _NAMED and name:
        return Fix(path, digest, label=name) if word == "relabel" else Fix(path, digest, group=name)
    raise ValueError(f"{action!r} is not an action")


def _both(one: Fix | None, other: Fix) -> Fix:
    """One fix of what two lines ask for the same photo. Raises `ValueError` if they contradict each other."""
    if one is None:
        return other
    both = Fix(one.path, one.digest, one.drop or other.drop, one.label or other.label, one.group or other.group)
    wanted = [(fix.label, fix.group) for fix in (one, other)]
    contradicts = any(a and b and a != b for a, b in zip(*wanted, strict=True))
    if one.digest != other.digest or contradicts or (both.drop and not (one.drop and other.drop)):
        raise ValueError(f"it contradicts another line for {shown(one.path)}")
    return both


def apply(
    fixes: Iterable[Fix], parts: Mapping[str, Sequence[Sample]], roots: Iterable[Place], classes: Sequence[str]
) -> tuple[dict[str, list[Sample]], list[str]]:
    """The photos of each split after `fixes`, and what the user should know. `roots`: of the splits.

    Raises `DataError` for photos that changed since the table was written, and for labels that are no classes.
    """
    root = data_root(roots)
    of_path = {_key(places.join(root, fix.path)): fix for fix in fixes}
    label = {name: i for i, name in enumerate(classes)}
    fixed: dict[str, list[Sample]] = {}
    problems, used = [], set()
    counts = dict.fromkeys(("dropped", "relabelled", "put into a group"), 0)
    for split, samples in parts.items():
        kept = fixed[split] = []
        for sample in samples:
            key = _key(sample.path)
            fix = of_path.get(key)
            if fix is None:
                kept.append(sample)
                continue
            used.add(key)
            if fix.digest != sample.digest:
                problems.append(f"{shown(sample.path)} changed since its fix was written")
            elif fix.label is not None and fix.label not in label:
                close = difflib.get_close_matches(fix.label, classes, 1)
                meant = f"; did you mean {shown(close[0])}?" if close else ""
                problems.append(f"{shown(sample.path)}: {shown(fix.label)} is not a class{meant}")
            elif fix.drop:
                counts["dropped"] += 1
            else:
                counts["relabelled"] += fix.label is not None
                counts["put into a group"] += fix.group is not None
                own = label[fix.label] if fix.label is not None else sample.label
                kept.append(replace(sample, label=own, group=fix.group or sample.group))
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise DataError(
            "\n  ".join(["data.fixes does not fit the photos", *problems[:_SHOWN], *more]),
            "examine the photos again: finetune doctor; or set the action of these lines to keep",
        )
    done = ", ".join(f"{counted(count, 'photo')} {what}" for what, count in counts.items() if count)
    notes = [f"data.fixes: {done or 'nothing to do'}"]
    if unused := len(of_path.keys() - used):
        notes.append(f"data.fixes: {counted(unused, 'photo')} that it names are not there, or cannot be used")
    return fixed, notes


def data_root(roots: Iterable[Place]) -> Place:
    """The folder that paths in a table of fixes are relative to: the one that holds all `roots`.

    Of roots in different stores or buckets there is none; then it is the first, and photos elsewhere have addresses.
    """
    roots = list(roots)
    local = [root for root in roots if isinstance(root, Path)]
    if len(local) == len(roots):
        return Path(os.path.commonpath([os.path.abspath(root) for root in local]))  # noqa: PTH100 - links stay, as in configs
    root = roots[0]
    while isinstance(root, Address) and root != root.parent:
        if all(str(other).startswith(f"{root}/") or other == root for other in roots):
            break
        root = root.parent
    return root


def name_below(root: Place, path: Place) -> str:
    """`path` as a table of fixes names it."""
    if isinstance(path, Address):
        return (root.relative(path.text) if isinstance(root, Address) else None) or path.text
    if isinstance(root, Address):
        return path.absolute().as_posix()
    return Path(os.path.relpath(os.path.abspath(path), root)).as_posix()  # noqa: PTH100


def _key(path: Place) -> str:
    """One name for ``a/b`` and ``a/../a/b``."""
    return path.text if isinstance(path, Address) else os.path.normpath(path)
