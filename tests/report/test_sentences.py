"""The report's sentences say what the numbers say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from manifest_example import EXAMPLE

from finetune_cli.evaluation.answers import Answers
from finetune_cli.evaluation.judge import Judgement
from finetune_cli.evaluation.photos import LabelledPhotos
from finetune_cli.metrics.scores import Proportion, compare, evaluate
from finetune_cli.report import sentences
from finetune_cli.report.refits import LearningCurve, ViewsEffect
from finetune_cli.runs.run import Run

CLASSES = ("ants", "bees")


def judged(labels, predicted, part="test") -> Judgement:
    probabilities = np.where(np.eye(2)[predicted] == 1, 0.9, 0.1)
    answers = Answers((), probabilities.astype(np.float32), np.zeros((0, 1), np.float32), 1, ())
    run = Run(Path("runs/pets-1"), replace(EXAMPLE, classes=CLASSES))
    return Judgement(
        run, LabelledPhotos(part, "test photos of the run", ()), answers, evaluate(probabilities, labels, CLASSES), None
    )


def test_a_good_run():
    labels = [0] * 40 + [1] * 60
    predicted = [0] * 36 + [1] * 4 + [1] * 60
    text = " ".join(sentences.verdict(judged(labels, predicted)))
    assert text.startswith(
        "pets-1 has an accuracy of 96.0% on 100 test photos of the run (95 % interval 90.2% to 98.4%)"
    )
    assert "the majority-class baseline, always “bees”, has 60.0%" in text
    assert "weakest on “ants”, with 36 of 40 correct; 4 are predicted as “bees”" in text
    assert "no better" not in text
    assert "Validation photos" not in text


def test_no_better_than_always_the_same():
    text = " ".join(sentences.verdict(judged([0] * 10 + [1] * 12, [0] * 6 + [1] * 4 + [1] * 8 + [0] * 4, "val")))
    assert "may be no better than the majority-class baseline" in text
    assert "Validation photos take part" in text


def test_all_right():
    assert "Every photo is classified correctly." in sentences.verdict(judged([0, 1], [0, 1]))


def test_comparisons():
    labels = np.zeros(100, int)
    first, second = labels.copy(), labels.copy()
    first[:20] = 1
    better = sentences.comparison("a", "b", compare(labels, first, second))
    assert "the accuracy of b is 20.0 points higher than that of a" in better
    assert "a significant difference" in better
    second[50:68] = 1
    even = sentences.comparison("a", "b", compare(labels, first, second))
    assert "may be chance" in even
    assert "the same as that of a" in sentences.comparison("a", "b", compare(labels, first, first))


def test_augmentation():
    labels = np.zeros(50, int)
    found = compare(labels, np.arange(50) % 5 == 0, np.arange(50) % 10 == 0)
    for interval, begin in (((0.02, 0.1), "Augmentation helped"), ((-0.1, -0.02), "Augmentation did harm"),
                            ((-0.1, 0.1), "Augmentation made no difference")):  # fmt: skip
        text = sentences.augmentation(ViewsEffect(4, found, (0.8, 0.9), (sum(interval) / 2, *interval)))
        assert text.startswith(begin)
        assert "4 views" in text
        assert "+10.0 points" in text
    assert sentences.points(Proportion(0, -0.012, 0.034)) == "95 % interval -1.2 to +3.4"


def curve(gain, error):
    recall = np.array([[0.5, 0.5], [0.6, 0.9], [0.7, 0.9], [0.6 + gain[0], 0.9 + gain[1]]])
    return LearningCurve((1, 2, 3, 4), recall.mean(axis=1), recall, np.array([9, 9]), np.array(gain), np.array(error))


def test_more_photos():
    text = sentences.more_photos(curve([0.15, 0.005], [0.05, 0.001]), ("ants", "bees"))
    assert "help most for “ants” (recall 60.0% to 75.0%)" in text
    assert "bees" not in text
    assert "hardly help" in sentences.more_photos(curve([0.03, 0.02], [0.04, np.inf]), ("ants", "bees"))
