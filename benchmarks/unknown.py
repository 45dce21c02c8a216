"""Compares scores that tell photos of none of the classes; prints the tables of docs/unknown.md.

    python benchmarks/unknown.py PHOTOS PICTURES [sets]
    python benchmarks/unknown.py --folds PHOTOS PICTURES

PHOTOS is a folder with `scenes/{train,test}`, `hymenoptera/{train,val}` and `digits/{train,test}`; PICTURES holds any
pictures that show nothing of these, such as `Tests/images` of Pillow's sources; with sets, only runs of these. Features
are of the bundled backbone, through the cache. A fifth of the training photos validates, five times differently; of
these photos half choose and half set the threshold, as in a training with `unknown: {false_rejects: 0.05}`. Strangers
are the test photos of the other sets, or of a class that was left out of everything. All shares are means over the five
divisions. With --folds, all training photos are dealt into five folds, five times differently, and a quarter of them 20
times; the threshold is that of a training with `data.folds: 5`.
"""

import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune_cli.config.load import load_config
from finetune_cli.errors import BadImage
from finetune_cli.head.data import HeadData
from finetune_cli.head.l2 import L2Search, choose_l2
from finetune_cli.head.lbfgs import Head, fit_lbfgs, one_blas_thread
from finetune_cli.head.out_of_fold import fit_folds
from finetune_cli.head.out_of_fold import logits as out_of_fold_logits
from finetune_cli.metrics import novelty
from finetune_cli.metrics.calibration import fit_temperature, softmax
from finetune_cli.metrics.folds import group_folds, group_numbers
from finetune_cli.metrics.novelty import NoveltyScore
from finetune_cli.photos.dataset import iter_photos
from finetune_cli.photos.decode import decode
from finetune_cli.progress import Silent, ignore_progress
from finetune_cli.training import fit, unknown
from finetune_cli.training.converted import Conversion
from finetune_cli.training.fit import Fitted, labels_of
from finetune_cli.training.prepare import Prepared, make_extractor, prepare
from finetune_cli.training.requirements import check_settings
from finetune_cli.training.settings import Settings

SETS = {"scenes": ("train", "test"), "hymenoptera": ("train", "val"), "digits": ("train", "test")}
RATE, DIVISIONS = 0.05, 5
Score = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Photos:
    """Features (n, views, D), labels, groups of the training photos; features (m, D) and labels of the test photos."""

    classes: tuple[str, ...]
    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    test_features: np.ndarray
    test_labels: np.ndarray
    samples: tuple[Any, ...]

    def without(self, label: int) -> "Photos":
        kept, test = self.labels != label, self.test_labels != label
        return Photos(
            tuple(name for i, name in enumerate(self.classes) if i != label),
            self.features[kept],
            self.labels[kept] - (self.labels[kept] > label),
            self.groups[kept],
            self.test_features[test],
            self.test_labels[test] - (self.test_labels[test] > label),
            tuple(s for s, taken in zip(self.samples, kept, strict=True) if taken),
        )


def settings_of(train: Path, val: Path, *more: str) -> Settings:
    overrides = [
        f"data.train={train}",
        f"data.val={val}",
        "data.on_bad_image=skip",
        "model.backbone=efficientnet_lite0",
        "augmentation.horizontal_flip=true",
        "augmentation.width_shift_range=0.1",
        "augmentation.height_shift_range=0.1",
        *more,
    ]
    return check_settings(load_config(None, overrides))


def load(folder: Path, name: str) -> Photos:
    prepared = prepare(settings_of(*(folder / name / part for part in SETS[name])), Silent())
    train, test = prepared.parts["train"], prepared.parts["val"]
    person = (lambda s: s.name.split("/")[-1].split("-")[0]) if name == "digits" else (lambda _s: None)
    return Photos(
        prepared.data.classes,
        np.array(train.array),
        labels_of(train.samples),
        group_numbers((person(sample), sample.digest) for sample in train.samples),
        np.array(test.array[:, 0]),
        labels_of(test.samples),
        train.samples,
    )


