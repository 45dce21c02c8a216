"""Photos in stores, with a dictionary in place of a store: listings, tables, and what is remembered of an object."""

import hashlib
from collections import Counter

import pytest
from photo_files import write_photos

from finetune_cli import storage
from finetune_cli.cache.digests import DigestCache, Facts
from finetune_cli.config.load import load_config
from finetune_cli.errors import ConfigError, DataError
from finetune_cli.photos import dataset, fixes, folders
from finetune_cli.photos.dataset import DataSettings
from finetune_cli.photos.scan import listed
from finetune_cli.places import Address, place
from finetune_cli.progress import ignore_progress
from finetune_cli.runs import run
from finetune_cli.storage import Stored


class Store(dict):
    """Key -> content; counts what is read."""

    def __init__(self):
        self.reads = Counter()

    def read_version(self, address, most=0):
        key = address.removeprefix("s3://bucket/")
        if key not in self:
            raise FileNotFoundError(2, "there is no such object", address)
        self.reads[key] += 1
        return self[key], self.version(key)

    def read(self, address, most=0):
        return self.read_version(address)[0]

    def version(self, key):
        return hashlib.md5(self[key]).hexdigest()

    def status(self, address):
        return Stored("", 0, self.version(address.removeprefix("s3://bucket/")))

    def entries(self, folder, deep=False):
        prefix = f"{folder.rstrip('/')}/".removeprefix("s3://bucket/")
        below = sorted(key.removeprefix(prefix) for key in self if key.startswith(prefix))
        if deep:
            yield from (Stored(name, 0, self.version(prefix + name)) for name in below)
        else:
            yield from (Stored(name) for name in dict.fromkeys(a + b for a, b, _ in (n.partition("/") for n in below)))


@pytest.fixture
def store(monkeypatch, tmp_path):
    found = Store()
    for name in ("read_version", "read", "status", "entries"):
        monkeypatch.setattr(storage, name, getattr(found, name))
    monkeypatch.setattr(storage, "exists", lambda address: address.removeprefix("s3://bucket/") in found)
    names = "a/1.png a/2.png b/1.png b/2.png"
    write_photos(tmp_path, names)
    for split in ("train", "val"):
        for name in names.split():
            found[f"set/{split}/{name}"] = (tmp_path / name).read_bytes()
    return found


def load(source, cache=None, **options):
    with DigestCache(cache) as digests:
        return dataset.load(DataSettings(place(source), **options), digests, ignore_progress)


def test_class_folders_and_the_splits_beside_them(store):
    found = load("s3://bucket/set")
    assert found.classes == ("a", "b")
    assert [sample.name for sample in found.val] == ["a/1.png", "a/2.png", "b/1.png", "b/2.png"]
    assert str(found.val[0].path) == "s3://bucket/set/val/a/1.png"
    assert found.roots == {"train": Address("s3://bucket/set/train"), "val": Address("s3://bucket/set/val")}
    assert "validation photos: s3://bucket/set/val, found beside the training photos" in found.notes
    assert set(store.reads.values()) == {1}


def test_what_is_no_photo_is_counted(store):
    for name in ("a/../../x.png", "a//x.png", "a/./x.png", ".hidden/x.png", "a/.x.png", "a/x.txt", "loose.png", "c/"):
        store[f"odd/{name}"] = b"x"
    ignored = Counter()
    names = [entry.name for entry in folders.objects(Address("s3://bucket/odd"), ignored)]
    assert names == ["c/", "loose.png"]
    assert ignored == {"objects with . or .. or nothing between slashes": 3, "hidden": 2, ".txt files": 1}
    listing = folders.read(Address("s3://bucket/odd"))
    assert listing.classes == ("c",)  # an empty folder is a class without photos


def test_names_of_strangers_stay_text(store, tmp_path):
    names = ["a/=1+2.png", "a/\x1b[31m.png", 'a/","train,.png', "a/\u202egnp.png"]
    store.update({f"set/train/{name}": store["set/train/a/1.png"] + name.encode() for name in names})
    store["set/train/b/\x1b[2J.png"] = b"no photo"
    found = load("s3://bucket/set")
    assert set(names) < {sample.name for sample in found.train}
    rows = [run.SplitRow("train", "a", sample.digest, sample.name) for sample in found.train]
    run.write_split(tmp_path / "split.csv", rows)
    assert run.read_split(tmp_path / "split.csv") == rows
    assert ",=" not in (tmp_path / "split.csv").read_text()
    assert "\x1b" not in listed(found.bad)


def test_a_folder_that_is_not_there(store):
    with pytest.raises(DataError, match="s3://bucket/none does not exist"):
        load("s3://bucket/none")


def test_what_is_known_of_an_object_is_remembered_by_its_version(store, tmp_path):
    cache = tmp_path / "cache"
    before = load("s3://bucket/set", cache)
    store.reads.clear()
    assert load("s3://bucket/set", cache) == before
    assert not store.reads
    store["set/train/a/1.png"] = store["set/train/b/2.png"] + b" "
    after = load("s3://bucket/set", cache)
    assert store.reads == {"set/train/a/1.png": 1}
    assert after.train[0].digest == hashlib.sha256(store["set/train/a/1.png"]).hexdigest()


