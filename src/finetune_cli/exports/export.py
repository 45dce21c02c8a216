"""`export`: a finished run in the forms that other programs run, each proven before it is in place.

All forms of one call are built beside their targets and compared with the run. Only if every one of them keeps its
limits are they moved into place; otherwise nothing has changed.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_cli import files, signals
from finetune_cli.errors import FinetuneError, GateError, UsageError
from finetune_cli.exports import forms, manifest, parity, place
from finetune_cli.exports.forms import Form, Source
from finetune_cli.exports.litert import LiteRt, Quantize
from finetune_cli.exports.openvino import OpenVino, Precision
from finetune_cli.exports.parity import Check, Replay
from finetune_cli.parallel import cores
from finetune_cli.progress import Observer
from finetune_cli.runs.run import Run

PARITY = "parity.json"
_NOTHING = "nothing was written; try another format or option"
# Room for the files of one form: none is larger than the run's model but for graphs, labels and records.
_EXTRA_BYTES = 20_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. None: the next free `version` (savedmodel), no quantizing (litert), float32 (openvino).

    `root`: where the run's photos are now, if they were moved; `force` replaces an export at `output`.
    """

    names: Sequence[str]
    output: Path
    version: int | None = None
    quantize: Quantize | None = None
    precision: Precision | None = None
    root: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """One form in place: its size in bytes, and milliseconds a photo in its own runtime."""

    form: str
    options: dict[str, str]
    folder: Path
    size: int
    milliseconds: float
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Result:
    """All exports of one call, and how the photos were that they were proven with."""

    exports: tuple[Exported, ...]
    photos: int
    missing: int


def export(run: Run, request: Request, observer: Observer) -> Result:
    """Write `run` in the wanted forms to `request.output`.

    Raises `UsageError` for wrong options or a target that may not be replaced, `MissingExtra`, `RunError` when the run
    is damaged, `DataError` when its validation photos are not there, `GateError` when a form answers differently.
    Nothing is changed then.
    """
    wanted = make_forms(request)
    inner = place.inner_paths(request.output, [form.name for form in wanted], request.version)
    _check_targets(run, request, inner)
    replay = parity.collect(run, request.root, observer)
    _tell(replay, observer)
    source = Source(run, lambda: parity.calibration_photos(run, request.root, observer))
    with contextlib.ExitStack() as stack:
        folders = _open_targets(stack, request, inner)
        exports = [_build(form, source, folders[form.name], replay, observer) for form in wanted]
    placed = [_in_place(one, request.output / inner[one.form]) for one in exports]
    return Result(tuple(placed), len(replay.photos), replay.missing)


def make_forms(request: Request) -> list[Form]:
    """The forms of `request`, each once. Raises `UsageError` for an unknown one and for a stray option."""
    for name in request.names:
        if name not in forms.NAMES:
            raise UsageError(f"unknown format {name!r}", f"known are {', '.join(forms.NAMES)}")
    # One order, because TensorFlow numbers functions through the life of a process, and writes the numbers.
    names = [name for name in forms.NAMES if name in request.names]
    for option, value, form in (
        ("--version", request.version, "savedmodel"),
        ("--quantize", request.quantize, "litert"),
        ("--precision", request.precision, "openvino"),
    ):
        if value is not None and form not in names:
            raise UsageError(f"{option} belongs to the format {form}", f"add --format {form}, or drop {option}")
    if request.version is not None and request.version < 1:
        raise UsageError(f"--version {request.version} is not a positive number", "choose 1 or more")
    for name in names:
        forms.require(forms.form_class(name))
    return [_make(name, request) for name in names]


def _make(name: str, request: Request) -> Form:
    if name == LiteRt.name:
        return LiteRt(request.quantize or "none")
    if name == OpenVino.name:
        return OpenVino(request.precision or "float32")
    return forms.form_class(name)()


def _check_targets(run: Run, request: Request, inner: dict[str, Path]) -> None:
    """Find out before the work whether the results can be written."""
    targets = _targets(request, inner)
    if targets != [request.output]:
        place.check_beside(request.output, request.force)
    for target in targets:
        place.check(target, request.force)
        place.check_replaceable(target)
    model = run.file("model.keras").stat().st_size
    files.free_space_check(request.output, len(inner) * (model + _EXTRA_BYTES))


def _targets(request: Request, inner: dict[str, Path]) -> list[Path]:
    """The folders that are moved into place: a new one with all forms in it, or one for each form in an old one."""
    if not request.output.is_dir():  # nothing, or a file, which `place.check` refuses
        return [request.output]
    return [request.output / path for path in inner.values()]


def _tell(replay: Replay, observer: Observer) -> None:
    if replay.missing:
        observer.warn(
            f"{replay.missing} validation photos are not where they were, or have changed; "
            f"{len(replay.photos)} others are replayed"
        )
    if replay.measured > parity.LARGEST_DIFFERENCE:
        observer.warn(
            f"on this machine the run's probabilities differ by {replay.measured:.2g} from those in predictions.csv; "
            "another CPU or another version of Pillow can do that"
        )


def _open_targets(stack: contextlib.ExitStack, request: Request, inner: dict[str, Path]) -> dict[str, Path]:
    """Form -> the temporary folder to write it to; all take their places when `stack` closes without an error."""
    if not request.output.exists():
        root = stack.enter_context(place.placed(request.output, request.force))
        folders = {name: root / path for name, path in inner.items()}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        return folders
    return {
        name: stack.enter_context(place.placed(request.output / path, request.force)) for name, path in inner.items()
    }


def _build(form: Form, source: Source, folder: Path, replay: Replay, observer: Observer) -> Exported:
    """Write one form to `folder`, load it again from there, and compare. Raises `GateError` past a limit."""
    with observer.stage(f"export to {form.name}", 4, "steps") as advance, signals.deferred():
        form.write(source, folder)
        source.card.write(folder)
        advance(1)
        opened = form.open(folder / form.main if form.main else folder, cores())
        advance(1)
        try:
            checks = parity.compare(opened, replay, form.exact)
            advance(1)
            milliseconds = parity.milliseconds(opened, replay)
        except FinetuneError:
            raise
        except Exception as exc:  # the runtimes raise dozens of unrelated types
            raise GateError(f"the {form.name} export cannot be run: {forms.reason(exc)}", _NOTHING) from exc
        advance(1)
    for check in checks:
        if not check.passed:
            raise GateError(
                f"the {form.name} export does not answer as the run does: {check.signature}: top-1 agrees on "
                f"{check.agreement:.1%} of {check.photos} photos, the largest difference is {check.largest:.2g} "
                f"({check.worst}); allowed: {check.rule()}",
                _NOTHING,
            )
    files.write_json(
        folder / PARITY,
        {
            "run": source.run.name,
            "photos": len(replay.photos),
            "photos_not_found": replay.missing,
            "run_against_predictions_csv": replay.measured,
            "checks": [check.to_json() for check in checks],
        },
    )
    manifest.write(folder, form, source.run)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Exported(form.name, form.options, folder, size, milliseconds, checks)


def _in_place(one: Exported, folder: Path) -> Exported:
    return Exported(one.form, one.options, folder, one.size, one.milliseconds, one.checks)
