"""The fine-tuning stage of a training: from a fitted head on a frozen backbone to the best model that was found.

    activations at the cut, once -> upper part and head, epoch by epoch -> the head once more on the tuned features
    -> frozen, tuned, or between, by the validation photos -> the features of the tuned backbone, through the cache

The backbone's own layers learn, so the backbone that goes in is the tuned one afterwards, or has its old weights again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.backbones import build
from finetune_cli.backbones.build import Backbone
from finetune_cli.cache.features import FeatureStore
from finetune_cli.devices import Device, Precision
from finetune_cli.errors import CheckpointError, StorageError
from finetune_cli.head.data import class_weights
from finetune_cli.head.keras_fit import fit_epochs
from finetune_cli.inference import runtimes
from finetune_cli.inference.runtimes import Runtime
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.photos.augment import Augmenter
from finetune_cli.photos.dataset import Dataset
from finetune_cli.progress import Observer, timed
from finetune_cli.runs import checkpoints
from finetune_cli.text import counted
from finetune_cli.training import fit
from finetune_cli.training.extract import FeatureRequest, Features, scratch_array
from finetune_cli.training.fit import Fitted, labels_of
from finetune_cli.training.prepare import Extractor, Prepared
from finetune_cli.training.settings import Settings
from finetune_cli.training.start_from import AnyBackbone
from finetune_cli.training.tuning import activations, candidates, plan
from finetune_cli.training.tuning.activations import Lower, Pixels, Recomputed, Scratch, Source
from finetune_cli.training.tuning.candidates import Candidate, Validation
from finetune_cli.training.tuning.cuts import Cut, cut
from finetune_cli.training.tuning.plan import Store, Trial
from finetune_cli.training.tuning.upper import Labelled, Upper, UpperSettings, UpperState, Weights, interpolated
from finetune_cli.training.unknown import choosing


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the stage ends with: the backbone to save, every photo's features of it, and the head on them (`fitted`).

    tuned: whether the backbone is another than the frozen one. facts: what was tried and what was kept, as JSON
    values. history: a row for each epoch of each training, with its number in `training`.
    """

    backbone: Backbone
    parts: dict[str, Features]
    fitted: Fitted
    tuned: bool
    facts: dict[str, Any]
    history: tuple[dict[str, float], ...]


@dataclass(frozen=True, eq=False)
class _Trained:
    """A finished training: the weights that it began and ended with, and what came of it.

    `l2`: with which the head was fitted once more on its features.
    """

    upper: Upper
    start: Weights
    end: Weights
    l2: float
    candidates: tuple[Candidate, ...]
    history: tuple[dict[str, float], ...]
    facts: dict[str, Any]


def checked(settings: Settings) -> Callable[[Dataset, AnyBackbone], None]:
    """A check for `prepare` to make before hours of work: that the network can be cut, and that the disk has room.

    It raises `ConfigError` and `StorageError`.
    """

    def check(data: Dataset, backbone: AnyBackbone) -> None:
        config, section = settings.config, settings.config.fine_tuning
        if section is None:
            return
        assert isinstance(backbone, Backbone)  # as `changes_backbone` says
        train, val, views = len(data.train), len(data.val), settings.augmenter.views
        # The features of the frozen and of the tuned backbone, each in the cache and at hand; the head's second fit.
        row = 4 * backbone.width
        needed = 4 * row * (train * views + val + len(data.test)) + row * train * views
        checkpoints_needed = 0
        for trial in plan.trials(section, train):
            part = cut(backbone.model, trial.unfreeze)
            needed += plan.store(part, train, views, val, plan.limit(section)).bytes
            # Up to three checkpoints, each with the weights and both moments of AdamW.
            checkpoints_needed += 3 * 3 * 4 * part.upper.count_params()
        files.free_space_check(config.output.directory, checkpoints_needed)
        try:
            files.free_space_check(settings.cache.scratch, needed)
        except StorageError as exc:
            exc.remedy = f"{exc.remedy} (runtime.cache_dir), or lower fine_tuning.scratch_gb"
            raise

    return check


