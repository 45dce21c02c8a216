"""The run directory: its layout, its manifest `run.json`, how a run is named, found and loaded.

`run.json` is written last, so a directory without it is an unfinished run. Every file it lists carries its SHA-256,
and a file is checked before it is used; `run.json` carries a SHA-256 of its own content. No file holds a pickle or an
absolute path.
"""

import csv
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_cli import files
from finetune_cli.errors import RunError, StorageError, UsageError
from finetune_cli.photos import listing, table
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.places import Address, Place
from finetune_cli.runs import manifest as manifests
from finetune_cli.runs.formats import NewerFormat
from finetune_cli.runs.manifest import SPLITS, Manifest
from finetune_cli.storage import is_address
from finetune_cli.tables import parse_csv, write_csv

DIRECTORY = Path("runs")  # where the commands look for runs
MANIFEST = manifests.FILE
FIXES = "fixes.csv"  # the copy of `data.fixes`
_LIST_THEM = "list the runs with: finetune runs"
_LONGEST_STEM = 50
_REMEDY = "restore it from a copy, or train again"


@dataclass(frozen=True, slots=True)
class SplitRow:
    """One line of split.csv: `split` is train, val or test; `path` is relative to that split's data root.

    group: photos of a group are on one side of a split; empty for a photo without one. fold: in which a training photo
    was held out in cross-validation, from 1; None for one that was not.
    """

    split: str
    label: str
    digest: str
    path: str
    group: str = ""
    fold: int | None = None


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.folder.name

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the model's outputs."""
        return self.manifest.classes

    @property
    def image_settings(self) -> ImageSettings:
        """How photos are decoded for this model."""
        return self.manifest.image

    @property
    def temperature(self) -> float:
        """The calibration T inside the model; 1 if none."""
        return self.manifest.temperature

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """The finished run in `folder`. Raises `RunError` when it is missing, unfinished or not readable."""
        if folder.name in ("", ".."):  # "." has no name to call the run by
            folder = folder.resolve()
        path = folder / MANIFEST
        if not folder.is_dir():
            raise RunError(f"there is no run {folder}", _LIST_THEM)
        if not os.path.lexists(path) and not (folder / "config.yaml").is_file():
            raise RunError(f"{folder} is not a run directory: it has no {MANIFEST}", _LIST_THEM)
        if not os.path.lexists(path):
            raise RunError(
                f"{folder} is not a finished run: it has no {MANIFEST}",
                f"finish it with: finetune train --resume {folder}",
            )
        try:
            return cls(folder, manifests.parse(files.read_own(path).decode("utf-8")))
        except NewerFormat as exc:
            problem = f"{folder} has format {exc.found}, this version reads {exc.known}"
            raise RunError(problem, "update finetune-cli") from exc
        except (OSError, ValueError, RecursionError) as exc:
            raise RunError(f"{path} is damaged: {exc}", _REMEDY) from exc

    def file(self, name: str) -> Path:
        """The path of a listed file, after its SHA-256 was checked: for libraries that take names.

        Raises `RunError` when it is damaged, missing, a link or no regular file.
        """
        self._check(name, files.sha256_own)
        return self.folder / name

    def read(self, name: str) -> bytes:
        """The bytes of a listed file whose SHA-256 was checked, read once. Raises `RunError` as `file` does."""
        content = b""

        def digest(path: Path, root: Path) -> str:
            nonlocal content
            content = files.read_own(path, root)
            return hashlib.sha256(content).hexdigest()

        self._check(name, digest)
        return content

    def _check(self, name: str, digest: Callable[[Path, Path], str]) -> None:
        path = self.folder / name
        expected = self.manifest.files.get(name)
        if expected is None:
            raise RunError(f"{self.folder} lists no file {name}", _REMEDY)
        try:
            actual = digest(path, self.folder)
        except OSError as exc:
            raise RunError(f"{path} cannot be read: {exc.strerror}", _REMEDY) from exc
        if actual != expected:
            raise RunError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}", _REMEDY)

    def split(self) -> list[SplitRow]:
        """The photos of the run, by split."""
        return _parse_split(self.read("split.csv"), self.folder / "split.csv")

    def data_roots(self) -> dict[str, Place]:
        """Split -> the folder that its photos were in when the run was made."""
        return {
            split: Address(root) if is_address(root) else Path(os.path.normpath(self.folder / root))
            for split, root in self.manifest.roots.items()
        }


def check_target(directory: Path, name: str | None) -> None:
    """Raise `UsageError` when `name` exists in `directory`: before minutes of work."""
    if name is not None and os.path.lexists(directory / name):
        raise UsageError(
            f"{directory / name} exists already, and runs are never overwritten",
            "choose another --name, or remove that folder",
        )


def stem(photos: Place) -> str:
    """What a run of the training photos `photos`, a folder or a table, is called before its number.

    The table's name without its suffix, or the folder's; of a folder named after a split, that of the one above it.
    """
    path = Path(os.path.normpath(photos.absolute())) if isinstance(photos, Path) else photos
    name = path.stem if path.suffix.lower() in table.SUFFIXES else path.name
    if name.lower() in listing.SPLITS:
        name = path.parent.name
    return re.sub(r"[^\w.-]+", "-", name)[:_LONGEST_STEM].strip("-.") or "run"


