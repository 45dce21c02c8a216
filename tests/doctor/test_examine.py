"""`finetune doctor` on planted faults, and what becomes of its table."""

import csv
import shutil

import pytest
import trainings
from PIL import Image
from planted import copy, picture
from typer.testing import CliRunner

from finetune_cli.cli.app import app
from finetune_cli.config.load import load_config
from finetune_cli.doctor import page, table
from finetune_cli.doctor.examine import examine
from finetune_cli.errors import DataError, UsageError
from finetune_cli.progress import Silent
from finetune_cli.training import pipeline, prepare
from finetune_cli.training.requirements import check_settings

FAULTS = {
    ("duplicate", "bee/copy.png"),
    ("near-duplicate", "ant/mirrored.png"),
    ("near-duplicate", "bee/other-class.png"),
    ("quality", "ant/blank.png"),
    ("quality", "ant/tiny.png"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """20 pictures of each of two classes, with the faults above and a file that cannot be decoded."""
    folder = tmp_path_factory.mktemp("faulty") / "photos"
    for label, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            picture(100 * label + i, side=96).save(folder / name / f"{i:02}.png")
    shutil.copy(folder / "ant" / "03.png", folder / "bee" / "copy.png")
    copy(picture(5, side=96), "mirrored").save(folder / "ant" / "mirrored.png")
    copy(picture(7, side=96), "brightened").save(folder / "bee" / "other-class.png")
    Image.new("RGB", (90, 90), (50, 50, 50)).save(folder / "ant" / "blank.png")
    picture(99, side=96).resize((40, 40)).save(folder / "ant" / "tiny.png")
    (folder / "ant" / "broken.png").write_bytes((folder / "ant" / "00.png").read_bytes()[:500])
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory, faulty):
    folder = tmp_path_factory.mktemp("config")
    trainings.build_backbone(folder / "tiny.keras")
    (folder / "config.yaml").write_text(
        f"data: {{train: {faulty}, on_bad_image: skip}}\nmodel: {{backbone: {folder / 'tiny.keras'}}}\n"
        f"image: {{size: 64}}\nruntime: {{cache_dir: {folder / 'cache'}}}\noutput: {{directory: {folder / 'runs'}}}\n"
    )
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def found(config):
    return examine(load_config(config), Silent())


def test_planted_faults_are_found(found):
    assert {(finding.problem, finding.path) for finding in found.findings} >= FAULTS
    assert [photo.name for photo in found.bad] == ["ant/broken.png"]
    pairs = {f.path: f for f in found.findings if f.problem in ("duplicate", "near-duplicate")}
    assert len(pairs) == 3
    assert pairs["bee/copy.png"].serious
    assert pairs["bee/copy.png"].suggestion.startswith("relabel: ant")
    assert "which is ant; this one is bee" in pairs["bee/other-class.png"].evidence
    assert not pairs["ant/mirrored.png"].serious
    assert (found.count("duplicate"), found.count("near-duplicate"), found.count("near-duplicate", serious=True)) == (
        1,
        2,
        1,
    )


def test_the_page_is_one_file_without_scripts(found, tmp_path):
    page.write(tmp_path / "doctor.html", found, Silent())
    text = (tmp_path / "doctor.html").read_text()
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text
    assert text.count("<img") == len(found.findings)
    assert "ant/broken.png" in text


def test_names_of_photos_are_text_in_the_page(found, tmp_path):
    from dataclasses import replace

    evil = replace(
        found.findings[0], path="<img src=x onerror=alert(1)>\u202e\udcff.png", evidence="<script>alert(2)</script>"
    )
    page.write(tmp_path / "doctor.html", replace(found, findings=(evil,)), Silent())
    text = (tmp_path / "doctor.html").read_text()
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "\u202e" not in text


def test_a_page_of_many_findings_stays_small(found, tmp_path):
    from dataclasses import replace

    pair = next(finding for finding in found.findings if finding.other is not None)
    many = [replace(pair, problem=problem) for problem in ("duplicate", "near-duplicate") for _ in range(1500)]
    page.write(tmp_path / "doctor.html", replace(found, findings=tuple(many)), Silent())
    assert (tmp_path / "doctor.html").stat().st_size < 5_000_000
    assert "to keep this file small" in (tmp_path / "doctor.html").read_text()


def run_doctor(config, folder, *options):
    return CliRunner().invoke(app, ["doctor", str(config), "--output", str(folder), "--quiet", *options])


def edited(path, actions):
    rows = list(csv.reader(path.read_text().splitlines()))
    for row in rows[1:]:
        row[-1] = actions.get((row[2], row[0]), row[-1])
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_decisions_survive_another_examination_and_are_applied(config, faulty, tmp_path):
    answer = run_doctor(config, tmp_path)
    assert answer.exit_code == 0, answer.output
    rows = list(csv.DictReader((tmp_path / "fixes.csv").read_text().splitlines()))
    assert {row["action"] for row in rows} == {"keep"}
    assert tuple(rows[0]) == ("path", "digest", "problem", "evidence", "suggestion", "action")
    decisions = {
        ("duplicate", "bee/copy.png"): "drop",
        ("near-duplicate", "bee/other-class.png"): "relabel: ant",
        ("quality", "ant/blank.png"): "drop",
        ("near-duplicate", "ant/mirrored.png"): "group: left",
    }
    edited(tmp_path / "fixes.csv", decisions)
    answer = run_doctor(config, tmp_path, f"data.fixes={tmp_path / 'fixes.csv'}")
    assert "4 decisions of the earlier fixes.csv kept" in answer.output
    rows = list(csv.DictReader((tmp_path / "fixes.csv").read_text().splitlines()))
    assert {(row["problem"], row["path"]): row["action"] for row in rows if row["action"] != "keep"} == decisions

    loaded = load_config(config, [f"data.fixes={tmp_path / 'fixes.csv'}"])
    before = {path: path.read_bytes() for path in faulty.rglob("*.png")}
    run = pipeline.train(loaded, Silent())
    lines = {row.path: row for row in run.split()}
    assert "bee/copy.png" not in lines
    assert "ant/blank.png" not in lines
    assert lines["bee/other-class.png"].label == "ant"
    assert lines["ant/mirrored.png"].group == "left"
    assert run.read("fixes.csv") == (tmp_path / "fixes.csv").read_bytes()
    assert load_config(run.folder / "config.yaml").data.fixes == run.folder / "fixes.csv"
    settings = check_settings(load_config(run.folder / "config.yaml"))
    again = prepare.index(settings.photos, settings.cache, Silent())
    assert {sample.name for part in again.splits.values() for sample in part} - {"ant/broken.png"} == set(lines)
    assert {path: path.read_bytes() for path in faulty.rglob("*.png")} == before
    of_run = run_doctor(run.folder, tmp_path / "again").output
    assert f"finetune train {run.folder / 'config.yaml'} data.fixes=" in of_run.replace("\n", "")


def test_problems_fail_only_where_that_is_asked_for(config, tmp_path):
    assert run_doctor(config, tmp_path, "--fail-on", "duplicate").exit_code == 4
    assert run_doctor(config, tmp_path, "--fail-on", "quality", "--fail-on", "label").exit_code == 4


def test_another_file_of_that_name_is_not_overwritten(config, tmp_path):
    (tmp_path / "fixes.csv").write_text("mine")
    answer = run_doctor(config, tmp_path)
    assert answer.exit_code == 2
    assert (tmp_path / "fixes.csv").read_text() == "mine"
    with pytest.raises(UsageError, match="no table that finetune doctor can continue"):
        table.decided(tmp_path / "fixes.csv")


def test_a_photo_under_two_labels_stops_a_training_and_names_the_doctor(config):
    with pytest.raises(DataError) as caught:
        prepare.prepare(check_settings(load_config(config)), Silent())
    assert "the same photo is" in str(caught.value)
    assert "finetune doctor" in caught.value.remedy


def test_overrides_alone_name_the_photos_as_in_a_training(config, faulty, tmp_path):
    overrides = load_config(config).model_dump(mode="json")
    words = [f"data.train={faulty}", "data.on_bad_image=skip", "image.size=64"]
    words += [f"model.backbone={overrides['model']['backbone']}", f"runtime.cache_dir={config.parent / 'cache'}"]
    answer = CliRunner().invoke(app, ["doctor", *words, "--output", str(tmp_path), "--quiet"])
    assert answer.exit_code == 0, answer.output
    assert (tmp_path / "doctor.html").is_file()
    printed = answer.output.replace("\n", "")
    assert f"finetune train data.train={faulty}" in printed
    assert f"data.fixes={tmp_path / 'fixes.csv'}" in printed
    answer = CliRunner().invoke(app, ["doctor"])
    assert answer.exit_code == 2
    assert "there are no photos to examine" in answer.output
