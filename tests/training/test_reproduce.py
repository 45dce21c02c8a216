"""What `check --reproduce` says of the same place, of other photos and of another place."""

import hashlib
import shutil
import subprocess
import sys
import urllib.request
from dataclasses import replace
from importlib import metadata

import pytest
from paths import ROOT

from finetune_cli import files
from finetune_cli.errors import RunError
from finetune_cli.progress import Silent
from finetune_cli.runs import environment as environments
from finetune_cli.runs import run
from finetune_cli.runs.environment import Difference
from finetune_cli.runs.manifest import SkippedPhoto
from finetune_cli.runs.run import Run
from finetune_cli.training.reproduce import reproduce


@pytest.fixture
def copy(tiny_run, tmp_path):
    """The tiny run in a folder of its own, with its photos where it expects them."""
    shutil.copytree(tiny_run.photos, tmp_path / "photos")
    shutil.copytree(tiny_run.run.folder, tmp_path / "runs" / "tiny-1")

    def rewritten(environment: dict | None = None) -> Run:
        """The run as if it had been made with `environment`, one worker and photos in this folder."""
        folder = tmp_path / "runs" / "tiny-1"
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(
            text.replace(str(tiny_run.photos), str(tmp_path / "photos"))
            .replace("workers: auto", "workers: 1")
            .replace("device: auto", "device: cpu")
        )
        if environment is not None:
            files.write_json(folder / "environment.json", environment)
        return run.finish(folder, tiny_run.run.manifest, tiny_run.run.manifest.files)

    return rewritten


def test_the_same_environment(copy):
    found = reproduce(copy(), Silent())
    assert found.same, found


def test_another_environment(copy):
    made = copy()
    environment = environments.read_environment(made.folder / "environment.json").to_json()
    environment["packages"]["keras"] = "3.99"
    environment["cpu"]["flags"] = ["avx9"]
    environment["git_commit"] = None
    environment["variables"] = {**environment["variables"], "OMP_NUM_THREADS": "7"}
    found = reproduce(copy(environment), Silent())
    changes = {change.what: change for change in found.environment}
    assert changes["packages.keras"].before == "3.99"
    assert changes["cpu.flags"].before == "avx9"
    assert changes["variables.OMP_NUM_THREADS"].before == "7"
    assert set(changes) <= {"packages.keras", "cpu.flags", "variables.OMP_NUM_THREADS", "git_commit"}
    assert not found.same
    assert found.photos == ()


@pytest.fixture
def backbone_file(copy, tmp_path):
    """A run as if it had been made with a backbone of one's own, `own.keras`; and that file."""
    path = tmp_path / "own.keras"
    path.write_bytes(b"weights")
    made = copy()
    config = made.folder / "config.yaml"
    config.write_text(config.read_text().replace("backbone: resnet50", "backbone: ../../own.keras"))
    backbone = replace(made.manifest.backbone, weights_sha256=hashlib.sha256(b"weights").hexdigest())
    return run.finish(made.folder, replace(made.manifest, backbone=backbone), made.manifest.files), path


def test_other_weights(backbone_file):
    made, path = backbone_file
    assert reproduce(made, Silent()).same
    path.write_bytes(b"other")
    (line,) = reproduce(made, Silent()).weights
    assert hashlib.sha256(b"other").hexdigest() in line
    assert hashlib.sha256(b"weights").hexdigest() in line
    path.unlink()
    found = reproduce(made, Silent())
    assert "own.keras are not here" in found.weights[0]
    assert not found.same


def test_imagenet_weights_that_are_not_here(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_: pytest.fail("it connects"))
    made = copy()
    there = replace(made.manifest, backbone=replace(made.manifest.backbone, weights_sha256="ab"))
    (line,) = reproduce(replace(made, manifest=there), Silent()).weights
    assert "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5 are not here and are downloaded" in line
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5").write_bytes(b"x")
    (line,) = reproduce(replace(made, manifest=there), Silent()).weights
    assert f"have the SHA-256 {hashlib.sha256(b'x').hexdigest()}, and had ab" in line


def test_another_run_to_start_from(copy, tiny_run, tmp_path):
    made = copy()
    config = made.folder / "config.yaml"
    config.write_text(config.read_text().replace("start_from: null", "start_from: ../first"))
    manifest = replace(made.manifest, start_from=tiny_run.run.manifest.files["model.keras"])
    made = run.finish(made.folder, manifest, made.manifest.files)
    assert "there is no run" in reproduce(made, Silent()).weights[0]
    first = shutil.copytree(tiny_run.run.folder, tmp_path / "runs" / "first")
    assert reproduce(made, Silent()).same
    (first / "model.keras").write_bytes(b"other")
    assert "model.keras is damaged" in reproduce(made, Silent()).weights[0]
    run.finish(first, manifest, made.manifest.files)
    assert "is another run than it was" in reproduce(made, Silent()).weights[0]


