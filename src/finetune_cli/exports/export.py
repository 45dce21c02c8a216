"""`export`: a finished run in the forms that other programs run, each proven to give the run's answers.

All forms of one call are built beside their targets and compared with the run. They are moved into place only if all of
them stay within their limits; otherwise nothing changes. Forms whose packages are not installed are left out and named.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune_cli import files, signals
from finetune_cli.errors import FinetuneError, GateError, UsageError
from finetune_cli.exports import manifest, parity, photo_files, place, registry, triton
from finetune_cli.exports.benchmark import Benchmark, Figures
from finetune_cli.exports.forms import Form, Served, Source
from finetune_cli.exports.parity import Check, Replay
from finetune_cli.exports.registry import FORMS, Entry
from finetune_cli.parallel import cores
from finetune_cli.places import Place
from finetune_cli.progress import Observer
from finetune_cli.runs.run import Run
from finetune_cli.text import first_line
from finetune_cli.training.outputs import PARITY_LIMIT

PARITY = "parity.json"
_NOTHING = "nothing was written; try another format or option"
# Room for the files of one form: none is larger than the run's model but for graphs, labels and records.
_EXTRA_BYTES = 20_000_000


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Which forms to write, and where. names: as `registry.parse` takes them.

    version: the folder of a version below that of the form; by default the next free one for a SavedModel, and none for
    other forms. options: those of the forms in the registry, such as ``{"quantize": "int8"}``; None stands for the
    default. root: where the run's photos are now, if they were moved. force: replace an export at `output`.
    benchmark: measure speed and accuracy on all test photos of the run, else on its validation photos.
    """

    names: Sequence[str]
    output: Path
    version: int | None = None
    options: Mapping[str, str | None] = field(default_factory=dict)
    root: Place | None = None
    force: bool = False
    benchmark: bool = False


@dataclass(frozen=True)
class Exported:
    """One form in place: its size in bytes, and milliseconds a photo in its own runtime, on all cores.

    figures: of the benchmark, if there was one. config: what Triton needs to know to serve it, see `triton.py`.
    """

    form: str
    options: dict[str, str]
    folder: Path
    size: int
    milliseconds: float
    checks: tuple[Check, ...]
    figures: Figures | None = None
    config: str | None = None


@dataclass(frozen=True)
class _Proof:
    """What each form is compared with; the second only if a benchmark was asked for."""

    replay: Replay
    benchmark: Benchmark | None


@dataclass(frozen=True)
class Result:
    """All exports of one call, how many photos they were compared on, and how many of the run's were not found.

    not_installed: forms that were asked for and left out. run_figures: of the run itself, if there was a benchmark.
    """

    exports: tuple[Exported, ...]
    photos: int
    missing: int
    not_installed: tuple[Entry, ...] = ()
    run_figures: Figures | None = None


def export(run: Run, request: ExportRequest, observer: Observer) -> Result:
    """Write `run` in the wanted forms to `request.output`.

    Raises `UsageError` for wrong options or a target that may not be replaced, `MissingExtra` when the packages of no
    form are installed, `RunError` when the run is damaged, `DataError` when its validation photos are not there,
    `GateError` when a form answers differently. Nothing is changed then.
    """
    wanted, not_installed = make_forms(request)
    names = [form.name for form in wanted]
    # The folders are those of the whole request, so that what is not installed today can be added later.
    paths = place.inner_paths(request.output, [*names, *(entry.name for entry in not_installed)], request.version)
    inner = {name: paths[name] for name in names}
    _check_targets(run, request, inner)
    replay = parity.collect(run, request.root, observer)
    _warn(replay, observer)
    source = Source(run, lambda: parity.calibration_photos(run, request.root, observer))
    proof = _Proof(replay, Benchmark(run, request.root, observer) if request.benchmark else None)
    is_new = not request.output.exists()
    with contextlib.ExitStack() as stack:
        folders = _open_targets(stack, request, inner)
        exports = [_build(form, source, folders[form.name], proof, observer) for form in wanted]
        if is_new:
            _write_configs(request, run, exports, folders, observer)
    if not is_new:
        _write_configs(request, run, exports, {name: request.output / path for name, path in inner.items()}, observer)
    placed = [replace(built, folder=request.output / inner[built.form]) for built in exports]
    run_figures = proof.benchmark.run_figures if proof.benchmark else None
    return Result(tuple(placed), len(replay.photos), replay.missing, not_installed, run_figures)


def make_forms(request: ExportRequest) -> tuple[list[Form], tuple[Entry, ...]]:
    """The forms of `request`, each once, and those of them whose packages are not installed.

    Raises `UsageError` for an unknown form, a stray option or a wrong value, `MissingExtra` if no form is left.
    """
    entries = [FORMS[name] for name in registry.parse(request.names)]
    if request.version is not None and request.version < 1:
        raise UsageError(f"--version {request.version} is not a positive number", "choose 1 or more")
    for option, value in request.options.items():
        if value is not None:
            _check_belongs(option, entries)
            if value not in registry.choices(option):
                known = ", ".join(registry.choices(option))
                raise UsageError(f"--{option} {value} is unknown", f"choose one of {known}")
    entries = [entry.made_with(request.options) for entry in entries]
    possible = [entry for entry in entries if entry.installed]
    not_installed = tuple(entry for entry in entries if entry not in possible)
    if not possible:
        raise registry.missing_extras(not_installed)
    return [entry.load()(**entry.chosen(request.options)) for entry in possible], not_installed


