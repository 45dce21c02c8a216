"""How well `finetune doctor` finds wrong labels, and what accepting its suggestions regains.

    python benchmarks/doctor.py DATA [SET ...]

DATA holds the folders hymenoptera, scenes and digits. Some training labels are changed to another class, drawn by a
seed. The head is fitted by L-BFGS, with l2 by cross-validation, on features of the bundled backbone (float32, view 0),
and scored on the untouched test photos: with the wrong labels, after all suggestions of the tier high were accepted,
and with the right labels. Only planted errors count as found: what was wrong before lowers the precision.
"""

import sys
from pathlib import Path

import numpy as np

from finetune_cli.backbones import build
from finetune_cli.backbones.source import Wanted
from finetune_cli.doctor.labels import doubts
from finetune_cli.head.data import HeadData
from finetune_cli.head.l2 import choose_l2
from finetune_cli.head.lbfgs import fit_lbfgs
from finetune_cli.inference import runtimes
from finetune_cli.photos.decode import ImageSettings, decode

TESTS = {"hymenoptera": "val", "scenes": "test", "digits": "test"}
RATES = (0.02, 0.05, 0.1)
SEEDS = range(3)


def features(folder: Path, runtime: runtimes.Runtime) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels, and groups: persons, where the name tells them."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})
    classes = sorted({path.parent.name for path in paths})
    persons = [path.name.split("-")[0] if path.name[0] == "p" and "-" in path.name else path.name for path in paths]
    pixels = [decode(path, ImageSettings()) for path in paths]
    rows = np.concatenate([runtime.infer(np.stack(pixels[i : i + 4])) for i in range(0, len(pixels), 4)])
    labels = np.array([classes.index(path.parent.name) for path in paths])
    return rows, labels, np.unique(persons, return_inverse=True)[1]


def accuracy(data: HeadData, rows: np.ndarray, labels: np.ndarray) -> float:
    head = fit_lbfgs(data, choose_l2(data)[0])
    return float((head.logits(rows).argmax(axis=1) == labels).mean())


def main(data: Path, names: list[str]) -> None:
    model = build.build(Wanted("efficientnet_lite0", "imagenet", 224, 0)).model
    runtime = runtimes.OpenVinoRuntime(runtimes.convert(model), "float32", 2)
    print(
        "| set | wrong labels | high: found, precision | look: found of the rest | accuracy: wrong, after high, right |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name in names or TESTS:
        rows, labels, groups = features(data / name / "train", runtime)
        test_rows, test_labels, _groups = features(data / name / TESTS[name], runtime)
        classes = int(labels.max()) + 1
        clean = accuracy(HeadData.of(rows, labels, classes, groups=groups), test_rows, test_labels)
        for rate in RATES:
            planted = found = high = looked = 0
            before, after = [], []
            for seed in SEEDS:
                rng = np.random.default_rng(seed)
                wrong = rng.permutation(len(labels))[: round(rate * len(labels))]
                given = labels.copy()
                given[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
                told = doubts(HeadData.of(rows, given, classes, groups=groups), 2)
                accepted = [doubt for doubt in told if doubt.high]
                planted += len(wrong)
                high += len(accepted)
                found += sum(doubt.photo in wrong for doubt in accepted)
                looked += sum(doubt.photo in wrong for doubt in told if not doubt.high)
                before.append(accuracy(HeadData.of(rows, given, classes, groups=groups), test_rows, test_labels))
                for doubt in accepted:
                    given[doubt.photo] = doubt.suggested
                after.append(accuracy(HeadData.of(rows, given, classes, groups=groups), test_rows, test_labels))
            print(
                f"| {name} | {rate:.0%} ({planted} in {len(SEEDS)} draws) | {found / planted:.0%}, "
                f"{found}/{high} = {found / max(high, 1):.2f} | {looked / max(planted - found, 1):.0%} "
                f"| {np.mean(before):.1%}, {np.mean(after):.1%}, {clean:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
