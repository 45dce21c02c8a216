"""Fine-tuning with `data.folds`: candidates are compared out of fold, and the one that is kept learns from all photos.

    activations of all photos, once -> for every training of the list and every fold: upper part and head learn from the
    other folds, and every candidate answers for this one
    -> frozen, tuned, or between, by the out-of-fold answers -> that training once more, on all photos

The final training has no validation photos: how long it lasts and how far it goes was chosen out of fold. A training
that is finished is read from its checkpoint, so a resumed run goes on in the fold in which it was killed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli.backbones import build
from finetune_cli.config.schema import Config
from finetune_cli.head import out_of_fold
from finetune_cli.head.data import Rows
from finetune_cli.head.lbfgs import Head
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.progress import Observer, timed
from finetune_cli.training import fit, unknown
from finetune_cli.training.extract import Features, release, scratch_array
from finetune_cli.training.fit import Fitted
from finetune_cli.training.prepare import Prepared
from finetune_cli.training.tuning import candidates, inputs
from finetune_cli.training.tuning.activations import Part, Source
from finetune_cli.training.tuning.candidates import Candidate, Validation
from finetune_cli.training.tuning.stage import FROZEN_IS_KEPT, EpochRow, Outcome, Place, Stage, Task, Tried
from finetune_cli.training.tuning.upper import (
    Diverged,
    Labelled,
    Upper,
    Weights,
    interpolated,
    with_head,
)
from finetune_cli.training.unknown import FoldFeatures


@dataclass(frozen=True, eq=False)
class _Tried(Tried):
    """A training of the list in all folds: no candidates if it diverged in one of them.

    l2: with which the head is fitted once more; None if it was not.
    """

    l2: float | None = None


@dataclass(frozen=True, eq=False)
class _Final:
    """The model that is kept, after it has learned from all photos: the backbone has its weights."""

    head: Head
    l2: float
    history: tuple[EpochRow, ...]
    facts: dict[str, Any]
    folds: tuple[FoldFeatures, ...]


def run(prepared: Prepared, fitted: Fitted, checkpoint_folder: Path, training_id: str, observer: Observer) -> Outcome:
    """As `stage.run`, where `fitted` also has the frozen heads of all folds. Raises the same."""
    stage = Stage(prepared, prepared.validating, checkpoint_folder, training_id, observer)
    release(prepared.parts["train"].array)  # of the frozen backbone, which only the fits of the heads read
    folds = _Folds(stage, fitted)
    assert fitted.out_of_fold is not None
    frozen = folds.candidate(fitted.out_of_fold)
    tried = stage.in_order(folds.attempt, frozen)
    tuned = [each for training in tried for each in training.candidates]
    kept = candidates.choose(frozen, tuned)
    final = None if kept.training is None else folds.final(kept, tried[kept.training])
    trainings, history = [each.facts for each in tried], [row for each in tried for row in each.history]
    if final is None:
        kept = frozen
    else:
        trainings.append(final.facts)
        history += final.history
    document = {
        "kept": kept.name,
        "folds": folds.count,
        "frozen_fingerprint": prepared.keras_backbone.fingerprint,
        "trainings": trainings,
        "candidates": [each.to_json(frozen, each is kept) for each in (frozen, *tuned)],
    }
    prepared.keras_backbone.model.trainable = False
    if final is None:
        observer.note(FROZEN_IS_KEPT)
        return Outcome(
            prepared.keras_backbone, prepared.parts, fitted, None, document, tuple(history), prepared.held_out
        )
    backbone = build.with_changed_weights(prepared.keras_backbone)
    observer.note(
        f"fine-tuning: kept is {kept.name}; out-of-fold log loss {kept.log_loss:.3f}, frozen {frozen.log_loss:.3f}"
    )
    parts, held_out = stage.features_of(backbone)
    ended = replace(fitted, head=final.head, l2=final.l2, out_of_fold=folds.of_all(kept.logits), fold_heads={})
    return Outcome(backbone, parts, ended, kept.training, document, tuple(history), held_out, final.folds)


class _Folds:
    """The folds of a run, and the frozen heads that its trainings begin with."""

    def __init__(self, stage: Stage, fitted: Fitted) -> None:
        config, samples = stage.prepared.config, stage.train.samples
        assert config.data.folds is not None
        self.stage, self.fitted, self.count = stage, fitted, config.data.folds
        self.of_photo = np.array([sample.fold or 0 for sample in samples], np.int64)
        self.numbers = out_of_fold.numbers(self.of_photo)
        self.judged = np.flatnonzero(self.of_photo)
        groups = group_numbers((sample.group, sample.digest) for sample in samples)[self.judged]
        self.validation = Validation(
            stage.labels[self.judged], groups, config.calibration == "temperature", config.data.folds
        )

    def candidate(
        self, logits: Rows, training: int | None = None, share: float = 0.0, refitted: bool = False
    ) -> Candidate:
        """See `Validation.candidate`; logits: ``(n, C)`` of all training photos."""
        return self.validation.candidate(logits[self.judged], training, share, refitted)

    def of_all(self, logits: Rows) -> Rows:
        """Logits of the photos that are held out once as those of all training photos, NaN for the others."""
        whole = self._no_logits()
        whole[self.judged] = logits
        return whole

    def attempt(self, number: int, before: Sequence[float]) -> _Tried:
        """A training of the list in all folds, and its candidates. The backbone has its old weights again afterwards.

        before: the best log loss of each earlier training. Only for one that is better than those the head is fitted
        once more, which takes as long as some epochs.
        """
        stage, trial = self.stage, self.stage.trials[number]
        place = stage.place(trial)
        model = inputs.upper(place.cut, self.fitted.head, stage.prepared.device)
        frozen = model.weights()
        facts = stage.facts(trial, place, frozen) | {"folds": self.count}
        logits = {share: self._no_logits() for share in (*candidates.SHARES, 1.0)}
        histories: list[Sequence[Mapping[str, float]]] = []
        try:
            for fold in self.numbers:
                others, own = self._sides(fold)
                start = with_head(frozen, self.fitted.fold_heads[fold])
                model.assign(start)
                held_out = Labelled(Part(place.val, own), stage.labels[own], np.ones(len(own)))
                task = self._task(number, fold)
                state = stage.trained(task, trial, model, stage.learnt(place.train, others), held_out)
                histories.append(state.history)
                for share, pooled in logits.items():
                    model.assign(interpolated(start, state.weights, share))
                    pooled[own] = model.head().logits(model.features(held_out.source, 1)[:, 0])
        except Diverged as exc:
            stage.observer.warn(f"{exc.problem}; nothing of this training is kept: {exc.remedy}")
            model.assign(frozen)
            return _Tried((), (), {**facts, "diverged": True})
        facts["batch_size"] = min(int(history[-1]["batch_size"]) for history in histories)
        scored = [self.candidate(pooled, number, share) for share, pooled in logits.items()]
        l2: float | None = None
        if min(each.log_loss for each in scored) < min(before, default=math.inf):
            with timed(stage.prepared.seconds, "head again"):
                pooled, l2 = self._heads_again(number, model, frozen, place)
            scored.append(self.candidate(pooled, number, 1.0, refitted=True))
        model.assign(frozen)
        return _Tried(tuple(scored), tuple(self._mean(number, histories)), facts, l2)

    def final(self, kept: Candidate, tried: _Tried) -> _Final | None:
        """The training that `kept` comes from, on all photos; None if it diverges, the frozen weights are back then."""
        assert kept.training is not None
        stage, trial = self.stage, self.stage.trials[kept.training]
        place = stage.place(trial)
        model = inputs.upper(place.cut, self.fitted.head, stage.prepared.device)
        start = model.weights()
        folds: tuple[FoldFeatures, ...] = ()
        if stage.prepared.config.unknown is not None:
            folds = tuple(self._fold_features(kept, model, start, place))
            model.assign(start)
        facts = stage.facts(trial, place, start) | {"final": True}
        name = f"fine-tuning on all photos ({trial.unfreeze} at {trial.learning_rate:g})"
        task = Task("tuning-final", name, "fine-tuning (on all photos)")
        try:
            state = stage.trained(task, trial, model, stage.learnt(place.train), None)
        except Diverged as exc:
            stage.observer.warn(f"{exc.problem}, though it did not without the folds; {exc.remedy}")
            model.assign(start)
            return None
        facts["batch_size"] = state.batch_size
        model.assign(interpolated(start, state.weights, kept.share))
        head, l2 = model.head(), self.fitted.l2
        if kept.refitted and tried.l2 is not None:
            with timed(stage.prepared.seconds, "head again"):
                head, l2 = self._head_again(model, place.train, place, stage.train, tried.l2).head, tried.l2
        rest = {"training": len(stage.trials), "val_loss": None, "val_accuracy": None}
        history = tuple({**row, **rest} for row in state.history)
        return _Final(head, l2, history, facts, folds)

    def _sides(self, fold: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The photos that are learned from when `fold` is held out, and those of `fold`."""
        return np.flatnonzero(self.of_photo != fold), np.flatnonzero(self.of_photo == fold)

    def _no_logits(self) -> Rows:
        return np.full((len(self.of_photo), len(self.stage.prepared.data.classes)), np.nan, np.float32)

    def _task(self, number: int, fold: int) -> Task:
        return Task(
            f"tuning-{number}-fold-{fold}",
            f"{self.stage.title(number)}, fold {fold} of {self.count}",
            f"fine-tuning (without fold {fold})",
        )

    def _assign(self, number: int, fold: int, share: float, model: Upper, frozen: Weights) -> None:
        """Give `model` the weights of a finished training: `share` of the way from where it began."""
        state = self.stage.resumed(self._task(number, fold))
        assert state is not None
        model.assign(interpolated(with_head(frozen, self.fitted.fold_heads[fold]), state.weights, share))

    def _heads_again(self, number: int, model: Upper, frozen: Weights, place: Place) -> tuple[Rows, float]:
        """Out-of-fold logits of the heads that are fitted once more in every fold, and the l2 for the final one.

        Each fold chooses its l2 by the photos that it learns from alone; the final head gets the median.
        """
        train, logits, chosen = self.stage.train, self._no_logits(), []
        for fold in self.numbers:
            self._assign(number, fold, 1.0, model, frozen)
            others, own = self._sides(fold)
            samples = tuple(train.samples[i] for i in others)
            again = self._head_again(model, Part(place.train, others), place, replace(train, samples=samples))
            logits[own] = again.head.logits(model.features(Part(place.val, own), 1)[:, 0])
            chosen.append(again.l2)
        return logits, float(np.median(chosen))

    def _head_again(self, model: Upper, source: Source, place: Place, of: Features, l2: float | None = None) -> Fitted:
        """The head on the features of the photos `of` by the upper part as it is now, always by L-BFGS.

        Adam and SGD would need photos that say when to stop. l2: by default as the config has it.
        """
        config = _without_folds(self.stage.prepared.config, l2)
        tuned = self.stage.tuned_features(model, source, place, of)
        return fit.lbfgs(config, tuned, self.stage.prepared.data.classes, None, self.stage.observer)

    def _fold_features(self, kept: Candidate, model: Upper, frozen: Weights, place: Place) -> Iterator[FoldFeatures]:
        """What `unknown` knows of every fold: features by the backbone of `kept` that learned without it."""
        assert kept.training is not None
        folder, width = self.stage.prepared.settings.cache.scratch, model.model.output_shape[-1]
        for rows, outside in unknown.by_fold(self.stage.train.samples):
            self._assign(kept.training, int(self.of_photo[rows[0]]), kept.share, model, frozen)
            found = [
                model.features(Part(source, photos), 1, scratch_array(folder, (len(photos), 1, width)))[:, 0]
                for source, photos in ((place.val, rows), (place.train, outside))
            ]
            yield FoldFeatures(rows, outside, *found)

    def _mean(self, number: int, histories: Sequence[Sequence[Mapping[str, float]]]) -> Iterator[EpochRow]:
        """A row for each epoch: the means of the folds' trainings, and the validation scores of all photos."""
        sizes = [int((self.of_photo == fold).sum()) for fold in self.numbers]
        for rows in zip(*histories, strict=True):
            yield {
                "training": number,
                "epoch": rows[0]["epoch"],
                **{name: float(np.mean([row[name] for row in rows])) for name in ("loss", "accuracy")},
                **{
                    name: float(np.average([row[name] for row in rows], weights=sizes))
                    for name in ("val_loss", "val_accuracy")
                },
                "batch_size": min(row["batch_size"] for row in rows),
                "seconds": round(sum(row["seconds"] for row in rows), 3),
            }


def _without_folds(config: Config, l2: float | None) -> Config:
    """`config` for the photos of some folds, which are not dealt into folds again."""
    training = config.training if l2 is None else config.training.model_copy(update={"l2": l2})
    return config.model_copy(update={"data": config.data.model_copy(update={"folds": None}), "training": training})
