import hashlib
import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from paths import SOURCE
from photo_files import photo_bytes, write_photo, write_photos

from finetune_cli.cache.digests import DigestCache
from finetune_cli.errors import BadPhotos, DataError
from finetune_cli.photos import dataset
from finetune_cli.photos.dataset import DataSettings, iter_photos, load_labelled
from finetune_cli.photos.scan import BadPhoto, refuse_bad
from finetune_cli.progress import ignore_progress


def load(train, val=None, test=None, val_split=0.2, group_regex=None, max_pixels=10**8, **options):
    options = {"cache": DigestCache(None), "advance": ignore_progress} | options
    cache, advance = options.pop("cache"), options.pop("advance")
    return dataset.load(DataSettings(train, val, test, val_split, group_regex, max_pixels, **options), cache, advance)


def names(samples):
    return [sample.name for sample in samples]


def problem(*args, **options):
    with pytest.raises(DataError) as caught:
        load(*args, **options)
    assert caught.value.remedy
    return str(caught.value)


@pytest.fixture
def two_classes(tmp_path):
    """20 photos each of city and forest."""
    write_photos(tmp_path / "data", " ".join(f"{c}/{i:02}.png" for c in ("forest", "city") for i in range(20)))
    return tmp_path / "data"


# What comes out


def test_samples(two_classes):
    data = load(two_classes)
    assert data.classes == ("city", "forest")
    assert names(data.train) == sorted(names(data.train))
    assert len(data.train) + len(data.val) == 40
    assert data.test == data.bad == ()
    assert data.roots == {"train": two_classes, "val": two_classes}
    for sample in (*data.train, *data.val):
        assert sample.path == two_classes / sample.name
        assert data.classes[sample.label] == sample.name.split("/")[0]
        assert sample.digest == hashlib.sha256(sample.path.read_bytes()).hexdigest()
        assert sample.group is None


def test_progress_counts_all_photos_once(two_classes):
    calls = []
    load(two_classes, advance=lambda n, total: calls.append((n, total)))
    assert calls == [(1, 40)] * 40


