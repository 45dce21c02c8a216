"""How the feature pass scales: threads against the workers of a Ray cluster on this machine, and more and more photos.

    python benchmarks/scaling.py prepare FOLDER --source PHOTOS [--photos 30000]   make photos: crops of real ones
    python benchmarks/scaling.py measure FOLDER RESULTS.json ray 2 10000           one measurement, added to RESULTS
    python benchmarks/scaling.py table RESULTS.json                                write the table into docs/scaling.md

A measurement is a pass over photos whose headers and digests are known, from an empty cache, with EfficientNet-Lite0 in
the precision of training. Core-seconds are those of this process and of everything that it started, from before Ray
starts until the pass has ended; seconds say something only on a machine that does nothing else.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
SIDE, QUALITY = 320, 85
TICKS = os.sysconf("SC_CLK_TCK")


def prepare(folder: Path, source: Path, count: int) -> None:
    """`count` JPEG files in folders of 1,000, each another crop of a photo in `source`."""
    import numpy as np
    from PIL import Image

    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    rng = np.random.default_rng(0)
    made = 0
    for path in (paths * (count // len(paths) + 1))[:: max(1, len(paths) * (count // len(paths) + 1) // count)]:
        if made == count:
            break
        with Image.open(path) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            whole = image.convert("RGB")
        scale = rng.uniform(1.1, 1.6) * SIDE / min(whole.size)
        whole = whole.resize([max(SIDE, round(side * scale)) for side in whole.size])
        for _crop in range(8):
            left, top = (int(rng.integers(0, side - SIDE + 1)) for side in whole.size)
            target = folder / f"{made // 1000:03}" / f"{made:06}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            whole.crop((left, top, left + SIDE, top + SIDE)).save(target, quality=QUALITY)
            made += 1
            if made == count:
                break
    assert made == count, made


def core_seconds() -> tuple[float, float, float]:
    """User and system seconds of this process, of all together, and the largest memory of a worker in MB."""
    own = os.times()
    mine = own.user + own.system
    parents, seconds, memory = {}, {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
                fields = rest.split()
                parents[int(entry.name)] = int(fields[1])
                seconds[int(entry.name)] = sum(map(int, fields[11:15])) / TICKS  # with its children that have ended
                if name.startswith("ray::Worker"):
                    peak = re.search(r"VmHWM:\s+(\d+)", (entry / "status").read_text())
                    memory[int(entry.name)] = int(peak[1]) / 1024 if peak else 0.0
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    others = sum(seconds[pid] for pid in family if pid != os.getpid())
    ended = own.children_user + own.children_system
    return mine, mine + others + ended, max((memory[pid] for pid in family & memory.keys()), default=0.0)


def measure(folder: Path, engine_name: str, workers: int, count: int) -> dict[str, object]:
    """One pass over the first `count` photos of `folder`."""
    sys.path.insert(0, str(ROOT / "src"))
    os.environ["PYTHONPATH"] = str(ROOT / "src")
    from finetune_cli.cache.features import FeatureStore
    from finetune_cli.cli.console import Console
    from finetune_cli.config.load import load_config
    from finetune_cli.engines.opening import opened
    from finetune_cli.photos.scan import Sample
    from finetune_cli.training import prepare as preparing
    from finetune_cli.training.requirements import check_settings

    paths = sorted(folder.rglob("*.jpg"))[:count]
    assert len(paths) == count
    samples = [Sample(path, path.name, 0, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        config = load_config(
            None,
            [
                f"data.train={folder}",
                "model.backbone=efficientnet_lite0",
                "augmentation=null",
                f"runtime.cache_dir={folder.parent / 'backbone-cache'}",
                f"runtime.workers={workers}",
                f"output.directory={scratch}/runs",
            ],
        )
        settings, console = check_settings(config), Console()
        with preparing.conversion_of(settings) as conversion:
            extractor = preparing.make_extractor(settings, console, conversion)
            extractor.prove()
            own, everyone, _worker = core_seconds()
            started = time.monotonic()
            with opened(engine_name, None, workers, console) as engine, FeatureStore(Path(scratch)) as store:
                extractor.engine = engine
                found = extractor(store, "train", samples)
                seconds = time.monotonic() - started
                own_after, everyone_after, worker = core_seconds()
    assert found.computed == count
    digest = hashlib.sha256(found.array.tobytes()).hexdigest()
    return {
        "engine": engine_name,
        "workers": workers,
        "photos": count,
        "seconds": round(seconds, 1),
        "core_seconds": round(everyone_after - everyone, 1),
        "driver_core_seconds": round(own_after - own, 1),
        "driver_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "worker_mb": round(worker),
        "features": digest[:16],
    }


def table(results: list[dict[str, object]]) -> str:
    """The measurements in Markdown, and whether features were the same."""
    rows = sorted(results, key=lambda row: (row["photos"], row["workers"], row["engine"]))
    out = io.StringIO()
    out.write("| photos | engine | workers | seconds | photos/s | core-ms a photo | the driver | its MB | a worker |\n")
    out.write("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n")
    for row in rows:
        count = row["photos"]
        local = row["engine"] == "local"
        out.write(
            f"| {count:,} | {row['engine']} | {row['workers']} | {row['seconds']} | {count / row['seconds']:.0f} | "
            f"{1000 * row['core_seconds'] / count:.2f} | "
            f"{'' if local else format(1000 * row['driver_core_seconds'] / count, '.2f')} | {row['driver_mb']} MB | "
            f"{'' if local else str(row['worker_mb']) + ' MB'} |\n"
        )
    sets = {}
    for row in rows:
        sets.setdefault(row["photos"], set()).add(row["features"])
    same = all(len(digests) == 1 for digests in sets.values())
    out.write(
        f"\nThe features of the same photos are {'the same to the last bit in all rows' if same else 'NOT THE SAME'}.\n"
    )
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("prepare")
    made.add_argument("folder", type=Path)
    made.add_argument("--source", type=Path, required=True)
    made.add_argument("--photos", type=int, default=30_000)
    one = commands.add_parser("measure")
    one.add_argument("folder", type=Path)
    one.add_argument("results", type=Path)
    one.add_argument("engine", choices=("local", "ray"))
    one.add_argument("workers", type=int)
    one.add_argument("photos", type=int)
    commands.add_parser("table").add_argument("results", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.folder, arguments.source, arguments.photos)
        return
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    if arguments.command == "measure":
        found = measure(arguments.folder.absolute(), arguments.engine, arguments.workers, arguments.photos)
        print(found)
        arguments.results.write_text(json.dumps([*results, found], indent=1))
        return
    text = PAGE.read_text("utf-8")
    marked = re.compile(r"(?<=<!-- scaling -->\n).*?(?=<!-- end -->)", re.DOTALL)
    PAGE.write_text(marked.sub(lambda _old: table(results), text, count=1), "utf-8")


if __name__ == "__main__":
    main()
