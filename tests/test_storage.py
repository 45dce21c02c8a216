"""Addresses, before any store is asked: what is one, what is refused, and that no message repeats a password."""

import sys

import pytest

from finetune_cli import places, storage
from finetune_cli.errors import MissingExtra, UsageError
from finetune_cli.places import Address


@pytest.mark.parametrize("text", ["s3://bucket/a.jpg", "gs://bucket", "memory://a", "S3://b/c", "abfs://c@account/a"])
def test_addresses(text):
    assert storage.is_address(text)
    storage.check(text)
    assert str(places.place(text)) == text


@pytest.mark.parametrize("text", ["photos", "/a/s3://b", "C:\\photos", "s3:/bucket/a.jpg", "simplecache::s3://b/a", ""])
def test_paths(text):
    assert not storage.is_address(text)
    assert not isinstance(places.place(text), Address)


@pytest.mark.parametrize(
    "text", ["s3://AKIA:hush@bucket/a", "s3://hush@bucket/a", "sftp://me:hush@host/a", "gs://hush@b", "s3://a:hush@"]
)
def test_credentials_in_an_address_are_refused_and_not_repeated(text):
    with pytest.raises(UsageError, match="holds credentials") as caught:
        storage.check(text)
    assert "hush" not in str(caught.value)
    assert "hush" not in storage.masked(text)


def test_addresses_of_the_web_and_those_without_a_bucket_are_refused():
    for text in ("file:///etc/passwd", "https://host/a.jpg", "ftp://host/a.jpg", "s3://", "s3:///", "s3://a\0b"):
        with pytest.raises(UsageError):
            storage.check(text)


def test_an_address_has_the_parts_of_a_path():
    address = Address("s3://bucket/photos/a.tar.JPG")
    assert (address.name, address.stem, address.suffix) == ("a.tar.JPG", "a.tar", ".JPG")
    assert address.parent == Address("s3://bucket/photos")
    assert address.parent.parent == address.parent.parent.parent == Address("s3://bucket")
    assert Address("s3://bucket/photos/") / "b//c.jpg" == Address("s3://bucket/photos/b//c.jpg")


def test_relative_names_stay_in_the_bucket():
    folder = Address("s3://bucket/a/b")
    assert folder.below("../c/d.jpg") == Address("s3://bucket/a/c/d.jpg")
    assert folder.below("../../../other/d.jpg") is None
    assert folder.relative("s3://bucket/a/c/d.jpg") == "../c/d.jpg"
    assert folder.relative("s3://other/a/b/d.jpg") is None
    assert folder.relative("gs://bucket/a/b/d.jpg") is None
    assert places.join(folder, "c/d.jpg") == Address("s3://bucket/a/b/c/d.jpg")
    assert places.join(folder, "gs://x/d.jpg") == Address("gs://x/d.jpg")


def test_a_missing_package_is_named(monkeypatch):
    storage._file_system.cache_clear()
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for address, extra in (("s3://b/a", "s3"), ("gs://b/a", "gcs")):
        with pytest.raises(MissingExtra) as caught:
            storage.read(address)
        assert f"finetune-cli[{extra}]" in caught.value.remedy
    storage._file_system.cache_clear()


def test_versions():
    assert storage._stored("a", {"ETag": '"e"', "Size": 3, "LastModified": None}).version is None
    assert storage._stored("a", {"ETag": 'W/"e"', "Size": 3}).version is None
    assert storage._stored("a", {"generation": "17", "size": 3}).version == "17 3"