def run(prepared: Prepared, fitted: Fitted, checkpoint_folder: Path, training_id: str, observer: Observer) -> Outcome:
    """Fine-tune the backbone of `prepared`, on which the head `fitted` is the best frozen one.

    `training_id`: what only the checkpoints of this training share. After a kill it resumes from those, to the same
    bits.
    Raises `ConfigError` for a layer that cannot be cut at, `StorageError` when the scratch files have no room,
    `FinetuneError` when the loss is no longer a number, `Interrupted` after a signal.
    """
    stage = _Stage(prepared, fitted, checkpoint_folder, training_id, observer)
    frozen = stage.validation.candidate(fitted.head, stage.val.array[:, 0])
    trained = [stage.attempt(number, trial) for number, trial in enumerate(stage.trials)]
    tuned = [each for training in trained for each in training.candidates]
    kept = candidates.choose(frozen, tuned)
    document = {
        "kept": kept.name,
        "trainings": [training.facts for training in trained],
        "candidates": [each.to_json(frozen, each is kept) for each in (frozen, *tuned)],
    }
    history = tuple(row for training in trained for row in training.history)
    prepared.keras_backbone.model.trainable = False
    if kept.training is None:
        observer.note("fine-tuning: no other model is better than the frozen one by more than chance, so that is kept")
        return Outcome(prepared.keras_backbone, prepared.parts, fitted, False, document, history)
    winner = trained[kept.training]
    winner.upper.assign(interpolated(winner.start, winner.end, kept.share))
    backbone = build.with_changed_weights(prepared.keras_backbone)
    observer.note(
        f"fine-tuning: kept is {kept.name}; validation log loss {kept.log_loss:.3f}, frozen {frozen.log_loss:.3f}"
    )
    with timed(prepared.seconds, "tuned features"):
        parts = stage.features_of(backbone)
    ended = replace(fitted, head=kept.head, l2=winner.l2 if kept.refitted else fitted.l2)
    return Outcome(backbone, parts, ended, True, document, history)


def lower_runtime(lower: Any | None, device: Device, precision: Precision, workers: int) -> Runtime:
    """The lower part of a cut on the fast runtime of the device; `lower` None gives the pixels themselves."""
    if lower is None:
        return Pixels()
    if device == "gpu":
        return runtimes.TensorFlowRuntime(lower, precision)
    return runtimes.OpenVinoRuntime(runtimes.convert(lower), precision, workers)


