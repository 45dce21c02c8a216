"""`train`: photos -> features -> head -> a finished run directory.

The stages: preflight (headers and digests), the feature pass, the head, fine-tuning if it is asked for, calibration,
and the proof that the saved model gives the same probabilities. Nothing exists under the output directory before all
photos were decoded, and `run.json` is written last.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from finetune_cli import files, storage
from finetune_cli.config.schema import Config
from finetune_cli.drawing import figures
from finetune_cli.errors import Interrupted
from finetune_cli.fields import Fields
from finetune_cli.head import classifier, finished, out_of_fold
from finetune_cli.head.data import Rows
from finetune_cli.head.keras_fit import EpochState, fit_epochs
from finetune_cli.head.keras_folds import FoldsState, fit_folds_by_epochs
from finetune_cli.head.lbfgs import Head
from finetune_cli.inference import runtimes
from finetune_cli.metrics.calibration import cross_fitted_calibration, fit_temperature, softmax32
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.metrics.scores import evaluate, of_folds, without
from finetune_cli.photos import scan
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Observer, timed
from finetune_cli.runs import run
from finetune_cli.runs import start as start_record
from finetune_cli.runs.manifest import Backbone, Manifest, Parity, SkippedPhoto, Solver, SplitMetrics, Views
from finetune_cli.runs.run import Run
from finetune_cli.tables import write_records
from finetune_cli.text import shown
from finetune_cli.training import fit, head_state, near, outputs, start_from, unknown
from finetune_cli.training import resume as resume_checks
from finetune_cli.training.converted import Converted
from finetune_cli.training.fit import Fitted, labels_of
from finetune_cli.training.head_state import HeadState
from finetune_cli.training.keras_process import KerasProcess
from finetune_cli.training.prepare import Prepared, evenly_spread, prepare
from finetune_cli.training.requirements import check_settings
from finetune_cli.training.settings import Settings
from finetune_cli.training.tuning import budget, comparison, folds, plan, stage

# Fewer views say nothing about how long others would take: most of their seconds are the start.
_TIMED_VIEWS = 32


@dataclass(frozen=True)
class Outcome:
    """What a training leads to; `parity` is None if no photo was compared."""

    fitted: Fitted
    temperature: float
    parity: Parity | None
    judged: tuple[outputs.ScoredSplit, ...]


def train(config: Config, observer: Observer) -> Run:
    """Train as `config` says and return the finished run, named `output.name`, or after its photos with the
    next free number.

    Raises any `FinetuneError`; whatever happens, no finished run is changed and computed features stay in the cache.
    """
    settings = check_settings(config)
    with KerasProcess("openvino") as keras:
        _start_keras(keras, settings)
        checks = stage.checked(settings), unknown.checked(config), budget.announced(settings, observer)
        prepared = prepare(settings, observer, *checks)
        start = _start(prepared, observer)
        folder = run.create(
            config.output.directory,
            config.output.name,
            run.stem(config.data.train),
            lambda temporary, folder: resume_checks.record_start(temporary, folder, prepared),
        )
        with files.lock(folder), _resumable(folder):
            return _fit_and_finish(folder, prepared, start, observer, keras)


def resume(folder: Path, config: Config, observer: Observer) -> Run:
    """Finish the unfinished run in `folder`, whose stored config (perhaps with more epochs) is `config`.

    Raises `RunError` when the run is finished already, or when its photos, classes or settings are not what they were.
    """
    files.check_writable(folder)
    with files.lock(folder), _resumable(folder), KerasProcess("openvino") as keras:
        resume_checks.check_files(folder)
        files.remove_leftovers(folder)
        settings = check_settings(config)
        _start_keras(keras, settings)
        recorded = run.read_split(folder / "split.csv")
        prepared = prepare(settings, observer, stage.checked(settings), unknown.checked(config), recorded=recorded)
        prepared.leaks = near.read_leaks(folder)
        resume_checks.check_inputs(folder, prepared, observer)
        return _fit_and_finish(folder, prepared, _start(prepared, observer), observer, keras)


def _start_keras(keras: KerasProcess, settings: Settings) -> None:
    """Start the process that proves the saved model; with a tuned backbone, that is done in this process."""
    if not settings.builds_backbone:
        keras.start()  # it is needed in the end, and takes a while to be ready


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Say how to resume when the block is interrupted."""
    try:
        yield
    except Interrupted as exc:
        exc.remedy = f"what was finished is saved; resume with: finetune train --resume {folder}"
        raise


