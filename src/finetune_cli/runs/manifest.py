"""`run.json`, the manifest of a finished run: its content as types, the one parser and the one writer.

`seal` adds a SHA-256 of the content. It shows damage and is not a signature, so `parse` checks every value as well.
`formats.py` holds the version of the format and says how to make a new one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_cli.devices import Precision
from finetune_cli.fields import FieldError, Fields
from finetune_cli.photos import settings
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.runs import formats

FILE = "run.json"
SPLITS = ("train", "val", "test")
MEASURED = (*SPLITS, "folds")  # on folds: training photos, each answered by a head that was fitted without its fold


@dataclass(frozen=True, slots=True)
class Backbone:
    """What the features come from: ``float32 (width,)`` per photo.

    `weights_sha256`: of the weight file, None for random weights. `feature_map`: whether the features are the mean of a
    feature map over its positions, so that a heat map is exact. `original`: the fingerprint before fine-tuning; the
    same as `fingerprint` if nothing was fine-tuned.
    """

    name: str
    width: int
    fingerprint: str
    original: str
    weights_sha256: str | None
    feature_map: bool

    @property
    def tuned(self) -> bool:
        """Whether fine-tuning changed its weights."""
        return self.fingerprint != self.original


@dataclass(frozen=True, slots=True)
class Solver:
    """How the head was fitted, and with which L2 strength."""

    name: str
    l2: float


@dataclass(frozen=True, slots=True)
class Views:
    """Augmented views per photo, and how many views were computed and how many came from the cache."""

    per_photo: int
    computed: int
    cached: int


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest differences of probabilities between the saved forms of the model on `photos` photos."""

    photos: int
    openvino_against_keras: float
    openvino_against_measured: float


@dataclass(frozen=True, slots=True)
class Unknown:
    """How a run refuses photos that are unlike its training photos; the arrays are in files, see `runs/novelty.py`.

    false_rejects: the share of photos of the run's own kind that may be refused. interval: 95 % of runs with as many
    held-out photos refuse a share between these; None with `data.folds`, which make the share approximate. references,
    held_out: how many photos are compared with, and how many set the threshold. energy_weight: see
    `metrics/novelty.py`. detection: class that was left out -> share of its photos that was refused, by the score that
    was chosen. compared: score -> mean of these shares. tuned: whether the backbone learned from the classes that were
    left out, so that `detection` is too high.
    """

    false_rejects: float
    interval: tuple[float, float] | None
    references: int
    held_out: int
    energy_weight: float
    detection: Mapping[str, float]
    compared: Mapping[str, float]
    tuned: bool

    @property
    def approximate(self) -> bool:
        """Whether the rate is approximate, because the held-out photos were cross-validated."""
        return self.interval is None

    def to_json(self) -> dict[str, Any]:
        """The facts as plain JSON values."""
        return {
            "false_rejects": self.false_rejects,
            "approximate": self.approximate,
            "interval": None if self.interval is None else list(self.interval),
            "references": self.references,
            "held_out": self.held_out,
            "energy_weight": self.energy_weight,
            "detection": dict(self.detection),
            "compared": dict(self.compared),
            "tuned": self.tuned,
        }

    @classmethod
    def from_json(cls, fields: Fields) -> "Unknown":
        """Read what `to_json` gave. Raises `FieldError`."""
        return cls(
            false_rejects=fields.number("false_rejects", 0, 1),
            interval=fields.optional("interval", lambda name: _interval(fields, name)),
            references=fields.integer("references", 1),
            held_out=fields.integer("held_out", 1),
            energy_weight=fields.number("energy_weight", 0),
            detection=fields.mapping("detection", _share),
            compared=fields.mapping("compared", _share),
            tuned=fields.flag("tuned"),
        )