def test_other_photos(copy, tmp_path):
    made = copy()
    (tmp_path / "photos" / "train" / "bee" / "bee-03.png").unlink()
    shutil.copy(tmp_path / "photos" / "val" / "ant" / "ant-02.png", tmp_path / "photos" / "test" / "ant" / "zz.png")
    found = reproduce(made, Silent())
    assert found.photos == ("gone or changed: train/bee: bee/bee-03.png", "new: test/ant: ant/zz.png")
    for path in (tmp_path / "photos" / "train" / "ant").iterdir():
        path.rename(path.with_stem(path.stem + "x"))
    found = reproduce(made, Silent())
    assert "gone or changed: and 13 more" in found.photos  # 17 ants and a bee


def test_photos_that_are_not_here(copy, tmp_path):
    made = copy()
    shutil.rmtree(tmp_path / "photos")
    found = reproduce(made, Silent())
    assert "photos/train" in found.photos_problem
    assert not found.same


def test_skipped_photos_are_no_news(copy, tmp_path):
    made = copy()
    shutil.copy(tmp_path / "photos" / "val" / "ant" / "ant-02.png", tmp_path / "photos" / "test" / "ant" / "zz.png")
    bad = replace(made.manifest, bad_photos=(SkippedPhoto("ant/zz.png", "is cut off"),))
    assert reproduce(replace(made, manifest=bad), Silent()).same


def test_a_damaged_run_is_refused(copy):
    made = copy()
    (made.folder / "environment.json").write_bytes(b"{}")
    with pytest.raises(RunError, match=r"environment\.json is damaged"):
        reproduce(made, Silent())
    for content in (b"", b"[]", b"\xff", b"[" * 10**5):
        (made.folder / "environment.json").write_bytes(content)
        with pytest.raises(RunError, match=r"environment\.json is damaged"):
            environments.read_environment(made.folder / "environment.json")


def test_differences_name_what_came_and_what_went():
    before = {"a": 1, "b": {"c": [1, 2], "d": None, "e": 0.5}, "gone": True}
    now = {"a": 1, "b": {"c": [1], "d": None, "e": 0.5}, "come": "x"}
    assert environments.differences(before, now) == [
        Difference("b.c", "1 2", "1"),
        Difference("gone", "True", ""),
        Difference("come", "", "x"),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="there, typer does need it")
def test_dependencies_for_another_system_do_not_count(tmp_path, monkeypatch):
    facts = tmp_path / "colorama-0.4.6.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: colorama\nVersion: 0.4.6\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert metadata.version("colorama") == "0.4.6"
    assert "colorama" not in environments.packages()


def test_all_that_is_depended_on_is_recorded():
    found = environments.packages()
    assert list(found)[:3] == ["finetune-cli", "tensorflow", "keras"]
    for name in ("matplotlib", "ml-dtypes", "threadpoolctl", "protobuf", "pydantic-core"):
        assert found[name] == metadata.version(name)
    assert "pytest" not in found  # of an extra
    assert None not in found.values()


INTEL = (
    "processor\t: 0\nmodel name\t: Xeon: 2\nflags\t\t: fpu sse4_2 avx2 amx_bf16\n\nprocessor\t: 1\nmodel name\t: B\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd4f\n"


@pytest.mark.parametrize(
    ("text", "model", "flags"),
    [(INTEL, "Xeon: 2", ["amx_bf16", "avx2", "sse4_2"]), (ARM, "cpu", ["asimd", "bf16", "fp"]), (None, "cpu", [])],
    ids=["Intel", "ARM", "no such file"],
)
def test_the_processor(text, model, flags, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(environments, "_CPU_FACTS", tmp_path / "cpuinfo")
    monkeypatch.setattr(environments.platform, "processor", lambda: "cpu")
    assert {**environments._cpu(), "machine": ""} == {"machine": "", "model": model, "flags": flags}


@pytest.mark.parametrize("driver", ["535.161.08", None])
def test_the_gpu(driver, tmp_path, monkeypatch):
    import tensorflow as tf

    if driver:
        (tmp_path / "version").write_text(
            f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sat Feb 24\nGCC 12\n"
        )
    monkeypatch.setattr(environments, "_DRIVER_FACTS", tmp_path / "version")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _kind: ["one", "two"])
    details = {"one": {"device_name": "H100", "compute_capability": (9, 0)}, "two": {}}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details.__getitem__)
    monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: {"cuda_version": "12.5", "cudnn_version": "9"})
    assert environments._gpu() == {
        "devices": ["H100 9.0", "unknown"],
        "driver": driver,
        "cuda": "12.5",
        "cudnn": "9",
    }


def test_the_command_line(copy, tmp_path):
    environment = environments.read_environment(copy().folder / "environment.json").to_json()
    environment["packages"]["keras"] = "3.99"
    made = copy(environment)
    command = [sys.executable, "-m", "finetune_cli", "check", "--reproduce", str(made.folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    assert "packages.keras" in answer.stdout
    assert "3.99" in answer.stdout
    both = subprocess.run([*command, "config.yaml"], capture_output=True, text=True, check=False)
    assert both.returncode == 2
    neither = subprocess.run(command[:4], capture_output=True, text=True, check=False)
    assert neither.returncode == 2
