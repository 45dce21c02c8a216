"""`fixes.csv`, written for a person to edit: a line for every finding. What was decided before is kept."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from finetune_cli import files
from finetune_cli.doctor.examine import Finding
from finetune_cli.errors import UsageError
from finetune_cli.photos.fixes import COLUMNS, KEEP
from finetune_cli.tables import parse_csv, write_csv

FILE = "fixes.csv"


def decided(path: Path) -> list[list[str]]:
    """The lines of an earlier table at `path` whose action is not `keep`; none without a table.

    Raises `UsageError` when the file there is something else: it is not overwritten.
    """
    if not os.path.lexists(path):
        return []
    try:
        rows = parse_csv(files.read_regular(path), COLUMNS)
    except (OSError, ValueError, csv.Error) as exc:
        raise UsageError(
            f"{path} exists, and is no table that finetune doctor can continue: {exc}",
            "move it away, or name another folder with --output",
        ) from exc
    return [row for row in rows if row[-1].strip().lower() not in ("", KEEP)]


def write(path: Path, findings: Iterable[Finding], before: Iterable[list[str]]) -> int:
    """Write the table; returns how many lines of `before`, decisions of an earlier one, it keeps.

    A finding of the same problem of the same photo has the action that was decided; decisions about anything else
    follow at the end. Raises `StorageError`.
    """
    left = {(row[0], row[1], row[2]): row for row in before}
    kept = len(left)
    rows: list[list[str]] = []
    for finding in findings:
        key = (finding.path, finding.photo.digest, finding.problem)
        earlier = left.pop(key, None)
        action = KEEP if earlier is None else earlier[-1]
        rows.append([*key, finding.evidence, finding.suggestion, action])
    write_csv(path, COLUMNS, [*rows, *left.values()])
    return kept