@dataclass(frozen=True, slots=True)
class SkippedPhoto:
    """A photo that was left out of the training, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class PartAccuracy:
    """The accuracy on some photos, and its 95 % interval; shares lie between 0 and 1."""

    photos: int
    accuracy: float
    accuracy_interval: tuple[float, float]

    @classmethod
    def from_json(cls, fields: Fields) -> "PartAccuracy":
        """The values of these keys. Raises `FieldError`."""
        return cls(
            photos=fields.integer("photos", 1),
            accuracy=fields.number("accuracy", 0, 1),
            accuracy_interval=_interval(fields, "accuracy_interval"),
        )


@dataclass(frozen=True, slots=True)
class SplitMetrics:
    """How good the run is on one split; shares lie between 0 and 1.

    `baseline_accuracy`: of the majority-class baseline. `without_near_duplicates`: the same for the photos that are no
    near-duplicate of a training photo, where some are. `document`: everything that was measured, as
    `metrics.Evaluation.to_json` gives it.
    """

    photos: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    baseline_accuracy: float
    document: Mapping[str, Any]
    without_near_duplicates: PartAccuracy | None = None

    @classmethod
    def from_json(cls, fields: Fields) -> "SplitMetrics":
        """Take the values that are used out of the document. Raises `FieldError`."""
        whole = PartAccuracy.from_json(fields)
        part = fields.document.get("without_near_duplicates")
        return cls(
            photos=whole.photos,
            accuracy=whole.accuracy,
            accuracy_interval=whole.accuracy_interval,
            baseline_accuracy=fields.object("baseline").number("accuracy", 0, 1),
            document=fields.document,
            without_near_duplicates=None
            if part is None
            else PartAccuracy.from_json(fields.object("without_near_duplicates")),
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `run.json`.

    classes: in the order of the model's outputs. temperature: the calibration T inside the model, 1 if none.
    start_from: the SHA-256 of the model whose head the training started from. photos: how many by split. roots: split
    -> the folder that its photos were in, relative to the run. seconds: by stage. parity: None if no photo was
    compared. files: name -> SHA-256 of every other file of the run. fine_tuning: what was tried and kept, None without
    it. fine_tuning_seconds: what it would take here, as estimated by a run without it. unknown: how photos that show
    none of the classes are refused, None if the run cannot tell. storage_retries: how many requests to a store had to
    be made again. retries: blocks of photos that were done again because a worker of a cluster was lost. The file has
    these two only if they are not 0.
    """

    created: str
    classes: tuple[str, ...]
    image: ImageSettings
    backbone: Backbone
    start_from: str | None
    solver: Solver
    temperature: float
    device: str
    feature_precision: "Precision"
    photos: Mapping[str, int]
    views: Views
    cache_bytes: int
    bad_photos: tuple[SkippedPhoto, ...]
    roots: Mapping[str, str]
    parity: Parity | None
    seconds: Mapping[str, float]
    metrics: Mapping[str, SplitMetrics]
    files: Mapping[str, str]
    fine_tuning: Mapping[str, Any] | None = None
    fine_tuning_seconds: int | None = None
    unknown: Unknown | None = None
    storage_retries: int = 0
    retries: int = 0

    def to_json(self) -> dict[str, Any]:
        """The whole of `run.json`, sealed."""
        parity = self.parity
        again = {"storage_retries": self.storage_retries, "retries": self.retries}
        return seal(
            {
                "format": formats.FORMAT,
                "created": self.created,
                "classes": list(self.classes),
                "image": settings.to_json(self.image),
                "backbone": {
                    "name": self.backbone.name,
                    "width": self.backbone.width,
                    "fingerprint": self.backbone.fingerprint,
                    "original": self.backbone.original,
                    "weights_sha256": self.backbone.weights_sha256,
                    "feature_map": self.backbone.feature_map,
                },
                "start_from": self.start_from,
                "solver": {"name": self.solver.name, "l2": self.solver.l2},
                "temperature": self.temperature,
                "device": self.device,
                "feature_precision": self.feature_precision,
                "photos": dict(self.photos),
                "views": {key: getattr(self.views, key) for key in ("per_photo", "computed", "cached")},
                "cache_bytes": self.cache_bytes,
                "bad_photos": [{"path": photo.path, "reason": photo.reason} for photo in self.bad_photos],
                "roots": dict(self.roots),
                "parity": {}
                if parity is None
                else {
                    "photos": parity.photos,
                    "openvino_against_keras": parity.openvino_against_keras,
                    "openvino_against_measured": parity.openvino_against_measured,
                },
                "seconds": dict(self.seconds),
                "metrics": {split: dict(metrics.document) for split, metrics in self.metrics.items()},
                "files": dict(self.files),
                "fine_tuning_seconds": self.fine_tuning_seconds,
                "fine_tuning": None if self.fine_tuning is None else dict(self.fine_tuning),
                "unknown": None if self.unknown is None else self.unknown.to_json(),
                **{key: number for key, number in again.items() if number},
            }
        )

    @classmethod
    def from_json(cls, document: object) -> "Manifest":
        """The manifest in `document`. Raises `FieldError` that names the key which is wrong."""
        fields = Fields(document)
        formats.known(FILE, fields)  # before the seal: a later format may be sealed in another way
        check_seal(fields)
        fields = formats.upgrade(FILE, fields)
        manifest = cls(
            created=fields.text("created"),
            classes=fields.names("classes", 2),
            image=settings.from_json(fields.object("image")),
            backbone=_backbone(fields.object("backbone")),
            start_from=fields.optional("start_from", fields.sha256),
            solver=Solver(
                fields.object("solver").choice("name", ("lbfgs", "adam", "sgd")),
                fields.object("solver").number("l2", 0),
            ),
            temperature=fields.positive("temperature"),
            device=fields.text("device"),
            feature_precision=fields.choice("feature_precision", ("float32", "bfloat16", "mixed")),
            photos=fields.mapping("photos", Fields.integer),
            views=_views(fields.object("views")),
            cache_bytes=fields.integer("cache_bytes"),
            bad_photos=tuple(
                SkippedPhoto(photo.text("path"), photo.text("reason")) for photo in fields.objects("bad_photos")
            ),
            roots=fields.mapping("roots", _root),
            parity=_parity(fields.object("parity")),
            seconds=fields.mapping("seconds", _seconds),
            metrics={
                split: SplitMetrics.from_json(metrics)
                for split, metrics in fields.mapping("metrics", Fields.object).items()
            },
            files=fields.listed_files("files"),
            fine_tuning=_fine_tuning(fields),
            fine_tuning_seconds=_fine_tuning_seconds(fields),
            unknown=_unknown(fields),
            storage_retries=_count(fields, "storage_retries"),
            retries=_count(fields, "retries"),
        )
        for key, allowed in (("photos", SPLITS), ("roots", SPLITS), ("metrics", MEASURED)):
            if unknown := set(getattr(manifest, key)) - set(allowed):
                raise FieldError(f"{key} names {min(unknown)!r}, which is not a split")
        if missing := {split for split, count in manifest.photos.items() if count} - set(manifest.roots):
            raise FieldError(f"roots.{min(missing)} is missing")
        return manifest


