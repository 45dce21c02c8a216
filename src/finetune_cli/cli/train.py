"""`finetune train`: train a run, or resume one."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.cli.options import (
    DebugOption,
    EngineOption,
    OptionalConfigArgument,
    OverridesArgument,
    QuietOption,
    RayAddressOption,
    config_or_override,
    engine_overrides,
    load_config,
    nearby,
    new_console,
    skippable,
)
from finetune_cli.errors import UsageError
from finetune_cli.text import duration, shown

if TYPE_CHECKING:
    from finetune_cli.cli.console import Console
    from finetune_cli.config.schema import Config
    from finetune_cli.runs.manifest import PartAccuracy, SplitMetrics, Unknown
    from finetune_cli.runs.run import Run


def train(
    config: OptionalConfigArgument = None,
    overrides: OverridesArgument = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Resume the run that is named in place of CONFIG, or the newest unfinished one in runs/."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the stages with their seconds and disk space; train nothing.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The run's name. [default: the photo folder's name and a number]", show_default=False
        ),
    ] = None,
    engine: EngineOption = None,
    ray_address: RayAddressOption = None,
    print_run: Annotated[
        bool, typer.Option("--print-run", help="Print the path of the finished run, and nothing else, on stdout.")
    ] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Train a classifier on a folder of photos."""
    console = new_console(quiet)
    if print_run:
        console.results_to_stderr()
    path, overrides = config_or_override(config, overrides)
    overrides = [*(overrides or []), *engine_overrides(engine, ray_address)]
    if resume and dry_run:
        raise UsageError("--dry-run and --resume cannot be combined", "plan a new run: leave out --resume")
    if dry_run:
        _plan(console, load_config(path, overrides))
        return
    finished = _resume(console, path, overrides, name) if resume else _train(console, path, overrides, name)
    _print_result(console, finished)
    if print_run:
        typer.echo(os.fsencode(finished.folder.absolute()))


def _plan(console: "Console", config: "Config") -> None:
    """Show what a training would take."""
    from finetune_cli.cli import tuning_output
    from finetune_cli.training.tuning import budget

    tuning_output.planned(console, budget.budget(config, console))


def _train(console: "Console", path: Path | None, overrides: list[str] | None, name: str | None) -> "Run":
    if name in {"", "null"}:  # `output.name=` reads these as the default
        raise UsageError(f"{name!r} cannot be the name of a run", "choose another --name")
    named = [f"output.name={name}"] if name is not None else []
    loaded = load_config(path, [*(overrides or []), *named])
    from finetune_cli.training import pipeline  # after the config is known to be good

    with skippable(path, overrides, *(["--name", name] if name is not None else [])):
        return pipeline.train(loaded, console)


def _resume(console: "Console", run_folder: Path | None, overrides: list[str] | None, name: str | None) -> "Run":
    from finetune_cli.runs import run

    if name is not None:
        raise UsageError("--name and --resume cannot be combined", "a resumed run keeps its name")
    named = run.DIRECTORY if run_folder is None else run.located(run_folder)
    if run_folder and not named.is_dir():
        reason = "it is a file" if named.is_file() else "it does not exist"
        raise UsageError(
            f"{named} is not a run directory: {reason}",
            "name the run to resume, such as finetune train --resume runs/NAME; for a new run, leave --resume out",
        )
    allowed = ("training.epochs=", "training.early_stopping_patience=", "runtime.", "data.")
    for override in overrides or ():
        if not override.startswith(allowed):
            raise UsageError(
                f"{override.split('=')[0]} cannot change when a run is resumed",
                "only training.epochs, training.early_stopping_patience, data and runtime can; or train a new run",
            )
    # A config.yaml alone proves nothing: the folder of a project may hold one as well.
    is_run = (named / "split.csv").is_file() or (named / run.MANIFEST).is_file()
    folder = named if is_run else run.find_unfinished(named)
    from finetune_cli.training import pipeline

    console.note(f"resuming {folder}")
    return pipeline.resume(folder, load_config(folder / "config.yaml", overrides, own=True), console)


def _print_result(console: "Console", run: "Run") -> None:
    """The end of `train`: how good, how long, and what to try next."""
    from finetune_cli.cli import tuning_output

    manifest = run.manifest
    names = {"val": "selection (validation)", "folds": "selection (cross-validated)", "test": "test"}
    folder = nearby(run.folder)
    console.print()
    console.title(f"{shown(folder)}: {shown(manifest.backbone.name)}, {len(run.classes)} classes")
    rows = []
    for split, metrics in sorted(manifest.metrics.items()):
        parts: list[tuple[str, SplitMetrics | PartAccuracy, str]] = []
        parts.append((names[split], metrics, f"{metrics.baseline_accuracy:.1%}"))
        if metrics.without_near_duplicates is not None:
            parts.append(("  without near-duplicates", metrics.without_near_duplicates, ""))
        rows += [
            (name, f"{part.accuracy:.1%}", "{:.1%} to {:.1%}".format(*part.accuracy_interval), baseline, part.photos)
            for name, part, baseline in parts
        ]
    console.table(("", "accuracy", "95 % interval", "majority-class baseline", "photos"), rows, right=(1, 2, 3, 4))
    if manifest.fine_tuning is not None:
        tuning_output.fine_tuned(console, manifest.fine_tuning)
    if manifest.unknown is not None:
        _print_unknown(console, manifest.unknown)
    console.table(("stage", "seconds"), [(k, f"{v:.1f}") for k, v in manifest.seconds.items()], right=(1,))
    console.print(
        f"views: {manifest.views.computed} computed, {manifest.views.cached} from the cache "
        f"({manifest.cache_bytes / 1e6:.0f} MB on disk)"
    )
    if manifest.bad_photos:
        console.print(f"skipped {len(manifest.bad_photos)} bad photos; they are listed in run.json")
    console.print("\ntry next:")
    console.print(f"  finetune predict PHOTO --run {shown(shlex.quote(str(folder)))}")
    console.print(f"  finetune evaluate --run {shown(shlex.quote(str(folder)))}")
    in_folds = "folds" in manifest.metrics
    if manifest.fine_tuning is None and manifest.metrics["folds" if in_folds else "val"].accuracy < 1:
        seconds = manifest.fine_tuning_seconds
        takes = (
            "add --dry-run to see how long that takes" if seconds is None else f"at most about {duration(seconds)} more"
        )
        console.print(f"  finetune train {shown(shlex.quote(str(folder / 'config.yaml')))} fine_tuning=auto")
        console.print(f"    (the backbone learns, too; kept only if it is better; {takes})")


def _print_unknown(console: "Console", unknown: "Unknown") -> None:
    """What the answer `unknown` costs, and what it detects."""
    if unknown.detection:
        console.table(
            ("class left out", "its photos answered unknown"),
            [(name, f"{share:.1%}") for name, share in unknown.detection.items()],
            right=(1,),
        )
    if unknown.interval is None:
        console.print(
            f"unknown: refuses approximately {unknown.false_rejects:.1%} of the photos of these classes "
            f"({unknown.held_out} cross-validated photos set the threshold, which gives no guarantee)"
        )
    else:
        low, high = unknown.interval
        console.print(
            f"unknown: refuses at most {unknown.false_rejects:.1%} of the photos of these classes on average, here "
            f"{low:.1%} to {high:.1%} (95 % interval, {unknown.held_out} held-out photos)"
        )
    if unknown.tuned:
        console.print("the backbone learned from the classes that were left out, so these shares are too high")
