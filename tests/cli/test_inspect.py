"""`finetune inspect`."""

import json

from command_line import run


def test_inspect_shows_a_run_and_a_config(tiny_run, tmp_path, monkeypatch):
    photo = next((tiny_run.photos / "test").rglob("*.*"))
    answer = run("inspect", tiny_run.run.folder, "--filters", photo, tmp_path / "filters.png")
    assert answer.exit_code == 0, answer.output
    assert "the gradient stops at" in answer.stdout
    assert (tmp_path / "filters.png").is_file()
    answer = run("inspect", tiny_run.run.folder, "--full", "--format", "json", "--batch", 3)
    shown = json.loads(answer.stdout)
    with_picture = run(
        "inspect",
        tiny_run.run.folder,
        "--full",
        "--format",
        "json",
        "--batch",
        3,
        "--filters",
        photo,
        tmp_path / "f.png",
    )
    assert json.loads(with_picture.stdout) == shown
    assert shown["batch"] == 3
    assert shown["parameters"] == sum(node["parameters"] for node in shown["nodes"])
    assert run("inspect", tmp_path / "absent.yaml").exit_code == 2
