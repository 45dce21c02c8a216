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
