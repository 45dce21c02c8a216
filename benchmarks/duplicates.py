"""How well near-duplicates are found, what keeping them together costs, and what it does to the accuracy that is shown.

    python benchmarks/duplicates.py planted DATA        recall and precision on planted copies of real photos
    python benchmarks/duplicates.py moved               photos that move to the other side when photos are added
    python benchmarks/duplicates.py crops DATA WORK [--crops 25] [--originals 1200]
                                                        the accuracy that is shown for crops of the same photos

DATA holds the folders hymenoptera, scenes and digits. The bundled backbone is used; seeds are fixed.
"""

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from finetune_cli.duplicates.find import find
from finetune_cli.duplicates.thumbnails import thumbnail
from finetune_cli.photos import split
from finetune_cli.photos.decode import ImageSettings, decode

SETTINGS = ImageSettings()
ORIGINALS = 100  # of each set, which get a copy of each kind
KINDS = ("re-encoded", "resized", "cropped to 90 %", "cropped to 70 %", "flipped", "brightened")


def copies(image: Image.Image, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """A copy of each kind, as a JPEG file."""
    width, height = image.size
    half = max(32, width // 2), max(32, height // 2)
    for kind in KINDS:
        quality, changed = 85, image
        if kind == "re-encoded":
            quality = 50
        elif kind == "resized":
            changed = image.resize(half, Image.Resampling.LANCZOS)
        elif kind == "flipped":
            changed = ImageOps.mirror(image)
        elif kind == "brightened":
            changed = ImageEnhance.Brightness(image).enhance(1.3)
        else:
            changed = cropped(image, int(kind.split()[2]) / 100, rng)
        yield kind, encoded(changed, quality)


def cropped(image: Image.Image, share: float, rng: random.Random) -> Image.Image:
    """A part with `share` of both sides, anywhere."""
    width, height = round(share * image.width), round(share * image.height)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def photos_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})


def planted(data: Path) -> None:
    from finetune_cli.backbones import build
    from finetune_cli.backbones.source import Wanted
    from finetune_cli.inference import runtimes

    model = build.build(Wanted("efficientnet_lite0", "imagenet", 224, 0)).model
    runtime = runtimes.OpenVinoRuntime(runtimes.convert(model), "float32", 2)
    print("| set | photos |", " | ".join(KINDS), "| precision | CPU seconds |")
    print("| --- |" + " --- |" * (len(KINDS) + 3))
    for name in ("hymenoptera", "scenes", "digits"):
        paths, rng = photos_of(data / name), random.Random(0)
        chosen = set(rng.sample(range(len(paths)), ORIGINALS))
        pixels, source, kind = [], [], []
        for number, path in enumerate(paths):
            made = [("original", path.read_bytes())]
            made += list(copies(opened(path), rng)) if number in chosen else []
            for what, content in made:
                pixels.append(decode(content, SETTINGS))
                source.append(number)
                kind.append(what)
        classes = sorted({path.parent.name for path in paths})
        labels = np.array([classes.index(paths[i].parent.name) for i in source], np.int64)
        features = np.concatenate([runtime.infer(np.stack(pixels[i : i + 4])) for i in range(0, len(pixels), 4)])
        started = time.process_time()
        found = find(np.stack([thumbnail(photo) for photo in pixels]), features, labels, 2)
        seconds = time.process_time() - started
        group_of = {i: number for number, group in enumerate((*found.groups, *found.large)) for i in group}
        original = {source[i]: i for i in range(len(source)) if kind[i] == "original"}
        recalls = []
        for what in KINDS:
            own = [i for i in range(len(source)) if kind[i] == what]
            together = [i in group_of and group_of[i] == group_of.get(original[source[i]]) for i in own]
            recalls.append(f"{np.mean(together):.2f}")
        pairs = [pair for group in (*found.groups, *found.large) for pair in combinations(group, 2)]
        wrong = {(source[a], source[b]) for a, b in pairs if source[a] != source[b]}
        precision = sum(source[a] == source[b] for a, b in pairs) / len(pairs)
        print(f"| {name} | {len(source)} |", " | ".join(recalls), f"| {precision:.3f} | {seconds:.1f} |")
        for a, b in sorted(wrong):
            print(f"  not planted: {paths[a].relative_to(data)} and {paths[b].relative_to(data)}")


