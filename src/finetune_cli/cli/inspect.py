"""`finetune inspect`: a model stage by stage or node by node, as a table or JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_cli.cli.options import (
    DebugOption,
    QuietOption,
    ResultFormat,
    check_png,
    find_run,
    load_config,
    new_console,
)
from finetune_cli.text import shown

if TYPE_CHECKING:
    from finetune_cli.cli.console import Console
    from finetune_cli.inspection.filters import Filter
    from finetune_cli.inspection.graph import Graph, Node, Stage
    from finetune_cli.photos.decode import ImageSettings


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
    console = new_console(quiet)
    if filters is not None:
        check_png(filters[1])
    model, settings, classes, rate = _inspected(target, console)
    from finetune_cli.inspection.filters import filters as draw_filters
    from finetune_cli.inspection.graph import inspect as inspect_model
    from finetune_cli.photos.decode import decode

    drawn = None
    if filters is not None:
        drawn = draw_filters(model, decode(filters[0], settings), filters[1])
    _print_graph(console, inspect_model(model, classes), full, batch, format, rate)
    if filters is not None and drawn is not None:
        _print_filters(console, drawn, filters[1], format)


def _inspected(target: Path, console: "Console") -> "tuple[Any, ImageSettings, int | None, float | None]":
    """The model of a run or a config, its image settings, the classes of a head to add, and its views per second."""
    from finetune_cli.cache import folder
    from finetune_cli.runs.run import located
    from finetune_cli.training import prepare, settings
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
    from finetune_cli.backbones import build

    config = load_config(target, None)
    data = prepare.index(settings.data_settings(config), folder.locate(config.runtime.cache_dir), console)
    model = build.build(settings.wanted_backbone(config)).model
    if config.fine_tuning is not None:
        cuts.unfreeze_above(model, plan.trials(config.fine_tuning, len(data.train))[0].unfreeze)
    return model, settings.image_settings(config), len(data.classes), None


def _print_graph(
    console: "Console", graph: "Graph", full: bool, batch: int, form: ResultFormat, rate: float | None
) -> None:
    """Show `graph`; `rate`: views per second of the run's feature pass, if known."""
    if form is ResultFormat.json:
        console.print(json.dumps({**graph.as_dict(full, batch), "views_per_second": rate}, indent=2))
        return
    console.title(f"{shown(graph.name)}: {len(graph.nodes)} nodes in {len(graph.stages)} stages")
    header = ("output", "parameters", "multiply-adds", "activations", "gradient")
    if full:
        nodes = [(n.name, n.kind, *_figures(n)) for n in graph.nodes]
        console.table(("node", "kind", *header), nodes, right=(2, 3, 4, 5))
    else:
        stages = [(_leaf(s.first), _leaf(s.last), s.nodes, *_figures(s)) for s in graph.stages]
        console.table(("from", "to", "nodes", *header), stages, right=(2, 3, 4, 5, 6))
    frozen = graph.parameters - graph.trained
    console.print(f"parameters: {graph.parameters:,} ({graph.trained:,} trainable, {frozen:,} frozen)")
    console.print(f"multiply-adds per photo: {_count(graph.multiply_adds)}")
    console.print(f"activations for the backward pass, per photo: {_bytes(graph.activations)}")
    if graph.gradient_stops:
        console.print(f"the gradient stops at: {', '.join(map(shown, graph.gradient_stops))}")
    predict, train = graph.memory_to_predict(batch), graph.memory_to_train(batch)
    console.print(f"memory for {batch} photos at once, about: {_bytes(predict)} to predict, {_bytes(train)} to train")
    if rate is not None:
        console.print(f"throughput: {rate:.0f} views/s in the feature pass of this run")
    if graph.uncounted:
        console.print(f"multiply-adds not counted for: {', '.join(map(shown, graph.uncounted))}")


def _print_filters(console: "Console", drawn: "Sequence[Filter]", output: Path, form: ResultFormat) -> None:
    """Show what the strongest filters of the first layer find, and where the picture is; with JSON, only the latter."""
    wrote = f"wrote {output}: {len(drawn)} filters and their responses, strongest first"
    if form is ResultFormat.json:
        console.note(wrote)
        return
    console.table(
        ("filter", "finds", "strength"), [(f.index, f.label, f"{f.strength:.2f}") for f in drawn[:10]], right=(0, 2)
    )
    console.print(wrote)


def _leaf(name: str) -> str:
    """A node's own name, without the model that it is in: the order identifies it well enough."""
    return name.rpartition("/")[2]


def _figures(part: "Node | Stage") -> tuple[str, str, str, str, str]:
    gradient = "trainable" if part.trained else "passes" if part.gradient else "stops"
    shape = " x ".join(map(str, part.output))
    return shape, _count(part.parameters), _count(part.multiply_adds), _bytes(part.activations), gradient


def _count(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    from finetune_cli.files import human_bytes

    return human_bytes(number) if number else "0"
