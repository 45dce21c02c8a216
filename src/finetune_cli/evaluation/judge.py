"""How good a finished run is on labelled photos: its scores and its calibration."""

from dataclasses import dataclass, replace

import numpy as np

from finetune_cli.engines.engine import Engine
from finetune_cli.errors import DataError
from finetune_cli.evaluation.answers import Answers, answer, out_of_fold, seen_in_training
from finetune_cli.evaluation.compare import Compared
from finetune_cli.evaluation.photos import LabelledPhotos
from finetune_cli.evaluation.unknown import Refused, refused
from finetune_cli.metrics import scores
from finetune_cli.metrics.calibration import (
    CalibrationScores,
    calibration_scores,
    cross_fitted_calibration,
    softmax,
)
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.metrics.scores import Evaluation
from finetune_cli.photos.scan import BadPhoto
from finetune_cli.progress import Advance
from finetune_cli.runs.run import Run
from finetune_cli.training import near

# About the least positive float32: a probability of 0 has no logit.
_SMALLEST = np.float32(1e-38)


@dataclass(frozen=True)
class Calibration:
    """How well the run is calibrated without (`before`) and with its model's temperature (`after`).

    cross_fitted: these are the photos that the temperature was fitted on, so in `after` the probabilities of each photo
    are scaled by a temperature that was fitted on others. left_out: how many photos of the evaluation do not count
    here, because the temperature was fitted on them and not on the others.
    """

    before: CalibrationScores
    after: CalibrationScores
    cross_fitted: bool
    left_out: int = 0


@dataclass(frozen=True, eq=False)
class Judgement:
    """All results of an evaluation. seen: how many of the photos the run was trained on.

    refused: the photos that are answered `unknown`; None if the run cannot tell. They count in `evaluation` by their
    most probable class, as all photos do.
    """

    run: Run
    photos: LabelledPhotos
    answers: Answers
    evaluation: Evaluation
    calibration: Calibration | None
    compared: Compared | None = None
    seen: int = 0
    refused: Refused | None = None

    @property
    def bad(self) -> tuple[BadPhoto, ...]:
        """The photos that could not be judged."""
        return (*self.photos.bad, *self.answers.bad)


def judge(run: Run, photos: LabelledPhotos, engine: Engine, advance: Advance) -> Judgement:
    """Judge `run` by `photos`. Raises `DataError` when not one of them can be used.

    Photos that were cross-validated, the part `folds`, have their recorded answers: the model has learned from them.
    """
    recorded = out_of_fold(run, photos.samples) if photos.part == "folds" else None
    answers = answer(run, photos.samples, engine, advance) if recorded is None else recorded
    if not answers.samples:
        bad = (*photos.bad, *answers.bad)
        first = f"; the first is {bad[0].path}: {bad[0].reason}" if bad else ""
        raise DataError(f"none of the {len(bad)} photos can be used{first}", "name a folder of readable photos")
    evaluation = scores.evaluate(answers.probabilities, answers.labels, run.classes)
    if recorded is not None:
        evaluation = scores.of_folds(evaluation, len({row.fold for row in run.split() if row.fold}))
    calibration = _calibration(run, answers, evaluation)
    if calibration is not None:
        evaluation = replace(evaluation, calibration=calibration.after)
    leaked = near.leaked(near.leaks_of(run), photos.part, answers.samples)
    evaluation = scores.without(evaluation, leaked, answers.probabilities, answers.labels)
    seen = seen_in_training(run, answers.samples) if recorded is None else 0
    return Judgement(run, photos, answers, evaluation, calibration, seen=seen, refused=refused(run, answers))


def _calibration(run: Run, answers: Answers, evaluation: Evaluation) -> Calibration | None:
    """The effect of the model's temperature, never judged by photos that it was fitted on; None without one."""
    if run.temperature == 1.0:
        return None
    logits = run.temperature * np.log(np.maximum(answers.probabilities, _SMALLEST), dtype=np.float64)
    rows = run.split()
    fitted_on = {row.digest for row in rows if row.split == "val" or row.fold}
    others = np.array([sample.digest not in fitted_on for sample in answers.samples])
    if not others.any():
        group_of = {row.digest: row.group for row in rows}
        groups = group_numbers((group_of.get(s.digest) or s.group, s.digest) for s in answers.samples)
        before, after = cross_fitted_calibration(logits, answers.labels, groups)
        return Calibration(before, after, cross_fitted=True)
    labels = answers.labels[others]
    before = calibration_scores(softmax(logits[others]), labels)
    if others.all():
        return Calibration(before, evaluation.calibration, cross_fitted=False)
    after = calibration_scores(answers.probabilities[others], labels)
    return Calibration(before, after, cross_fitted=False, left_out=int((~others).sum()))
