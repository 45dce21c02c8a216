"""Prints the numbers that the project promises, measured here and now.

    python benchmarks/measure.py PHOTOS [part ...]

PHOTOS is a folder with `hymenoptera/{train,val}` and `scenes/{train,test}` (see data/README.md for where such sets
are). Parts: predict, quickstart, stages, stages_many, many, extraction, views, textbook, textbook_resnet50, again,
growth, memory, classes; all of them without a name. The machine should have nothing else to do; compare ratios, not
seconds, between machines.
"""

import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import stages as stage_tables

HERE = Path(__file__).parent
FINETUNE = [sys.executable, "-m", "finetune_cli"]
LITE0 = HERE.parent / "src" / "finetune_cli" / "assets" / "efficientnet_lite0.keras"
TEST = {"scenes": "test", "hymenoptera": "val"}
AUGMENTATION = [
    "augmentation.horizontal_flip=true",
    "augmentation.width_shift_range=0.2",
    "augmentation.height_shift_range=0.2",
]


def say(*cells: object) -> None:
    print(" | ".join(str(cell) for cell in cells), flush=True)


def seconds(command: list[str], times: int = 1, code: int = 0, **options: object) -> tuple[float, str]:
    """Median wall-clock seconds of `command`, which must exit with `code`, and what it printed last."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        answer = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        taken.append(time.perf_counter() - started)
        if answer.returncode != code:
            sys.exit(f"{command} failed:\n{answer.stdout}{answer.stderr}")
    return statistics.median(taken), answer.stdout


def train(folder: Path, name: str, data: list[str], *overrides: str) -> tuple[float, dict]:
    command = [*FINETUNE, "train", *data, f"output.directory={folder}/runs", f"runtime.cache_dir={folder}/cache"]
    taken, _ = seconds([*command, *overrides, "--name", name, "--quiet"])
    return taken, json.loads((folder / "runs" / name / "run.json").read_text())


def lite0(photos: Path, folder: Path, name: str) -> list[str]:
    """A table that holds the test photos apart: a fifth of the training photos validates, the rest of them trains."""
    table = folder / f"{name}.csv"
    lines = ["image_path,label,split"]
    for split, source in (("train", "train"), ("test", TEST[name])):
        found = sorted((photos / name / source).glob("*/*.*"))
        lines += [f"{os.path.relpath(path, folder)},{path.parent.name},{split}" for path in found]
    table.write_text("\n".join(lines) + "\n")
    return [f"data.train={table}", "model.backbone=efficientnet_lite0"]


def predict(photos: Path, folder: Path) -> None:
    """Cold answers: `finetune predict` against a Keras script with the same model."""
    photo = next((photos / "hymenoptera" / "val" / "bees").glob("*.jpg"))
    for name, backbone in (("light", "efficientnet_lite0"), ("resnet", "resnet50")):
        weights = ["model.weights=null"] if backbone == "resnet50" else []
        train(
            folder,
            name,
            [*lite0(photos, folder, "hymenoptera"), f"model.backbone={backbone}"],
            *weights,
            "augmentation=null",
        )
        run = folder / "runs" / name
        ours, _ = seconds([*FINETUNE, "predict", str(photo), "--run", str(run)], 7)
        keras, _ = seconds([sys.executable, str(HERE / "keras_predict.py"), str(run / "model.keras"), str(photo)], 3)
        say("predict, cold", backbone, f"{ours:.2f} s", f"Keras script {keras:.2f} s", f"{keras / ours:.1f} x")
        heatmap = ["--output", str(folder / "heatmap.png")]
        explained, _ = seconds([*FINETUNE, "explain", str(photo), "--run", str(run), *heatmap], 7)
        say("explain, cold", backbone, f"{explained:.2f} s")
    say("--help", f"{seconds([*FINETUNE, '--help'], 7)[0]:.2f} s")
    config = folder / "wrong.yaml"
    config.write_text("data: {train: photos, valsplit: 0.2}\ntraining: {lr: 1}\n")
    say("a wrong config", f"{seconds([*FINETUNE, 'train', str(config)], 7, code=2)[0]:.2f} s")


def quickstart(photos: Path, folder: Path) -> None:  # noqa: ARG001
    """What `make quickstart` does after installing."""
    drawing, _ = seconds([*FINETUNE, "sample", str(folder / "quickstart-photos")])
    (folder / "configs").mkdir()
    config = folder / "configs" / "quickstart.yaml"
    config.write_text((HERE.parent / "configs" / "quickstart.yaml").read_text())
    training, _ = seconds([*FINETUNE, "train", str(config), f"runtime.cache_dir={folder}/cache"], cwd=folder)
    photo = next((folder / "quickstart-photos" / "city").glob("*.jpg"))
    predicting, _ = seconds([*FINETUNE, "predict", str(photo)], cwd=folder)
    say(
        "quickstart",
        f"drawing {drawing:.1f} s",
        f"training {training:.1f} s",
        f"predicting {predicting:.1f} s",
        f"together {drawing + training + predicting:.1f} s",
    )


def extraction(photos: Path, folder: Path) -> None:
    """ResNet50 features from JPEG files against `keras.Model.predict`, and against what the cores allow."""
    import keras

    from finetune_cli.backbones import build
    from finetune_cli.backbones.source import Wanted
    from finetune_cli.cache.features import FeatureStore
    from finetune_cli.engines.engine import Local
    from finetune_cli.inference import runtimes
    from finetune_cli.parallel import cores
    from finetune_cli.photos.augment import Augmenter
    from finetune_cli.photos.decode import ImageSettings
    from finetune_cli.photos.scan import Sample
    from finetune_cli.training import extract

    paths = sorted((photos / "hymenoptera").glob("*/*/*.jpg"))[:256]
    samples = [Sample(path, path.name, 0, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
    settings = ImageSettings()
    for name, weights in (("resnet50", None), ("efficientnet_lite0", "imagenet")):
        backbone = build.build(Wanted(name, weights, 224, 0))
        listing = keras.utils.image_dataset_from_directory(
            photos / "hymenoptera", labels=None, image_size=(224, 224), shuffle=False, verbose=False
        ).take(8)
        backbone.model.predict(listing.take(1), verbose=0)
        started = time.perf_counter()
        backbone.model.predict(listing, verbose=0)
        keras_rate = 256 / (time.perf_counter() - started)
        for precision in ("float32", "bfloat16"):
            augmenter = Augmenter({"horizontal_flip": True, "width_shift_range": 0.2}, 2, 0, 224)
            model = runtimes.convert(backbone.model)
            single = runtimes.OpenVinoRuntime(model, precision, 1)
            chosen = samples[:64]
            decode, warp, infer = photo_costs(chosen, settings, augmenter, single)
            rates = []
            for _ in range(3):
                for label, augment, cost in (
                    ("view 0", None, decode + infer),
                    ("2 views", augmenter, decode + warp + 2 * infer),
                ):
                    request = extract.FeatureRequest(settings, backbone.fingerprint, precision, augment)
                    with tempfile.TemporaryDirectory(dir=folder) as cache, FeatureStore(Path(cache)) as store:
                        compiled = runtimes.OpenVinoRuntime(runtimes.convert(backbone.model), precision, cores())
                        started = time.perf_counter()
                        resources = extract.Resources(store, lambda _p, c=compiled: c, Path(cache), Local(cores()), 4)
                        extract.extract(samples, request, backbone.width, resources, lambda _n: None)
                        rates.append((label, 256 / (time.perf_counter() - started), cores() / cost))
            for label in ("view 0", "2 views"):
                rate = statistics.median(rate for name_, rate, _ in rates if name_ == label)
                allowed = next(allowed for name_, _, allowed in rates if name_ == label)
                say(
                    f"extraction, {name}, {precision}, {label}",
                    f"{rate:.1f} photos/s",
                    f"keras.predict {keras_rate:.1f}",
                    f"{rate / keras_rate:.2f} x",
                    f"{rate / allowed:.2f} of what the core-seconds allow ({allowed:.1f})",
                    f"decode {decode * 1e3:.1f} ms, warp {warp * 1e3:.2f} ms, infer {infer * 1e3:.1f} ms",
                )


def photo_costs(samples: list, settings: object, augmenter: object, runtime: object) -> tuple[float, float, float]:
    """Core-seconds a photo for decoding, a view for the warp, and a view for the backbone, over 64 `samples`."""
    import numpy as np

    from finetune_cli.photos import scan

    decode = core_seconds(lambda: [scan.decode_sample(sample, settings) for sample in samples])
    decoded = np.stack([scan.decode_sample(sample, settings) for sample in samples])
    augmenter.view(decoded[0], samples[0].digest, 1)
    warp = core_seconds(lambda: [augmenter.view(x, s.digest, 1) for x, s in zip(decoded, samples, strict=True)])
    runtime.infer(decoded[:4])
    infer = core_seconds(lambda: [runtime.infer(decoded[i : i + 4]) for i in range(0, len(decoded), 4)])
    return decode / len(samples), warp / len(samples), infer / len(samples)


def stages(photos: Path, folder: Path) -> None:
    """The stages of a first run, of one with other head settings, and of a first one with ResNet50.

    The limit of the features: the core-seconds that decoding, warping and the backbone need, divided by the cores.
    """
    say("import tensorflow", f"{seconds([sys.executable, '-c', 'import tensorflow'], 3)[0]:.2f} s")
    stage_tables.print_header()
    for backbone, weights in (("efficientnet_lite0", "imagenet"), ("resnet50", "null")):
        data = [*lite0(photos, folder, "hymenoptera"), f"model.backbone={backbone}", f"model.weights={weights}"]
        data += AUGMENTATION
        first = [stage_tables.measured(fresh(folder / f"{backbone}-{i}"), "first", data) for i in range(3)]
        limit = photo_limit(photos / "hymenoptera" / "train", folder / f"{backbone}-0" / "runs" / "first")
        found = median_run(first)
        stage_tables.print_table(f"{backbone}, first", found, {"features": limit})
        if backbone == "efficientnet_lite0":
            second = [
                stage_tables.measured(
                    folder / f"{backbone}-0", f"second-{i}", [*data, f"training.label_smoothing=0.{i}"]
                )
                for i in range(1, 6)
            ]
            stage_tables.print_table(f"{backbone}, other head settings", median_run(second), {})


def stages_many(photos: Path, folder: Path) -> None:
    """The stages of a first run on many photos with one view each; FINETUNE_MANY says how many, 30,000 by default."""
    count = int(os.environ.get("FINETUNE_MANY", "30000"))
    source = copies(photos, folder / "many", count)
    data = [f"data.train={source}", "model.backbone=efficientnet_lite0", "augmentation=null"]
    data += ["data.near_duplicates=ignore"]  # nearly all of them are
    found, _run = stage_tables.measured(fresh(folder / "run"), "first", data)
    limit = photo_limit(source, folder / "run" / "runs" / "first")
    stage_tables.print_header()
    stage_tables.print_table(f"{count} photos", found, {"features": limit})


def fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


def median_run(runs: list[tuple[dict, dict]]) -> dict:
    """The stages of the run whose seconds are the median."""
    return sorted((found for found, _run in runs), key=lambda found: found["all"][0])[len(runs) // 2]


def photo_limit(photos: Path, run: Path) -> float:
    """Seconds that the photos of `run`, such as those in the class folders `photos`, would take if all cores worked
    on nothing else.
    """
    from finetune_cli.inference import runtimes
    from finetune_cli.parallel import cores
    from finetune_cli.photos.augment import Augmenter
    from finetune_cli.photos.decode import ImageSettings
    from finetune_cli.photos.scan import Sample
    from finetune_cli.training.converted import Converted

    manifest = json.loads((run / "run.json").read_text())
    paths = sorted(photos.glob("*/*.jpg"))[:64]
    samples = [Sample(path, path.name, 0, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
    augmenter = Augmenter({"horizontal_flip": True, "width_shift_range": 0.2, "height_shift_range": 0.2}, 4, 0, 224)
    found = next(path for path in (run.parents[1] / "cache" / "backbones").iterdir() if path.is_dir())
    costs = {}
    for precision in {"float32", manifest["feature_precision"]}:
        runtime = runtimes.OpenVinoRuntime(Converted.read(found).openvino_model(), precision, 1)
        costs[precision] = photo_costs(samples, ImageSettings(), augmenter, runtime)
    counts, views = manifest["photos"], manifest["views"]["per_photo"]
    decode, warp, infer = costs[manifest["feature_precision"]]
    needed = counts["train"] * (decode + (views - 1) * warp + views * infer)
    decode, _warp, infer = costs["float32"]
    needed += (counts["val"] + counts.get("test", 0)) * (decode + infer)
    return needed / cores()


def core_seconds(work: Callable[[], object], times: int = 3) -> float:
    """Median CPU seconds of all threads of this process during `work`."""
    taken = []
    for _ in range(times):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def views(photos: Path, folder: Path) -> None:  # noqa: ARG001
    """What an augmented view costs on top of decoding, against the generator's own warp."""
    import numpy as np

    from finetune_cli.photos.augment import Augmenter
    from finetune_cli.photos.decode import ImageSettings, decode

    photo = decode(next((photos / "hymenoptera" / "train" / "ants").glob("*.jpg")), ImageSettings())
    for name, arguments in {
        "flip and shifts": {"horizontal_flip": True, "width_shift_range": 0.2, "height_shift_range": 0.2},
        "rotation, zoom, shear": {"rotation_range": 20, "zoom_range": 0.2, "shear_range": 10},
        "brightness, channel shift": {"brightness_range": [0.8, 1.2], "channel_shift_range": 20},
    }.items():
        augmenter = Augmenter(arguments, 200, 0, 224)
        augmenter.view(photo, "00", 1)
        ours = core_seconds(lambda a=augmenter: [a.view(photo, "00", i) for i in range(1, 200)]) / 199
        from keras.src.legacy.preprocessing.image import ImageDataGenerator

        generator = ImageDataGenerator(**arguments)
        pixels = photo.astype(np.float32)
        theirs = core_seconds(lambda g=generator, p=pixels: [g.random_transform(p) for _ in range(100)]) / 100
        say(f"a view, {name}", f"{ours * 1e3:.2f} ms", f"generator {theirs * 1e3:.2f} ms")


