import os
from collections import Counter
from pathlib import Path

import pytest
from photo_files import write_photo, write_photos

from finetune_cli.errors import DataError
from finetune_cli.photos.folders import find_sources, read, walk


def listed(source):
    return [(photo.name, photo.label) for photo in read(source).photos]


def walked(folder):
    ignored = Counter()
    failed = []
    names = list(walk(folder, ignored, lambda place, exc: failed.append(place)))
    return names, dict(ignored), failed


# Folders


def test_a_folder_per_class_in_bytewise_order(tmp_path):
    write_photos(tmp_path, "b/2.png b/10.png B/x.JPG a/1.png a/deep/er/0.webp é/1.png")
    assert listed(tmp_path) == [
        ("B/x.JPG", "B"),
        ("a/1.png", "a"),
        ("a/deep/er/0.webp", "a"),
        ("b/10.png", "b"),
        ("b/2.png", "b"),
        ("é/1.png", "é"),
    ]
    assert read(tmp_path).classes == ("B", "a", "b", "é")
    assert all(photo.path == str(tmp_path / photo.name) for photo in read(tmp_path).photos)


def test_whole_paths_are_in_bytewise_order(tmp_path):
    write_photos(tmp_path, "a/x/1.png a/x-1.png a/x.png a/xy.png a/x0/1.png")
    names = [name for name, _label in listed(tmp_path)]
    assert names == sorted(names, key=os.fsencode) == ["a/x-1.png", "a/x.png", "a/x/1.png", "a/x0/1.png", "a/xy.png"]


def test_what_is_left_out_is_counted(tmp_path):
    write_photos(tmp_path, "a/1.png a/.2.png a/.git/3.png a/__MACOSX/4.png .cache/5.png loose.png b/6.png")
    write_photos(tmp_path, "a/notes.txt a/more.TXT a/LICENSE a/raw.cr2")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "a" / "self.png").symlink_to("self.png")
    listing = read(tmp_path)
    assert [photo.name for photo in listing.photos] == ["a/1.png", "b/6.png"]
    (note,) = listing.notes
    counts = (
        "4 hidden",
        "2 .txt files",
        "1 .cr2 files",
        "1 files without an extension",
        "2 broken links",
        "1 pipes, sockets or devices",
        "1 photos outside of any class folder",
    )
    assert all(count in note for count in counts), note


def test_a_note_does_not_grow_with_the_kinds_of_files(tmp_path):
    write_photos(tmp_path / "a", " ".join(f"x.e{i}" for i in range(100)))
    (note,) = read(tmp_path).notes
    assert "92 others" in note


def test_links_are_followed_and_loops_end(tmp_path):
    write_photos(tmp_path, "data/a/1.png data/b/1.png elsewhere/2.png elsewhere/deep/3.png")
    (tmp_path / "data/a/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/photo.png").symlink_to(tmp_path / "elsewhere/2.png")
    (tmp_path / "data/a/self").symlink_to(".")
    (tmp_path / "data/a/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/a/top").symlink_to("/")
    (tmp_path / "elsewhere/deep/round").symlink_to(tmp_path / "elsewhere")
    names, ignored, failed = walked(tmp_path / "data" / "a")
    assert names == ["1.png", "linked/2.png", "linked/deep/3.png", "photo.png"]
    assert ignored == {"links to folders that were already seen": 4}
    assert failed == []


def test_a_class_folder_may_be_a_link(tmp_path):
    write_photos(tmp_path, "store/cats/1.png data/dogs/2.png")
    (tmp_path / "data/cats").symlink_to(tmp_path / "store/cats")
    (tmp_path / "store/cats/back").symlink_to(tmp_path / "data")
    assert listed(tmp_path / "data") == [("cats/1.png", "cats"), ("dogs/2.png", "dogs")]


def test_a_tree_of_links_is_walked_in_linear_time(tmp_path):
    for i in range(40):
        (tmp_path / f"d{i}").mkdir()
        for name in "xy":
            (tmp_path / f"d{i}" / name).symlink_to(f"../d{i + 1}")
    write_photo(tmp_path / "d40" / "1.png")
    assert len(walked(tmp_path / "d0")[0]) == 1