def _fit_and_finish(
    folder: Path, prepared: Prepared, start: Head | None, observer: Observer, keras: KerasProcess
) -> Run:
    classes = prepared.data.classes
    with timed(prepared.seconds, "head"):
        fitted = _fit(folder, prepared, start, observer)
    temperature, judged = _judge(prepared, fitted)
    names = ["config.yaml", "environment.json", "split.csv", *([near.LEAKS] if prepared.leaks else [])]
    names += [run.FIXES] if prepared.data.fixes is not None else []
    tuning: dict[str, Any] | None = None
    fold_features: tuple[unknown.FoldFeatures, ...] = ()
    if prepared.config.fine_tuning is not None:
        run_stage = stage.run if prepared.config.data.folds is None else folds.run
        tuned = run_stage(prepared, fitted, folder / "checkpoints", start_record.read(folder).training_id, observer)
        before, fold_features = judged, tuned.folds
        prepared = replace(prepared, backbone=tuned.backbone, parts=tuned.parts, held_out=tuned.held_out)
        fitted = tuned.fitted
        temperature, judged = _judge(prepared, fitted)
        tuning = {**tuned.facts, "compared": comparison.compared(before, judged)}
        names += comparison.write_history(folder, tuned.history, tuned.training)
        names += comparison.write_flipped(folder, classes, before, judged)
    learnt = unknown.learn(folder, prepared, fitted, observer, fold_features)
    names += learnt.files
    if text := _below_baseline(prepared.config, judged[-1]):
        observer.warn(text)
    with timed(prepared.seconds, "saving"), observer.stage("saving and comparing the model", None, "models"):
        outcome = Outcome(fitted, temperature, None, tuple(judged))
        proof = _save_models(folder, prepared, outcome, keras)
        # While Keras loads the model in its own process:
        names += outputs.write_metrics(folder, judged, tuning, learnt.facts)
        names += outputs.write_tables(folder, classes, judged)
        names += _write_history(folder, fitted)
        names += figures.write_figures(folder, judged[-1].evaluation, fitted.history)
        parity = proof()
    names += outputs.MODELS
    outcome = replace(outcome, parity=parity)
    manifest = replace(_manifest(folder, prepared, outcome), fine_tuning=tuning, unknown=learnt.facts)
    if tuning is None and manifest.views.computed >= _TIMED_VIEWS:
        a_view = prepared.seconds["features"] / manifest.views.computed
        photos, validating = len(prepared.parts["train"].samples), len(prepared.validating.samples)
        counts = plan.Counts(photos, prepared.settings.augmenter.views, validating)
        seconds = budget.rough_seconds(prepared.backbone, prepared.config, counts, a_view)
        manifest = replace(manifest, fine_tuning_seconds=math.ceil(seconds))
    finished = run.finish(folder, manifest, names)
    if os.path.lexists(folder / "checkpoints"):
        files.remove_folder(folder / "checkpoints")
    return finished


def _judge(prepared: Prepared, fitted: Fitted) -> tuple[float, list[outputs.ScoredSplit]]:
    """The temperature of a head, and how good it is on the photos that validate it and on the test photos."""
    parts, classes = prepared.parts, prepared.data.classes
    calibrated = prepared.config.calibration == "temperature"
    measured = [_validation(prepared, fitted)]
    if "test" in parts:
        measured.append(("test", parts["test"].samples, fitted.head.logits(parts["test"].array[:, 0])))
    _split, choosing, logits = measured[0]
    if "val" in parts:
        chooses = unknown.choosing(parts["val"], prepared.config)
        choosing, logits = chooses.samples, fitted.head.logits(chooses.array[:, 0])
    temperature = fit_temperature(logits, labels_of(choosing)) if calibrated else 1.0
    judged = []
    for split, samples, logits in measured:
        labels, probabilities = labels_of(samples), softmax32(logits, temperature)
        evaluation = evaluate(probabilities, labels, classes)
        if calibrated and split != "test":  # cross-fitted, so that no photo fits the temperature that it is judged by
            groups = group_numbers((sample.group, sample.digest) for sample in samples)
            evaluation = replace(evaluation, calibration=cross_fitted_calibration(logits, labels, groups)[1])
        if split == "folds" and prepared.config.data.folds is not None:
            evaluation = of_folds(evaluation, prepared.config.data.folds)
        evaluation = without(evaluation, near.leaked(prepared.leaks, split, samples), probabilities, labels)
        judged.append(outputs.ScoredSplit(split, samples, probabilities, evaluation))
    return temperature, judged