def test_objects_of_a_table_are_asked_for_their_version(store, tmp_path):
    rows = [f"s3://bucket/set/train/{name},{name[0]},{split}" for name, split in
            (("a/1.png", "train"), ("b/1.png", "train"), ("a/2.png", "val"), ("b/2.png", "val"))]  # fmt: skip
    (tmp_path / "t.csv").write_text("\n".join(["image_path,label,split", *rows]))
    for reads in (4, 0):
        found = load(tmp_path / "t.csv", tmp_path / "cache")
        assert [sample.name for sample in found.train] == [row.partition(",")[0] for row in rows[:2]]
        assert store.reads.total() == reads
        store.reads.clear()


def test_a_first_look_replaces_the_reading(store, tmp_path):
    asked = []

    def look(split, photos, split_is_made):
        asked.append((split, len(photos), split_is_made))
        for photo in photos:
            yield (Facts(hashlib.sha256(photo.path.encode()).hexdigest(), 9, 9), "1") if "b/2" not in photo.path else (
                "not an image", None)  # fmt: skip

    with DigestCache(None) as cache:
        found = dataset.load(DataSettings(place("s3://bucket/set")), cache, ignore_progress, look=look)
    assert asked == [("train", 4, True), ("val", 4, True)]
    assert not store.reads
    assert [photo.reason for photo in found.bad] == ["not an image"] * 2


def test_a_table_in_a_store_names_objects_of_its_bucket_or_store(store):
    def problem(row):
        store["set/t.csv"] = f"image_path,label\n{row},a\n".encode()
        with pytest.raises(DataError) as caught:
            folders.read(Address("s3://bucket/set/t.csv"))
        return str(caught.value)

    for row in ("/etc/passwd", "../../../x.png", "~/x.png"):
        assert "is outside of the bucket" in problem(row)
    assert "is on this machine" in problem("file:///etc/passwd")
    for row in ("memory://x.png", "gs://bucket/x.png"):
        assert "another kind of store" in problem(row)
    assert "hush" not in problem("s3://me:hush@bucket/x.png")
    store["set/t.csv"] = b"image_path,label\ntrain/a/1.png,a\ns3://bucket/else/b.png,b\ns3://other/c.png,b\n"
    listing = folders.read(Address("s3://bucket/set/t.csv"))
    assert [(photo.path, photo.name) for photo in listing.photos] == [
        ("s3://bucket/else/b.png", "../else/b.png"),
        ("s3://other/c.png", "s3://other/c.png"),
        ("s3://bucket/set/train/a/1.png", "train/a/1.png"),
    ]


def test_fixes_name_photos_below_the_folder_that_holds_all(store):
    roots = [Address("s3://bucket/set/train"), Address("s3://bucket/set/val")]
    root = fixes.data_root(roots)
    assert root == Address("s3://bucket/set")
    assert fixes.name_below(root, Address("s3://bucket/set/val/a/1.png")) == "val/a/1.png"
    assert fixes.name_below(root, Address("s3://other/1.png")) == "s3://other/1.png"
    found = load("s3://bucket/set")
    parts = {"train": list(found.train), "val": list(found.val)}
    wanted = [fixes.Fix("val/a/1.png", found.val[0].digest, drop=True)]
    fixed, _notes = fixes.apply(wanted, parts, roots, found.classes)
    assert [sample.name for sample in fixed["val"]] == ["a/2.png", "b/1.png", "b/2.png"]


def test_addresses_in_a_config(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {train: 's3://bucket//a', val: gs://other/b}")
    config = load_config(tmp_path / "c.yaml")
    assert (config.data.train, config.data.val) == (Address("s3://bucket//a"), Address("gs://other/b"))
    dumped = config.dump(tmp_path / "elsewhere")
    assert (dumped["data"]["train"], dumped["data"]["val"]) == ("s3://bucket//a", "gs://other/b")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.train=s3://me:hush@bucket/a", "`data.train`: an address that starts with s3:// holds credentials"),
        ("output.directory=s3://bucket/runs", "`output.directory`: 's3://bucket/runs' is an address"),
        ("data.train=https://host/a", "address of the web"),
    ],
)
def test_wrong_addresses_in_a_config(override, problem):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert problem in str(caught.value)
    assert "hush" not in str(caught.value)


# Tables in Parquet


def parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def test_a_parquet_table_is_read_as_the_same_csv(tmp_path):
    write_photos(tmp_path, "1.png 2.png 3.png")
    columns = {"Image_Path": ["1.png", "2.png", "3.png"], "label": [7, 8, 7], "split": ["train", "train", "VAL"],
               "group": ["g", None, None], "pixels": [b"1", b"2", b"3"]}  # fmt: skip
    found = folders.read(parquet(tmp_path / "t.parquet", **columns))
    rows = ["image_path,label,split,group", "1.png,7,train,g", "2.png,8,train,", "3.png,7,VAL,"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    assert found.photos == folders.read(tmp_path / "t.csv").photos
    assert found.classes == ("7", "8")


def test_wrong_parquet_tables(tmp_path):
    def problem(path):
        with pytest.raises(DataError) as caught:
            folders.read(path)
        return str(caught.value)

    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then something else")
    assert "cannot be read as Parquet" in problem(tmp_path / "x.parquet")
    assert "does not name the columns" in problem(parquet(tmp_path / "y.parquet", photo=["a"], label=["b"]))
    text = problem(parquet(tmp_path / "z.parquet", image_path=["a", None], label=[None, "b"]))
    assert "row 1: no label" in text
    assert "row 2: no image_path" in text
    assert "cannot be read as Parquet" in problem(parquet(tmp_path / "l.parquet", image_path=[["a"]], label=["b"]))
