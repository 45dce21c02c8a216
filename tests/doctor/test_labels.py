import numpy as np
import pytest

from finetune_cli.doctor.labels import FITS, doubts
from finetune_cli.head.data import HeadData


def blobs(count=60, classes=3, width=20, apart=10.0):
    """Features of well separated classes, labels, and the labels with 9 of them wrong."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), count)
    features = apart * np.eye(classes, width)[labels] + rng.normal(size=(len(labels), width))
    wrong = rng.permutation(len(labels))[:9]
    given = labels.copy()
    given[wrong] = (labels[wrong] + 1) % classes
    return features.astype(np.float32), labels, given, wrong


def test_wrong_labels_are_found_with_high_confidence_and_the_right_suggestion():
    features, labels, given, wrong = blobs()
    calls = []
    found = doubts(HeadData.of(features, given, 3), 2, advance=calls.append)
    high = [doubt for doubt in found if doubt.high]
    assert {doubt.photo for doubt in found} == set(wrong.tolist())
    assert all(doubt.suggested == labels[doubt.photo] for doubt in found)
    assert len(high) >= 5
    assert all(doubt.probability <= 0.075 and doubt.of == 10 and doubt.neighbours >= 8 for doubt in high)
    assert [doubt.high for doubt in found] == sorted((doubt.high for doubt in found), reverse=True)
    assert sum(calls) == FITS


def test_correct_labels_raise_no_high_doubts():
    features, labels, _given, _wrong = blobs()
    assert not [doubt for doubt in doubts(HeadData.of(features, labels, 3), 1) if doubt.high]


def test_photos_of_a_group_do_not_judge_each_other():
    """A wrong label that ten near-duplicates share: they would confirm it."""
    features, labels, _given, _wrong = blobs()
    burst = features[:1] + 0.01 * np.random.default_rng(1).normal(size=(10, features.shape[1])).astype(np.float32)
    data = HeadData.of(
        np.concatenate([features, burst]),
        np.concatenate([labels, np.ones(10, int)]),
        3,
        groups=np.concatenate([np.arange(len(labels)), np.full(10, len(labels))]),
    )
    high = {doubt.photo for doubt in doubts(data, 1) if doubt.high}
    assert high == set(range(len(labels), len(labels) + 10))


@pytest.mark.parametrize("counts", [(3, 60), (1, 1), (4, 4), (60,)])
def test_classes_with_few_photos_are_not_judged(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    features = np.random.default_rng(0).normal(size=(len(labels), 8)).astype(np.float32)
    small = {label for label, count in enumerate(counts) if count < 5}
    found = doubts(HeadData.of(features, labels, max(len(counts), 2)), 1)
    assert not small & {int(labels[doubt.photo]) for doubt in found}
