"""The terminal: plain lines without one, progress with one, odd names made visible, signals seen."""

import io

import pytest

from finetune_cli import signals
from finetune_cli.cli.console import Console
from finetune_cli.errors import FinetuneError, Interrupted


def console(terminal: bool, quiet: bool = False) -> tuple[Console, io.StringIO, io.StringIO]:
    from rich.console import Console as RichConsole

    made = Console(quiet)
    out, err = io.StringIO(), io.StringIO()
    made.out = RichConsole(file=out, force_terminal=terminal, highlight=False, soft_wrap=True)
    made.err = RichConsole(file=err, force_terminal=terminal, highlight=False, soft_wrap=True)
    return made, out, err


def test_a_slow_stage_has_no_rate_of_zero(monkeypatch):
    made, _, err = console(terminal=False)
    clock = iter(range(0, 1000, 30))
    monkeypatch.setattr("finetune_cli.cli.console.time.monotonic", lambda: next(clock))
    with made.stage("head", None, "iterations") as advance:
        advance(1)
    with made.stage("openvino: converting", None):
        pass
    lines = err.getvalue().splitlines()
    assert lines == ["head: 1 iterations", "head: 1 iterations in 60.0 s", "openvino: converting: 30.0 s"]


def test_plain_lines_without_a_terminal(monkeypatch):
    made, out, err = console(terminal=False)
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("finetune_cli.cli.console.time.monotonic", lambda: next(clock))
    with made.stage("features", 100) as advance:
        advance(10)
        advance(10)
        advance(10, 50)  # a stage may learn its total on the way
    made.print("result")
    text = err.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.splitlines() == [
        "features: 20/100 photos, 1.7/s, 48 s left",
        "features: 30 photos in 24.0 s (1.2/s)",
    ]
    assert out.getvalue() == "result\n"


def test_a_bar_on_a_terminal():
    made, _out, err = console(terminal=True)
    with made.stage("features a[/b]", 3) as advance:
        advance(3)
    assert "features" in err.getvalue()
    assert "3 photos in" in err.getvalue()


def test_quiet_tells_warnings_and_errors_only():
    made, out, err = console(terminal=False, quiet=True)
    with made.stage("features", 3) as advance:
        advance(3)
    made.note("a note")
    made.warn("careful")
    made.error(FinetuneError("it broke", "mend it"))
    assert out.getvalue() == ""
    assert err.getvalue().splitlines() == ["warning: careful", "error: it broke", "try: mend it"]


def test_names_are_shown_and_not_obeyed():
    made, out, err = console(terminal=False)
    made.warn("photo \x1b[2J\u202e.jpg")
    made.table(("name\x1b[1m",), [("[red]\x07",)])
    made.title("\x1b]0;title\x07")
    made.print("two\nlines\x1b[1m")
    assert "\x1b" not in out.getvalue()
    assert "\x1b" not in err.getvalue()
    assert "\u202e" not in err.getvalue()
    assert "[red]\\x07" in out.getvalue()


@pytest.mark.parametrize("quiet", [True, False])
def test_a_signal_is_seen_at_the_next_sign_of_progress(monkeypatch, quiet):
    made, _out, _err = console(terminal=False, quiet=quiet)
    with pytest.raises(Interrupted), made.stage("features", 3) as advance:  # noqa: PT012 - the stage is the point
        advance(1)
        monkeypatch.setattr(signals, "_received", [15])
        advance(1)


def narrow(header, rows, right=()):
    """The lines of a table on a terminal of 60 columns."""
    from rich.console import Console as RichConsole

    made = Console()
    out = io.StringIO()
    made.out = RichConsole(file=out, force_terminal=True, color_system=None, width=60, highlight=False, soft_wrap=True)
    made.table(header, rows, right)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= 60 for line in lines)
    return [line.rstrip() for line in lines if line.strip()]


def test_a_table_is_folded_between_words_only():
    header = ("temperature", "log loss", "Brier score", "calibration error")
    lines = narrow(header, [("with (cross-fitted)", "0.1306", "0.0700", "0.1057")], (1, 2, 3))
    assert lines[-1].split() == ["with", "(cross-fitted)", "0.1306", "0.0700", "0.1057"]
    lines = narrow(("what", "it was"), [("packages.keras", "one two three " * 6)])
    assert lines[1].startswith("packages.keras  one two three")
    assert {"one", "two", "three"} == {word for line in lines[2:] for word in line.split()}


def test_a_table_that_is_too_wide_becomes_a_few_lines_a_row():
    header = ("true \\ predicted", *(f"class number {i:02}" for i in range(12)))
    lines = narrow(header, [(f"class {i}", *range(1000, 1012)) for i in range(12)], range(1, 13))
    assert lines[:3] == ["true \\ predicted: class 0", "  class number 00: 1000", "  class number 01: 1001"]
    assert len(lines) == 12 * 13


def test_no_color_leaves_no_control_codes(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")  # Rich takes the output for a terminal then
    written = io.StringIO()
    monkeypatch.setattr("sys.stdout", written)
    monkeypatch.setattr("sys.stderr", written)
    made = Console()
    assert made.out.is_terminal
    made.title("a title")
    made.note("a note")
    made.error(FinetuneError("it broke", "repair it"))
    made.table(("a", "b"), [(1, 2)])
    with made.stage("features", 3) as advance:
        advance(3)
    assert "a title" in written.getvalue()
    assert "\x1b" not in written.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_epochs_are_thinned_out_in_a_log(terminal):
    made, _out, err = console(terminal)
    for i in range(1, 124):
        made.epoch(i, 123, f"epoch {i}/123")
    shown = [line for line in err.getvalue().splitlines() if "epoch" in line]
    if terminal:
        assert len(shown) == 123
    else:
        numbers = [*range(1, 11), *range(20, 101, 10), 123]
        assert shown == [f"epoch {i}/123" for i in numbers]
