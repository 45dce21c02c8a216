"""`finetune explain`: a heat map of a photo, and the evidence for every class."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.cli.options import DebugOption, QuietOption, RunOption, check_png, find_run, new_console
from finetune_cli.text import shown

if TYPE_CHECKING:
    from finetune_cli.cli.console import Console
    from finetune_cli.evaluation.explain import Explanation

_MOST_ROWS = 20


def explain(
    photo: Annotated[str, typer.Argument(metavar="PATH", help="The photo.")],
    run: RunOption = None,
    class_name: Annotated[
        str | None, typer.Option("--class", metavar="NAME", help="The class to explain. [default: the predicted one]")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="PNG", help="The picture to write.")] = Path("heatmap.png"),
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Show which regions of a photo support a class: an exact heat map, and the evidence for every class."""
    from finetune_cli.evaluation.explain import explain as explain_photo
    from finetune_cli.places import place

    console = new_console(quiet)
    check_png(output)
    _print_result(console, explain_photo(find_run(console, run), place(photo), class_name, output))


def _print_result(console: "Console", explanation: "Explanation") -> None:
    """The end of `explain`: the evidence for every class, in logits."""
    rows = explanation.evidence[:_MOST_ROWS]
    rows += tuple(row for row in explanation.evidence[_MOST_ROWS:] if row.name == explanation.name)
    console.table(
        ("class", "probability", "regions for", "regions against", "bias", "logit"),
        [
            (row.name, f"{row.probability:.1%}", *(f"{x:+.3f}" for x in (row.supporting, row.opposing, row.bias)),
             f"{row.logit:+.3f}")
            for row in rows
        ],
        right=(1, 2, 3, 4, 5),
    )  # fmt: skip
    if len(rows) < len(explanation.evidence):
        console.print(f"... and {len(explanation.evidence) - len(rows)} less probable classes")
    if explanation.temperature != 1:
        console.print(
            f"the logits, divided by the run's temperature of {explanation.temperature:.3f}, give the probabilities"
        )
    console.print(f"wrote {explanation.output}: red regions support {shown(explanation.name)}, blue ones oppose it")
