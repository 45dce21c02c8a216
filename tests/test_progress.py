"""How long the stages of a training took."""

from finetune_cli.progress import timed


def test_the_seconds_of_a_stage_add_up(monkeypatch):
    times = iter([1.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr("finetune_cli.progress.time.monotonic", lambda: next(times))
    seconds = {}
    for _ in range(2):
        with timed(seconds, "head"):
            pass
    assert seconds == {"head": 2.75}
