"""Progress is counted in steps; a download is shown in whole megabytes."""

from finetune_cli.progress import in_megabytes, timed


def test_bytes_are_shown_as_whole_megabytes():
    calls = []
    advance = in_megabytes(lambda n, total=None, /: calls.append((n, total)))
    for size in (600_000, 600_000, 3_000_000, 1):
        advance(size, 4_200_001)
    assert calls == [(0, 4), (1, 4), (3, 4), (0, 4)]
    advance(1_000_000)
    assert calls[-1] == (1, None)


def test_the_seconds_of_a_stage_add_up(monkeypatch):
    times = iter([1.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr("finetune_cli.progress.time.monotonic", lambda: next(times))
    seconds = {}
    for _ in range(2):
        with timed(seconds, "head"):
            pass
    assert seconds == {"head": 2.75}