def parse(text: str) -> Manifest:
    """The manifest in the content of `run.json`. Raises `ValueError` or `RecursionError`."""
    return Manifest.from_json(json.loads(text))


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with the SHA-256 of all of it, which shows damage and is not a signature."""
    return {**content, "sha256": _own_sha256(content)}


def check_seal(fields: Fields) -> None:
    """Raise `FieldError` unless the SHA-256 that `seal` added is right."""
    if fields.value("sha256") != _own_sha256(fields.document):
        raise FieldError("its content does not match its own SHA-256")


def _own_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256 of all of `content` but `sha256`, as JSON with sorted keys and without spaces."""
    others = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fine_tuning(fields: Fields) -> Mapping[str, Any] | None:
    """What was tried and kept, as it is shown and not as it is used; None without it and in runs from before it."""
    if fields.document.get("fine_tuning") is None:
        return None
    return fields.object("fine_tuning").document


def _count(fields: Fields, key: str) -> int:
    """A number that is left out when it is 0."""
    return fields.integer(key) if key in fields.document else 0


def _fine_tuning_seconds(fields: Fields) -> int | None:
    return None if fields.document.get("fine_tuning_seconds") is None else fields.integer("fine_tuning_seconds")


def _backbone(fields: Fields) -> Backbone:
    return Backbone(
        name=fields.text("name"),
        width=fields.integer("width", 1),
        fingerprint=fields.text("fingerprint"),
        # Runs from before fine-tuning do not have it.
        original=fields.text("original" if "original" in fields.document else "fingerprint"),
        weights_sha256=fields.optional("weights_sha256", fields.sha256),
        feature_map=fields.flag("feature_map"),
    )


def _views(fields: Fields) -> Views:
    return Views(fields.integer("per_photo", 1), fields.integer("computed"), fields.integer("cached"))


def _parity(fields: Fields) -> Parity | None:
    if not fields.document:
        return None
    return Parity(
        fields.integer("photos", 1),
        fields.number("openvino_against_keras", 0),
        fields.number("openvino_against_measured", 0),
    )


def _interval(fields: Fields, name: str) -> tuple[float, float]:
    """Two shares."""
    interval = fields.value(name)
    if not isinstance(interval, list) or len(interval) != 2:
        raise fields.wrong(name, "a list of two numbers")
    ends = Fields({"[0]": interval[0], "[1]": interval[1]}, fields.path(name))
    return ends.number("[0]", 0, 1), ends.number("[1]", 0, 1)


def _share(fields: Fields, name: str) -> float:
    return fields.number(name, 0, 1)


def _unknown(fields: Fields) -> Unknown | None:
    """None without it, and in runs from before it."""
    return None if fields.document.get("unknown") is None else Unknown.from_json(fields.object("unknown"))


def _root(fields: Fields, split: str) -> str:
    found = fields.text(split)
    if "\0" in found:
        raise fields.wrong(split, "a folder")
    return found


def _seconds(fields: Fields, stage: str) -> float:
    return fields.number(stage, 0)