def textbook(photos: Path, folder: Path) -> None:
    """`finetune train` with augmentation against 20 epochs of `ImageDataGenerator` + `fit`."""
    for name in ("scenes", "hymenoptera"):
        data = lite0(photos, folder, name)
        test = str(photos / name / TEST[name])
        ours, run = train(folder, f"textbook-{name}", data, *AUGMENTATION)
        theirs, printed = seconds(
            [sys.executable, str(HERE / "textbook.py"), str(LITE0), str(photos / name / "train"), test]
        )
        say(
            f"training, {name}",
            f"{ours:.1f} s, test accuracy {run['metrics']['test']['accuracy']:.1%}",
            f"textbook {theirs:.1f} s ({printed.splitlines()[-1]})",
            f"{theirs / ours:.1f} x",
        )


def textbook_resnet50(photos: Path, folder: Path) -> None:
    """The same race with ResNet50, whose weights are random here: only the seconds mean something."""
    data = lite0(photos, folder, "hymenoptera")
    ours, _ = train(folder, "resnet50", [*data, "model.backbone=resnet50", "model.weights=null"], *AUGMENTATION)
    folders = [str(photos / "hymenoptera" / name) for name in ("train", TEST["hymenoptera"])]
    theirs, printed = seconds([sys.executable, str(HERE / "textbook.py"), "resnet50", *folders])
    say(
        "training, ResNet50",
        f"{ours:.1f} s",
        f"textbook {theirs:.1f} s ({printed.splitlines()[-1]})",
        f"{theirs / ours:.1f} x",
    )


