"""How honest and how good runs on small sets are, with `data.folds` and with `data.val_split`.

Prints the table of docs/training.md.

    python benchmarks/folds.py PHOTOS RESULTS.jsonl [seeds]
    python benchmarks/folds.py --table RESULTS.jsonl

PHOTOS is a folder with `hymenoptera/{train,val}`, `scenes/{train,test}` and `digits/{train,test}`; `handwritten` are
the 1,797 digits of 8 x 8 pixels that come with scikit-learn, a larger set. The photos of a set are pooled; a seed draws
some of each class (of digits: as many persons, who show every class), and all others test. Features are of the bundled
backbone, float32, four views with shifts and, where a mirrored photo would be right, flips; `handwritten` has one view.

For every draw the head is trained in these ways, each of which shows an accuracy, and has a true one, that of its
final head on the test photos:

    val_split 0.2   a fifth, balanced by class, validates and chooses the temperature; the head is fitted on the others
    folds K         cross-validation in K folds; the final head is fitted on all photos
    folds 5 nested  the same, but each fold's head has an l2 that was chosen without that fold

A line of RESULTS.jsonl is one way on one draw; draws that it holds already are not measured again.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finetune_cli.config.load import load_config
from finetune_cli.head.data import HeadData
from finetune_cli.head.l2 import L2Search, choose_l2
from finetune_cli.head.lbfgs import Head, fit_lbfgs
from finetune_cli.head.out_of_fold import fit_folds, numbers
from finetune_cli.head.out_of_fold import logits as out_of_fold_logits
from finetune_cli.metrics.calibration import calibration_scores, cross_fitted_calibration, fit_temperature, softmax
from finetune_cli.metrics.folds import group_numbers
from finetune_cli.metrics.scores import wilson
from finetune_cli.photos.split import into_folds
from finetune_cli.progress import Silent
from finetune_cli.training.fit import labels_of
from finetune_cli.training.prepare import prepare
from finetune_cli.training.requirements import check_settings

SETS = {
    "hymenoptera": ("train", "val"),
    "scenes": ("train", "test"),
    "digits": ("train", "test"),
    "handwritten": ("all",),
}
SIZES = {"handwritten": (20, 40, 80, 120)}
SMALL = (5, 10, 20, 40)
FEW_SEEDS = {"folds 5 nested": 3, "folds 10": 3}


@dataclass(frozen=True)
class Photos:
    """Features (photos, views, D), labels, and (label, digest, group) of each photo."""

    features: np.ndarray
    labels: np.ndarray
    identities: list[tuple[int, str, str | None]]

    def part(self, chosen: np.ndarray) -> "Photos":
        return Photos(self.features[chosen], self.labels[chosen], [self.identities[i] for i in chosen])

    @property
    def data(self) -> HeadData:
        groups = group_numbers((group, digest) for _label, digest, group in self.identities)
        return HeadData.of(self.features, self.labels, int(self.labels.max()) + 1, groups=groups)

    def folds(self, count: int) -> np.ndarray:
        return np.array([fold or 0 for fold in into_folds(self.identities, count)])


@dataclass(frozen=True)
class Result:
    """The final head with its temperature, and what was shown: right photos, photos, log loss, its l2."""

    head: Head
    temperature: float
    right: int
    photos: int
    log_loss: float
    l2: float


def write_handwritten(folder: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 - 15.9 * pixels).astype(np.uint8)).resize((112, 112), Image.Resampling.BICUBIC).save(path)


def load(folder: Path, name: str) -> Photos:
    parts = []
    for part in SETS[name]:
        other = next((each for each in SETS[name] if each != part), part)
        overrides = [
            f"data.train={folder / name / part}",
            f"data.val={folder / name / other}",
            "data.on_bad_image=skip",
            "data.near_duplicates=ignore",
            "model.backbone=efficientnet_lite0",
            "runtime.feature_precision=float32",
            f"augmentation.views={1 if name == 'handwritten' else 4}",
            f"augmentation.horizontal_flip={'true' if name in ('hymenoptera', 'scenes') else 'false'}",
            "augmentation.width_shift_range=0.1",
            "augmentation.height_shift_range=0.1",
            *(["data.group_regex=(?:^|/)(p[0-9]+)"] if name == "digits" else []),
        ]
        parts.append(prepare(check_settings(load_config(None, overrides)), Silent()).parts["train"])
    samples = [sample for part in parts for sample in part.samples]
    features = np.concatenate([np.array(part.array) for part in parts])
    return Photos(features, labels_of(samples), [(s.label, s.digest, s.group) for s in samples])


def drawn(photos: Photos, size: int, seed: int) -> tuple[Photos, Photos]:
    """`size` photos of each class, or of `size` groups all photos; and all others, without copies of the first."""
    rng = np.random.default_rng((size, seed))
    groups = np.array([group or "" for _label, _digest, group in photos.identities])
    if groups[0]:
        chosen = np.flatnonzero(np.isin(groups, rng.permutation(np.unique(groups))[:size]))
    else:
        classes = range(int(photos.labels.max()) + 1)
        chosen = np.concatenate([rng.permutation(np.flatnonzero(photos.labels == label))[:size] for label in classes])
    digests = {photos.identities[i][1] for i in chosen}
    rest = np.setdiff1d(np.arange(len(photos.labels)), chosen)
    return photos.part(np.sort(chosen)), photos.part(
        np.array([i for i in rest if photos.identities[i][1] not in digests])
    )


def with_val_split(photos: Photos) -> Result:
    held_out = photos.folds(5) == 1
    train, val = photos.part(np.flatnonzero(~held_out)), photos.part(np.flatnonzero(held_out))
    l2 = choose_l2(train.data.rows(), L2Search())[0]
    head = fit_lbfgs(train.data.rows(), l2)
    logits = head.logits(val.features[:, 0])
    return result(head, l2, logits, val)


def with_folds(photos: Photos, count: int, nested: bool = False) -> Result:
    data = replace(photos.data, folds=photos.folds(count))
    l2 = choose_l2(data.rows(), L2Search())[0]
    if nested:
        heads = {}
        for fold in numbers(data.folds):
            rest = photos.part(np.flatnonzero(data.folds != fold)).data.rows()
            heads[fold] = fit_lbfgs(rest, choose_l2(rest, L2Search())[0])
    else:
        heads = fit_folds(data, l2)
    logits = out_of_fold_logits(heads, data.folds, photos.features[:, 0])
    judged = np.flatnonzero(data.folds)
    return result(fit_lbfgs(data.rows(), l2), l2, logits[judged], photos.part(judged))


def result(head: Head, l2: float, logits: np.ndarray, held_out: Photos) -> Result:
    _before, after = cross_fitted_calibration(logits, held_out.labels, held_out.data.groups)
    right = int((logits.argmax(axis=1) == held_out.labels).sum())
    return Result(head, fit_temperature(logits, held_out.labels), right, len(logits), after.log_loss, l2)


WAYS = {
    "val_split 0.2": with_val_split,
    "folds 5": lambda photos: with_folds(photos, 5),
    "folds 10": lambda photos: with_folds(photos, 10),
    "folds 5 nested": lambda photos: with_folds(photos, 5, nested=True),
}


def measure(folder: Path, file: Path, seeds: int) -> None:
    lines = file.read_text().splitlines() if file.exists() else []
    done = {tuple(json.loads(line)["draw"]) for line in lines}
    with tempfile.TemporaryDirectory() as drawn_here:
        write_handwritten(Path(drawn_here) / "handwritten" / "all")
        sets = {name: load(Path(drawn_here) if name == "handwritten" else folder, name) for name in SETS}
    with file.open("a") as out:
        for seed in range(seeds):
            for name, photos in sets.items():
                for size in SIZES.get(name, SMALL):
                    train, test = drawn(photos, size, seed)
                    for way, train_head in WAYS.items():
                        draw = (name, size, seed, way)
                        large = name in SIZES and way != "folds 5" and "val" not in way
                        if draw in done or large or seed >= FEW_SEEDS.get(way, seeds):
                            continue
                        found = train_head(train)
                        logits = found.head.logits(test.features[:, 0])
                        folds = int(way.split()[1]) if way.startswith("folds") else None
                        shown = wilson(found.right, found.photos, folds)
                        row = {
                            "draw": draw,
                            "l2": found.l2,
                            "temperature": found.temperature,
                            "shown": shown.value,
                            "interval": [shown.low, shown.high],
                            "shown_log_loss": found.log_loss,
                            "photos": found.photos,
                            "test": float((logits.argmax(axis=1) == test.labels).mean()),
                            "test_log_loss": calibration_scores(
                                softmax(logits, found.temperature), test.labels
                            ).log_loss,
                            "test_photos": len(test.labels),
                        }
                        out.write(json.dumps(row) + "\n")
                        out.flush()


def table(file: Path) -> Iterator[str]:
    """What the two ways show and reach for every set and size, and what more folds or a nested choice of l2 change."""
    rows = {tuple(row["draw"]): row for row in map(json.loads, file.read_text().splitlines())}
    ways = "val_split 0.2", "folds 5"
    yield (
        "| set | photos | draws | typical error of the shown accuracy (mean error), val_split | folds 5 "
        "| true accuracy, val_split | folds 5 | log loss, val_split | folds 5 | interval holds, val_split | folds 5 |"
    )
    yield "| --- |" + " ---: |" * 10
    for name, size in dict.fromkeys((name, size) for name, size, _seed, _way in rows):
        seeds = [
            seed for n, s, seed, way in rows if (n, s, way) == (name, size, ways[1]) and (n, s, seed, ways[0]) in rows
        ]
        found = {way: [rows[name, size, seed, way] for seed in seeds] for way in ways}
        cells = {way: _cells(found[way]) for way in ways}
        photos = round(np.mean([row["photos"] for row in found[ways[1]]]))
        in_turn = (cells[way][i] for i in range(4) for way in ways)
        yield f"| {name} | {photos} | {len(seeds)} | " + " | ".join(in_turn) + " |"
    yield ""
    yield "| way | draws | typical error (mean error) | folds 5 on the same draws | true accuracy | folds 5 |"
    yield "| --- |" + " ---: |" * 5
    for way in ("folds 10", "folds 5 nested"):
        draws = [draw for draw in rows if draw[3] == way and (*draw[:3], ways[1]) in rows]
        mine, theirs = (_cells([rows[(*draw[:3], other)] for draw in draws]) for other in (way, ways[1]))
        yield f"| {way} | {len(draws)} | {mine[0]} | {theirs[0]} | {mine[1]} | {theirs[1]} |"


def _cells(rows: list[dict[str, Any]]) -> tuple[str, str, str, str]:
    """Typical (root mean square) and mean error, true accuracy, log loss, how often the interval holds the truth."""
    errors = 100 * np.array([row["shown"] - row["test"] for row in rows])
    holds = np.mean([row["interval"][0] <= row["test"] <= row["interval"][1] for row in rows])
    return (
        f"{np.sqrt((errors**2).mean()):.1f} ({errors.mean():+.1f})",
        f"{100 * np.mean([row['test'] for row in rows]):.1f} %",
        f"{np.mean([row['test_log_loss'] for row in rows]):.3f}",
        f"{holds:.0%}",
    )


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        print("\n".join(table(Path(sys.argv[2]))))
    else:
        measure(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 20)
