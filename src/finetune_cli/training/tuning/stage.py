"""The fine-tuning stage of a training: from a fitted head on a frozen backbone to the best model that was found.

    activations at the cut, once -> upper part and head, epoch by epoch -> the head once more on the tuned features
    -> frozen, tuned, or between, by the validation photos -> the features of the tuned backbone, through the cache

The backbone's own layers learn, so the backbone that goes in is the tuned one afterwards, or has its old weights again.
With `data.folds`, `folds.py` does this.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.backbones import build
from finetune_cli.backbones.build import Backbone
from finetune_cli.cache.features import FeatureStore
from finetune_cli.errors import CheckpointError, StorageError
from finetune_cli.head.data import class_weights
from finetune_cli.head.keras_fit import fit_epochs
from finetune_cli.head.lbfgs import Head
from finetune_cli.inference import runtimes
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.photos.dataset import Dataset
from finetune_cli.progress import Observer, timed
from finetune_cli.runs import checkpoints
from finetune_cli.training import fit
from finetune_cli.training.extract import Features, release, scratch_array
from finetune_cli.training.extractor import Extractor
from finetune_cli.training.fit import Fitted, labels_of
from finetune_cli.training.prepare import Prepared, as_held_out
from finetune_cli.training.settings import Settings
from finetune_cli.training.start_from import AnyBackbone
from finetune_cli.training.tuning import candidates, inputs, plan
from finetune_cli.training.tuning.activations import Part, Source
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
from finetune_cli.training.unknown import MOST_REFERENCES, FoldFeatures, choosing

# Of tuning.csv: the number of the training, and what `UpperState.history` has; None for what was not measured.
EpochRow = Mapping[str, float | None]
FROZEN_IS_KEPT = "fine-tuning: no other model is better than the frozen one by more than chance, so that is kept"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the stage ends with: the backbone to save, every photo's features of it, and the head on them (`fitted`).

    training: the number of the training that the backbone comes from; None for the frozen one. facts: what was tried
    and what was kept, as JSON values. history: a row for each epoch of each training, with its number in `training`.
    held_out: see `Prepared`. folds: for `unknown`, the features of every fold by the backbone that was tuned without
    it; empty if they are those of `parts`, or not needed.
    """

    backbone: Backbone
    parts: dict[str, Features]
    fitted: Fitted
    training: int | None
    facts: dict[str, Any]
    history: tuple[EpochRow, ...]
    held_out: Features | None = None
    folds: tuple[FoldFeatures, ...] = ()


@dataclass(frozen=True, eq=False)
class Tried:
    """A training of the list, and what came of it: no candidates if it diverged."""

    candidates: tuple[Candidate, ...]
    history: tuple[EpochRow, ...]
    facts: dict[str, Any]

    @property
    def best(self) -> float:
        """The lowest validation log loss of the models whose head was not fitted again."""
        return min((each.log_loss for each in self.candidates if not each.refitted), default=math.inf)


AnyTried = TypeVar("AnyTried", bound=Tried)


@dataclass(frozen=True, eq=False)
class _Trained(Tried):
    """A finished training: the weights that it began and ended with.

    `again`: the head that was fitted once more on its features; None if it was not.
    """

    upper: Upper
    start: Weights
    end: Weights
    again: Fitted | None


