"""The paths in a configuration: which keys hold one, and how a path as typed becomes absolute.

Paths in a file are relative to the folder of that file, paths in overrides to the current folder.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_cli import storage
from finetune_cli.config.yaml_file import Keys
from finetune_cli.errors import UsageError

_PLACES = (("data", "train"), ("data", "val"), ("data", "test"))  # which may be addresses


def is_backbone_file(name: str) -> bool:
    """Whether `model.backbone` names a file rather than a known backbone."""
    return name.endswith(".keras") or "/" in name or os.sep in name


def path_keys(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The (section, key) pairs of `values` that hold a path."""
    always = [("data", ("train", "val", "test", "fixes")), ("model", ("start_from",))]
    always += [("runtime", ("cache_dir",)), ("output", ("directory",))]
    for section, keys in always:
        for key in keys:
            if isinstance(values.get(section), dict) and isinstance(values[section].get(key), str):
                yield section, key
    model = values.get("model")
    if isinstance(model, dict):
        if isinstance(model.get("weights"), str) and model["weights"] != "imagenet":
            yield "model", "weights"
        if isinstance(model.get("backbone"), str) and is_backbone_file(model["backbone"]):
            yield "model", "backbone"


def resolve_paths(
    values: dict[str, Any], base: Path, overridden: frozenset[str]
) -> tuple[frozenset[str], list[tuple[Keys, str]]]:
    """Make the paths in `values` absolute.

    Returns the dotted names of those that were typed so, and for what cannot be a path its keys and the reason.
    """
    output = values.setdefault("output", {})
    if isinstance(output, dict) and "directory" not in output:
        # A default was not typed in the file: runs go under the current folder, where later commands look for them.
        output["directory"] = str(Path("runs").absolute())
    absolute: set[str] = set()
    wrong: list[tuple[Keys, str]] = []
    for section, key in list(path_keys(values)):
        text = values[section][key]
        if "\0" in text:
            wrong.append(((section, key), f"`{section}.{key}` is {text!r}: a path cannot hold a NUL character"))
            continue
        if storage.is_address(text):
            absolute.add(f"{section}.{key}")
            if problem := _problem_with_address(section, key, text):
                wrong.append(((section, key), f"`{section}.{key}`: {problem}"))
                values[section][key] = "address"  # no other message repeats what may hold a password
            continue
        try:
            typed = Path(text).expanduser()
        except RuntimeError:
            user = Path(text).parts[0]
            wrong.append(
                ((section, key), f"`{section}.{key}` is {text!r}: there is no user {user[1:]}; for a folder: ./{user}")
            )
            continue
        if typed.is_absolute() and (section, key) != ("output", "directory"):
            absolute.add(f"{section}.{key}")
        folder = Path() if overridden & {section, f"{section}.{key}"} else base
        values[section][key] = os.path.abspath(folder / typed)  # noqa: PTH100 - unlike resolve() it keeps links, which people mean
    return frozenset(absolute), wrong


def _problem_with_address(section: str, key: str, text: str) -> str | None:
    """Why an address cannot be the value of this key; None if it can."""
    try:
        storage.check(text)
    except UsageError as exc:
        return f"{exc.problem}; {exc.remedy}"
    if (section, key) not in _PLACES:
        return f"{text!r} is an address, and this must be a path on this machine"
    return None