def again(photos: Path, folder: Path) -> None:
    """A second run with another learning rate: no backbone pass."""
    for name, rate in (("again-1", 0.001), ("again-2", 0.003)):
        taken, run = train(
            folder,
            name,
            lite0(photos, folder, "scenes"),
            *AUGMENTATION,
            "training.solver=adam",
            f"training.learning_rate={rate}",
        )
        say(
            f"learning rate {rate}",
            f"{taken:.1f} s",
            f"views computed {run['views']['computed']}",
            f"from the cache {run['views']['cached']}",
            f"features {run['seconds']['features']:.2f} s",
        )


def growth(photos: Path, folder: Path) -> None:
    """Seconds for 500, 1,000 and 2,000 photos."""
    for count in (500, 1000, 2000):
        target = copies(photos, folder / f"growth-{count}", count)
        taken, run = train(
            folder, f"growth-{count}", [f"data.train={target}", "model.backbone=efficientnet_lite0"], *AUGMENTATION
        )
        say(f"{count} photos x {run['views']['per_photo']} views", f"{taken:.1f} s", json.dumps(run["seconds"]))


def copies(photos: Path, target: Path, count: int) -> Path:
    """Write `count` photos of scenes into the class folders `target`: other digests, the same few hundred pictures."""
    originals = sorted((photos / "scenes" / "train").glob("*/*.jpg"))
    for i in range(count):
        source = originals[i % len(originals)]
        copy = target / source.parent.name / f"{i}-{source.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes() + f"copy {i}".encode())
    return target


