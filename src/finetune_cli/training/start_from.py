"""The run that a training starts from (`model.start_from`): its backbone, perhaps fine-tuned, and its head."""

from collections.abc import Sequence

from finetune_cli.backbones import build
from finetune_cli.backbones.build import Backbone
from finetune_cli.errors import DataError, RunError
from finetune_cli.head import classifier
from finetune_cli.head.lbfgs import Head
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Observer
from finetune_cli.runs.run import Run
from finetune_cli.text import counted
from finetune_cli.training.converted import Converted

# As Keras builds it in this process, for fine-tuning, or converted, in the cache.
AnyBackbone = Backbone | Converted


def digest_of(start: Run | None) -> str | None:
    """SHA-256 of the model of the run to start from. Raises `RunError` when it is damaged."""
    if start is None:
        return None
    start.file("model.keras")
    return start.manifest.files["model.keras"]


def backbone_of(start: Run | None, backbone: AnyBackbone) -> AnyBackbone:
    """`backbone`, with the weights that fine-tuning gave it if `start` is a run that tuned it; it changes then.

    Raises `RunError` when `start` was trained on another backbone.
    """
    if start is None or start.manifest.backbone.fingerprint == backbone.fingerprint:
        return backbone
    old = start.manifest.backbone
    if backbone.original != old.original:
        raise RunError(
            f"model.start_from: {start.folder} was trained on another backbone ({old.name})",
            "use the same model.backbone, model.weights and image.size, or drop model.start_from",
        )
    assert isinstance(backbone, Backbone)  # a tuned one is not converted, see `Settings.builds_backbone`
    path = start.file("model.keras")
    tuned = build.with_weights_of(backbone, path)
    if tuned.fingerprint != old.fingerprint:
        raise RunError(f"{path} does not hold the backbone that run.json names", "restore the run from a copy")
    return tuned


def check_held_out(start: Run | None, samples: Sequence[Sample], solver: str) -> None:
    """Raise `DataError` when `start` has learned from some of `samples`, which are to be cross-validated.

    A head that Adam or SGD take from there, or a backbone that was tuned there, would answer for photos that it knows.
    L-BFGS ends at the same minimum whatever it starts from.
    """
    if start is None or (solver == "lbfgs" and not start.manifest.backbone.tuned):
        return
    known = {row.digest for row in start.split() if row.split != "test"}
    seen = sum(sample.digest in known for sample in samples)
    if seen:
        raise DataError(
            f"data.folds: the run {start.name} of model.start_from has learned from {counted(seen, 'photo')} of these, "
            "so they cannot be held out from it",
            "leave out model.start_from, or set data.val_split in place of data.folds",
        )


def head_of(start: Run | None, classes: Sequence[str], solver: str, seed: int, observer: Observer) -> Head | None:
    """The head of `start`, grown to `classes`: those that it knows keep their columns, others are drawn from `seed`."""
    if start is None:
        return None
    old_head = classifier.read(start.file("model.keras"))
    grown, kept, new = classifier.grow(old_head, start.classes, classes, seed)
    dropped = [name for name in start.classes if name not in classes]
    report = observer.note if kept else observer.warn
    report(
        f"start from {start.name}: kept {', '.join(kept) or 'nothing'}; new {', '.join(new) or 'nothing'}"
        + (f"; dropped {', '.join(dropped)}" if dropped else "")
    )
    if solver == "lbfgs":
        observer.note(
            "solver lbfgs ends at the same optimum with and without model.start_from; the kept columns only save "
            "iterations. It is useful with training.solver=adam or sgd: these continue from the old head, for example "
            "to add a class"
        )
    return grown
