"""What the numbers say, in sentences; plain text, so that the template escapes whatever the names hold."""

import numpy as np

from finetune_cli.evaluation.judge import Judgement
from finetune_cli.metrics.scores import Comparison, Evaluation, Proportion
from finetune_cli.report.refits import FRACTIONS, LearningCurve, ViewsEffect
from finetune_cli.text import brief, counted

_CHANCE = 0.05
_NAMED = 5


def percent(share: float) -> str:
    """A share with one decimal."""
    return f"{share:.1%}"


def verdict(judged: Judgement) -> list[str]:
    """How good, where it is weakest, how confident, on what photos: one sentence each."""
    evaluation, name = judged.evaluation, brief(judged.run.name)
    accuracy, baseline = evaluation.accuracy, evaluation.baseline
    first = (
        f"{name} has an accuracy of {percent(accuracy.value)} on {evaluation.photos} {brief(judged.photos.source)} "
        f"(95 % interval {percent(accuracy.low)} to {percent(accuracy.high)}); the majority-class baseline, always "
        f"“{brief(evaluation.baseline_class)}”, has {percent(baseline.value)}."
    )
    sentences = [first]
    if judged.seen:
        sentences.append(f"It was trained on {judged.seen} of these photos, so expect a lower accuracy on others.")
    if (others := evaluation.without_near_duplicates) is not None:
        sentences.append(
            f"{counted(evaluation.photos - others[0], 'photo')} of them show the same picture as a training photo "
            f"(leaks.csv of the run lists them); on the {others[0]} others the accuracy is {percent(others[1].value)} "
            f"({percent(others[1].low)} to {percent(others[1].high)})."
        )
    if accuracy.low <= baseline.value:
        sentences.append("That may be no better than the majority-class baseline.")
    if weakest := _weakest(evaluation):
        sentences.append(weakest)
    sentences.append(_confidence(evaluation))
    if judged.photos.part == "val":
        sentences.append(
            "Validation photos take part in choosing settings, so expect a slightly lower accuracy on new photos."
        )
    if judged.photos.part == "folds":
        tuned = (judged.run.manifest.fine_tuning or {}).get("kept", "frozen") != "frozen"
        model = "backbone and a head that were tuned" if tuned else "head that was fitted"
        sentences.append(
            f"The accuracy is cross-validated: each photo is predicted by a {model} without its fold. The final model "
            "has learned from all of these photos and may be a little better; the interval is approximate and wider "
            "than for as many independent photos, because the models of the folds share training photos."
        )
    if (compared := judged.compared) is not None:
        other = brief(compared.run.name)
        if compared.left_out:
            sentences.append(
                f"{name} and {other} are compared on the {counted(len(compared.rows), 'photo')} of the "
                f"{len(compared.classes)} classes that both have, and choose among these."
            )
        sentences.append(comparison(name, other, compared.comparison))
    return sentences


def _weakest(evaluation: Evaluation) -> str:
    """The class with the lowest recall, and what it is predicted as most often."""
    known = [(row.recall, i) for i, row in enumerate(evaluation.per_class) if row.recall is not None and row.recall < 1]
    if not known:
        return "Every photo is classified correctly."
    _recall, i = min(known)
    row, taken = evaluation.per_class[i], evaluation.confusion[i].copy()
    hits, taken[i] = int(taken[i]), 0
    other = int(taken.argmax())
    return (
        f"It is weakest on “{brief(row.name)}”, with {hits} of {row.support} correct; "
        f"{int(taken[other])} {'is' if taken[other] == 1 else 'are'} predicted as "
        f"“{brief(evaluation.classes[other])}”."
    )


def _confidence(evaluation: Evaluation) -> str:
    """The highest target accuracy that is reached on at least 20 % of the photos."""
    rows = [row for row in evaluation.coverage if row.threshold is not None and row.coverage >= 0.2]
    if not rows:
        return "No confidence threshold gives an accuracy of 90 % on at least 20 % of the photos."
    best = rows[-1]
    return (
        f"Predictions with a probability of at least {best.threshold:.4f} have an accuracy of at least "
        f"{best.target:.0%}; they are {best.coverage:.0%} of all."
    )


def comparison(first: str, second: str, found: Comparison) -> str:
    """Whether the second run is better."""
    difference = found.difference
    chance = "a difference that may be chance" if found.p_value >= _CHANCE else "a significant difference"
    size = f"{abs(difference.value) * 100:.1f} points {'higher' if difference.value > 0 else 'lower'} than that"
    relation = f"{size} of {first}" if difference.value else f"the same as that of {first}"
    return (
        f"On these photos the accuracy of {second} is {relation} ({points(difference)}): {chance} "
        f"(McNemar's exact test, p = {found.p_value:.2g})."
    )


def points(difference: Proportion) -> str:
    """The interval of a difference of two shares, in percentage points."""
    return f"95 % interval {difference.low * 100:+.1f} to {difference.high * 100:+.1f}"


def augmentation(effect: ViewsEffect) -> str:
    """Whether augmentation, the views beyond the photo itself, helped."""
    difference, (mean, low, high) = effect.comparison.difference, effect.log_loss
    if low > 0:
        judgement = "Augmentation helped"
    elif high < 0:
        judgement = "Augmentation did harm"
    else:
        judgement = "Augmentation made no difference that these photos could show"
    return (
        f"{judgement}: with {effect.views} views of each training photo the head has an accuracy of "
        f"{percent(effect.accuracies[1])}, with the photos alone {percent(effect.accuracies[0])} "
        f"({difference.value * 100:+.1f} points, {points(difference)}); "
        f"the log loss changes by {-mean:+.4f} (95 % interval {-high:+.4f} to {-low:+.4f})."
    )


def more_photos(curve: LearningCurve, classes: tuple[str, ...]) -> str:
    """Which classes would gain most from more photos."""
    gain = np.nan_to_num(curve.gain, nan=-1.0)
    growing = [i for i in np.argsort(-gain) if gain[i] >= 0.01 and gain[i] > curve.error[i]]
    half, whole = (float(curve.accuracy[FRACTIONS.index(fraction)]) for fraction in (0.5, 1.0))
    overall = f"From half to all of the training photos the accuracy changed from {percent(half)} to {percent(whole)}."
    if not growing:
        return (
            f"{overall} No class gained more than its standard error: more photos of the same kind would hardly help."
        )
    named = ", ".join(
        f"“{brief(classes[i])}” (recall {percent(float(curve.recall[1, i]))} to {percent(float(curve.recall[-1, i]))})"
        for i in growing[:_NAMED]
    )
    more = f" and {len(growing) - _NAMED} others" if len(growing) > _NAMED else ""
    return f"{overall} More photos would probably help most for {named}{more}."