def memory(photos: Path, folder: Path) -> None:  # noqa: ARG001
    """Peak memory with 20,000 photos x 4 views of synthetic features, each solver in a process of its own."""
    for solver in ("adam", "lbfgs"):
        command = [sys.executable, __file__, str(folder), f"--fit={solver}"]
        taken, printed = seconds(command)
        say(f"20,000 photos x 4 views x 1280, {solver}", f"{taken:.1f} s", printed.strip())


def many(photos: Path, folder: Path) -> None:
    """30,000 photos: the search for l2 and the fit, on features of scenes, mixed in pairs of a class, with noise."""
    import numpy as np

    from finetune_cli.config.load import load_config
    from finetune_cli.head.data import HeadData
    from finetune_cli.head.l2 import choose_l2
    from finetune_cli.head.lbfgs import fit_lbfgs
    from finetune_cli.progress import Silent
    from finetune_cli.training.fit import labels_of
    from finetune_cli.training.prepare import prepare
    from finetune_cli.training.requirements import check_settings

    overrides = [*lite0(photos, folder, "scenes"), f"runtime.cache_dir={folder}/cache", f"output.directory={folder}"]
    parts = prepare(check_settings(load_config(None, [*overrides, "augmentation=null"])), Silent()).parts.values()
    x = np.concatenate([part.array[:, 0] for part in parts])
    y = np.concatenate([labels_of(part.samples) for part in parts])
    rng = np.random.default_rng(0)
    first = rng.integers(0, len(x), 30_000)
    second = np.empty_like(first)
    for label in np.unique(y):
        own = y[first] == label
        second[own] = rng.choice(np.flatnonzero(y == label), own.sum())
    share = rng.uniform(0.5, 1, (30_000, 1)).astype(np.float32)
    drawn = x[first] * share + x[second] * (1 - share)
    drawn += 1.2 * x.std(axis=0) * rng.standard_normal(drawn.shape, np.float32)
    data = HeadData.of(np.maximum(drawn, 0), y[first], len(np.unique(y)))
    l2 = choose_l2(data)[0]
    for name, work in (("search for l2", lambda: choose_l2(data)), ("fit", lambda: fit_lbfgs(data, l2))):
        used, started = time.process_time(), time.perf_counter()
        work()
        say(
            f"30,000 photos, {name}",
            f"{time.perf_counter() - started:.1f} s",
            f"{time.process_time() - used:.1f} core-seconds",
        )