def checked(settings: Settings) -> Callable[[Dataset, AnyBackbone], None]:
    """A check for `prepare` to make before hours of work: that the network can be cut, and that the disk has room.

    It raises `ConfigError` and `StorageError`.
    """

    def check(data: Dataset, backbone: AnyBackbone) -> None:
        config, section = settings.config, settings.config.fine_tuning
        if section is None:
            return
        assert isinstance(backbone, Backbone)  # as `changes_backbone` says
        train, views, folds = len(data.train), settings.augmenter.views, config.data.folds or 0
        val = train if folds else len(data.val)
        counts, device = Counts(train, views, val), settings.device
        # The features of the frozen and of the tuned backbone, each in the cache and at hand; the head's second fit.
        row = 4 * backbone.width
        needed = 4 * row * (train * views + val + len(data.test)) + row * train * views
        if folds and config.unknown is not None:
            needed += row * (train + folds * min(train, MOST_REFERENCES))
        checkpoints_needed = scratch = 0
        for trial in plan.trials(section, train):
            part = cut(backbone.model, trial.unfreeze)
            # The scratch files of one cut are gone before those of the next one are made.
            scratch = max(scratch, plan.store(part, trial.epochs, device, counts, plan.limit(section)).bytes)
            # Up to three checkpoints, each with the weights and both moments of AdamW; later the weights alone.
            weights = 4 * part.upper.count_params()
            checkpoints_needed += 3 * 3 * weights + folds * weights
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
    val = choosing(prepared.parts["val"], prepared.config)
    stage = Stage(prepared, val, checkpoint_folder, training_id, observer)
    release(prepared.parts["train"].array)  # of the frozen backbone, which only the fit of the head read
    groups = group_numbers((sample.group, sample.digest) for sample in val.samples)
    validation = Validation(stage.val_labels, groups, prepared.config.calibration == "temperature")
    frozen = validation.candidate(fitted.head.logits(val.array[:, 0]))
    trained = stage.in_order(functools.partial(_attempt, stage, fitted.head, validation), frozen)
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
        observer.note(FROZEN_IS_KEPT)
        return Outcome(prepared.keras_backbone, prepared.parts, fitted, None, document, history)
    winner = trained[kept.training]
    winner.upper.assign(interpolated(winner.start, winner.end, kept.share))
    backbone = build.with_changed_weights(prepared.keras_backbone)
    observer.note(
        f"fine-tuning: kept is {kept.name}; validation log loss {kept.log_loss:.3f}, frozen {frozen.log_loss:.3f}"
    )
    parts, _held_out = stage.features_of(backbone)
    if kept.refitted and winner.again is not None:
        ended = replace(fitted, head=winner.again.head, l2=winner.again.l2)
    else:
        ended = replace(fitted, head=winner.upper.head())
    return Outcome(backbone, parts, ended, kept.training, document, history)


def _attempt(stage: "Stage", head: Head, validation: Validation, number: int, before: Sequence[float]) -> _Trained:
    """A training of the list, which begins with `head`, and its candidates. The backbone has its old weights again
    afterwards.

    before: the best log loss of each earlier training. Only for one that is better than those the head is fitted
    once more, which takes as long as some epochs.
    """
    trial, seconds = stage.trials[number], stage.prepared.seconds
    place = stage.place(trial)
    model = inputs.upper(place.cut, head, stage.prepared.device)
    start = model.weights()
    facts = stage.facts(trial, place, start)
    val = Labelled(place.val, stage.val_labels, np.ones(len(stage.val_labels)))
    try:
        state = stage.trained(
            Task(f"tuning-{number}", stage.title(number), "fine-tuning"), trial, model, stage.learnt(place.train), val
        )
    except Diverged as exc:
        stage.observer.warn(f"{exc.problem}; nothing of this training is kept: {exc.remedy}")
        model.assign(start)
        return _Trained((), (), {**facts, "diverged": True}, model, start, start, None)
    facts["batch_size"] = state.batch_size
    scored = []
    for share in (*candidates.SHARES, 1.0):
        model.assign(interpolated(start, state.weights, share))
        features = model.features(val.source, 1)[:, 0]
        scored.append(validation.candidate(model.head().logits(features), number, share))
    again: Fitted | None = None
    if min(each.log_loss for each in scored) < min(before, default=math.inf):
        with timed(seconds, "head again"):
            again = _head_again(stage, model, place, features)
        scored.append(validation.candidate(again.head.logits(features), number, 1.0, refitted=True))
    model.assign(start)
    rows = tuple({"training": number, **row} for row in state.history)
    return _Trained(tuple(scored), rows, facts, model, start, state.weights, again)


