"""The registry of exported forms: complete, agreed with the classes, and nothing imports in a circle."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from finetune_cli.errors import UsageError
from finetune_cli.exports import manifest, registry
from finetune_cli.exports.export import ExportRequest, export
from finetune_cli.exports.forms import Signature
from finetune_cli.exports.opening import open_model
from finetune_cli.exports.registry import FORMS
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.progress import Silent

EXPORTS = Path(registry.__file__).parent


@pytest.mark.parametrize("name", FORMS)
def test_an_entry_fits_its_class(name):
    entry = FORMS[name]
    form = entry.load()(**{option: choices[0] for option, choices in entry.options.items()})
    assert form.name == name
    assert form.options == {option: choices[0] for option, choices in entry.options.items()}
    assert form.exact


def test_names_aliases_and_options_are_unambiguous():
    words = [word for entry in FORMS.values() for word in (entry.name, *entry.aliases)] + [registry.ALL]
    assert len(words) == len(set(words))
    assert all(word == word.lower() and "," not in word for word in words)
    for option in {option for entry in FORMS.values() for option in entry.options}:  # one option, one meaning
        assert {entry.options[option] for entry in registry.owners(option)} == {registry.choices(option)}
    assert len(registry.suffixes()) == len(set(registry.suffixes()))


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["tflite"], ("litert",)),
        (["openvino,ONNX", " savedmodel "], ("savedmodel", "onnx", "openvino")),
        (["all"], tuple(FORMS)),
        (["keras", "all", "keras"], tuple(FORMS)),
        (["saved_model,"], ("savedmodel",)),
    ],
)
def test_formats_as_people_type_them(texts, names):
    assert registry.parse(texts) == names


def test_a_mistyped_format_names_the_right_one():
    with pytest.raises(UsageError, match="unknown format 'onxx'") as caught:
        registry.parse(["keras,onxx"])
    assert caught.value.remedy.startswith("did you mean onnx?")


def test_the_extras_exist():
    import tomllib

    project = tomllib.loads((EXPORTS.parents[2] / "pyproject.toml").read_text())["project"]
    extras = {entry.extra for entry in FORMS.values()}
    extras |= {entry.quantizer[1] for entry in FORMS.values() if entry.quantizer}
    assert extras - {None} <= set(project["optional-dependencies"])


def test_what_int8_needs_besides():
    plain, int8 = (FORMS["openvino"].made_with({"quantize": value}) for value in (None, "int8"))
    assert (plain.packages, plain.extra) == (("openvino",), None)
    assert (int8.packages, int8.versions, int8.extra) == (("openvino", "nncf"), ("openvino", "nncf"), "int8")
    assert FORMS["onnx"].made_with({"quantize": "int8"}) == FORMS["onnx"]
    assert FORMS["keras"].made_with({"quantize": "int8"}) == FORMS["keras"]
    chosen = FORMS["onnx"].chosen({"quantize": None, "layout": "nchw"})
    assert chosen == {"quantize": "none", "layout": "nchw", "pixels": "fixed", "page": "no page"}


def test_the_registry_imports_no_form():
    code = "import json, sys; from finetune_cli.exports import registry; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(json.loads(answer.stdout))
    assert {name for name in loaded if name.startswith("finetune_cli.exports.")} == {"finetune_cli.exports.registry"}
    assert not {"numpy", "tensorflow"} & loaded


def test_no_module_of_the_package_imports_another_in_a_circle():
    prefix = "finetune_cli.exports."
    edges = {}
    for path in EXPORTS.glob("*.py"):
        tree, found = ast.parse(path.read_text("utf-8")), set()
        typing_only = {id(child) for node in ast.walk(tree) if _for_types(node) for child in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in typing_only:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        edges[path.stem] = {name.removeprefix(prefix).split(".")[0] for name in found if name.startswith(prefix)}
    assert "onnx" in edges["registry"]
    while edges:
        free = {name for name, below in edges.items() if not below & set(edges)}
        assert free, f"in a circle: {sorted(edges)}"
        edges = {name: below for name, below in edges.items() if name not in free}


def _for_types(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_a_module_and_an_entry_are_all_that_a_new_form_needs(tiny_run, tmp_path, monkeypatch):
    """A form that copies the run's model and answers through the run: exported, compared, described, opened again."""

    class Opened(RunPredictor):
        def signatures(self):
            return (Signature("pixels", "pixels", self.probabilities),)

    class Copied:
        name, exact = "copied", True
        options: ClassVar[dict[str, str]] = {}

        def write(self, source, folder):
            shutil.copyfile(source.run.file("model.keras"), folder / "model.copied")

        @staticmethod
        def open(path, workers, latency=False):
            assert path.is_file()
            return Opened(tiny_run.run, workers)

    monkeypatch.setitem(FORMS, "copied", registry.Entry("copied", "model.copied", lambda: Copied, (), ("keras",)))
    assert "copied" in registry.parse(["all"])
    (exported,) = export(tiny_run.run, ExportRequest(["copied"], tmp_path / "out"), Silent()).exports
    assert [check.passed for check in exported.checks] == [True]
    assert manifest.verify(tmp_path / "out").form == "copied"
    for path in (tmp_path / "out", tmp_path / "out" / "model.copied"):
        assert open_model(path, 1).classes == tiny_run.run.classes