def test_a_deep_tree(tmp_path):
    place = tmp_path
    for _ in range(600):
        place = place / "d"
    place.mkdir(parents=True)
    write_photo(place / "1.png")
    assert len(walked(tmp_path)[0]) == 1


def test_names_may_hold_any_bytes(tmp_path):
    odd = [os.fsdecode(name) for name in (b"new\nline.png", b"\"quote'.png", b"a=b.png", b"<b>.png", b"caf\xe9.png")]
    label = os.fsdecode(b"cl\xffss")
    for name in odd:
        write_photo(tmp_path / label / name)
    listing = read(tmp_path)
    assert listing.classes == (label,)
    assert {photo.name for photo in listing.photos} == {f"{label}/{name}" for name in odd}
    assert all(Path(photo.path).is_file() for photo in listing.photos)


# Splits beside one another


def test_the_folder_above_train(tmp_path):
    write_photos(tmp_path, "train/a/1.png train/b/1.png Validation/a/1.png test/a/1.png")
    for named in (tmp_path, tmp_path / "train"):
        sources = find_sources(named, None, None)
        assert (sources.train, sources.val, sources.test) == tuple(
            tmp_path / n for n in ("train", "Validation", "test")
        )
        assert [str(tmp_path / "Validation") in sources.notes[0], str(tmp_path / "test") in sources.notes[1]] == [
            True
        ] * 2


def test_what_is_named_wins(tmp_path):
    write_photos(tmp_path, "train/a/1.png val/a/1.png mine/a/1.png")
    sources = find_sources(tmp_path, tmp_path / "mine", None)
    assert (sources.train, sources.val, sources.test) == (tmp_path / "train", tmp_path / "mine", None)
    assert ["mine" in note for note in sources.notes] == [True]


def test_relative_train_folder(tmp_path, monkeypatch):
    write_photos(tmp_path, "train/a/1.png val/a/1.png")
    monkeypatch.chdir(tmp_path / "train")
    assert find_sources(type(tmp_path)(), None, None).val == tmp_path / "val"


def test_another_folder_has_no_neighbours(tmp_path):
    write_photos(tmp_path, "photos/a/1.png val/a/1.png test/a/1.png")
    sources = find_sources(tmp_path / "photos", None, None)
    assert (sources.val, sources.test) == (None, None)


def test_a_test_folder_without_classes_is_not_used(tmp_path):
    write_photos(tmp_path, "train/a/1.png test/1.png")
    sources = find_sources(tmp_path, None, None)
    assert sources.test is None
    assert "no class folders" in sources.notes[0]


def test_two_validation_folders_are_refused(tmp_path):
    write_photos(tmp_path, "train/a/1.png val/a/1.png valid/a/1.png")
    with pytest.raises(DataError, match=r"data\.val"):
        find_sources(tmp_path, None, None)


def test_a_class_named_train(tmp_path):
    write_photos(tmp_path, "bus/1.png train/1.png")
    assert find_sources(tmp_path, None, None).train == tmp_path
    write_photos(tmp_path, "train/steam/1.png")
    with pytest.raises(DataError, match="is train a class"):
        find_sources(tmp_path, None, None)


def test_a_folder_of_data_sets_is_reported(tmp_path):
    write_photos(tmp_path, "pets/train/cat/1.png flowers/train/rose/1.png")
    assert sum("as if it were a data set" in note for note in read(tmp_path).notes) == 2


@pytest.mark.parametrize("name", ["nowhere", "photo.png", "nowhere.csv"])
def test_invalid_sources(tmp_path, name):
    write_photo(tmp_path / "photo.png")
    with pytest.raises(DataError):
        read(tmp_path / name)


# Tables