def _validation(prepared: Prepared, fitted: Fitted) -> tuple[str, Sequence[Sample], Rows]:
    """What validates a head: the name of the part, its photos and their logits ``float32 (n, C)``.

    With `data.folds`, the training photos do, by their out-of-fold logits; `folds` is the name of that part.
    """
    if fitted.out_of_fold is None:
        val = prepared.parts["val"]
        return "val", val.samples, fitted.head.logits(val.array[:, 0])
    samples = prepared.parts["train"].samples
    held_out = [i for i, sample in enumerate(samples) if sample.fold is not None]
    return "folds", [samples[i] for i in held_out], fitted.out_of_fold[held_out]


def _below_baseline(config: Config, part: outputs.ScoredSplit) -> str | None:
    """Why the model may not beat the majority-class baseline on `part`; `None` if it does, or if it has no errors.

    With random weights, accuracy by chance is to be expected, so the whole 95 % interval must be above it.
    """
    accuracy, baseline = part.evaluation.accuracy, part.evaluation.baseline.value
    random = config.is_named_backbone and config.model.weights is None
    if (accuracy.low if random else accuracy.value) > baseline or accuracy.value == 1:
        return None
    if random:
        why = "the backbone's weights are random (model.weights: null); use pretrained ones, or efficientnet_lite0"
    elif part.split == "test":
        why = "look at the labels, and whether the test photos are like the training photos"
    else:
        why = "look at the labels (finetune check) and at what augmentation makes of the photos (finetune preview)"
    photos = {"val": "validation photos", "test": "test photos", "folds": "cross-validated photos"}[part.split]
    return (
        f"the accuracy on the {photos}, {accuracy.value:.1%}, is not clearly above that of the majority class "
        f"{shown(part.evaluation.baseline_class)!r}, {baseline:.1%}: {why}"
    )


def _fit(folder: Path, prepared: Prepared, start: Head | None, observer: Observer) -> Fitted:
    """Fit the head; in Keras, from the last checkpoint if there is one, with a new one after every epoch."""
    config, parts, classes = prepared.config, prepared.parts, prepared.data.classes
    data, held_out = fit.head_data(config, parts["train"], classes), prepared.validating.array[:, 0]
    if config.training.solver == "lbfgs":
        fitted = fit.lbfgs(config, parts["train"], classes, start, observer)
        if data.folds is None:
            return fitted
        with observer.stage("cross-validation", config.data.folds, "folds") as advance:
            heads = out_of_fold.fit_folds(data, fitted.l2, config.training.label_smoothing, advance)
        return replace(fitted, out_of_fold=out_of_fold.logits(heads, data.folds, held_out), fold_heads=heads)
    training_id = start_record.read(folder).training_id
    state: EpochState | FoldsState | None
    epochs: Iterator[EpochState | FoldsState]

    def chosen_l2() -> float:
        return fit.chosen_l2(config, parts["train"], classes, observer)

    if data.folds is None:
        last = head_state.load_latest(folder, classes, training_id, observer, EpochState)
        state, l2 = last or (None, chosen_l2())
        val = fit.validation_data(unknown.choosing(parts["val"], config), classes)
        epochs = fit_epochs(data, val, fit.keras_settings(config, l2), start, state)
    else:
        last_of_folds = head_state.load_latest(folder, classes, training_id, observer, FoldsState)
        state, l2 = last_of_folds or (None, chosen_l2())
        epochs = fit_folds_by_epochs(data, held_out, fit.keras_settings(config, l2), start, state)
    solver, most = config.training.solver, config.training.epochs
    with observer.stage(f"head ({solver})", most, "epochs") as advance:
        for state in epochs:
            HeadState(state, classes, l2, training_id).save(folder)
            observer.epoch(state.epoch, most, _epoch_line(state, most))
            advance(1)
    assert state is not None
    if text := fit.still_improving(state.history, solver, most):
        observer.warn(text)
    if isinstance(state, FoldsState):
        assert data.folds is not None
        heads = state.heads(data.folds)
        return Fitted(state.final, l2, state.history, out_of_fold.logits(heads, data.folds, held_out), heads)
    return Fitted(state.best, l2, state.history)


