"""Install other people's programs, each into an environment of its own, and let them answer for exported models.

    python tools/test_clients.py [--data DIR] [--work DIR] [--write] [CLIENT ...]

`--data`: the folder with scenes, hymenoptera and digits; where it is absent, drawn photos are used. `--write` puts the
table of all clients into docs/serving.md. The exit code is 1 when a client cannot be installed, fails, or differs by
more than its limit. Runs, exports and environments that are already in the folder `--work` are used again.
"""

import argparse
import datetime as dt
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune_cli.errors import BadImage, FinetuneError, RunError
from finetune_cli.exports import page
from finetune_cli.exports.export import ExportRequest, export
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.photos.decode import decode
from finetune_cli.practice.sample import draw
from finetune_cli.progress import Silent
from finetune_cli.runs.run import Run

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = Path(__file__).parent / "clients"
FAILURES = (FinetuneError, RuntimeError, OSError, subprocess.SubprocessError)
EXACT = 1e-4  # of a probability, as for the export itself
ORT_WEB = f"onnxruntime-web@{page.VERSION}"


@dataclass(frozen=True)
class Client:
    """Another program. packages: what pip or npm installs, the program first. form, option: the export that it gets.

    given: what goes in. limit: the largest difference of a probability that is no fault; None: the client decodes or
    resizes photos in its own way, and its figures are only told.
    """

    name: str
    program: str
    packages: tuple[str, ...]
    form: str
    given: str = "photo.py"
    option: tuple[str, str] | None = None
    arguments: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    limit: float | None = EXACT


