"""The section of the report about photos that are answered `unknown`."""

from dataclasses import dataclass

import numpy as np

from finetune_cli.evaluation.judge import Judgement
from finetune_cli.parallel import cores
from finetune_cli.progress import ignore_progress
from finetune_cli.report import thumbnails
from finetune_cli.report.sentences import percent
from finetune_cli.report.thumbnails import Figure
from finetune_cli.runs.manifest import Unknown
from finetune_cli.text import brief, counted

_MOST_FIGURES = 12
_MOST_ROWS = 20
_NO_P_VALUES = (
    "The photos of this report were cross-validated, and their recorded predictions have no p-values. To measure how "
    "many photos are refused, evaluate other photos."
)


@dataclass(frozen=True)
class UnknownSection:
    """sentences: what the run promises, and what these photos show. detection: (class left out, share refused).

    figures: some of the `refused` photos, the least likely first. refused: how many; None for photos without p-values.
    """

    sentences: tuple[str, ...]
    detection: tuple[tuple[str, float], ...]
    figures: tuple[Figure, ...]
    refused: int | None


def section(judged: Judgement) -> UnknownSection | None:
    """The section; None when the run was trained without `unknown`."""
    facts, refused = judged.run.manifest.unknown, judged.refused
    if facts is None:
        return None
    detection = tuple((brief(name), share) for name, share in [*facts.detection.items()][:_MOST_ROWS])
    if refused is None:
        return UnknownSection((promise(facts), _NO_P_VALUES, estimate(facts)), detection, (), None)
    found = (promise(facts), *_measured(judged), estimate(facts))
    return UnknownSection(found, detection, _figures(judged), int(refused.photos.sum()))


def promise(facts: Unknown) -> str:
    """What share of its own kind of photos the run refuses."""
    rate = percent(facts.false_rejects)
    if facts.interval is None:
        return (
            f"A photo is answered “unknown” if it is less like the training photos than all but {rate} of "
            f"{facts.held_out} cross-validated photos, each of them compared with the photos outside its fold. So "
            f"approximately {rate} of the photos that do show a class are refused. New photos are compared with the "
            "photos of all folds, so this rate is not guaranteed, and has no interval."
        )
    low, high = facts.interval
    return (
        f"A photo is answered “unknown” if it is less like the training photos than all but {rate} of "
        f"{facts.held_out} held-out validation photos, which chose nothing else. So at most {rate} of the photos that "
        f"do show a class are refused on average; with so many held-out photos, between {percent(low)} and "
        f"{percent(high)} (95 % interval)."
    )


def estimate(facts: Unknown) -> str:
    """What share of strange photos it refuses."""
    if not facts.compared:
        photos = "cross-validated" if facts.approximate else "validation"
        return f"The {photos} photos show too few classes for an estimate of the strange photos that are refused."
    score = max(facts.compared, key=facts.compared.__getitem__)
    others = "".join(
        f" (by {brief(name)}: {percent(share)})" for name, share in facts.compared.items() if name != score
    )
    flaw = " The backbone learned from these classes, so expect less." if facts.tuned else ""
    return (
        f"Each class was left out once, and {percent(facts.compared[score])} of its photos were refused, by "
        f"{brief(score)}{others}. That is an estimate for photos that are much like yours; photos of something else "
        f"are refused more often.{flaw}"
    )


def _measured(judged: Judgement) -> list[str]:
    refused = judged.refused
    assert refused is not None
    share = refused.share
    first = (
        f"Of the photos of this report, {int(refused.photos.sum())} are refused; they were trained on, chose the score "
        "or set its threshold, so that proves nothing."
    )
    if share is not None:
        first = (
            f"Of {counted(refused.counted, 'new photo')} in this report, {percent(share.value)} are refused (95 % "
            f"interval {percent(share.low)} to {percent(share.high)})."
        )
    found = [first]
    if refused.right is not None:
        found.append(f"The accuracy on the photos that are not refused is {percent(refused.right.value)}.")
    return found


def _figures(judged: Judgement) -> tuple[Figure, ...]:
    answers, run, refused = judged.answers, judged.run, judged.refused
    assert answers.p_values is not None
    assert refused is not None
    order = [int(i) for i in np.argsort(answers.p_values, kind="stable") if refused.photos[i]][:_MOST_FIGURES]
    samples = [answers.samples[i] for i in order]
    pictures = thumbnails.thumbnails(samples, run.image_settings, cores(), ignore_progress)

    def figure(i: int, picture: str | None) -> Figure:
        predicted = int(answers.predicted[i])
        return Figure(
            brief(answers.samples[i].name),
            picture,
            (
                f"labelled {brief(run.classes[answers.samples[i].label])}",
                f"{percent(float(answers.probabilities[i, predicted]))} {brief(run.classes[predicted])}",
                f"p = {answers.p_values[i]:.2g}" if answers.p_values is not None else "",
            ),
        )

    return tuple(figure(i, picture) for i, picture in zip(order, pictures, strict=True))