def classes(photos: Path, folder: Path) -> None:  # noqa: ARG001
    """1,000 classes x 20 photos of drawn features: the search for l2, the fit, and their peak memory."""
    command = [sys.executable, __file__, str(folder), "--fit=classes"]
    say("1,000 classes x 20 photos x 1280, lbfgs", seconds(command)[1].strip())


def fit_classes() -> None:
    import numpy as np

    from finetune_cli.head.data import HeadData
    from finetune_cli.head.l2 import choose_l2
    from finetune_cli.head.lbfgs import fit_lbfgs

    count, each = 1000, 20
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 0.15, (count, 1280)).astype(np.float32)

    def draw(photos: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(photos) % count
        return centres[labels] + rng.standard_normal((photos, 1280), np.float32), labels

    (x, y), (test_x, test_y) = draw(count * each), draw(5 * count)
    data = HeadData.of(x, y, count)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    l2, _ = choose_l2(data)
    chosen = time.perf_counter()
    head = fit_lbfgs(data, l2)
    fitted = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    right = (head.logits(test_x).argmax(axis=1) == test_y).mean()
    print(
        f"search {chosen - started:.1f} s | fit {fitted - chosen:.1f} s | accuracy {right:.1%} | "
        f"peak memory {peak / 1024:.0f} MB above the features"
    )


def fit_synthetic(folder: Path, solver: str) -> None:
    import numpy as np

    from finetune_cli.config.schema import Config
    from finetune_cli.head.keras_fit import fit_epochs
    from finetune_cli.photos.scan import Sample
    from finetune_cli.progress import Silent
    from finetune_cli.training import fit
    from finetune_cli.training.extract import Features, scratch_array

    rng = np.random.default_rng(0)
    centres = rng.normal(size=(10, 1280)).astype(np.float32) * 0.05
    parts = {}
    for split, count, n_views in (("train", 20_000, 4), ("val", 2_000, 1)):
        samples = tuple(Sample(Path(f"{split}{i}"), f"{i}", i % 10, f"{split}{i:060x}") for i in range(count))
        array = scratch_array(folder, (count, n_views, 1280))
        for i in range(count):
            array[i] = np.abs(rng.normal(size=(n_views, 1280)).astype(np.float32)) + centres[i % 10]
        parts[split] = Features(array, samples, (), 0, 0, np.zeros((0, 0, 0), np.uint8))
    config = Config.model_validate({"data": {"train": folder}, "training": {"solver": solver, "l2": 1e-4}})
    classes = tuple("0123456789")
    if solver == "adam":
        train, val = fit.head_data(config, parts["train"], classes), fit.validation_data(parts["val"], classes)
        for _state in fit_epochs(train, val, fit.keras_settings(config, 1e-4)):
            pass
    else:
        fit.lbfgs(config, parts["train"], classes, None, Silent())
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


PARTS = {
    part.__name__: part
    for part in (
        predict,
        quickstart,
        stages,
        stages_many,
        many,
        extraction,
        views,
        textbook,
        textbook_resnet50,
        again,
        growth,
        memory,
        classes,
    )
}


def main() -> None:
    photos, *names = sys.argv[1:]
    if names and names[0].startswith("--fit="):
        solver = names[0].partition("=")[2]
        fit_classes() if solver == "classes" else fit_synthetic(Path(photos), solver)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    for name in names or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(photos).resolve(), Path(folder))


if __name__ == "__main__":
    main()
