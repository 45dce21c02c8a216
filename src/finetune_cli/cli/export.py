"""`finetune export`: a run in formats for other programs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.cli.options import DataOption, DebugOption, QuietOption, RunOption, find_run, new_console
from finetune_cli.exports import registry
from finetune_cli.text import counted

if TYPE_CHECKING:
    from typer.models import OptionInfo

    from finetune_cli.cli.console import Console
    from finetune_cli.exports.benchmark import Figures
    from finetune_cli.exports.export import Result
    from finetune_cli.metrics.scores import Proportion

DEFAULT_FORMAT = "savedmodel"


def _form_option(option: str, what: str) -> "OptionInfo":
    """The option of some formats, with the choices that the registry lists."""
    choices = registry.choices(option)
    text = f"{', '.join(entry.name for entry in registry.owners(option))}: {what}. [default: {choices[0]}]"
    return typer.Option(metavar="|".join(choices), help=text)  # type: ignore[no-any-return]


def export(
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="A new or empty folder; several formats go into folders below it.")
    ],
    run: RunOption = None,
    format: Annotated[  # noqa: A002
        list[str] | None,
        typer.Option(
            metavar="FORMAT[,FORMAT...]",
            help=f"{', '.join(registry.FORMS)}, or {registry.ALL}. A SavedModel is a program: whoever loads it must "
            f"trust its author. [default: {DEFAULT_FORMAT}]",
            show_default=False,
        ),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The version, a folder below that of the format, with a config.pbtxt for Triton beside it (onnx, "
            "openvino). [default: for savedmodel the next free number, for others none]",
        ),
    ] = None,
    quantize: Annotated[
        str | None, _form_option("quantize", "float16 weights, or weights and activations in int8, for a smaller file")
    ] = None,
    layout: Annotated[
        str | None, _form_option("layout", "the order of the input's axes: channels last or channels first")
    ] = None,
    pixels: Annotated[
        str | None,
        _form_option("pixels", "float32 pixels of the model's size, or uint8 pixels of any size, resized by the model"),
    ] = None,
    page: Annotated[
        bool,
        typer.Option(
            "--page", help="onnx: also write page.html, which classifies photos in a browser, without a server."
        ),
    ] = False,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Measure speed and accuracy on all test photos, else validation photos.")
    ] = False,
    root: DataOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that already exists.")] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Export a run for other programs, after checking on validation photos that the predictions agree."""
    from finetune_cli.exports.export import ExportRequest
    from finetune_cli.exports.export import export as export_run
    from finetune_cli.places import place

    console = new_console(quiet)
    request = ExportRequest(
        names=registry.parse(format or [DEFAULT_FORMAT]),
        output=output,
        version=version,
        options={"quantize": quantize, "layout": layout, "pixels": pixels, "page": "page" if page else None},
        root=None if root is None else place(root),
        force=force,
        benchmark=benchmark,
    )
    result = export_run(find_run(console, run), request, console)
    _print_result(console, result)
    if result.not_installed:
        raise registry.missing_extras(result.not_installed)


def _print_result(console: "Console", result: "Result") -> None:
    """The end of `export`: how much each format differs from the run, its size, its speed and its folder."""
    console.print()
    console.title(f"compared with the run on {result.photos} validation photos")
    checks = [(exported.form, check) for exported in result.exports for check in exported.checks]
    console.table(
        ("format", "input", "photos", "top-1 agrees", "or a tie (95 % interval)", "largest difference", "mean",
         "allowed"),
        [
            (form, check.signature, check.photos, f"{check.agreement:.1%}", _interval(check.agreement_or_tie),
             f"{check.largest:.1e}", f"{check.mean:.1e}", check.rule())
            for form, check in checks
        ],
        right=(2, 3, 4, 5, 6),
    )  # fmt: skip
    for form, check in checks:
        for note in check.notes:
            console.print(f"{form}, {check.signature}: {note}")
    if result.run_figures:
        _print_benchmark(console, result, result.run_figures)
    console.table(
        ("format", "options", "MB", "ms per photo", "folder"),
        [
            (
                exported.form,
                " ".join(exported.options.values()),
                f"{exported.size / 1e6:.1f}",
                f"{exported.milliseconds:.1f}",
                exported.folder,
            )
            for exported in result.exports
        ],
        right=(2, 3),
    )
    console.print("try next:")
    for exported in result.exports:
        console.print(f"  finetune predict PHOTO --model {exported.folder}")


def _print_benchmark(console: "Console", result: "Result", of_run: "Figures") -> None:
    """Speed and accuracy of the run and of each format, on the same photos."""
    console.print()
    console.title(f"{of_run.photos} {of_run.source}, one at a time, {counted(of_run.threads, 'thread')}")
    rows = [("run", "", of_run)]
    rows += [(one.form, f"{one.size / 1e6:.1f}", one.figures) for one in result.exports if one.figures]
    console.table(
        ("format", "MB", "ms per photo", "accuracy", "95 % interval", "same answer", "largest difference"),
        [
            (form, size, f"{figures.milliseconds:.1f}", f"{figures.accuracy.value:.1%}", _interval(figures.accuracy),
             f"{figures.agreement.value:.1%}", f"{figures.largest:.1e}")
            for form, size, figures in rows
        ],
        right=(1, 2, 3, 4, 5, 6),
    )  # fmt: skip


def _interval(share: "Proportion") -> str:
    return f"{share.low:.1%} to {share.high:.1%}"