def test_photos_in_the_digest_cache_are_not_read_again(two_classes, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune_cli.cache.digests._SETTLED_NS", -1)
    monkeypatch.setattr("finetune_cli.cache.mounts.ChangeTimes.trusted", lambda *_arguments: True)
    with DigestCache(tmp_path / "cache") as cache:
        first = load(two_classes, cache=cache)
    monkeypatch.setattr("finetune_cli.photos.scan.examine", lambda path: pytest.fail(f"{path} is read again"))
    with DigestCache(tmp_path / "cache") as cache:
        assert load(two_classes, cache=cache) == first
        text = problem(two_classes, cache=cache, max_pixels=3)
    assert text.count("2 x 2 pixels, more than image.max_pixels = 3") == 20
    assert "and 20 more" in text


def test_any_bytes_in_names(tmp_path):
    odd = [os.fsdecode(label) for label in (b"\xff\xfe", b"a\nb", b"=1+1", b"<b>")]
    for label, i in itertools.product(odd, range(3)):
        write_photo(tmp_path / label / os.fsdecode(b"'%d\" \xe9\r\n.png" % i))
    data = load(tmp_path)
    assert data.classes == tuple(sorted(odd, key=os.fsencode))
    assert len(data.train) + len(data.val) == 12


# Where validation photos come from


def test_folders_beside_train(tmp_path):
    write_photos(tmp_path, "train/a/1.png train/b/2.png valid/a/3.png valid/b/4.png test/a/5.png test/b/6.png")
    for source in (tmp_path, tmp_path / "train"):
        data = load(source)
        assert (names(data.train), names(data.val), names(data.test)) == (
            ["a/1.png", "b/2.png"],
            ["a/3.png", "b/4.png"],
            ["a/5.png", "b/6.png"],
        )
        assert data.roots == {"train": tmp_path / "train", "val": tmp_path / "valid", "test": tmp_path / "test"}
        assert any("found beside" in note for note in data.notes)


def test_precedence(tmp_path):
    write_photos(tmp_path, "train/a/1.png train/b/1.png val/a/2.png val/b/2.png mine/a/3.png mine/b/3.png")
    rows = "train/a/1.png,a,train\ntrain/b/1.png,b,train\nval/a/2.png,a,val\nval/b/2.png,b,val\n"
    (tmp_path / "table.csv").write_text("image_path,label,split\n" + rows)
    assert names(load(tmp_path / "train").val) == ["a/2.png", "b/2.png"]
    assert names(load(tmp_path / "train", val=tmp_path / "mine").val) == ["a/3.png", "b/3.png"]
    assert names(load(tmp_path / "table.csv").val) == ["val/a/2.png", "val/b/2.png"]
    data = load(tmp_path / "table.csv", val=tmp_path / "mine")
    assert names(data.val) == ["a/3.png", "b/3.png"]
    assert names(data.train) == ["train/a/1.png", "train/b/1.png"]
    assert any("are not used, because data.val is set" in note for note in data.notes)


def test_a_table_without_validation_lines_is_split(two_classes):
    rows = [f"{p.relative_to(two_classes).as_posix()},{p.parent.name}" for p in sorted(two_classes.glob("*/*.png"))]
    table = two_classes / "photos.tsv"
    table.write_text("image_path\tlabel\n" + "\n".join(rows).replace(",", "\t"))
    by_table, by_folder = load(table), load(two_classes)
    assert (names(by_table.train), names(by_table.val)) == (names(by_folder.train), names(by_folder.val))


def test_test_lines_of_a_table_are_never_trained_on(two_classes):
    rows = [f"city/{i:02}.png,city,{'test' if i < 5 else 'train'}" for i in range(20)]
    rows += [f"forest/{i:02}.png,forest,train" for i in range(20)]
    (two_classes / "t.csv").write_text("image_path,label,split\n" + "\n".join(rows))
    data = load(two_classes / "t.csv")
    assert names(data.test) == [f"city/{i:02}.png" for i in range(5)]
    assert len(data.train) + len(data.val) == 35
    assert any(note == "no photos for test of: forest" for note in data.notes)


def test_no_validation_photos_at_all(two_classes):
    assert "data.val_split" in problem(two_classes, val_split=None)


def test_adding_photos_moves_few(two_classes):
    write_photos(two_classes, " ".join(f"{c}/more{i:02}.png" for c in ("forest", "city") for i in range(60)))
    before = load(two_classes, val_split=0.2)
    write_photos(two_classes, " ".join(f"{c}/new{i:02}.png" for c in ("forest", "city") for i in range(8)))
    after = load(two_classes, val_split=0.2)
    assert len(set(names(before.train)) - set(names(after.train))) <= 6
    assert len(set(names(before.val)) - set(names(after.val))) <= 6


def test_every_class_gives_its_share_of_validation_photos(two_classes):
    assert Counter(sample.label for sample in load(two_classes, val_split=0.2).val) == {0: 4, 1: 4}


def test_renaming_photos_moves_none(two_classes):
    before = {sample.digest for sample in load(two_classes).val}
    for i, path in enumerate(sorted(two_classes.glob("*/*.png"))):
        path.rename(path.with_name(f"renamed{(i * 7) % 20:02}{i}.png"))
    assert {sample.digest for sample in load(two_classes).val} == before


# Groups


@pytest.mark.parametrize("group_regex", [r"/(\w+)-", r"s\d+"])
def test_groups_by_regex(tmp_path, group_regex):
    write_photos(tmp_path, " ".join(f"{c}/s{g}-{i}.png" for c in "ab" for g in range(10) for i in range(4)))
    write_photos(tmp_path, "a/alone.png")
    data = load(tmp_path, group_regex=group_regex, val_split=0.5)
    assert {s.group for s in data.train}.isdisjoint({s.group for s in data.val} - {None})
    assert {s.group for s in (*data.train, *data.val)} == {f"s{g}" for g in range(10)} | {None}
    assert any("does not match 1 photo;" in note for note in data.notes)


def test_groups_by_table(two_classes):
    rows = [f"{c}/{i:02}.png,{c},patient {i // 4}" for c in ("city", "forest") for i in range(20)]
    (two_classes / "t.csv").write_text("image_path,label,group\n" + "\n".join(rows))
    data = load(two_classes / "t.csv", val_split=0.4)
    assert {s.group for s in data.train}.isdisjoint({s.group for s in data.val})
    assert {s.group for s in (*data.train, *data.val)} == {f"patient {i}" for i in range(5)}


def test_groups_across_named_splits_are_reported(tmp_path):
    write_photos(tmp_path, "train/a/s1-1.png train/b/s2-1.png val/a/s1-2.png val/b/s3-1.png")
    assert "1 group with photos in both train and val" in load(tmp_path, group_regex=r"s\d").warnings


@pytest.mark.parametrize("group_regex", ["(", "nothing like this"])
def test_useless_group_regex(two_classes, group_regex):
    assert "data.group_regex" in problem(two_classes, group_regex=group_regex)


# What is wrong


def test_all_problems_with_classes_at_once(tmp_path):
    write_photos(
        tmp_path, "train/a/1.png train/b/1.png train/c/1.txt val/a/1.png val/B/1.png test/a/1.png test/b/1.png"
    )
    (tmp_path / "val" / "c").mkdir()
    text = problem(tmp_path)
    assert text.startswith("4 problems with the photos\n")
    assert f"class c has no photos: {tmp_path}/train/c" in text
    assert f"{tmp_path}/val has classes unknown to the training photos: B; close to them: b" in text
    assert f"{tmp_path}/val lacks folders for: b" in text
    assert f"{tmp_path}/test lacks folders for: c" in text
    assert "1 .txt files" in text


def test_an_empty_class_folder_for_validation_is_a_note(tmp_path):
    write_photos(tmp_path, "train/a/1.png train/b/1.png val/a/2.png")
    (tmp_path / "val" / "b").mkdir()
    assert "no photos for val of: b" in load(tmp_path).notes


def test_an_empty_validation_folder(tmp_path):
    write_photos(tmp_path, "train/a/1.png train/b/1.png")
    for name in "ab":
        (tmp_path / "val" / name).mkdir(parents=True)
    assert f"{tmp_path}/val has no photos for val" in problem(tmp_path)


@pytest.mark.parametrize(("files", "words"), [("a/1.png a/2.png", "only the class a"), ("1.png 2.png", "no class")])
def test_fewer_than_two_classes(tmp_path, files, words):
    write_photos(tmp_path, files)
    assert words in problem(tmp_path)


def test_one_photo_under_two_labels(two_classes):
    for name in ("city/copy.png", "forest/copy.png"):
        write_photo(two_classes / name, "the same")
    text = problem(two_classes)
    assert f"the same photo is city as {two_classes}/city/copy.png and forest as {two_classes}/forest/copy.png" in text


def test_one_photo_under_two_labels_in_two_splits(tmp_path):
    write_photos(tmp_path, "train/a/1.png train/b/1.png val/a/2.png")
    write_photo(tmp_path / "val/b/1.png", str(tmp_path / "train/a/1.png"))
    assert "val/b/1.png" in problem(tmp_path)


def test_copies_are_reported_and_stay_on_one_side(two_classes):
    for i in range(20):
        write_photo(two_classes / f"city/copy{i:02}.png", str(two_classes / f"city/{i:02}.png"))
    data = load(two_classes, val_split=0.5)
    assert {s.digest for s in data.train}.isdisjoint({s.digest for s in data.val})
    copies = len(data.train) - len({s.digest for s in data.train})
    assert f"{copies} training photos are exact copies of others" in data.notes


def test_a_photo_in_two_named_splits_is_reported(tmp_path):
    write_photos(tmp_path, "train/a/1.png train/b/1.png val/b/2.png test/a/5.png test/b/6.png")
    write_photo(tmp_path / "val/a/9.png", str(tmp_path / "train/a/1.png"))
    warnings = load(tmp_path).warnings
    assert [text for text in warnings if text.startswith("1 photo of val also in train")]


def test_class_names_that_differ_in_unicode_form_only_are_reported(tmp_path):
    composed, decomposed = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"
    write_photos(tmp_path, " ".join(f"{c}/{i}.png" for c in (composed, decomposed, "tea") for i in range(4)))
    (warning,) = load(tmp_path).warnings
    assert warning == (
        f"the classes {decomposed} and {composed} have the same name, but for its Unicode form "
        "(composed or decomposed accents): are they one class?"
    )


def write_persons(folder, split=lambda person, number: ""):
    names = [f"{split(p, n)}{label}/p{p}-{n}.png" for label in ("cat", "dog") for p in range(10) for n in range(4)]
    write_photos(folder, " ".join(names))


def test_likely_groups_on_both_sides_are_warned_of(tmp_path):
    write_persons(tmp_path)
    data = load(tmp_path)
    (warning,) = data.warnings
    sides = [{sample.name.split("/")[1].split("-")[0] for sample in part} for part in (data.train, data.val)]
    shared = len(sides[0] & sides[1])
    assert shared > 2
    assert f"in 10 groups; {shared} of them are in both train and val, so the accuracy may look better" in warning
    assert warning.endswith("keep each on one side with 'data.group_regex=(?:^|/)(p[0-9]+)'")
    data = load(tmp_path, group_regex=data.proposal.regex)
    assert data.warnings == ()
    assert data.proposal is None
    sides = [{sample.group for sample in part} for part in (data.train, data.val)]
    assert sides[0].isdisjoint(sides[1])


def test_likely_groups_in_several_folds_are_warned_of(tmp_path):
    write_persons(tmp_path)
    data = load(tmp_path, folds=5)
    (warning,) = data.warnings
    assert "in 10 groups; 10 of them are in several folds, so the accuracy may look better" in warning
    assert warning.endswith("keep each on one side with 'data.group_regex=(?:^|/)(p[0-9]+)'")
    data = load(tmp_path, folds=5, group_regex=data.proposal.regex)
    assert data.warnings == ()
    assert len({(sample.group, sample.fold) for sample in data.train}) == 10


def test_with_folds_all_photos_are_training_photos(two_classes):
    data = load(two_classes, folds=4)
    assert (len(data.train), data.val) == (40, ())
    assert "val" not in data.roots
    assert sorted((s.label, s.fold) for s in data.train) == sorted((c, k) for c in (0, 1) for k in (1, 2, 3, 4) * 5)


def test_folds_beside_validation_photos_are_refused(tmp_path):
    write_photos(tmp_path, "train/a/1.png train/b/1.png val/a/2.png val/b/2.png")
    assert "data.folds is 5, but there are validation photos" in problem(tmp_path, folds=5)


def test_too_few_photos_for_the_folds(tmp_path):
    write_photos(tmp_path, "a/1.png a/2.png b/1.png b/2.png")
    assert "fill only 4 folds" in problem(tmp_path, folds=5)
    assert sorted(sample.fold for sample in load(tmp_path, folds=4).train) == [1, 2, 3, 4]


def test_a_class_that_no_fold_can_judge_is_noted(tmp_path):
    write_photos(tmp_path, "a/1.png a/2.png a/3.png b/1.png b/2.png b/3.png c/1.png")
    data = load(tmp_path, folds=3)
    assert [sample.fold for sample in data.train if data.classes[sample.label] == "c"] == [None]
    assert "not cross-validated, only trained on: 1 photo of c, because a class needs photos in two folds" in data.notes


def test_likely_groups_on_both_sides_of_a_split_that_was_given(tmp_path):
    write_persons(tmp_path, lambda _person, number: "val/" if number == 3 else "train/")
    (warning,) = load(tmp_path).warnings
    assert "in 10 groups; 10 of them are in both train and val" in warning
    assert warning.endswith("make the split by these groups")


def test_groups_of_a_table_are_not_guessed_at(tmp_path):
    write_persons(tmp_path)
    rows = [f"{path.relative_to(tmp_path)},{path.parent.name},{i}" for i, path in enumerate(tmp_path.rglob("*.png"))]
    (tmp_path / "t.csv").write_text("image_path,label,group\n" + "\n".join(rows))
    data = load(tmp_path / "t.csv")
    assert (data.proposal, data.warnings) == (None, ())


def test_class_names_that_differ_only_in_case_are_reported(tmp_path):
    write_photos(tmp_path, " ".join(f"{c}/{i}.png" for c in ("Ants", "ants", "bees") for i in range(4)))
    assert [text for text in load(tmp_path).warnings if "Ants and ants have almost the same name" in text]


def test_a_table_is_named_and_not_its_folder(tmp_path):
    write_photos(tmp_path, "1.png 2.png")
    (tmp_path / "t.csv").write_text("image_path,label\n1.png,a\n2.png,a\n")
    text = problem(tmp_path / "t.csv")
    assert f"{tmp_path}/t.csv has only the class a" in text
    assert "table" in text.splitlines()[-1]
    (tmp_path / "t.csv").write_text("image_path,label\n1.png,a\n2.png,b\n1.png,b\n")
    assert f"the same photo is a and b as {tmp_path}/1.png" in problem(tmp_path / "t.csv")


# Bad photos


@pytest.fixture
def some_bad(two_classes):
    """40 good photos, and four that are not."""
    (two_classes / "city" / "empty.jpg").write_bytes(b"")
    (two_classes / "city" / "text.png").write_text("words")
    (two_classes / "forest" / "cut.png").write_bytes(photo_bytes(1)[:20])
    (two_classes / "forest" / "page\n.jpg").write_text("<html>")
    return two_classes


def refused(data, on_bad):
    with pytest.raises(DataError) as caught:
        refuse_bad(data.bad, data.photos, on_bad)
    return caught.value


def test_all_bad_photos_are_listed(some_bad):
    error = refused(load(some_bad), "error")
    assert isinstance(error, BadPhotos)
    assert error.problem.splitlines()[0] == "4 of 44 photos cannot be used"
    assert len(error.problem.splitlines()) == 5
    assert f"  {some_bad}/city/empty.jpg: the file is empty" in error.problem.splitlines()
    assert rf"{some_bad}/forest/page\n.jpg: a web page" in error.problem
    assert "data.on_bad_image=skip" in error.remedy


def test_of_many_bad_photos_the_first_are_listed_and_all_are_counted():
    bad = [BadPhoto(Path(f"{i}.png"), f"{i}.png", "there is no such file") for i in range(100)] * 10_000
    with pytest.raises(DataError) as caught:
        refuse_bad(bad, 1_000_000, "error")
    lines = caught.value.problem.splitlines()
    assert lines[0].startswith("1000000 of 1000000 photos cannot be used")
    assert lines[1] == "  0.png: there is no such file"
    assert len(lines) == 22
    assert lines[-1] == "  and 999980 more"


def test_bad_photos_are_skipped_on_demand(some_bad):
    data = load(some_bad)
    refuse_bad(data.bad, data.photos, "skip")
    assert {photo.name for photo in data.bad} == {
        "city/empty.jpg",
        "city/text.png",
        "forest/cut.png",
        "forest/page\n.jpg",
    }
    assert len(data.train) + len(data.val) == 40


def test_too_many_bad_photos_stop_also_when_skipped(some_bad):
    (some_bad / "forest" / "fifth.jpg").write_bytes(b"x")
    for on_bad in ("error", "skip"):  # it makes no sense to propose skipping them
        error = refused(load(some_bad), on_bad)
        assert error.problem.startswith(
            "5 of 45 photos cannot be used, which is more than the 10% that could be skipped"
        )
        assert "skip" not in error.remedy


def test_a_class_of_bad_photos_only(two_classes):
    (two_classes / "lake").mkdir()
    (two_classes / "lake" / "1.jpg").write_bytes(b"x")
    data = load(two_classes)
    with pytest.raises(DataError) as caught:
        dataset.refuse_empty(data.classes, data.splits, data.bad)
    assert "no good photo of class lake is left" in caught.value.problem
    assert f"{two_classes}/lake/1.jpg: " in caught.value.problem


def test_a_split_of_bad_photos_only(two_classes):
    for name in ("city", "forest"):
        (two_classes / "val" / name).mkdir(parents=True)
    (two_classes / "val" / "city" / "1.jpg").write_bytes(b"")
    (two_classes / "train").mkdir()
    for name in ("city", "forest"):
        (two_classes / name).rename(two_classes / "train" / name)
    text = problem(two_classes)
    assert text.startswith(f"no photo for val can be used\n  {two_classes}/val/city/1.jpg: the file is empty\n")


def test_a_table_may_name_files_that_are_not_photos(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    write_photos(tmp_path, "1.png 2.png 3.png")
    rows = ["1.png,a", "2.png,b", "3.png,b", "pipe.png,a", "missing.png,a", ".,a", "/dev/zero,a"]
    (tmp_path / "t.csv").write_text("image_path,label\n" + "\n".join(rows))
    text = refused(load(tmp_path / "t.csv"), "error").problem
    assert text.startswith("4 of 7 photos")
    assert f"{tmp_path}/pipe.png: it is a pipe, not a regular file" in text
    assert f"{tmp_path}/missing.png: there is no such file" in text


def test_addresses_in_a_table_or_a_config_are_named(tmp_path):
    (tmp_path / "t.csv").write_text("image_path,label\nhttps://host/a//b.jpg,city\n")
    assert "line 2: https://host/a//b.jpg is an address of the web" in problem(tmp_path / "t.csv")
    assert "https://host/photos is an address, not a path" in problem(tmp_path / "https://host/photos")


def test_refuse_bad():
    bad = [BadPhoto(Path(f"{i}.png"), f"{i}.png", "why") for i in range(3)]
    refuse_bad([], 0, "error")
    refuse_bad(bad, 30, "skip")
    for total, on_bad in ((29, "skip"), (10**6, "error")):
        with pytest.raises(DataError, match=r"2\.png: why"):
            refuse_bad(bad, total, on_bad)


# Photos to evaluate and to predict


def labelled(path, classes=("city", "forest", "sea")):
    return load_labelled(path, classes, 10**8, DigestCache(None), ignore_progress)


def test_labelled_photos_are_aligned_by_name(two_classes):
    answer = labelled(two_classes, ("sea", "forest", "city"))
    assert {(s.label, s.name.split("/")[0]) for s in answer.samples} == {(1, "forest"), (2, "city")}
    assert len(answer.samples) == 40
    assert answer.root == two_classes


def test_labelled_photos_of_an_unknown_class(two_classes):
    write_photos(two_classes, "City/1.png lake/2.png")
    with pytest.raises(DataError, match=r"unknown to the run: City, lake; close to them: city"):
        labelled(two_classes)


def test_labelled_lines_for_test_count(two_classes):
    (two_classes / "t.csv").write_text("image_path,label,split\ncity/00.png,city,train\ncity/01.png,city,test\n")
    assert names(labelled(two_classes / "t.csv").samples) == ["city/01.png"]
    (two_classes / "u.csv").write_text("image_path,label\ncity/00.png,city\ncity/01.png,city\n")
    assert len(labelled(two_classes / "u.csv").samples) == 2


def test_a_photo_named_twice_in_a_table_counts_once(two_classes, tmp_path):
    """Under whatever names, for training and for evaluation; another file with the same content is only noted."""
    (tmp_path / "link").symlink_to(two_classes)
    (two_classes / "city" / "copy.png").write_bytes((two_classes / "city" / "02.png").read_bytes())
    photos = [
        "city/00.png",
        "./city/00.png",
        "../data/city/00.png",
        "../link/city/00.png",
        str(two_classes / "city/00.png"),
    ]
    lines = [f"{name},city" for name in (*photos, "city/01.png", "city/02.png", "city/copy.png")]
    lines += [f"forest/{i:02}.png,forest" for i in range(4)]
    (two_classes / "t.csv").write_text("\n".join(["image_path,label", *lines]))
    trained, judged = load(two_classes / "t.csv", val_split=0.3), labelled(two_classes / "t.csv")
    assert len(trained.train) + len(trained.val) == len(judged.samples) == 8
    assert names(judged.samples)[:2] == ["city/00.png", "city/01.png"]
    for found in (trained, judged):
        assert f"4 lines of {two_classes}/t.csv repeat an earlier one and are ignored" in found.notes
    assert "1 photo is an exact copy of another" in judged.notes


def test_labelled_bad_photos_and_contradictions(some_bad):
    assert len(labelled(some_bad).bad) == 4
    for name in ("city/copy.png", "forest/copy.png"):
        write_photo(some_bad / name, "the same")
    with pytest.raises(DataError, match="the same photo is city"):
        labelled(some_bad)


def test_no_labelled_photos(tmp_path):
    (tmp_path / "city").mkdir()
    with pytest.raises(DataError, match="no photos to evaluate on"):
        labelled(tmp_path)


def test_iter_photos(two_classes, tmp_path):
    os.mkfifo(two_classes / "city" / "pipe.png")
    (two_classes / "city" / "loop").symlink_to("..")
    paths = [Path("missing.jpg"), two_classes, two_classes / "city" / "pipe.png", tmp_path / "notes.txt"]
    write_photos(two_classes, "notes.txt more.txt city/.hidden.png city/list.csv")
    ignored = Counter()
    found = list(iter_photos(iter(paths), ignored))
    assert ignored == {
        ".txt files": 2,
        "hidden": 1,
        ".csv files": 1,
        "pipes, sockets or devices": 1,
        "links to folders that were already seen": 1,
    }
    assert found[0] == paths[0]
    assert found[-2:] == paths[-2:]
    assert [path.relative_to(two_classes).as_posix() for path in found[1:-2]] == [
        f"{c}/{i:02}.png" for c in ("city", "forest") for i in range(20)
    ]


def test_iter_photos_is_lazy(two_classes):
    endless = (two_classes for _ in itertools.count())
    assert len(list(itertools.islice(iter_photos(endless), 100))) == 100


MEASURE_INDEX = """
import gc, hashlib, sys, tracemalloc
from pathlib import Path
from finetune_cli.photos import dataset, scan
from finetune_cli.cache.digests import DigestCache, Facts
from finetune_cli.progress import ignore_progress

def load():
    settings = dataset.DataSettings(Path(sys.argv[1]), val_split=0.2)
    return dataset.load(settings, DigestCache(None), ignore_progress)

scan.examine = lambda path: Facts(hashlib.sha256(str(path).encode()).hexdigest(), 2, 2)
load()  # what is imported and kept once does not count
gc.collect()
tracemalloc.start()
data = load()
gc.collect()
# The interpreter's table of interned strings, which is one block, may grow just now, by more than all photos take.
blocks = sorted(trace.size for trace in tracemalloc.take_snapshot().traces)
tables = [size for size in blocks if size > 2**19]
assert len(tables) <= 1, tables
print(len(data.train) + len(data.val), sum(blocks) - sum(tables))
"""


def test_memory_of_an_index_is_modest(tmp_path):
    """A million photos take about a gigabyte. Measured in a process of its own, where nothing else is going on."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    count = 4000
    for i in range(count):
        (tmp_path / "ab"[i % 2] / f"{i:08}.png").touch()
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", MEASURE_INDEX, str(tmp_path)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    photos, size = map(int, answer.stdout.split())
    assert photos == count
    assert 200 < size / count < 1200


def test_real_photos(shared_data):
    data = load(shared_data / "hymenoptera")
    assert (data.classes, len(data.train), len(data.val)) == (("ants", "bees"), 245, 153)
    assert data.bad == ()
    data = load(shared_data / "scenes")
    assert (len(data.classes), len(data.train) + len(data.val), len(data.test)) == (6, 360, 240)
    assert 40 < len(data.val) < 105


# Near-duplicates


def test_near_duplicates_become_groups_and_the_photos_are_split_again(two_classes):
    data = load(two_classes)
    pairs = [(a.digest, b.digest) for a, b in zip(data.train, data.val, strict=False)]
    again = dataset.split_again(data, pairs, frozenset())
    side = {sample.digest: name for name, samples in again.splits.items() for sample in samples}
    assert len(side) == 40
    assert all(side[a] == side[b] for a, b in pairs)
    groups = {sample.digest: sample.group for samples in again.splits.values() for sample in samples}
    assert all(groups[a] == groups[b] and groups[a].startswith("near:") for a, b in pairs)
    assert sum(group is None for group in groups.values()) == 40 - 2 * len(pairs)


def test_a_split_that_the_user_chose_stays_as_it_is(tmp_path):
    write_photos(
        tmp_path, "train/a/1.png train/b/2.png train/b/3.png val/a/3.png val/b/4.png test/a/5.png test/b/6.png"
    )
    data = load(tmp_path)
    first, other = data.train[0], data.val[0]
    again = dataset.split_again(data, [(first.digest, other.digest)], frozenset())
    for split in ("train", "val", "test"):
        assert names(getattr(again, split)) == names(getattr(data, split))
    assert again.train[0].group == again.val[0].group is not None


def test_a_recorded_split_is_taken_as_it_was(two_classes):
    data = dataset.split_again(load(two_classes), [], frozenset())
    moved = {
        (s.digest, s.name): ("val" if name == "train" else "train", "g")
        for name, part in data.splits.items()
        for s in part
    }
    again = dataset.split_as_recorded(data, moved)
    assert (names(again.train), names(again.val)) == (names(data.val), names(data.train))
    assert {sample.group for sample in again.train} == {"g"}
    assert dataset.split_as_recorded(data, {}) == data


def test_unusable_photos_leave_every_split(two_classes):
    data = load(two_classes)
    bad = [BadPhoto(sample.path, sample.name, "broken") for sample in (data.train[0], data.val[0])]
    after = dataset.without(data, bad)
    assert (len(after.train), len(after.val)) == (len(data.train) - 1, len(data.val) - 1)
    assert after.bad == tuple(bad)
    assert after.photos == data.photos


def test_photos_that_an_earlier_run_was_trained_on_do_not_validate(two_classes):
    everything = {sample.digest for samples in load(two_classes).splits.values() for sample in samples}
    unseen = sorted(everything)[::3]
    data = load(two_classes, trained_on=frozenset(everything - set(unseen)))
    assert {sample.digest for sample in data.val} <= set(unseen)
    assert "was trained on all of them" in problem(two_classes, trained_on=frozenset(everything))