class _Stage:
    """What all trainings of the stage share."""

    def __init__(
        self, prepared: Prepared, fitted: Fitted, checkpoint_folder: Path, training_id: str, observer: Observer
    ) -> None:
        assert prepared.config.fine_tuning is not None
        self.section = prepared.config.fine_tuning
        self.prepared, self.fitted, self.observer = prepared, fitted, observer
        self.checkpoint_folder, self.training_id = checkpoint_folder, training_id
        self.train, self.val = prepared.parts["train"], choosing(prepared.parts["val"], prepared.config)
        self.labels, self.val_labels = labels_of(self.train.samples), labels_of(self.val.samples)
        groups = group_numbers((sample.group, sample.digest) for sample in self.val.samples)
        self.validation = Validation(self.val_labels, groups, prepared.config.calibration == "temperature")
        self.weights = class_weights(self.labels, prepared.config.training.class_weights, prepared.data.classes)
        self.trials = plan.trials(self.section, len(self.train.samples))
        self.extractor = Extractor(prepared.settings, prepared.backbone, prepared.device, prepared.precision, observer)
        self._sources: dict[str, tuple[Source, Source, Store]] = {}

    def attempt(self, number: int, trial: Trial) -> _Trained:
        """One training and its candidates. The backbone has its old weights again afterwards."""
        part = cut(self.prepared.keras_backbone.model, trial.unfreeze)
        with timed(self.prepared.seconds, "activations"):
            train, val, store = self._activations(part)
        model = Upper(part.upper, self.fitted.head)
        start = model.weights()
        with timed(self.prepared.seconds, "fine-tuning"):
            state = self._trained(number, trial, model, train, val)
        scored = []
        for share in (*candidates.SHARES, 1.0):
            model.assign(interpolated(start, state.weights, share))
            features = model.features(val, 1)[:, 0]
            scored.append(self.validation.candidate(model.head(), features, number, share))
        with timed(self.prepared.seconds, "head again"):
            again = self._head_again(model, train, store.views, features)
        scored.append(self.validation.candidate(again.head, features, number, 1.0, refitted=True))
        model.assign(start)
        rows = tuple({"training": number, **row} for row in state.history)
        facts = self._facts(trial, part, store, start)
        return _Trained(model, start, state.weights, again.l2, tuple(scored), rows, facts)

    def _activations(self, part: Cut) -> tuple[Source, Source, Store]:
        """The activations at `part` of the training photos (all views that fit) and of the validation photos."""
        if part.below in self._sources:
            return self._sources[part.below]
        settings, device = self.prepared.settings, self.prepared.device
        augmentation = settings.augmenter
        store = plan.store(
            part, len(self.train.samples), augmentation.views, len(self.val.samples), plan.limit(self.section)
        )

        def lower(precision: Precision, views: Augmenter | None) -> Lower:
            request = FeatureRequest(settings.image, self.prepared.backbone.fingerprint, precision, views)
            runtime = lower_runtime(part.lower, device, precision, self.extractor.workers)
            return Lower(request, runtime, part.shape, self.extractor.workers, self.extractor.batch_size)

        of_train, of_val = lower(self.prepared.precision, augmentation), lower("float32", None)
        if store.storage == "recomputed":
            self.observer.warn(
                "the activations of one view a photo do not fit in fine_tuning.scratch_gb, so the frozen part runs "
                "again in every epoch"
            )
            found: tuple[Source, Source] = (
                Recomputed(self.train.samples, of_train),
                Recomputed(self.val.samples, of_val),
            )
        else:
            if store.views < augmentation.views:
                self.observer.warn(
                    f"{counted(store.views, 'view')} of {augmentation.views} fit in fine_tuning.scratch_gb; the upper "
                    "part learns from those"
                )
            scratch = settings.cache.scratch
            kind = np.float16 if store.storage == "float16" else np.uint8
            photos = len(self.train.samples) + len(self.val.samples)
            with self.observer.stage(f"activations of {part.below}", photos) as advance:
                found = (
                    activations.stored(self.train.samples, of_train, Scratch(scratch, store.views, kind), advance),
                    activations.stored(self.val.samples, of_val, Scratch(scratch, 1, np.float32), advance),
                )
        self._sources[part.below] = (*found, store)
        return self._sources[part.below]

    def _trained(self, number: int, trial: Trial, model: Upper, train: Source, val: Source) -> UpperState:
        """The last state of a training, gone on with from its newest checkpoint."""
        training = self.prepared.config.training
        settings = UpperSettings(
            trial.epochs,
            self.section.batch_size,
            trial.learning_rate,
            self.section.weight_decay,
            training.label_smoothing,
            training.seed,
        )
        folder = self.checkpoint_folder / f"tuning-{number}"
        state = self._resumed(folder)
        learnt = Labelled(train, self.labels, self.weights)
        judged = Labelled(val, self.val_labels, np.ones(len(self.val_labels)))
        with self.observer.stage(f"fine-tuning ({trial.unfreeze})", trial.epochs, "epochs") as advance:
            if state is not None:
                advance(state.epoch)
            for each in model.train(learnt, judged, settings, state):
                state = each
                facts = {"history": list(state.history), "training_id": self.training_id}
                checkpoints.save(folder, state.epoch, state.arrays(), facts, best=True)
                row = state.history[-1]
                self.observer.note(
                    f"fine-tuning epoch {state.epoch}/{trial.epochs}: loss {row['loss']:.4f}, accuracy "
                    f"{row['accuracy']:.1%}, validation loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.1%}"
                )
                advance(1)
        assert state is not None
        return state

    def _resumed(self, folder: Path) -> UpperState | None:
        last = checkpoints.latest_of(folder, self.training_id, self.observer)
        if last is None:
            return None
        self.observer.note(f"fine-tuning: resuming after epoch {last.epoch}")
        try:
            return UpperState.restore(last.epoch, last.arrays, last.state["history"])
        except (KeyError, TypeError) as exc:
            raise CheckpointError(f"{last.path} is damaged: it lacks {exc}", f"remove {last.path}") from exc

    def _head_again(self, model: Upper, train: Source, views: int, val_features: NDArray[np.float32]) -> Fitted:
        """The head by the configured solver, on the features of the upper part as it is now."""
        config, classes = self.prepared.config, self.prepared.data.classes
        shape = (len(self.train.samples), views, val_features.shape[1])
        array = model.features(train, views, scratch_array(self.prepared.settings.cache.scratch, shape))
        tuned = replace(self.train, array=array)
        if config.training.solver == "lbfgs":
            return fit.lbfgs(config, tuned, classes, None, self.observer)
        l2 = fit.chosen_l2(config, tuned, classes, self.observer)
        val = fit.validation_data(replace(self.val, array=val_features[:, None]), classes)
        *_, state = fit_epochs(fit.head_data(config, tuned, classes), val, fit.keras_settings(config, l2))
        return Fitted(state.best, l2, state.history)

    def _facts(self, trial: Trial, part: Cut, store: Store, weights: Sequence[NDArray[Any]]) -> dict[str, Any]:
        return {
            "unfreeze": trial.unfreeze,
            "last_frozen": part.below,
            "first_trained": part.above,
            "activations": list(part.shape),
            "weights": sum(int(array.size) for array in weights),
            "learning_rate": trial.learning_rate,
            "epochs": trial.epochs,
            "batch_size": self.section.batch_size,
            "views": store.views,
            "storage": store.storage,
            "scratch_bytes": store.bytes,
        }

    def features_of(self, backbone: Backbone) -> dict[str, Features]:
        """The features of all photos by the tuned `backbone`, as the frozen one's were made."""
        settings = self.prepared.settings
        extractor = replace(self.extractor, backbone=backbone)
        parts: dict[str, Features] = {}
        with FeatureStore(settings.cache.path, settings.cache.writable) as store:
            for split, part in self.prepared.parts.items():
                parts[split] = extractor(store, split, part.samples)
            warnings = list(store.warnings)
        for warning in warnings:
            self.observer.warn(warning)
        return parts
