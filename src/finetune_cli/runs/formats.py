"""The version of the run format, and the steps that upgrade the files of an older one while they are read.

`run.json`, `environment.json`, `checkpoints/start.json` and a checkpoint's `state.json` carry `format`. Each is read
with the reader of its module, which passes the content through `upgrade` first: so only this module knows old keys.
Nothing on the disk is rewritten; what a resumed training writes has the newest format.

A key that is only added needs no new format if readers can do without it: unknown keys are ignored. To rename, remove
or reinterpret a key, make format 3:

1. Before the change, make `tests/data/runs/format-2/` with the last version of format 2, as `format-1/` was made: a
   finished run, an unfinished one that was killed after an epoch, their photos and their backbone.
2. Set `FORMAT` to 3.
3. Write `_to_3`, which turns the content of any of these files from format 2 into format 3, and add it to `_STEPS`. The
   older steps stay as they are: a run of format 1 passes through all of them.
4. Add `format-2` to `tests/runs/test_old_formats.py`. Both runs must be read, and the unfinished one must resume.

History: 1 was the first. 2 renamed `views.a_photo` in `run.json` to `views.per_photo`, `went_on_with` in
`environment.json` to `resumed_with`, `checkpoints/begun.json` to `checkpoints/start.json`, and `begun` in the state of
a checkpoint to `training_id`; `environment.json` and `start.json` got the key `format`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from finetune_cli.fields import FieldError, Fields

FORMAT = 2
_WITHOUT_FORMAT_IN_1 = ("environment.json", "checkpoints/start.json")
_Content = Mapping[str, Any]


class NewerFormat(FieldError):
    """A file that a later version of this package wrote: its format is `found`, and `known` the newest known one."""

    def __init__(self, found: int, known: int) -> None:
        super().__init__(f"its format is {found}, and this version reads {known}")
        self.found = found
        self.known = known


def known(file: str, fields: Fields) -> int:
    """The format of the content of `file`, a name inside the run ("state.json" for that of any checkpoint).

    Raises `FieldError` when it is missing or there is no such format, and `NewerFormat` when it is later than `FORMAT`.
    """
    if file in _WITHOUT_FORMAT_IN_1 and "format" not in fields.document:
        return 1
    found = fields.integer("format")
    if found > FORMAT:
        raise NewerFormat(found, FORMAT)
    if found < 1:
        raise FieldError(f"there is no format {found}")
    return found


def upgrade(file: str, fields: Fields) -> Fields:
    """The content of `file`, of any known format, as the newest format has it. Raises as `known` does."""
    content = fields.document
    for step in _STEPS[known(file, fields) - 1 :]:
        content = step(file, content)
    return Fields({**content, "format": FORMAT})


def _to_2(file: str, content: _Content) -> _Content:
    if file == "run.json":
        views = Fields(content).object("views").document
        return {**content, "views": _renamed(views, "a_photo", "per_photo")}
    if file == "state.json":
        state = Fields(content).object("state").document
        return {**content, "state": _renamed(state, "begun", "training_id")}
    if file == "environment.json":
        return _renamed(content, "went_on_with", "resumed_with")
    return content


_STEPS: tuple[Callable[[str, _Content], _Content], ...] = (_to_2,)


def _renamed(content: _Content, old: str, new: str) -> _Content:
    return {new if key == old else key: value for key, value in content.items()}
