"""Near-duplicates in a training: linked, on one side of the split, and named where the user divided them."""

import csv
import json
import shutil
from collections import defaultdict

import numpy as np
import pytest
import trainings
from planted import copy, picture

from finetune_cli.config.load import load_config
from finetune_cli.errors import Interrupted, RunError
from finetune_cli.evaluation import evaluate
from finetune_cli.progress import Silent
from finetune_cli.runs.run import Run, read_split
from finetune_cli.training import near, pipeline, prepare
from finetune_cli.training.requirements import check_settings

CLASSES = ("ant", "bee")
COPIED = range(0, 20, 4)
KINDS = ("half the size", "mirrored", "brightened", "compressed")  # a network that learned nothing finds no crops


def draw(folder):
    """20 pictures a class, every fourth with a copy of each kind."""
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            original = picture(100 * label + i, side=96)
            original.save(folder / name / f"{i:02}.png")
            for number, kind in enumerate(KINDS if i in COPIED else ()):
                copy(original, kind).save(folder / name / f"{i:02}-copy{number}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("near") / "photos"
    draw(folder)
    return folder


@pytest.fixture(scope="module")
def divided(tmp_path_factory, photos):
    """The same photos, of which the user put all first copies into val."""
    folder = tmp_path_factory.mktemp("divided") / "photos"
    shutil.copytree(photos, folder / "train")
    for name in CLASSES:
        (folder / "val" / name).mkdir(parents=True)
        for path in [*(folder / "train" / name).glob("*-copy0.png"), *(folder / "train" / name).glob("1[0135].png")]:
            path.rename(folder / "val" / name / path.name)
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Overrides of a training with a tiny network and a cache of its own."""
    folder = tmp_path_factory.mktemp("settings")
    trainings.build_backbone(folder / "tiny.keras")
    return (
        f"model.backbone={folder / 'tiny.keras'}",
        "image.size=64",
        f"runtime.cache_dir={folder / 'cache'}",
        "augmentation.horizontal_flip=true",
        "augmentation.views=2",
    )


def load(tmp_path, photos, settings, *overrides):
    return load_config(None, [f"data.train={photos}", f"output.directory={tmp_path / 'runs'}", *settings, *overrides])


def prepared(tmp_path, photos, settings, *overrides, observer=None, recorded=None):
    checked = check_settings(load(tmp_path, photos, settings, *overrides))
    return prepare.prepare(checked, observer or Silent(), recorded=recorded)


def stem(name):
    return name.split("-")[0].removesuffix(".png")


def sides(found):
    """Picture -> the splits that it and its copies are in."""
    splits = defaultdict(set)
    for split, part in found.parts.items():
        for sample in part.samples:
            splits[stem(sample.name)].add(split)
    return splits


def test_near_duplicates_are_on_one_side(tmp_path, photos, settings):
    observer = Silent()
    found = prepared(tmp_path, photos, settings, observer=observer)
    assert all(len(splits) == 1 for splits in sides(found).values())
    groups = defaultdict(set)
    for part in found.parts.values():
        for sample in part.samples:
            groups[stem(sample.name)].add(sample.group)
    copied = {f"{name}/{i:02}" for name in CLASSES for i in COPIED}
    assert {name for name, names in groups.items() if names != {None}} == copied
    assert len({next(iter(groups[name])) for name in copied}) == len(copied)
    assert any("50 photos have near-duplicates, in 10 groups" in note for note in observer.notes)
    assert found.leaks == ()
    assert [len(found.parts[split].samples) for split in ("train", "val")] == [
        len(found.data.train),
        len(found.data.val),
    ]


def test_they_are_looked_for_once(tmp_path, photos, settings, monkeypatch):
    first = prepared(tmp_path, photos, settings)
    monkeypatch.setattr(near, "find", lambda *_arguments: pytest.fail("near-duplicates are looked for again"))
    second = prepared(tmp_path, photos, settings)
    assert [part.samples for part in second.parts.values()] == [part.samples for part in first.parts.values()]


def test_they_may_be_ignored(tmp_path, photos, settings):
    found = prepared(tmp_path, photos, settings, "data.near_duplicates=ignore")
    assert any(len(splits) > 1 for splits in sides(found).values())
    assert all(sample.group is None for part in found.parts.values() for sample in part.samples)


def test_the_features_are_those_of_a_training_without_the_first_pass(tmp_path, photos, settings):
    exact = "runtime.feature_precision=float32"
    found = prepared(tmp_path, photos, settings, exact)
    other = prepared(
        tmp_path, photos, settings, exact, f"runtime.cache_dir={tmp_path / 'cache'}", "data.near_duplicates=ignore"
    )
    rows = {
        sample.digest: row
        for part in other.parts.values()
        for sample, row in zip(part.samples, part.array, strict=True)
    }
    for split, part in found.parts.items():
        assert part.array.shape[1] == (2 if split == "train" else 1)
        for sample, row in zip(part.samples, part.array, strict=True):
            views = min(len(row), len(rows[sample.digest]))
            np.testing.assert_array_equal(row[:views], rows[sample.digest][:views])


def test_views_are_counted_once(tmp_path, photos, settings):
    """float32 for all: 80 photos in view 0, and the second view of the training photos."""
    cache = f"runtime.cache_dir={tmp_path / 'cache'}"
    for _time in range(2):
        found = prepared(tmp_path, photos, settings, cache, "runtime.feature_precision=float32")
        counts = [sum(getattr(part, name) for part in found.parts.values()) for name in ("computed", "cached")]
        views = 80 + len(found.data.train)
        assert counts == ([views, 0] if _time == 0 else [0, views])


def test_a_recorded_split_is_used_as_it_is(tmp_path, photos, settings):
    first = prepared(tmp_path, photos, settings)
    rows = [
        near.SplitRow("val" if i % 5 == 0 else "train", "", sample.digest, sample.name, "a group")
        for part in first.parts.values()
        for i, sample in enumerate(part.samples)
    ]
    found = prepared(tmp_path, photos, settings, recorded=rows)
    for split, part in found.parts.items():
        assert {sample.name for sample in part.samples} == {row.path for row in rows if row.split == split}
        assert {sample.group for sample in part.samples} == {"a group"}


def test_an_interrupted_training_resumes_with_its_split_and_its_groups(tmp_path, photos, settings, monkeypatch):
    config = load(tmp_path, photos, settings, "training.solver=adam", "training.epochs=2")
    whole = pipeline.train(config, Silent())

    def stop(*_arguments):
        raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_judge", stop)
        with pytest.raises(Interrupted):
            pipeline.train(config, Silent())
    folder = next(path for path in (tmp_path / "runs").iterdir() if path != whole.folder)
    monkeypatch.setattr(near, "link", lambda *_arguments: pytest.fail("near-duplicates are looked for again"))
    resumed = pipeline.resume(folder, load_config(folder / "config.yaml", own=True), Silent())
    assert resumed.split() == whole.split()
    assert any(row.group.startswith("near:") for row in resumed.split())
    assert (resumed.folder / "predictions.csv").read_bytes() == (whole.folder / "predictions.csv").read_bytes()


def test_a_changed_split_is_not_resumed(tmp_path, photos, settings, monkeypatch):
    def stop(*_arguments):
        raise Interrupted(2)

    monkeypatch.setattr(pipeline, "_judge", stop)
    with pytest.raises(Interrupted):
        pipeline.train(load(tmp_path, photos, settings), Silent())
    folder = next((tmp_path / "runs").iterdir())
    text = (folder / "split.csv").read_text()
    (folder / "split.csv").write_text(text.replace("\nval,", "\ntrain,", 1))
    with pytest.raises(RunError, match=r"split\.csv or leaks\.csv was changed"):
        pipeline.resume(folder, load_config(folder / "config.yaml", own=True), Silent())


def test_leaks_between_folders_of_the_user_are_named_and_left_out_beside(tmp_path, divided, settings):
    observer = Silent()
    run = pipeline.train(load(tmp_path, divided, settings), observer)
    warning = next(text for text in observer.warnings if "same picture" in text)
    assert warning.startswith("10 photos of val show the same picture as a training photo, such as ")
    leaks = list(csv.DictReader((run.folder / "leaks.csv").read_text().splitlines()))
    assert len(leaks) == 10
    for leak in leaks:
        assert (leak["split"], leak["path"].split("-")[1]) == ("val", "copy0.png")
        assert stem(leak["path"]) == stem(leak["train_path"])
        assert 0.6 <= float(leak["score"]) < 1
    # 18 photos are in val; by hand, from the predictions of those that are no copies:
    rows = list(csv.DictReader((run.folder / "predictions.csv").read_text().splitlines()))
    others = [row["true"] == row["predicted"] for row in rows if "copy" not in row["path"]]
    assert len(others) == 8
    document = json.loads((run.folder / "metrics.json").read_text())["val"]
    assert document["photos"] == 18
    assert document["without_near_duplicates"]["photos"] == 8
    assert document["without_near_duplicates"]["accuracy"] == sum(others) / 8
    shown = run.manifest.metrics["val"].without_near_duplicates
    assert (shown.photos, shown.accuracy) == (8, sum(others) / 8)
    assert {row.group for row in read_split(run.folder / "split.csv") if row.path == leaks[0]["path"]} != {""}
    judged = evaluate.judge_photos(Run.load(run.folder), Silent())
    assert judged.evaluation.without_near_duplicates[0] == 8


def test_copies_are_leaks_of_the_highest_score(tmp_path, divided, settings):
    for name in CLASSES:
        source = divided / "train" / name / "02.png"
        shutil.copy(source, divided / "val" / name / "02-same.png")
    try:
        found = prepared(tmp_path, divided, settings)
    finally:
        for name in CLASSES:
            (divided / "val" / name / "02-same.png").unlink()
    exact = [leak for leak in found.leaks if leak.score == 1]
    assert [(leak.path, leak.train_path) for leak in exact] == [(f"{c}/02-same.png", f"{c}/02.png") for c in CLASSES]


@pytest.mark.parametrize("content", ["", "split,path\n", "split,path,train_path,score\nval,a,b,none\n", "\0"])
def test_damaged_leaks_are_refused(tmp_path, content):
    (tmp_path / "leaks.csv").write_text(content)
    with pytest.raises(RunError, match="damaged"):
        near.read_leaks(tmp_path)


def test_leaks_come_back_as_they_were_written(tmp_path):
    leaks = (near.Leak("val", "a/ü,1.png", 'b/"2".png', 0.8125), near.Leak("test", "a", "b", 1.0))
    near.write_leaks(tmp_path, leaks)
    assert near.read_leaks(tmp_path) == leaks
    assert near.read_leaks(tmp_path / "nothing") == ()


def test_no_photo_that_the_earlier_run_was_trained_on_validates(tmp_path, photos, settings):
    run = pipeline.train(load(tmp_path, photos, settings), Silent())
    before = {row.digest: row.split for row in run.split()}
    start = f"model.start_from={run.folder}"
    found = prepared(tmp_path, photos, settings, start, "data.val_split=0.1")
    assert found.parts["val"].samples
    assert all(before[sample.digest] == "val" for sample in found.parts["val"].samples)
