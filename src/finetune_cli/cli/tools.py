"""The commands around training: look at photos and configs, make them, look after the cache."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli.cli.app import (
    ConfigArgument,
    DebugOption,
    OverridesArgument,
    QuietOption,
    ResultFormat,
    app,
    check_png,
    command,
    config_or_override,
    find_run,
    load_config,
    new_console,
    skippable,
)
from finetune_cli.errors import UsageError

if TYPE_CHECKING:
    from finetune_cli.cli.console import Console
    from finetune_cli.photos.decode import ImageSettings


@command(app)
def check(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)] = None,
    overrides: OverridesArgument = None,
    reproduce: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Say instead what differs here from where RUN was made.", show_default=False),
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Decode every photo of a config and report all that is wrong; trains nothing."""
    from finetune_cli.cli import render

    console = new_console(quiet)
    if (config is None) == (reproduce is None):
        raise UsageError("check needs either CONFIG or --reproduce RUN", "name one of them")
    if reproduce is not None:
        from finetune_cli.training import reproduce as command_reproduce

        render.reproduced(console, command_reproduce.reproduce(find_run(console, reproduce), console))
        return
    path, overrides = config_or_override(config, overrides)
    loaded = load_config(path, overrides)
    from finetune_cli.training import check as command_check

    with skippable(path, overrides):
        render.checked(console, command_check.check(loaded, console))


@command(app)
def preview(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="The PNG file to write.")] = Path("preview.png"),
    photos: Annotated[int, typer.Option(min=1, max=100, help="How many photos to show.")] = 6,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Draw a contact sheet of augmented views: photos by rows, views by columns."""
    console = new_console(quiet)
    check_png(output)
    loaded = load_config(config, overrides)
    from finetune_cli.training import prepare
    from finetune_cli.training import preview as command_preview

    data = prepare.index(loaded, console)
    augmenter = prepare.augmenter(loaded)
    command_preview.contact_sheet(data, augmenter, prepare.image_settings(loaded), output, photos)
    console.print(f"wrote {output}")


@command(app)
def inspect(
    target: Annotated[Path, typer.Argument(metavar="RUN|CONFIG", help="A run directory, or a YAML file.")],
    full: Annotated[bool, typer.Option("--full", help="Node by node instead of stage by stage.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Photos at once, for the estimate of memory.")] = 32,
    format: Annotated[ResultFormat, typer.Option(help="How to write it.")] = ResultFormat.table,  # noqa: A002
    filters: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="PHOTO PNG", help="Draw the first layer's filters and what they find in PHOTO."),
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Show what a model is made of: shapes, parameters, multiply-adds, memory, and where the gradient stops."""
    from finetune_cli.cli import render_graph

    console = new_console(quiet)
    if filters is not None:
        check_png(filters[1])
    model, settings, classes, rate = _inspected(target, console)
    from finetune_cli.inspection import filters as command_filters
    from finetune_cli.inspection import graph
    from finetune_cli.photos import decode

    drawn = None
    if filters is not None:
        drawn = command_filters.filters(model, decode.decode(filters[0], settings), filters[1])
    render_graph.graph(console, graph.inspect(model, classes), full, batch, format.value, rate)
    if filters is not None and drawn is not None:
        render_graph.filters(console, drawn, filters[1], format.value)


def _inspected(target: Path, console: "Console") -> "tuple[Any, ImageSettings, int | None, float | None]":
    """Model, image settings, classes to put a head for, and views a second if known, of a run or a config."""
    from finetune_cli.runs.run import located
    from finetune_cli.training import prepare
    from finetune_cli.training.tuning import comparison, cuts, plan

    target = located(target)
    if target.is_dir():
        from finetune_cli.untrusted.keras_archive import load_keras_file

        run = find_run(console, target)
        computed, seconds = run.manifest.views.computed, run.manifest.seconds.get("features")
        rate = computed / seconds if computed and seconds else None
        model = load_keras_file(run.file("model.keras"))
        if (first := comparison.trained_from(run)) is not None:
            cuts.unfreeze_above(model, first)
        return model, run.image_settings, None, rate
    config = load_config(target, None)
    data = prepare.index(config, console)
    model = prepare.build_backbone(config).model
    if config.fine_tuning is not None:
        cuts.unfreeze_above(model, plan.trials(config.fine_tuning, len(data.train))[0].unfreeze)
    return model, prepare.image_settings(config), len(data.classes), None


@command(app)
def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="The folder of photos, or a CSV file.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The config to write.")] = Path("config.yaml"),
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Look at a folder of photos and write a commented config that trains as it is."""
    from finetune_cli import files
    from finetune_cli.training import starter_config

    console = new_console()
    if files.holds_something(output):
        raise UsageError(f"{output} exists already", "choose another name with --output")
    with files.atomic_output(output) as temporary:
        text = starter_config.starter_config(data, output, console)
        temporary.write_text(text, "utf-8", "surrogateescape", newline="\n")
    console.print(f"wrote {output}; train with: finetune train {shlex.quote(str(output))}")


@command(app)
def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    photos: Annotated[int, typer.Option(min=2, max=10_000, help="Pictures a class.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other pictures.")] = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Draw a small practice set of city and forest scenes; they are drawings, not photos."""
    from finetune_cli.practice import sample as photos_sample

    console = new_console(quiet)
    with console.stage("drawing", 2 * photos, "pictures") as advance:
        written = photos_sample.draw(folder, photos, seed, advance)
    console.print(f"drew {len(written)} pictures of city and forest in {folder} (drawings, to practise with)")


cache = typer.Typer(name="cache", help="Look at the cache of features, or make it smaller.", no_args_is_help=True)
app.add_typer(cache)
CacheOption = Annotated[
    Path | None,
    typer.Option("--dir", metavar="DIR", help="The cache's folder. [default: the user's]", show_default=False),
]


@command(cache)
def info(folder: CacheOption = None, debug: DebugOption = False) -> None:  # noqa: ARG001
    """Say where the cache is and how large."""
    from finetune_cli.cache import maintenance as command_cache

    for line in command_cache.info(_cache_folder(folder)):
        new_console().print(line)


@command(cache)
def clear(folder: CacheOption = None, debug: DebugOption = False) -> None:  # noqa: ARG001
    """Remove all features and digests; they are computed again when they are needed."""
    from finetune_cli.cache import maintenance as command_cache

    new_console().print(command_cache.clear(_cache_folder(folder)))


@command(cache)
def prune(
    max_size: Annotated[str, typer.Option("--max-size", metavar="SIZE", help="Such as 5GB or 500MB.")],
    folder: CacheOption = None,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Remove the oldest features until the cache is no larger than SIZE."""
    from finetune_cli.cache import maintenance as command_cache

    new_console().print(command_cache.prune(_cache_folder(folder), max_size))


def _cache_folder(folder: Path | None) -> Path:
    from finetune_cli.cache.folder import own_folder

    return own_folder(folder)
