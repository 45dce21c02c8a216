"""What near-duplicates cost in the feature pass of a set that is larger than those at hand.

    python benchmarks/large_sets.py make DATA WORK [--photos 30000]   photos, made of those in DATA, into WORK/photos
    python benchmarks/large_sets.py train WORK                        the feature pass without and with near-duplicates

DATA holds the folders hymenoptera, scenes and digits. A made photo has four parts of different photos of a class, each
a crop of 50 to 80 % of both sides, mirrored or not, that meet at a point drawn between 35 and 65 % of both sides. No
photo is meant to be a near-duplicate of another, but 3 % of all: copies, cropped to 90 % or re-encoded. The seeds are
fixed. Figures are core-seconds (user and system), because seconds mean little on a machine that does other things.
"""

import argparse
import contextlib
import io
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, ImageOps

from finetune_cli.config.load import load_config
from finetune_cli.config.schema import Config
from finetune_cli.progress import Advance, Observer, Silent, ignore_progress
from finetune_cli.training.prepare import prepare
from finetune_cli.training.requirements import check_settings

SIDE = 256
COPIES = 0.03
# Of each set: the folders of its training photos and of its test photos.
SETS = {"hymenoptera": ("train", "val"), "scenes": ("train", "test"), "digits": ("train", "test")}


def loaded(folder: Path) -> dict[str, list[Image.Image]]:
    """The photos of each class, at most 400 pixels wide and high."""
    found: dict[str, list[Image.Image]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in {".jpg", ".jpeg"}:
            with Image.open(path) as image:
                image.draft("RGB", (400, 400))
                photo = ImageOps.exif_transpose(image).convert("RGB")
            photo.thumbnail((400, 400))
            found.setdefault(path.parent.name, []).append(photo)
    return found


def mosaic(photos: list[Image.Image], rng: random.Random) -> Image.Image:
    """Parts of four of `photos`, side by side and one above the other."""
    x, y = (round(SIDE * rng.uniform(0.35, 0.65)) for _ in range(2))
    made = Image.new("RGB", (SIDE, SIDE))
    corners = ((0, 0, x, y), (x, 0, SIDE, y), (0, y, x, SIDE), (x, y, SIDE, SIDE))
    for photo, (left, top, right, bottom) in zip(rng.sample(photos, 4), corners, strict=True):
        share = rng.uniform(0.5, 0.8)
        width, height = share * photo.width, share * photo.height
        a, b = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        part = photo.resize(
            (right - left, bottom - top), Image.Resampling.BILINEAR, (a, b, a + width, b + height), reducing_gap=2
        )
        made.paste(ImageOps.mirror(part) if rng.random() < 0.5 else part, (left, top))
    return made


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def make(data: Path, work: Path, count: int) -> None:
    """`count` training photos of eight classes, 800 test photos of them, and 400 of digits."""
    rng = random.Random(0)
    for part, total in ((0, count), (1, 800)):
        classes = {name: own for which in ("hymenoptera", "scenes") for name, own in photos_of(data, which, part)}
        folder = work / ("photos", "test")[part]
        for name, own in classes.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            originals = round(total / len(classes) / (1 + COPIES))
            for number in range(originals):
                made = mosaic(own, rng)
                (folder / name / f"{number:05}.jpg").write_bytes(jpeg(made, 90))
                if part == 0 and number < round(total / len(classes)) - originals:
                    side, left, top = round(0.9 * SIDE), rng.randint(0, 25), rng.randint(0, 25)
                    crop = made.crop((left, top, left + side, top + side))
                    copy = jpeg(crop, 85) if number % 2 else jpeg(made, 50)
                    (folder / name / f"{number:05}-copy.jpg").write_bytes(copy)
    for name, own in photos_of(data, "digits", 1):
        (work / "strangers" / name).mkdir(parents=True, exist_ok=True)
        for number in range(40):
            (work / "strangers" / name / f"{number:05}.jpg").write_bytes(jpeg(mosaic(own, rng), 90))


def photos_of(data: Path, name: str, part: int) -> list[tuple[str, list[Image.Image]]]:
    return list(loaded(data / name / SETS[name][part]).items())


class Timed(Silent):
    """Core-seconds of this process by stage; what is between two stages belongs to none."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None, unit: str = "photos") -> Iterator[Advance]:  # noqa: ARG002
        before = time.process_time()
        try:
            yield ignore_progress
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - before


def config_of(work: Path, cache: str, *overrides: str) -> Config:
    return load_config(
        None,
        [
            *(f"data.train={work / 'photos'}", f"runtime.cache_dir={work / cache}", "augmentation=null"),
            *("model.backbone=efficientnet_lite0", f"output.directory={work / 'runs'}", *overrides),
        ],
    )


def measured(name: str, function: Callable[[Observer], object]) -> None:
    """Print the core-seconds of each stage of `function`; one that is interrupted goes on at the next call."""
    observer, before = Timed(), time.process_time()
    try:
        function(observer)
    finally:
        print(f"{name}: {time.process_time() - before:.0f} core-seconds", flush=True)
        for stage, seconds in observer.seconds.items():
            print(f"  {stage}: {seconds:.1f}", flush=True)
        for text in (*observer.notes, *observer.warnings):
            print("  #", text[:160], flush=True)


def train(work: Path) -> None:
    for what in ("ignore", "together"):
        config = config_of(work, f"cache-{what}", f"data.near_duplicates={what}")
        measured(f"near_duplicates: {what}", lambda observer, c=config: prepare(check_settings(c), observer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    maker = commands.add_parser("make")
    maker.add_argument("data", type=Path)
    maker.add_argument("work", type=Path)
    maker.add_argument("--photos", type=int, default=30_000)
    commands.add_parser("train").add_argument("work", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "make":
        make(arguments.data, arguments.work, arguments.photos)
    else:
        train(arguments.work)


if __name__ == "__main__":
    main()
