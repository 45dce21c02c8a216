"""The fine-tuning stage of a training: from a fitted head on a frozen backbone to the best model that was found.

    activations at the cut, once -> upper part and head, epoch by epoch -> the head once more on the tuned features
    -> frozen, tuned, or between, by the validation photos -> the features of the tuned backbone, through the cache

The backbone's own layers learn, so the backbone that goes in is the tuned one afterwards, or has its old weights again.
"""

import math
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
from finetune_cli.errors import CheckpointError, StorageError
from finetune_cli.head.data import class_weights
from finetune_cli.head.keras_fit import fit_epochs
from finetune_cli.inference import runtimes
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.photos.dataset import Dataset
from finetune_cli.progress import Observer, timed
from finetune_cli.runs import checkpoints
from finetune_cli.training import fit
from finetune_cli.training.extract import Features, release, scratch_array
from finetune_cli.training.extractor import Extractor
from finetune_cli.training.fit import Fitted, labels_of
from finetune_cli.training.prepare import Prepared
from finetune_cli.training.settings import Settings
from finetune_cli.training.start_from import AnyBackbone
from finetune_cli.training.tuning import candidates, inputs, plan
from finetune_cli.training.tuning.activations import Source
from finetune_cli.training.tuning.candidates import Candidate, Validation
from finetune_cli.training.tuning.cuts import Cut, cut
from finetune_cli.training.tuning.inputs import Inputs
from finetune_cli.training.tuning.plan import Counts, Store, Trial
from finetune_cli.training.tuning.upper import (
    Diverged,
    Labelled,
    Upper,
    UpperSettings,
    UpperState,
    Weights,
    interpolated,
)
from finetune_cli.training.unknown import choosing


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the stage ends with: the backbone to save, every photo's features of it, and the head on them (`fitted`).

    training: the number of the training that the backbone comes from; None for the frozen one. facts: what was tried
    and what was kept, as JSON values. history: a row for each epoch of each training, with its number in `training`.
    """

    backbone: Backbone
    parts: dict[str, Features]
    fitted: Fitted
    training: int | None
    facts: dict[str, Any]
    history: tuple[dict[str, float], ...]


@dataclass(frozen=True, eq=False)
class _Trained:
    """A finished training: the weights that it began and ended with, and what came of it; nothing if it diverged.

    `l2`: with which the head was fitted once more on its features; None if it was not.
    """

    upper: Upper
    start: Weights
    end: Weights
    l2: float | None
    candidates: tuple[Candidate, ...]
    history: tuple[dict[str, float], ...]
    facts: dict[str, Any]

    @property
    def best(self) -> float:
        """The lowest validation log loss of the models whose head was not fitted again."""
        return min((each.log_loss for each in self.candidates if not each.refitted), default=math.inf)


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
        counts, device = Counts(train, views, val), settings.device
        # The features of the frozen and of the tuned backbone, each in the cache and at hand; the head's second fit.
        row = 4 * backbone.width
        needed = 4 * row * (train * views + val + len(data.test)) + row * train * views
        checkpoints_needed = scratch = 0
        for trial in plan.trials(section, train):
            part = cut(backbone.model, trial.unfreeze)
            # The scratch files of one cut are gone before those of the next one are made.
            scratch = max(scratch, plan.store(part, trial.epochs, device, counts, plan.limit(section)).bytes)
            # Up to three checkpoints, each with the weights and both moments of AdamW.
            checkpoints_needed += 3 * 3 * 4 * part.upper.count_params()
        files.free_space_check(config.output.directory, checkpoints_needed)
        try:
            files.free_space_check(settings.cache.scratch, needed + scratch)
        except StorageError as exc:
            exc.remedy = f"{exc.remedy} (runtime.cache_dir), or lower fine_tuning.scratch_gb"
            raise

    return check


def run(prepared: Prepared, fitted: Fitted, checkpoint_folder: Path, training_id: str, observer: Observer) -> Outcome:
    """Fine-tune the backbone of `prepared`, on which the head `fitted` is the best frozen one.

    `training_id`: what only the checkpoints of this training share. After a kill it resumes from those, to the same
    bits.
    Raises `ConfigError` for a layer that cannot be cut at, `StorageError` when the scratch files have no room,
    `Interrupted` after a signal.
    """
    stage = _Stage(prepared, fitted, checkpoint_folder, training_id, observer)
    release(prepared.parts["train"].array)  # of the frozen backbone, which only the fit of the head read
    frozen = stage.validation.candidate(fitted.head, stage.val.array[:, 0])
    trained: list[_Trained] = []
    for number, trial in enumerate(stage.trials):
        trained.append(stage.attempt(number, trial, [each.best for each in trained]))
        # The later ones are for photos that this one is wrong for.
        if candidates.choose(frozen, trained[-1].candidates) is not frozen:
            break
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
        return Outcome(prepared.keras_backbone, prepared.parts, fitted, None, document, history)
    winner = trained[kept.training]
    winner.upper.assign(interpolated(winner.start, winner.end, kept.share))
    backbone = build.with_changed_weights(prepared.keras_backbone)
    observer.note(
        f"fine-tuning: kept is {kept.name}; validation log loss {kept.log_loss:.3f}, frozen {frozen.log_loss:.3f}"
    )
    with timed(prepared.seconds, "tuned features"):
        parts = stage.features_of(backbone)
        release(parts["train"].array)
    l2 = winner.l2 if kept.refitted and winner.l2 is not None else fitted.l2
    ended = replace(fitted, head=kept.head, l2=l2)
    return Outcome(backbone, parts, ended, kept.training, document, history)


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
        self.counts = Counts(len(self.train.samples), prepared.settings.augmenter.views, len(self.val.samples))
        self.policy = runtimes.training_policy(prepared.device, prepared.precision)
        self.extractor = Extractor(prepared.settings, prepared.backbone, prepared.device, prepared.precision, observer)
        self._latest: tuple[tuple[str, Store], Inputs] | None = None

    def attempt(self, number: int, trial: Trial, before: Sequence[float]) -> _Trained:
        """One training and its candidates. The backbone has its old weights again afterwards.

        before: the best log loss of each earlier training. Only for one that is better than those the head is fitted
        once more, which takes as long as some epochs.
        """
        part = cut(self.prepared.keras_backbone.model, trial.unfreeze)
        store = plan.store(part, trial.epochs, self.prepared.device, self.counts, plan.limit(self.section))
        with timed(self.prepared.seconds, "activations"):
            found = self._inputs_at(part, store)
        train, val = found.train, found.val
        model = inputs.upper(part, self.fitted.head, self.prepared.device)
        start = model.weights()
        facts = self._facts(trial, part, store, start)
        try:
            with timed(self.prepared.seconds, "fine-tuning"):
                state = self._trained(number, trial, model, train, val)
        except Diverged as exc:
            self.observer.warn(f"{exc.problem}; nothing of this training is kept: {exc.remedy}")
            model.assign(start)
            return _Trained(model, start, start, None, (), (), {**facts, "diverged": True})
        facts["batch_size"] = state.batch_size
        scored = []
        for share in (*candidates.SHARES, 1.0):
            model.assign(interpolated(start, state.weights, share))
            features = model.features(val, 1)[:, 0]
            scored.append(self.validation.candidate(model.head(), features, number, share))
        l2: float | None = None
        if min(each.log_loss for each in scored) < min(before, default=math.inf):
            with timed(self.prepared.seconds, "head again"):
                again = self._head_again(model, train, plan.views_again(store, self.counts), features)
            scored.append(self.validation.candidate(again.head, features, number, 1.0, refitted=True))
            l2 = again.l2
        model.assign(start)
        rows = tuple({"training": number, **row} for row in state.history)
        return _Trained(model, start, state.weights, l2, tuple(scored), rows, facts)

    def _inputs_at(self, part: Cut, store: Store) -> Inputs:
        """The inputs at `part`, those of the training before if they are the same."""
        if self._latest is None or self._latest[0] != (part.below, store):
            self._latest = None  # so that the space of its scratch files is free for the next ones
            found = inputs.of_cut(self.extractor, self.train.samples, self.val.samples, part, store)
            self._latest = (part.below, store), found
        return self._latest[1]

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
            self.policy,
        )
        folder = self.checkpoint_folder / f"tuning-{number}"
        state = self._resumed(folder)
        learnt = Labelled(train, self.labels, self.weights)
        judged = Labelled(val, self.val_labels, np.ones(len(self.val_labels)))
        most = len(self.trials)
        of = f"at most {most}" if most > 1 else "1"
        name = f"fine-tuning {number + 1} of {of} ({trial.unfreeze} at {trial.learning_rate:g})"
        with self.observer.stage(name, trial.epochs, "epochs") as advance:
            if state is not None:
                advance(state.epoch)
            for each in model.train(learnt, judged, settings, state, self.observer.warn):
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
        release(array)
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
            "policy": self.policy,
            "views": store.views,
            "storage": store.storage,
            "scratch_bytes": store.bytes,
            "diverged": False,
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