def _check_belongs(option: str, entries: Sequence[Entry]) -> None:
    owners = [entry.name for entry in registry.owners(option)]
    if not {entry.name for entry in entries} & set(owners):
        listed = " and ".join([", ".join(owners[:-1]), owners[-1]] if len(owners) > 1 else owners)
        raise UsageError(
            f"--{option} belongs to the format{'s' * (len(owners) > 1)} {listed}",
            f"add --format {owners[0]}, or drop --{option}",
        )


def _check_targets(run: Run, request: ExportRequest, inner: dict[str, Path]) -> None:
    """Check before the work that the results can be written."""
    targets = _targets(request, inner)
    if targets != [request.output]:
        place.check_beside(request.output, request.force)
    for target in targets:
        place.refuse_links(request.output, target)
        place.check(target, request.force)
        place.check_replaceable(target)
    for name in _with_config(request, inner):
        triton.check(request.output / inner[name].parent, run.classes, request.force)
    model = run.file("model.keras").stat().st_size
    files.free_space_check(request.output, len(inner) * (model + _EXTRA_BYTES))


def _targets(request: ExportRequest, inner: dict[str, Path]) -> list[Path]:
    """The folders that are moved into place: a new one with all forms in it, or one for each form in an old one."""
    if not request.output.is_dir():  # nothing, or a file, which `place.check` refuses
        return [request.output]
    return [request.output / path for path in inner.values()]


def _warn(replay: Replay, observer: Observer) -> None:
    if replay.missing:
        observer.warn(
            f"{replay.missing} validation photos are not where they were, or have changed; "
            f"{len(replay.photos)} others are replayed"
        )
    if replay.measured is not None and replay.measured > PARITY_LIMIT:
        observer.warn(
            f"on this machine the run's probabilities differ by {replay.measured:.2g} from those in predictions.csv; "
            "another CPU or another version of Pillow can do that"
        )


def _open_targets(stack: contextlib.ExitStack, request: ExportRequest, inner: dict[str, Path]) -> dict[str, Path]:
    """Form -> the temporary folder to write it to; all are moved to the target when `stack` closes without an error."""
    if not request.output.exists():
        root = stack.enter_context(place.placed(request.output, request.force))
        folders = {name: root / path for name, path in inner.items()}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        return folders
    return {
        name: stack.enter_context(place.placed(request.output / path, request.force)) for name, path in inner.items()
    }


def _with_config(request: ExportRequest, names: Iterable[str]) -> list[str]:
    """Those forms of `names` that Triton can serve from their folder of a version."""
    return [name for name in names if request.version is not None and FORMS[name].triton]


def _write_configs(
    request: ExportRequest, run: Run, exports: Sequence[Exported], folders: Mapping[str, Path], observer: Observer
) -> None:
    """Write what Triton reads beside each folder of a version."""
    configs = {built.form: built.config for built in exports}
    for name in _with_config(request, configs):
        if (text := configs[name]) is not None and (
            warning := triton.write(folders[name].parent, text, run.classes, request.force)
        ):
            observer.warn(warning)


def _build(form: Form, source: Source, folder: Path, proof: _Proof, observer: Observer) -> Exported:
    """Write one form to `folder`, load it again from there, and compare. Raises `GateError` past a limit."""
    replay, benchmark = proof.replay, proof.benchmark
    main = FORMS[form.name].main
    with signals.deferred():
        with observer.stage(f"{form.name}: converting and writing", None):
            form.write(source, folder)
            source.card.write(folder)
            photo_files.write(folder)
        with observer.stage(f"{form.name}: loading what was written", None):
            opened = form.open(folder / main if main else folder, cores(), latency=True)
        try:
            with observer.stage(f"{form.name}: replaying photos", None) as advance:
                checks = parity.compare(opened, replay, form.exact, advance)
            _refuse_failed(form, checks)
            with observer.stage(f"{form.name}: timing", benchmark.photos if benchmark else None) as advance:
                figures = benchmark.measure(opened, advance) if benchmark else None
                milliseconds = figures.milliseconds if figures else parity.milliseconds(opened, replay)
        except FinetuneError:
            raise
        except Exception as exc:  # the runtimes raise dozens of unrelated types
            raise GateError(f"the {form.name} export cannot be run: {first_line(exc)}", _NOTHING) from exc
    said = {
        "run": source.run.name,
        "photos": len(replay.photos),
        "photos_not_found": replay.missing,
        "run_against_predictions_csv": replay.measured,
        "checks": [check.to_json() for check in checks],
    }
    files.write_json(folder / PARITY, said | ({"benchmark": figures.to_json()} if figures else {}))
    manifest.write(folder, form, source.run)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    backend = FORMS[form.name].triton
    config = triton.config(backend, *opened.tensors()) if backend and isinstance(opened, Served) else None
    return Exported(form.name, form.options, folder, size, milliseconds, checks, figures, config)


def _refuse_failed(form: Form, checks: Sequence[Check]) -> None:
    """Raise `GateError` for the first of `checks` that was not passed."""
    for check in checks:
        if not check.passed:
            tie = check.agreement_or_tie
            raise GateError(
                f"the {form.name} export does not answer as the run does: {check.signature}: top-1 agrees on "
                f"{check.agreement:.1%} of {check.photos} photos (with ties, 95 % interval: {tie.low:.1%} to "
                f"{tie.high:.1%}), the largest difference is {check.largest:.2g} ({check.worst}); "
                f"allowed: {check.rule()}",
                _NOTHING,
            )