_ANY = ("pixels", "any-size")
_FILES = ("files",)
_PHOTO = ("numpy", "pillow")
# The versions are those of the table in docs/serving.md: a release of somebody else's does not break a build.
_ONNX = ("onnxruntime==1.32.0", *_PHOTO)
_OPENVINO = ("openvino==2026.4.1", *_PHOTO)
_MEDIAPIPE = ("mediapipe==1.2.3", *_PHOTO)
_TASKS = ("tflite-support==0.4.4", "numpy<2", "pillow")
_KERAS = ("keras==3.15.1", "jax==0.10.2", *_PHOTO)
CLIENTS = (
    Client("onnxruntime", "with_onnxruntime.py", _ONNX, "onnx"),
    Client("onnxruntime-any-size", "with_onnxruntime.py", _ONNX, "onnx", "pixels", _ANY, limit=None),
    Client("node", "with_node.mjs", (ORT_WEB, "sharp@0.35.5"), "onnx", "sharp, photo.mjs", limit=None),
    Client("chromium", "with_chromium.py", ("playwright==1.65.2",), "onnx", "page.html", ("page", "page"), limit=None),
    Client("openvino", "with_openvino.py", _OPENVINO, "openvino"),
    Client("openvino-any-size", "with_openvino.py", _OPENVINO, "openvino", "pixels", _ANY, limit=None),
    Client("litert", "with_litert.py", ("ai-edge-litert==2.3.0", *_PHOTO), "litert"),
    Client("mediapipe", "with_mediapipe.py", _MEDIAPIPE, "litert"),
    Client("mediapipe-files", "with_mediapipe.py", _MEDIAPIPE, "litert", "files", arguments=_FILES, limit=None),
    Client("tflite-support", "with_tflite_support.py", _TASKS, "litert"),
    Client("tflite-support-files", "with_tflite_support.py", _TASKS, "litert", "files", arguments=_FILES, limit=None),
    Client("keras-jax", "with_keras.py", _KERAS, "keras", environment=(("KERAS_BACKEND", "jax"),)),
    Client("tensorflow", "with_tensorflow.py", ("tensorflow==2.21.0",), "savedmodel", "files", limit=None),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run with photos that it has not seen, and its own answers for them."""

    name: str
    run: Run
    photos: tuple[Path, ...]
    reference: np.ndarray


def call(command: Sequence[str | Path], environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """What `command` prints. Raises `RuntimeError` with its last words when it fails."""
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))[:300]}\n{done.stderr[-2000:]}")
    return done.stdout


def train(work: Path, name: str, photos: Path, *settings: str) -> Run:
    """The run `name`, trained now unless it is there."""
    if not (work / "runs" / name / "run.json").exists():
        command = [sys.executable, "-m", "finetune_cli", "train", f"data.train={photos}", f"output.name={name}"]
        command += ["model.backbone=efficientnet_lite0", f"output.directory={work / 'runs'}"]
        call([*command, f"runtime.cache_dir={work / 'cache'}", *settings])
    return Run.load(work / "runs" / name)


def tuned(work: Path, photos: Path) -> Run:
    """A run whose backbone was fine-tuned. Raises `RunError` if its training kept the frozen one."""
    settings = ("data.group_regex=p[0-9]+", "fine_tuning.unfreeze=last_stage", "fine_tuning.epochs=6")
    run = train(work, "digits-tuned", photos, *settings, "augmentation.horizontal_flip=false")
    if not run.manifest.backbone.tuned:
        raise RunError("digits-tuned kept the frozen backbone", "change its settings")
    return run


def case(run: Run, folder: Path) -> Case:
    """All photos below `folder` that the run can decode, and its answers."""
    predictor, photos, rows = RunPredictor(run, 1), [], []
    for path in sorted(folder.rglob("*.*")):
        try:
            pixels = decode(path, run.image_settings)
        except BadImage:
            continue
        photos.append(path.absolute())
        rows.append(predictor.probabilities(pixels[None])[0])
    return Case(run.name, run, tuple(photos), np.stack(rows))


def cases(work: Path, data: Path | None) -> list[Case]:
    """The runs that the clients answer for."""
    if data is None or not data.is_dir():
        if not (work / "drawn").exists():
            draw(work / "drawn")
        return [case(train(work, "drawn", work / "drawn"), work / "drawn")]
    odd = work / "odd"
    if not odd.exists():  # two classes whose names are not ASCII
        for old, new in (("ants", "fourmis ailées"), ("bees", "蜜蜂")):
            shutil.copytree(data / "hymenoptera" / "train" / old, odd / new)
    insects, scenes = data / "hymenoptera", data / "scenes"
    return [
        case(train(work, "scenes", scenes / "train"), scenes / "test"),
        case(train(work, "hymenoptera", insects / "train"), insects / "val"),
        case(train(work, "pad-96", odd, "image.resize=pad", "image.size=96"), insects / "val"),
        case(tuned(work, data / "digits" / "train"), data / "digits" / "test"),
    ]


def exported(work: Path, one: Case, client: Client) -> Path:
    """The folder of the export that `client` needs, made now unless it is there."""
    folder = work / "exports" / "-".join([one.name, client.form, *(client.option or ())[:1]])
    if not folder.exists():
        options = dict([client.option]) if client.option else {}
        folder.parent.mkdir(exist_ok=True)
        export(one.run, ExportRequest((client.form,), folder, options=options), Silent())
    return folder / "1" if client.form == "savedmodel" else folder


def install(work: Path, client: Client) -> list[str]:
    """The command that runs the client's programs, after installing what it needs."""
    home = work / "clients" / re.sub(r"\W+", "-", " ".join(client.packages))
    node = client.program.endswith(".mjs")
    if not (home / "installed").exists():
        home.mkdir(parents=True, exist_ok=True)
        if node:
            installer = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(home)]
        else:
            call([sys.executable, "-m", "venv", "--clear", home])
            installer = [str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        call([*installer, *client.packages])
        (home / "installed").touch()
    if node:  # it finds its packages beside it
        return ["node", str(shutil.copy(PROGRAMS / client.program, home))]
    return [str(home / "bin" / "python"), str(PROGRAMS / client.program)]


def shown(client: Client) -> str:
    """The client and its version, as the table names it."""
    package = re.sub("==|@", " ", client.packages[0])
    if client.name != "chromium":
        return package
    return f"{call(['chromium', '--version']).partition(' built')[0].strip()}, {package}"


def bring_library(work: Path) -> None:
    """Put ONNX Runtime Web into the cache, from which pages are made, by npm."""
    folder = page.library_folder()
    if not folder.exists():
        shutil.rmtree(work / "npm", ignore_errors=True)
        (work / "npm").mkdir()
        call(["npm", "pack", "--silent", ORT_WEB], cwd=work / "npm")
        with tarfile.open(next((work / "npm").glob("*.tgz"))) as archive:
            archive.extractall(work / "npm", filter="data")
        folder.mkdir(parents=True)
        for name in page.LIBRARY:
            shutil.copy(work / "npm" / "package" / "dist" / name, folder)


def answer(work: Path, client: Client, one: Case) -> tuple[int, float]:
    """On how many photos the client's best class is that of the run, and the largest difference of a probability."""
    command = [*install(work, client), str(exported(work, one, client).absolute())]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | dict(client.environment)
    photos = json.dumps([str(path) for path in one.photos])
    printed = call([*command, photos, *client.arguments], environment)
    rows = np.array(json.loads(printed.splitlines()[-1]))
    agree = int((rows.argmax(axis=1) == one.reference.argmax(axis=1)).sum())
    return agree, float(np.abs(rows - one.reference).max())


def main() -> int:
    """Run the clients and print the table; 1 if something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / ".clients")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(client.name for client in CLIENTS))
    asked = parser.parse_args()
    if unknown := set(asked.clients) - {client.name for client in CLIENTS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if asked.write and (asked.clients or not asked.data.is_dir()):
        parser.error("--write needs all clients, and the photos of --data")
    work = asked.work.absolute()
    work.mkdir(exist_ok=True)
    chosen = [client for client in CLIENTS if not asked.clients or client.name in asked.clients]
    try:
        everything = cases(work, asked.data)
    except FAILURES as exc:
        print(f"the runs: {exc}", file=sys.stderr)
        return 1
    heads = [f"{one.name} ({len(one.photos)})" for one in everything]
    lines = [f"| client | given | {' | '.join(heads)} |", "|" + " --- |" * (2 + len(heads))]
    failed = False
    for client in chosen:
        try:
            if client.option and client.option[0] == "page":
                bring_library(work)
            name = shown(client)
            found = [answer(work, client, one) for one in everything]
        except FAILURES as exc:
            print(f"{client.name}: {exc}", file=sys.stderr)
            failed = True
            continue
        if client.limit is not None and max(largest for _agree, largest in found) > client.limit:
            print(f"{client.name} differs by more than {client.limit:g}", file=sys.stderr)
            failed = True
        figures = [
            f"{agree / len(one.photos):.1%}, {largest:.1g}"
            for one, (agree, largest) in zip(everything, found, strict=True)
        ]
        lines.append(f"| {name} | {client.given} | {' | '.join(figures)} |")
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    print(table)
    if asked.write and not failed:
        path, today = ROOT / "docs" / "serving.md", dt.datetime.now(dt.UTC).date()
        block = f"<!-- clients -->\nMeasured on {today}.\n\n{table}\n<!-- end -->"
        text = path.read_text("utf-8")
        path.write_text(re.sub(r"<!-- clients -->.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL), "utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