def load_pictures(folder: Path, photos: Path) -> np.ndarray:
    settings = settings_of(*(photos / "scenes" / part for part in SETS["scenes"]))
    with Conversion(settings.backbone, settings.cache, here=False) as conversion:
        conversion.begin()
        extractor = make_extractor(settings, Silent(), conversion)
    found = []
    for path in iter_photos([folder]):
        try:
            found.append(extractor.runtime("float32").infer(decode(path, settings.image)[None])[0])
        except BadImage:
            continue
    return np.array(found)


def vim(material: unknown.Material, head: Head) -> Score:
    """Virtual-logit matching (Wang et al. 2022, arXiv 2203.10807), with min(512, n / 2) principal directions."""
    kernel, bias = head.kernel.astype(np.float64), head.bias.astype(np.float64)
    origin = -np.linalg.pinv(kernel.T) @ bias
    centred = material.features - origin
    directions = np.linalg.svd(centred, full_matrices=False)[2][: min(512, len(centred) // 2)]

    def residual(x: np.ndarray) -> np.ndarray:
        return np.sqrt(np.maximum((x**2).sum(axis=1) - ((x @ directions.T) ** 2).sum(axis=1), 0))

    weight = head.logits(material.features).max(axis=1).sum() / max(residual(centred).sum(), 1e-9)
    return lambda x: weight * residual(x - origin) + novelty.energies(head.logits(x))


@dataclass(frozen=True)
class Trained:
    """The scores of a training on a division of the photos, with the photos that set its threshold."""

    scores: dict[str, Score]
    held_out: np.ndarray
    held_out_labels: np.ndarray
    chosen: str
    estimate: float
    head: Head
    material: unknown.Material
    val: tuple[np.ndarray, np.ndarray]

    def refused(self, name: str, features: np.ndarray) -> float:
        score = self.scores[name]
        return float((novelty.p_values(score(features), np.sort(score(self.held_out))) <= RATE).mean())


def trained(photos: Photos, seed: int, l2: float, most: int = unknown.MOST_REFERENCES) -> Trained:
    n = len(photos.classes)
    is_val = group_folds(photos.labels, photos.groups, DIVISIONS, 0) == seed
    val, val_labels = photos.features[is_val, 0], photos.labels[is_val]
    digests = [photos.samples[i].digest for i in np.flatnonzero(is_val)]
    holds = unknown.held_out(val_labels, photos.groups[is_val], digests, RATE)
    train, labels = photos.features[~is_val], photos.labels[~is_val]
    head = fit_lbfgs(HeadData.of(train, labels, n).rows(), l2)
    rows = unknown.references([s for s, out in zip(photos.samples, is_val, strict=True) if not out], most)
    # The labels of samples are those before a class was left out; only their order counts here.
    material = unknown.Material(
        train[rows, 0],
        labels[rows],
        np.ones(len(rows)),
        unknown.as_stored(train[rows, 0]),
        val[~holds],
        val_labels[~holds],
        l2 * len(train) / len(rows),
    )
    choice = unknown.choose([material], n, RATE, ignore_progress)
    distance = NoveltyScore(material.references, 0.0)
    weight = unknown.Terms.of(material.val_features, material.references, head).energy_weight()
    both = NoveltyScore(material.references, weight)
    scores: dict[str, Score] = {
        "distance": lambda x: distance(x, x),
        "distance and energy": lambda x: both(x, head.logits(x)),
        "energy": lambda x: novelty.energies(head.logits(x)),
        "maximum logit": lambda x: -head.logits(x).max(axis=1),
        "largest probability": lambda x: -softmax(head.logits(x)).max(axis=1),
        "ViM": vim(material, head),
    }
    scores["as chosen"] = scores[choice.score]
    estimate = choice.compared[choice.score]
    return Trained(scores, val[holds], val_labels[holds], choice.score, estimate, head, material, (val, val_labels))


def table(rows: dict[str, dict[str, list[float]]]) -> None:
    columns = list(next(iter(rows.values())))
    print("\n| |", " | ".join(columns), "|\n| --- |", " | ".join("---" for _ in columns), "|")
    for name, row in rows.items():
        print(f"| {name} |", " | ".join(f"{100 * np.mean(row[column]):.0f} %" for column in columns), "|", flush=True)


def folds(folder: Path, strangers: dict[str, np.ndarray]) -> None:
    """What trainings with folds refuse, as one row per set and number of photos."""
    rows: Any = {}
    for name, parts in SETS.items():
        more = ["runtime.feature_precision=float32", f"unknown.false_rejects={RATE}"]
        if name == "digits":
            more.append("data.group_regex=([^/-]*)-[^/]*$")
        prepared = prepare(settings_of(*(folder / name / part for part in parts), *more), Silent())
        for part in (1, 4):
            row: Any = defaultdict(list)
            for seed in range(DIVISIONS * part):
                divided = in_folds(prepared, part, seed)
                score, held_out, estimate = learnt_in_folds(divided)
                own = np.asarray(prepared.parts["val"].array[:, 0])
                for other, features in (("its own test photos", own), *strangers.items()):
                    if other != name:
                        refused = novelty.p_values(score(features), held_out) <= RATE
                        row[other].append(float(refused.mean()))
                row["estimate"].append(estimate)
            print(name, len(held_out), {key: [round(x, 3) for x in values] for key, values in row.items()}, flush=True)
            rows[f"{name}, {len(held_out)} photos"] = row
    for name, row in rows.items():
        print(f"| {name} |", " | ".join(f"{other} {100 * np.mean(values):.0f} %" for other, values in row.items()), "|")


def in_folds(prepared: Prepared, part: int, seed: int) -> Prepared:
    """What a training with `data.folds` and one in `part` photos prepares; the folds differ with the seed."""
    config, train = prepared.config, prepared.parts["train"]
    config = config.model_copy(update={"data": config.data.model_copy(update={"folds": DIVISIONS})})
    groups = group_numbers((sample.group, sample.digest) for sample in train.samples)
    rows = np.flatnonzero(group_folds(labels_of(train.samples), groups, part, seed) == 0)
    numbers = group_folds(labels_of(train.samples)[rows], groups[rows], DIVISIONS, seed) + 1
    samples = tuple(replace(train.samples[i], fold=int(fold)) for i, fold in zip(rows, numbers, strict=True))
    some = replace(train, array=train.array[rows], samples=samples)
    return replace(prepared, settings=replace(prepared.settings, config=config), parts={"train": some}, held_out=some)


def learnt_in_folds(prepared: Prepared) -> tuple[Score, np.ndarray, float]:
    """The score, those of the photos that set its threshold, and the share of left-out classes that it refuses."""
    config, classes, train = prepared.config, prepared.data.classes, prepared.parts["train"]
    l2 = fit.chosen_l2(config, train, classes, Silent())
    data = fit.head_data(config, train, classes)
    head = fit_lbfgs(data.rows(), l2)
    logits = out_of_fold_logits(fit_folds(data, l2), data.folds, prepared.validating.array[:, 0])
    known = unknown.of_folds(prepared, Fitted(head, l2, (), logits))
    choice = unknown.choose(known.materials, len(classes), RATE, ignore_progress)
    weight = known.choosing.energy_weight() if choice.score == unknown.BOTH else 0.0
    score = NoveltyScore(known.references, weight)
    return lambda x: score(x, head.logits(x)), np.sort(known.held_out.scores(weight)), choice.compared[choice.score]


def main() -> None:
    in_folds_only = "--folds" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--folds"]
    folder = Path(sys.argv[1])
    photos = {name: load(folder, name) for name in SETS}
    strangers = {name: each.test_features for name, each in photos.items()}
    strangers["pictures"] = load_pictures(Path(sys.argv[2]), folder)
    print({name: len(each) for name, each in strangers.items()})
    with one_blas_thread():
        if in_folds_only:
            folds(folder, strangers)
            return
        for name in sys.argv[3:] or SETS:
            own = photos[name]
            l2, _tried = choose_l2(
                HeadData.of(own.features, own.labels, len(own.classes), groups=own.groups).rows(), L2Search()
            )
            print(f"\n## {name}, {len(own.labels)} photos, l2 {l2:g}")
            trainings = [trained(own, seed, l2) for seed in range(DIVISIONS)]
            print("chosen:", [(t.chosen, round(t.estimate, 3)) for t in trainings])
            print("held out:", [len(t.held_out) for t in trainings])
            rows: Any = defaultdict(lambda: defaultdict(list))
            for each in trainings:
                for score in each.scores:
                    rows[score]["its own test photos"].append(each.refused(score, own.test_features))
                    for other, features in strangers.items():
                        if other != name:
                            rows[score][other].append(each.refused(score, features))
            table(rows)
            temperatures(own, trainings)
            accuracy(own, trainings)
            fewer_references(own, l2, strangers, name)
            if len(own.classes) > 2:
                left_out(own, l2)


def left_out(own: Photos, l2: float) -> None:
    rows: Any = defaultdict(lambda: defaultdict(list))
    chosen, estimates = defaultdict(int), []
    for label, name in enumerate(own.classes):
        for seed in range(DIVISIONS):
            each = trained(own.without(label), seed, l2)
            chosen[each.chosen] += 1
            estimates.append(each.estimate)
            for score in each.scores:
                rows[score][name].append(each.refused(score, own.test_features[own.test_labels == label]))
    for row in rows.values():
        row["mean"] = [share for shares in row.values() for share in shares]
    print("chosen:", dict(chosen), "mean estimate:", np.mean(estimates))
    table(rows)


def temperatures(own: Photos, trainings: list[Trained]) -> None:
    """What it costs that only half of the validation photos fit the temperature: the log loss of the test photos."""
    losses = []
    for each in trainings:
        val, labels = each.val
        z, y = each.head.logits(own.test_features), own.test_labels
        for x, own_labels in ((val, labels), (each.material.val_features, each.material.val_labels)):
            p = softmax(z, fit_temperature(each.head.logits(x), own_labels))
            losses.append(float(-np.log(p[np.arange(len(y)), y]).mean()))
    print(f"\ntest log loss, temperature by all / half: {np.mean(losses[::2]):.4f} / {np.mean(losses[1::2]):.4f}")


def accuracy(own: Photos, trainings: list[Trained]) -> None:
    """What it costs people who never meet a stranger: the test accuracy if `unknown` counts as wrong."""
    right, kept = [], []
    for each in trainings:
        score = each.scores["as chosen"]
        correct = each.head.logits(own.test_features).argmax(axis=1) == own.test_labels
        known = novelty.p_values(score(own.test_features), np.sort(score(each.held_out))) > RATE
        right.append(correct.mean())
        kept.append((correct & known).mean())
    print(f"test accuracy: {np.mean(right):.3f}; if unknown counts as wrong: {np.mean(kept):.3f}")


def fewer_references(own: Photos, l2: float, strangers: dict[str, np.ndarray], name: str) -> None:
    rows: Any = defaultdict(lambda: defaultdict(list))
    whole = len(own.labels) * (DIVISIONS - 1) // DIVISIONS
    for share in (1, 2, 4, 8):
        for seed in range(DIVISIONS):
            each = trained(own, seed, l2, whole // share)
            row = rows[f"{whole // share} references"]
            row["its own test photos"].append(each.refused("distance", own.test_features))
            for other, features in strangers.items():
                if other != name:
                    row[other].append(each.refused("distance", features))
            for label in range(len(own.classes)):
                row["left-out classes"].append(left_out_references(each, own, label))
    table(rows)


def left_out_references(each: Trained, own: Photos, label: int) -> float:
    """Test photos of a class that are refused by the distance to references without it."""
    score = NoveltyScore(each.material.without(label).references, 0.0)
    known = each.held_out[each.held_out_labels != label]
    strangers = own.test_features[own.test_labels == label]
    threshold = np.quantile(score(known, known), 1 - RATE, method="weibull")
    return float((score(strangers, strangers) > threshold).mean())


if __name__ == "__main__":
    main()