def table(tmp_path, text, name="photos.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def test_a_table(tmp_path):
    path = table(
        tmp_path,
        "\ufeffLabel, image_path ,split,group,width\n"
        "city,b/1.png,train,s1,3\n"
        "forest,./a//2.png,Validation,,3\n"
        '"a, b","c ""q"".png",test,s2,3\n'
        "\n",
    )
    listing = read(path)
    assert [(p.name, p.label, p.split, p.group) for p in listing.photos] == [
        ("a/2.png", "forest", "val", None),
        ("b/1.png", "city", "train", "s1"),
        ('c "q".png', "a, b", "test", "s2"),
    ]
    assert listing.root == tmp_path
    assert listing.photos[1].path == str(tmp_path / "b/1.png")
    assert listing.classes == ("a, b", "city", "forest")


@pytest.mark.parametrize(("name", "delimiter"), [("p.tsv", "\t"), ("p.csv", ";"), ("P.CSV", ","), ("p.csv", "\t")])
def test_delimiters(tmp_path, name, delimiter):
    path = table(tmp_path, f"image_path{delimiter}label\nx.png{delimiter}city\n", name)
    assert listed(path) == [("x.png", "city")]


def test_paths_in_a_table_may_be_absolute_or_lead_up(tmp_path):
    path = tmp_path / "tables" / "t.csv"
    path.parent.mkdir()
    path.write_text(f"image_path,label\n{tmp_path}/x.png,a\n../y.png,b\n")
    assert listed(path) == [("../x.png", "a"), ("../y.png", "b")]


def test_repeated_lines_are_ignored(tmp_path):
    listing = read(table(tmp_path, "image_path,label\na.png,x\n./a.png,x\na.png,y\n"))
    assert [(p.name, p.label) for p in listing.photos] == [("a.png", "x"), ("a.png", "y")]
    assert "1 lines" in listing.notes[0]


def test_bytes_that_are_not_utf8_survive(tmp_path):
    listing = read(table(tmp_path, b"image_path,label\ncaf\xe9.png,na\xefve\n"))
    assert os.fsencode(listing.photos[0].name) == b"caf\xe9.png"
    assert os.fsencode(listing.classes[0]) == b"na\xefve"


@pytest.mark.parametrize("label", ['"city', '"city\n3.png,forest\n4.png,"city"'])
def test_an_unclosed_quote_does_not_swallow_lines(tmp_path, label):
    text = f"image_path,label\n1.png,city\n2.png,{label}\n5.png,forest\n6.png,forest\n"
    with pytest.raises(DataError) as caught:
        read(table(tmp_path, text))
    assert "from line 3 on" in caught.value.problem
    assert "quote" in caught.value.remedy


def test_a_label_of_two_lines_is_refused(tmp_path):
    with pytest.raises(DataError, match="lines 2 to 3: the label continues on the next line"):
        read(table(tmp_path, 'image_path,label\n1.png,"ci\nty"\n2.png,forest\n'))


def test_a_column_named_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="names label twice"):
        read(table(tmp_path, "image_path,label,Label\n1.png,city,forest\n"))


def test_all_invalid_lines_are_reported(tmp_path):
    with pytest.raises(DataError) as caught:
        read(
            table(tmp_path, 'image_path,label,split\n,city,val\nx.png,,val\nx.png\n"a\nb.png",city,dev\nx.png,a,val\n')
        )
    assert caught.value.problem.splitlines()[1:] == [
        "  line 2: no image_path",
        "  line 3: no label",
        "  line 4: no label",
        "  lines 5 to 6: split is 'dev', not train, val or test",
    ]


def test_many_wrong_lines_are_cut_short(tmp_path):
    with pytest.raises(DataError, match="and 480 more"):
        read(table(tmp_path, "image_path,label\n" + "x.png,\n" * 500))


@pytest.mark.parametrize(
    "text", ["", "path,class\na.png,city\n", "a.png,city\n", "image_path,label\n\0\0,x\n", '"' * 200_000]
)
def test_invalid_tables_are_reported(tmp_path, text):
    with pytest.raises(DataError):
        read(table(tmp_path, text))


def test_a_utf16_table_is_reported(tmp_path):
    with pytest.raises(DataError, match="first line"):
        read(table(tmp_path, "image_path,label\na.png,city\n", encoding="utf-16"))


def test_a_table_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "photos.csv")
    with pytest.raises(DataError, match="neither a folder nor a regular file"):
        read(tmp_path / "photos.csv")