def _epoch_line(state: EpochState | FoldsState, epochs: int) -> str:
    row = state.history[-1]
    return (
        f"epoch {state.epoch}/{epochs}: loss {row['loss']:.4f}, accuracy {row['accuracy']:.1%}, "
        f"validation loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.1%}"
        + (" (best)" if state.is_best else "")
    )


def _write_history(folder: Path, fitted: Fitted) -> list[str]:
    if not fitted.history:
        return []
    write_records(folder / "history.csv", fitted.history)
    return ["history.csv"]


def _start(prepared: Prepared, observer: Observer) -> Head | None:
    """The head of `model.start_from`, grown to the classes of this run; `None` without one."""
    training = prepared.config.training
    return start_from.head_of(prepared.settings.start, prepared.data.classes, training.solver, training.seed, observer)


def _save_models(folder: Path, prepared: Prepared, outcome: Outcome, keras: KerasProcess) -> outputs.Proof:
    head, temperature = outcome.fitted.head, outcome.temperature
    known = prepared.validating
    chosen = evenly_spread(len(known.samples), outputs.PARITY_PHOTOS)
    photos = np.stack([scan.decode_sample(known.samples[i], prepared.settings.image) for i in chosen])
    backbone, expected = prepared.backbone, softmax32(head.logits(known.array[chosen, 0]), temperature)
    if isinstance(backbone, Converted):
        parts = outputs.Parts(backbone, head, temperature)
        return outputs.save_with_proof(folder, parts, photos, expected, keras)
    model = classifier.build(backbone.model, head, temperature, prepared.data.classes)
    graph = finished.openvino_model(runtimes.convert(backbone.model), head, temperature)
    parity = outputs.save_models(folder, model, graph, photos, expected)
    return lambda: parity


def _manifest(folder: Path, prepared: Prepared, outcome: Outcome) -> Manifest:
    """The content of run.json, but for the hashes of the files."""
    config, backbone = prepared.config, prepared.backbone
    passes = [*prepared.parts.values(), *([] if prepared.held_out is None else [prepared.held_out])]
    skipped = (*prepared.data.bad, *(bad for part in prepared.parts.values() for bad in part.bad))
    return Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=prepared.data.classes,
        image=prepared.settings.image,
        backbone=Backbone(
            name=backbone.name if config.is_named_backbone else Path(config.model.backbone).name,
            width=backbone.width,
            fingerprint=backbone.fingerprint,
            original=backbone.original,
            weights_sha256=backbone.weights_sha256,
            feature_map=backbone.feature_map,
        ),
        start_from=prepared.start_from,
        solver=Solver(config.training.solver, outcome.fitted.l2),
        temperature=outcome.temperature,
        device=prepared.device,
        feature_precision=prepared.precision,
        photos={split: len(part.samples) for split, part in prepared.parts.items()},
        views=Views(
            per_photo=prepared.parts["train"].array.shape[1],
            computed=sum(part.computed for part in passes),
            cached=sum(part.cached for part in passes),
        ),
        cache_bytes=prepared.cache_bytes,
        bad_photos=tuple(SkippedPhoto(photo.name, photo.reason) for photo in skipped),
        roots={
            split: os.path.relpath(root, folder) if isinstance(root, Path) else root.text
            for split, root in prepared.data.roots.items()
        },
        parity=outcome.parity,
        storage_retries=storage.retries() - prepared.storage_retries_before,
        seconds=prepared.seconds,
        metrics={part.split: SplitMetrics.from_json(Fields(part.evaluation.to_json())) for part in outcome.judged},
        files={},
        retries=prepared.retries,
    )
