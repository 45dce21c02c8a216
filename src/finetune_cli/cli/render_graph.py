"""The model as `inspect` shows it: a table stage by stage or node by node, or JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_cli.cli.console import Console
from finetune_cli.text import shown

if TYPE_CHECKING:
    from finetune_cli.inspection.filters import Filter
    from finetune_cli.inspection.graph import Graph, Node, Stage


def graph(console: Console, graph: "Graph", full: bool, batch: int, form: str, rate: float | None) -> None:
    """Show `graph`; `rate`: views a second of the run's feature pass, if known."""
    if form == "json":
        console.print(json.dumps({**graph.as_dict(full, batch), "views_per_second": rate}, indent=2))
        return
    console.title(f"{shown(graph.name)}: {len(graph.nodes)} nodes in {len(graph.stages)} stages")
    header = ("output", "parameters", "multiply-adds", "kept", "gradient")
    if full:
        nodes = [(n.name, n.kind, *_figures(n)) for n in graph.nodes]
        console.table(("node", "kind", *header), nodes, right=(2, 3, 4, 5))
    else:
        stages = [(_leaf(s.first), _leaf(s.last), s.nodes, *_figures(s)) for s in graph.stages]
        console.table(("from", "to", "nodes", *header), stages, right=(2, 3, 4, 5, 6))
    frozen = graph.parameters - graph.trained
    console.print(f"parameters: {graph.parameters:,} ({graph.trained:,} learn, {frozen:,} are frozen)")
    console.print(f"multiply-adds a photo: {_count(graph.multiply_adds)}")
    console.print(f"kept for the backward pass, a photo: {_bytes(graph.kept)}")
    if graph.gradient_stops:
        console.print(f"the gradient stops at: {', '.join(map(shown, graph.gradient_stops))}")
    predict, train = graph.memory_to_predict(batch), graph.memory_to_train(batch)
    console.print(f"memory for {batch} photos at once, about: {_bytes(predict)} to predict, {_bytes(train)} to train")
    if rate is not None:
        console.print(f"throughput: {rate:.0f} views/s in the feature pass of this run")
    if graph.uncounted:
        console.print(f"multiply-adds not counted for: {', '.join(map(shown, graph.uncounted))}")


def filters(console: Console, drawn: "Sequence[Filter]", output: Path, form: str) -> None:
    """Say what the strongest filters of the first layer find, and where the picture is; beside JSON, only that."""
    wrote = f"wrote {output}: {len(drawn)} filters and their responses, strongest first"
    if form == "json":
        console.note(wrote)
        return
    console.table(
        ("filter", "finds", "strength"), [(f.index, f.label, f"{f.strength:.2f}") for f in drawn[:10]], right=(0, 2)
    )
    console.print(wrote)


def _leaf(name: str) -> str:
    """A node's own name; stages are told apart by their order, not by the model that their nodes are in."""
    return name.rpartition("/")[2]


def _figures(part: "Node | Stage") -> tuple[str, str, str, str, str]:
    gradient = "learns" if part.trained else "passes" if part.gradient else "stops"
    shape = " x ".join(map(str, part.output))
    return shape, _count(part.parameters), _count(part.multiply_adds), _bytes(part.kept), gradient


def _count(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    from finetune_cli.files import human_bytes

    return human_bytes(number) if number else "0"