def create(directory: Path, name: str | None, stem: str, write: Callable[[Path, Path], None]) -> Path:
    """Make a new run directory and return it: `name`, or `stem` with the next free number.

    ``write(temporary, folder)`` fills it while it has a temporary name, so that a kill leaves no run that cannot be
    resumed. Raises `UsageError` when `name` exists, because a run is never overwritten; `StorageError`.
    """
    files.remove_abandoned(directory)  # of trainings that were killed right here
    numbers = itertools.count(1)
    while True:
        check_target(directory, name)
        folder = directory / (name or f"{stem}-{next(numbers)}")
        if os.path.lexists(folder):
            continue
        try:
            with files.atomic_folder(folder) as temporary, files.lock(temporary.parent):
                write(temporary, folder)
            return folder
        except StorageError:
            if not os.path.lexists(folder):
                raise


def located(named: Path) -> Path:
    """`named`, or the run of that name under runs/ if `named` is a bare name and not a run itself."""
    is_name = len(named.parts) == 1 and named.name not in ("", "..")
    under = DIRECTORY / named
    return under if is_name and not _is_run(named) and _is_run(under) else named


def _is_run(folder: Path) -> bool:
    """Whether `folder` holds a run, finished or not."""
    return (folder / MANIFEST).is_file() or (folder / "config.yaml").is_file()


def find(directory: Path) -> Path:
    """The newest finished run under `directory`. Raises `RunError` when there is none."""
    found = [path.parent for path in directory.glob(f"*/{MANIFEST}")]
    if not found:
        raise RunError(
            f"there is no finished run under {directory}",
            "train one with: finetune train CONFIG, or name one with --run",
        )
    return max(found, key=lambda folder: ((folder / MANIFEST).lstat().st_mtime_ns, folder.name))


def find_unfinished(directory: Path) -> Path:
    """The newest unfinished run in `directory`. Raises `RunError` when there is none."""
    found = [path.parent for path in directory.glob("*/split.csv") if not os.path.lexists(path.parent / MANIFEST)]
    if not found:
        finished = any(directory.glob(f"*/{MANIFEST}"))
        raise RunError(
            f"there is no unfinished run in {directory}" + ("; all runs there are finished" if finished else ""),
            "name the run, or the folder that it is in: finetune train --resume runs/NAME; if it was interrupted "
            "before it had a folder there, run its command again",
        )
    return max(found, key=lambda folder: ((folder / "split.csv").lstat().st_mtime_ns, folder.name))


def finish(folder: Path, manifest: Manifest, names: Iterable[str]) -> Run:
    """Write `manifest` with the SHA-256 of the files `names` as `run.json`; the run is finished from here on."""
    listed = {name: files.sha256_own(folder / name, folder) for name in sorted(names)}
    files.write_json(folder / MANIFEST, replace(manifest, files=listed).to_json())
    return Run.load(folder)


_SPLIT_HEADER = ("split", "class", "digest", "path", "group")


def write_split(path: Path, rows: Sequence[SplitRow]) -> None:
    """Write split.csv, with the column `fold` if there are folds."""
    lines = [(row.split, row.label, row.digest, row.path, row.group) for row in rows]
    if any(row.fold for row in rows):
        numbered = [(*line, row.fold or "") for line, row in zip(lines, rows, strict=True)]
        write_csv(path, (*_SPLIT_HEADER, "fold"), numbered)
    else:
        write_csv(path, _SPLIT_HEADER, lines)


def read_split(path: Path) -> list[SplitRow]:
    """Read split.csv. Raises `RunError` when it is damaged."""
    try:
        data = files.read_own(path)
    except OSError as exc:
        raise RunError(f"{path} cannot be read: {exc.strerror}", _REMEDY) from exc
    return _parse_split(data, path)


def _fold(rest: Sequence[str]) -> int | None:
    """The number in the column `fold`, if there is that column and a number in it. Raises `ValueError`."""
    if not rest or not rest[0]:
        return None
    fold = int(rest[0])
    if not 1 <= fold <= 100:
        raise ValueError(f"there is no fold {rest[0]!r}")
    return fold


def _parse_split(data: bytes, path: Path) -> list[SplitRow]:
    try:
        try:
            rows = parse_csv(data, _SPLIT_HEADER)
        except ValueError:
            try:
                rows = parse_csv(data, (*_SPLIT_HEADER, "fold"))
            except ValueError:
                rows = parse_csv(data, _SPLIT_HEADER[:-1])  # written before groups were recorded
        if unknown := {row[0] for row in rows} - set(SPLITS):
            raise ValueError(f"there is no split {min(unknown)!r}")
        return [
            SplitRow(split, label, digest, name, rest[0] if rest else "", _fold(rest[1:]))
            for split, label, digest, name, *rest in rows
        ]
    except (ValueError, csv.Error) as exc:
        raise RunError(f"{path} is damaged: {exc}", _REMEDY) from exc
