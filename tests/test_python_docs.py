"""docs/python.md and docs/notebook.ipynb: their code runs, and uses public names only."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

import finetune_cli
from finetune_cli.training import pipeline as command_train

DOCS = ROOT / "docs"
PAGE = (DOCS / "python.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NOTEBOOK = json.loads((DOCS / "notebook.ipynb").read_text("utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
METHODS = {name for name in vars(finetune_cli.Classifier) if not name.startswith("_")}


@pytest.mark.parametrize("code", ["\n".join(SNIPPETS), "\n".join(CELLS)], ids=["page", "notebook"])
def test_only_public_names_are_used(code):
    used, called = set(), set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "finetune_cli":
                used.add(node.attr)
            elif node.value.id == "classifier":
                called.add(node.attr)
        assert not (isinstance(node, ast.ImportFrom) and str(node.module).startswith("finetune_cli"))
    assert {"train", "load"} <= used <= set(finetune_cli.__all__)
    assert {"predict", "evaluate", "export"} <= called <= METHODS


def test_every_method_and_error_is_on_the_page():
    for name in METHODS | set(finetune_cli.__all__) - {"Classifier", "Evaluation", "Prediction", "Run", "__version__"}:
        assert re.search(rf"\b{name}\b", PAGE), name
    table = PAGE[PAGE.index("| class |") :]
    for name, item in vars(finetune_cli.errors).items():
        if isinstance(item, type) and issubclass(item, finetune_cli.FinetuneError) and name != "FinetuneError":
            assert f"`{name}`" in table


def test_the_code_of_the_page_runs(tiny_run, tmp_path, monkeypatch, capsys):
    """In order, in one namespace; only training is left out, in favour of a run that is there already."""
    monkeypatch.setattr(command_train, "train", lambda _config, _observer: tiny_run.run)
    monkeypatch.chdir(tmp_path)
    photo = tiny_run.photos / "val" / "wasp" / "wasp-02.png"
    shutil.copy(photo, "photo.jpg")
    Path("broken.jpg").write_bytes(photo.read_bytes()[:-50])
    Path("config.yaml").write_text("data: {train: photos}\n")
    Path("labelled").symlink_to(tiny_run.photos / "test")
    Path("runs").mkdir()
    Path("runs/photos-1").symlink_to(tiny_run.run.folder)
    names = {}
    for snippet in SNIPPETS:
        exec(snippet, names)
    assert names["same"] == names["answer"]
    assert names["answers"][0].label == names["answer"].label
    assert (tmp_path / "models" / "photos" / "model.xml").is_file()
    status, content = names["respond"](photo.read_bytes())
    assert (status, content["label"]) == (200, names["answer"].label)
    assert names["respond"](b"no image") == (422, {"error": "not an image in a supported format"})
    assert names["answer"].label in capsys.readouterr().out


def test_the_notebook_is_one_without_outputs():
    """Whoever runs it makes them; none that are stored could be trusted to be today's."""
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] in {"code", "markdown"}
        assert cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Cell by cell in one namespace, as Jupyter does it; the temporary folder is gone at the end."""
    look = """
print(json.dumps([run.classes, answer and answer.label, [a and a.label for a in answers], evaluation.photos,
    evaluation.accuracy.value, int(evaluation.confusion.sum()), work.exists()]))
"""
    runner = "import json, sys\nnames = {'json': json}\nfor cell in json.load(sys.stdin):\n    exec(cell, names)\n"
    answer = subprocess.run(
        [sys.executable, "-c", runner],
        input=json.dumps([*CELLS, look]),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    classes, label, labels, photos, accuracy, counted, left = json.loads(answer.stdout.splitlines()[-1])
    assert classes == ["city", "forest"]
    assert label == "city"
    assert labels == ["city", "forest", "forest", None]
    assert photos == counted > 5
    assert accuracy >= 0.8
    assert not left
    assert not list(tmp_path.iterdir())
    assert "features of train" in answer.stderr
