"""Manifests of a run that was never trained and of its export: for tests that need one and no model."""

from collections.abc import Mapping
from typing import Any

from finetune_cli.exports.manifest import ExportManifest
from finetune_cli.fields import Fields
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.runs.manifest import Backbone, Manifest, Parity, SkippedPhoto, Solver, SplitMetrics, Views

VAL = {
    "photos": 9, "accuracy": 0.75, "accuracy_interval": [0.5, 0.9], "baseline": {"class": "ant", "accuracy": 0.5},
    "confusion_matrix": [[4, 1], [1, 3]],
}  # fmt: skip
EXAMPLE = Manifest(
    created="2026-01-01T00:00:00+00:00",
    classes=("ant", "bee"),
    image=ImageSettings(224, "pad", 1000),
    backbone=Backbone(
        name="resnet50", width=2048, fingerprint="f", original="f", weights_sha256="a" * 64, feature_map=True
    ),
    start_from=None,
    solver=Solver("lbfgs", 0.001),
    temperature=1.5,
    device="cpu",
    feature_precision="bfloat16",
    photos={"train": 20, "val": 9},
    views=Views(per_photo=4, computed=80, cached=0),
    cache_bytes=1000,
    bad_photos=(SkippedPhoto("ant/x.jpg", "is empty"),),
    roots={"train": "../../photos", "val": "../../photos"},
    parity=Parity(9, 1e-7, 2e-7),
    seconds={"features": 1.5},
    metrics={"val": SplitMetrics.from_json(Fields(VAL))},
    files={"split.csv": "b" * 64},
)


def export_manifest(files: Mapping[str, str]) -> dict[str, Any]:
    """The manifest.json of an export to ONNX that holds `files`, name -> SHA-256."""
    return ExportManifest("onnx", {}, EXAMPLE.created, "run-1", "0" * 64, {}, files).to_json()