def _head_again(stage: "Stage", model: Upper, place: "Place", val_features: NDArray[np.float32]) -> Fitted:
    """The head by the configured solver, on the features of the upper part as it is now."""
    config, classes = stage.prepared.config, stage.prepared.data.classes
    tuned = stage.tuned_features(model, place.train, place, stage.train)
    if config.training.solver == "lbfgs":
        return fit.lbfgs(config, tuned, classes, None, stage.observer)
    l2 = fit.chosen_l2(config, tuned, classes, stage.observer)
    val = fit.validation_data(replace(stage.val, array=val_features[:, None]), classes)
    *_, state = fit_epochs(fit.head_data(config, tuned, classes), val, fit.keras_settings(config, l2))
    return Fitted(state.best, l2, state.history)


@dataclass(frozen=True, slots=True)
class Task:
    """What a training is called: its folder below `checkpoints/`, its name as a stage, and in notes."""

    folder: str
    stage: str
    note: str


@dataclass(frozen=True, eq=False)
class Place:
    """A cut with its activations: of the training photos, and of the validation photos."""

    cut: Cut
    store: Store
    train: Source
    val: Source


class Stage:
    """What all trainings of the stage share.

    val: the photos that validate and choose.
    """

    def __init__(
        self, prepared: Prepared, val: Features, checkpoint_folder: Path, training_id: str, observer: Observer
    ) -> None:
        assert prepared.config.fine_tuning is not None
        self.section = prepared.config.fine_tuning
        self.prepared, self.observer = prepared, observer
        self.checkpoint_folder, self.training_id = checkpoint_folder, training_id
        self.train, self.val = prepared.parts["train"], val
        self.labels, self.val_labels = labels_of(self.train.samples), labels_of(val.samples)
        self.weights = class_weights(self.labels, prepared.config.training.class_weights, prepared.data.classes)
        self.trials = plan.trials(self.section, len(self.train.samples))
        self.counts = Counts(len(self.train.samples), prepared.settings.augmenter.views, len(self.val.samples))
        self.policy = runtimes.training_policy(prepared.device, prepared.precision)
        self.extractor = Extractor(prepared.settings, prepared.backbone, prepared.device, prepared.precision, observer)
        self._latest: tuple[tuple[str, Store], Inputs] | None = None

    def in_order(self, attempt: Callable[[int, Sequence[float]], AnyTried], frozen: Candidate) -> list[AnyTried]:
        """The trainings of the list, up to the first of which something is better than `frozen`.

        The later ones are for photos that this one is wrong for. attempt: gets the number of a training, and the
        `best` of each one before it.
        """
        tried: list[AnyTried] = []
        for number in range(len(self.trials)):
            tried.append(attempt(number, [each.best for each in tried]))
            if candidates.choose(frozen, tried[-1].candidates) is not frozen:
                break
        return tried

    def title(self, number: int) -> str:
        """What the training of that number is called as a stage."""
        trial, most = self.trials[number], len(self.trials)
        of = f"at most {most}" if most > 1 else "1"
        return f"fine-tuning {number + 1} of {of} ({trial.unfreeze} at {trial.learning_rate:g})"

    def place(self, trial: Trial) -> Place:
        """Where `trial` begins, with the activations, which are those of the training before if they are the same."""
        part = cut(self.prepared.keras_backbone.model, trial.unfreeze)
        store = plan.store(part, trial.epochs, self.prepared.device, self.counts, plan.limit(self.section))
        if self._latest is None or self._latest[0] != (part.below, store):
            self._latest = None  # so that the space of its scratch files is free for the next ones
            with timed(self.prepared.seconds, "activations"):
                found = inputs.of_cut(self.extractor, self.train.samples, self.val.samples, part, store)
            self._latest = (part.below, store), found
        return Place(part, store, self._latest[1].train, self._latest[1].val)

    def learnt(self, source: Source, photos: NDArray[np.intp] | None = None) -> Labelled:
        """What is learned from: `source` holds all training photos, of which `photos` are taken, by default all."""
        if photos is None:
            return Labelled(source, self.labels, self.weights)
        return Labelled(Part(source, photos), self.labels[photos], self.weights[photos])

    def trained(self, task: Task, trial: Trial, model: Upper, train: Labelled, val: Labelled | None) -> UpperState:
        """The last state of a training, gone on with from its newest checkpoint.

        Its optimizer is left out: nothing depends on it any more. Raises `Diverged`.
        """
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
        folder = self.checkpoint_folder / task.folder
        with (
            timed(self.prepared.seconds, "fine-tuning"),
            self.observer.stage(task.stage, trial.epochs, "epochs") as advance,
        ):
            state = self.resumed(task)
            if state is not None:
                self.observer.note(f"{task.note}: resuming after epoch {state.epoch}")
                advance(state.epoch)
                if state.epoch == trial.epochs:
                    return state
            for each in model.train(train, val, settings, state, self.observer.warn):
                last = each.epoch == trial.epochs
                state = replace(each, optimizer=()) if last else each
                facts = {"history": list(state.history), "training_id": self.training_id}
                saved = checkpoints.save(folder, state.epoch, state.arrays(), facts, best=True)
                if last:
                    checkpoints.keep_only(saved)
                self.observer.note(f"{task.note} epoch {state.epoch}/{trial.epochs}: {_scores(state.history[-1])}")
                advance(1)
        assert state is not None
        return state

    def resumed(self, task: Task) -> UpperState | None:
        """The state of the newest checkpoint of a training, None before the first."""
        last = checkpoints.latest_of(self.checkpoint_folder / task.folder, self.training_id, self.observer)
        if last is None:
            return None
        try:
            return UpperState.restore(last.epoch, last.arrays, last.state["history"])
        except (KeyError, TypeError) as exc:
            raise CheckpointError(f"{last.path} is damaged: it lacks {exc}", f"remove {last.path}") from exc

    def tuned_features(self, model: Upper, source: Source, place: Place, of: Features) -> Features:
        """`of` with the features of the upper part as it is now, on which the head is fitted once more.

        source: the activations of these photos.
        """
        shape = (source.shape[0], plan.views_again(place.store, self.counts), model.model.output_shape[-1])
        array = model.features(source, shape[1], scratch_array(self.prepared.settings.cache.scratch, shape))
        release(array)
        return replace(of, array=array)

    def facts(self, trial: Trial, place: Place, weights: Sequence[NDArray[Any]]) -> dict[str, Any]:
        """A training, as JSON values."""
        return {
            "unfreeze": trial.unfreeze,
            "last_frozen": place.cut.below,
            "first_trained": place.cut.above,
            "activations": list(place.cut.shape),
            "weights": sum(int(array.size) for array in weights),
            "learning_rate": trial.learning_rate,
            "epochs": trial.epochs,
            "batch_size": self.section.batch_size,
            "policy": self.policy,
            "views": place.store.views,
            "storage": place.store.storage,
            "scratch_bytes": place.store.bytes,
            "diverged": False,
        }

    def features_of(self, backbone: Backbone) -> tuple[dict[str, Features], Features | None]:
        """The features of all photos by the tuned `backbone`, made as the frozen one's; and `Prepared.held_out`."""
        settings = self.prepared.settings
        extractor = replace(self.extractor, backbone=backbone)
        parts: dict[str, Features] = {}
        held_out: Features | None = None
        with (
            timed(self.prepared.seconds, "tuned features"),
            FeatureStore(settings.cache.path, settings.cache.writable) as store,
        ):
            for split, part in self.prepared.parts.items():
                parts[split] = extractor(store, split, part.samples)
            if self.prepared.held_out is not None:
                held_out = as_held_out(extractor, store, parts["train"])
            warnings = list(store.warnings)
        for warning in warnings:
            self.observer.warn(warning)
        release(parts["train"].array)
        return parts, held_out


def _scores(row: Mapping[str, float]) -> str:
    """A row of the history in words."""
    text = f"loss {row['loss']:.4f}, accuracy {row['accuracy']:.1%}"
    if "val_loss" in row:
        text += f", validation loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.1%}"
    return text