def moved() -> None:
    def digests(first: int, last: int) -> list[tuple[int, str, None]]:
        return [(i % 10, hashlib.sha256(str(i).encode()).hexdigest(), None) for i in range(first, last)]

    print("| photos in 10 classes | added | moved to the other side |")
    print("| --- | --- | --- |")
    for count in (400, 4000, 40_000):
        for share in (0.01, 0.1, 1.0):
            before, after = digests(0, count), digests(0, count + round(share * count))
            old, new = split.choose(before, 0.2), split.choose(after, 0.2)
            changed = sum(a != b for a, b in zip(old, new, strict=False))
            print(f"| {count} | {share:.0%} | {changed} ({changed / count:.2%}) |")


def crops(data: Path, work: Path, per_photo: int, originals: int) -> None:
    """The issue of near-duplicates in one experiment: crops of 60 to 95 % of each side of the same photos."""
    rng, folder = random.Random(1), work / "crops"
    shutil.rmtree(folder, ignore_errors=True)
    paths = [path for name in ("scenes", "hymenoptera") for path in photos_of(data / name)]
    rng.shuffle(paths)
    for number, path in enumerate(paths[:originals]):
        target, image = folder / path.parent.name, opened(path)
        target.mkdir(parents=True, exist_ok=True)
        for i in range(per_photo):
            part = encoded(cropped(image, rng.uniform(0.6, 0.95), rng), 90)
            (target / f"o{number:05}-{i:02}.jpg").write_bytes(part)
    print("| validation split | accuracy shown | photos | features | near-duplicates | whole run | its CPU seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, overrides in (
        ("photo by photo (near_duplicates: ignore)", ["data.near_duplicates=ignore"]),
        ("near_duplicates: together", []),
        ("by original (group_regex)", ["data.near_duplicates=ignore", "data.group_regex=o[0-9]+"]),
    ):
        cache = work / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        started, before = time.monotonic(), cpu_seconds()
        run = trained(folder, work, cache, overrides)
        seconds, val, stages = time.monotonic() - started, run["metrics"]["val"], run["seconds"]
        low, high = val["accuracy_interval"]
        print(
            f"| {name} | {val['accuracy']:.1%} ({low:.1%} to {high:.1%}) | {sum(run['photos'].values())} "
            f"| {stages['features']:.0f} s | {stages.get('near-duplicates', 0):.0f} s | {seconds:.0f} s "
            f"| {cpu_seconds() - before:.0f} |",
            flush=True,
        )


def cpu_seconds() -> float:
    """Of the processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def trained(folder: Path, work: Path, cache: Path, overrides: list[str]) -> dict:
    """The run.json of a training with the bundled backbone and one view a photo."""
    command = [
        *(sys.executable, "-m", "finetune_cli", "train", f"data.train={folder}", "--print-run", "--quiet"),
        *("model.backbone=efficientnet_lite0", "augmentation=null", f"output.directory={work / 'runs'}"),
        *(f"runtime.cache_dir={cache}", *overrides),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    return json.loads((Path(answer.stdout.split("\n")[-2]) / "run.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("planted", "moved", "crops"))
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--crops", type=int, default=25)
    parser.add_argument("--originals", type=int, default=1200)
    arguments = parser.parse_args()
    if arguments.what == "planted":
        planted(arguments.data)
    elif arguments.what == "moved":
        moved()
    else:
        crops(arguments.data, arguments.work, arguments.crops, arguments.originals)


if __name__ == "__main__":
    main()
