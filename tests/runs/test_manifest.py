"""`run.json` from a stranger whose every hash is right: each wrong value is refused by its key, and nothing is lost."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from manifest_example import EXAMPLE, VAL

from finetune_cli.errors import RunError
from finetune_cli.fields import FieldError
from finetune_cli.runs import manifest
from finetune_cli.runs.manifest import seal
from finetune_cli.runs.run import Run


def changed(path: str, value: object) -> dict[str, Any]:
    """The example as JSON with another value at `path`, such as ``image.size``; `...` removes it. The seal fits."""
    document = json.loads(json.dumps(EXAMPLE.to_json()))
    *parents, last = path.split(".")
    inner = document
    for key in parents:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return document if path == "sha256" else seal(document)


def test_what_is_written_is_read_back():
    assert manifest.parse(json.dumps(EXAMPLE.to_json())) == EXAMPLE
    without = replace(EXAMPLE, parity=None, start_from="c" * 64, bad_photos=(), metrics={})
    assert manifest.parse(json.dumps(without.to_json())) == without


def test_all_that_was_measured_is_written():
    assert EXAMPLE.to_json()["metrics"]["val"] == VAL


def test_unknown_keys_are_ignored():
    assert manifest.parse(json.dumps(changed("image.colour", "grey"))) == EXAMPLE
    assert manifest.parse(json.dumps(changed("notes", ["later"]))) == EXAMPLE


BROKEN = [
    ("format", 0), ("format", "1"), ("format", True), ("format", 1.0), ("format", ...),
    ("sha256", "0" * 64), ("sha256", ...),
    ("created", ...), ("created", 5), ("created", ""),
    ("classes", ...), ("classes", "ab"), ("classes", {}), ("classes", []), ("classes", ["one"]),
    ("classes", ["a", "a"]),
    ("classes", ["a", 1]), ("classes", ["a", ""]), ("classes", ["a", None]), ("classes", ["a", ["b"]]),
    ("image", {}), ("image", []), ("image.size", 1), ("image.size", 10**6), ("image.size", "224"), ("image.size", True),
    ("image.resize", "zzz"), ("image.resize", []), ("image.max_pixels", 0), ("image.max_pixels", "all"),
    ("backbone", {}), ("backbone", None), ("backbone.name", ...), ("backbone.name", 5), ("backbone.width", 0),
    ("backbone.width", 3.5), ("backbone.fingerprint", ""), ("backbone.weights_sha256", "ab"),
    ("backbone.weights_sha256", ...), ("backbone.feature_map", 1), ("backbone.feature_map", ...),
    ("start_from", 5), ("start_from", "A" * 64), ("start_from", "a" * 64 + "\n"),
    ("solver", {}), ("solver.name", "newton"), ("solver.l2", -1), ("solver.l2", math.inf), ("solver.l2", "auto"),
    ("temperature", 0), ("temperature", -1.5), ("temperature", math.nan), ("temperature", math.inf),
    ("temperature", "hot"), ("temperature", True), ("temperature", None), ("temperature", 10**400),
    ("temperature", ...),
    ("device", None), ("feature_precision", "int4"),
    ("photos", [1]), ("photos.val", -1), ("photos.val", 1.5), ("photos.holdout", 5),
    ("views", {}), ("views.per_photo", 0), ("views.computed", -1), ("views.cached", None),
    ("cache_bytes", 0.5), ("bad_photos", {}), ("bad_photos", [5]), ("bad_photos", [{"path": "x"}]),
    ("roots", []), ("roots.val", 3), ("roots.val", ""), ("roots.val", "a\0b"), ("roots.val", ...), ("roots.x", "y"),
    ("parity", None), ("parity.photos", 0), ("parity.openvino_against_keras", math.nan),
    ("seconds", 5), ("seconds.features", "fast"), ("seconds.features", math.inf),
    ("metrics", None), ("metrics.val", []), ("metrics.val", {}), ("metrics.val.accuracy", 1.5),
    ("metrics.val.accuracy", math.nan), ("metrics.val.accuracy_interval", [0.5]), ("metrics.val.accuracy_interval", 1),
    ("metrics.val.accuracy_interval", [0.5, "x"]), ("metrics.val.baseline", None), ("metrics.val.photos", 0),
    ("metrics.x", VAL),
    ("files", ...), ("files", []), ("files", {"a": "00"}), ("files", {"a": 5}), ("files", {"a": "g" * 64}),
    *(("files", {name: "0" * 64}) for name in
      ("", ".", "..", "../x", "/etc/passwd", "a/../../b", "C:\\x", "C:x", "a\\b", "a//b", "./a", "a/", "a\0b")),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), BROKEN, ids=lambda each: str(each)[:40].replace("\0", "NUL"))
def test_a_wrong_value_is_refused_by_its_key(tmp_path, path, value):
    (tmp_path / "run.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(RunError, match=r"run\.json is damaged: ") as caught:
        Run.load(tmp_path)
    message = caught.value.problem
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(tmp_path)) + 250
    assert path.rpartition(".")[2] in message or (path == "sha256" and "SHA-256" in message)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "null", "5", '"x"', "\udcff", "[" * 10**5, "NaN"])
def test_what_is_no_manifest(tmp_path, text):
    (tmp_path / "run.json").write_text(text, errors="surrogateescape")
    with pytest.raises(RunError, match="damaged"):
        Run.load(tmp_path)


def rubbish() -> list[object]:
    nested: object = 1
    for _ in range(50):
        nested = [nested]
    return [None, True, 0, -1, 0.5, math.nan, -math.inf, 10**400, "", "x", "\ud800", [], {}, [{}], {"a": {}}, nested]


def paths(document: object, above: str = "") -> list[str]:
    """Every key of `document`, at any depth."""
    if not isinstance(document, dict):
        return []
    return [each for key, value in document.items() for each in (f"{above}{key}", *paths(value, f"{above}{key}."))]


def test_any_rubbish_anywhere_is_read_or_refused_in_a_line():
    messages = []
    document = EXAMPLE.to_json()
    document["files"] = {"split": "b" * 64}  # without a dot, by which paths are taken apart here
    every = [path for path in paths(document) if not path.startswith(("files.", "sha256"))]
    assert len(every) > 40
    for path in every:
        for value in rubbish():
            try:
                manifest.parse(json.dumps(changed(path, value)))
            except FieldError as error:
                messages.append(str(error))
    assert len(messages) > 10 * len(every)
    assert all(len(message.splitlines()) == 1 for message in messages)


def test_a_later_format_asks_for_an_update(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**EXAMPLE.to_json(), "format": 3}))
    with pytest.raises(RunError, match=re.escape("has format 3, this version reads 2")) as caught:
        Run.load(tmp_path)
    assert "update" in caught.value.remedy
