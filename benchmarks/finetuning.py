"""Compares fine-tuning with the frozen backbone and with the textbook; prints the tables of docs/training.md.

    python benchmarks/finetuning.py PHOTOS RESULTS.jsonl [--seeds N] [--sets NAME,...] [--ways NAME;...]

PHOTOS is a folder with `hymenoptera/{train,val}`, `scenes/{train,test}` and `digits/{train,test}`. Every way is a
process of its own, from JPEG files to a saved model, with an empty feature cache; its accuracy and log loss are those
of the test photos, which it has not seen. Results are appended to RESULTS.jsonl, and what is there already is not
measured again; the tables are made of all of it (`--seeds 0` measures nothing). Below the table of docs/training.md,
what `auto` keeps is compared with the frozen model of the same run, by McNemar's exact test on the test photos. `cpu`
are the core-seconds of a process, which other programs disturb less than `seconds`; `memory` is the most that it had
at once. The textbook: a head for 10 epochs, then everything above `block10_add` but BatchNorm unfrozen,
`ImageDataGenerator` and `fit` through the whole network, Adam, 20 epochs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SETS = {"digits": ("train", "test"), "scenes": ("train", "test"), "hymenoptera": ("train", "val")}
FLIPS = {"horizontal_flip": True, "width_shift_range": 0.2, "height_shift_range": 0.2}
# A hand that is mirrored or turned far shows another digit.
HANDS = {"width_shift_range": 0.1, "height_shift_range": 0.1, "rotation_range": 10, "zoom_range": 0.1}
AUGMENTATION = {"digits": HANDS, "scenes": FLIPS, "hymenoptera": FLIPS}
WAYS = {
    "frozen": {"fine_tuning": None},
    "auto": {"fine_tuning": "auto"},
    "auto, 4 views": {"fine_tuning": "auto", "views": 4},
    "auto, 16 views": {"fine_tuning": "auto", "views": 16},
    "last_stage": {"fine_tuning": {"unfreeze": "last_stage"}},
    "last_stage, 10 epochs": {"fine_tuning": {"unfreeze": "last_stage", "epochs": 10}},
    "last_two_stages": {"fine_tuning": {"unfreeze": "last_two_stages"}},
    "textbook, 1e-5": {"rate": 1e-5},
    "textbook, 1e-4": {"rate": 1e-4},
    "textbook, 1e-3": {"rate": 1e-3},
}
VIEWS = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("photos", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sets", type=lambda text: text.split(","), default=list(SETS))
    parser.add_argument("--ways", type=lambda text: text.split(";"), default=list(WAYS), help="separated by ;")
    arguments = parser.parse_args()
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    results = [json.loads(line) for line in lines]
    for seed in range(arguments.seeds):
        for name in arguments.sets:
            for way in arguments.ways:
                if any((r["set"], r["way"], r["seed"]) == (name, way, seed) for r in results):
                    continue
                found = {"set": name, "way": way, "seed": seed, **measured(arguments.photos, name, way, seed)}
                results.append(found)
                with arguments.results.open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(found, file=sys.stderr, flush=True)
    table(results)


def measured(photos: Path, name: str, way: str, seed: int) -> dict[str, object]:
    train, test = (photos / name / part for part in SETS[name])
    recipe = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        # Away from the test photos of hymenoptera: a folder `val` beside `train` would be taken for validation.
        train = shutil.copytree(train, Path(folder, "photos"))
        started = time.perf_counter()
        if "rate" in recipe:
            words = [__file__, "--textbook", train, test, recipe["rate"], seed, json.dumps(AUGMENTATION[name])]
            output, used = run([sys.executable, *map(str, words)])
            return {**json.loads(output.splitlines()[-1]), "seconds": time.perf_counter() - started, **used}
        config = {
            "data": {"train": str(train), "test": str(test), "on_bad_image": "skip"},
            "model": {"backbone": "efficientnet_lite0"},
            "augmentation": {"views": recipe.get("views", VIEWS), **AUGMENTATION[name]},
            "training": {"seed": seed},
            "runtime": {"cache_dir": f"{folder}/cache"},
            "output": {"directory": f"{folder}/runs", "name": "run"},
            "fine_tuning": recipe["fine_tuning"],
        }
        if name == "digits":
            config["data"]["group_regex"] = "p[0-9]+"  # a person is not in training and in validation
        path = Path(folder, "x.yaml")
        path.write_text(json.dumps(config))
        _, used = run([sys.executable, "-m", "finetune_cli", "train", "--quiet", str(path)])
        seconds = time.perf_counter() - started
        manifest = json.loads(Path(folder, "runs", "run", "run.json").read_text())
    facts = manifest.get("fine_tuning")
    return {
        "accuracy": manifest["metrics"]["test"]["accuracy"],
        "log_loss": manifest["metrics"]["test"]["log_loss"],
        "seconds": seconds,
        **used,
        **(found_by(facts) if facts else {}),
        "stages": manifest["seconds"],
    }


def found_by(facts: dict) -> dict[str, object]:
    """What a fine-tuning tried and kept, and what the frozen model of the same run has on the test photos."""
    compared = facts["compared"]["test"]
    (kept,) = [each for each in facts["candidates"] if each["kept"]]
    return {
        "kept": kept["name"],
        "training": kept["training"],
        "frozen": compared["frozen"],
        "only_frozen_right": compared["only_frozen_right"],
        "only_kept_right": compared["only_kept_right"],
        "p_value": compared["p_value"],
    }


def run(command: list[str]) -> tuple[str, dict[str, float]]:
    """The output of a command; its core-seconds, and the most megabytes that it had at once."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with code {process.returncode}")
    return output, {"cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss / 1024}


def table(results: list[dict]) -> None:
    print("| way | " + " | ".join(SETS) + " |")
    print("| --- |" + " --- |" * len(SETS))
    for way in WAYS:
        cells = []
        for name in SETS:
            rows = [r for r in results if (r["set"], r["way"]) == (name, way)]
            if not rows:
                cells.append("not measured")
                continue
            accuracies = [r["accuracy"] for r in rows]
            spread = f" ({min(accuracies):.1%} to {max(accuracies):.1%})" if len(rows) > 1 else ""
            loss = np.mean([r["log_loss"] for r in rows])
            seconds, cpu = (np.median([r[name] for r in rows]) for name in ("seconds", "cpu"))
            kept = sum(r.get("kept") == "frozen" for r in rows)
            note = f", frozen kept {kept} of {len(rows)}" if "kept" in rows[0] else ""
            cells.append(f"{np.mean(accuracies):.1%}{spread} / {loss:.3f} / {seconds:.0f} s, {cpu:.0f} of CPU{note}")
        if any(cell != "not measured" for cell in cells):
            print(f"| {way} | " + " | ".join(cells) + " |")
    print("\n| set | seed | kept by auto | frozen | kept | only frozen right | only kept right | p |")
    print("| --- |" + " --- |" * 7)
    for r in sorted((r for r in results if r["way"] == "auto"), key=lambda r: (list(SETS).index(r["set"]), r["seed"])):
        print(
            f"| {r['set']} | {r['seed']} | {r['kept']} | {r['frozen']['accuracy']:.1%} | {r['accuracy']:.1%} "
            f"| {r['only_frozen_right']} | {r['only_kept_right']} | {r['p_value']:.2g} |"
        )


def textbook(train: str, test: str, rate: float, seed: int, augmentation: dict) -> None:
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    from keras.src.legacy.preprocessing.image import ImageDataGenerator

    import finetune_cli

    keras.utils.set_random_seed(seed)
    backbone = keras.models.load_model(Path(finetune_cli.__file__).parent / "assets" / "efficientnet_lite0.keras")
    options = {"target_size": (224, 224), "batch_size": 32, "class_mode": "categorical"}
    photos = ImageDataGenerator(**augmentation).flow_from_directory(train, seed=seed, **options)
    held_out = ImageDataGenerator().flow_from_directory(test, shuffle=False, **options)
    image = keras.Input((224, 224, 3))
    head = keras.layers.Dense(photos.num_classes, activation="softmax")
    model = keras.Model(image, head(backbone(image, training=False)))
    backbone.trainable = False
    model.compile("adam", "categorical_crossentropy")
    model.fit(photos, epochs=10, verbose=0)
    names = [layer.name for layer in backbone.layers]
    backbone.trainable = True
    for layer in backbone.layers:
        above = names.index(layer.name) > names.index("block10_add")
        layer.trainable = above and not isinstance(layer, keras.layers.BatchNormalization)
    model.compile(keras.optimizers.Adam(rate), "categorical_crossentropy")
    model.fit(photos, epochs=20, verbose=0)
    probabilities = model.predict(held_out, verbose=0)
    own = probabilities[np.arange(len(held_out.classes)), held_out.classes]
    accuracy = float((probabilities.argmax(axis=1) == held_out.classes).mean())
    print(json.dumps({"accuracy": accuracy, "log_loss": float(-np.log(np.maximum(own, 1e-15)).mean())}))


if __name__ == "__main__":
    if sys.argv[1] == "--textbook":
        textbook(sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5]), json.loads(sys.argv[6]))
    else:
        main()
