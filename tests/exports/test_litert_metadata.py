"""The metadata in LiteRT files: complete for the libraries on phones, and safe from those who rewrite them."""

import io
import shutil
import struct
import zipfile

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import encode, number_types

from finetune_cli.exports import opening
from finetune_cli.exports.litert_metadata import card_text, with_metadata


@pytest.fixture(scope="module")
def file(exported):
    """The LiteRT file of the tiny run."""
    return next(one.folder for one in exported.exports if one.form == "litert") / "model.tflite"


def entries(data):
    """Name -> bytes of every entry of the list `metadata` in a model."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    return {entry.name.decode(): bytes(model.buffers[entry.buffer].data) for entry in model.metadata}


def repacked(data, change):
    """`data` as a tool writes it that loads a model, changes it, and writes the model alone."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    change(model)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class Reader:
    """A table of a flatbuffer, read by the positions of `metadata_schema.fbs`."""

    def __init__(self, data, position):
        self.table = flatbuffers.table.Table(data, position)

    @classmethod
    def root(cls, data):
        return cls(data, encode.Get(flatbuffers.packer.uoffset, data, 0))

    def at(self, slot):
        return self.table.Offset(4 + 2 * slot)

    def text(self, slot):
        return self.table.String(self.table.Pos + self.at(slot)).decode()

    def byte(self, slot):
        return self.table.Get(number_types.Uint8Flags, self.table.Pos + self.at(slot))

    def child(self, slot):
        return Reader(self.table.Bytes, self.table.Indirect(self.table.Pos + self.at(slot)))

    def only(self, slot):
        assert self.table.VectorLen(self.at(slot)) == 1
        return Reader(self.table.Bytes, self.table.Indirect(self.table.Vector(self.at(slot))))

    def floats(self, slot):
        return self.table.GetVectorAsNumpy(number_types.Float32Flags, self.at(slot)).tolist()


def test_the_metadata_say_what_an_image_classifier_must(file):
    data = entries(file.read_bytes())["TFLITE_METADATA"]
    assert data[4:8] == b"M001"
    model = Reader.root(data)
    assert model.text(0) == "tiny-1"
    graph = model.only(3)
    image, probabilities = graph.only(2), graph.only(3)
    assert (image.text(0), probabilities.text(0)) == ("image", "probabilities")
    assert image.child(3).byte(0) == 2  # ImageProperties
    assert image.child(3).child(1).byte(0) == 1  # RGB
    unit = image.only(4)
    assert unit.byte(0) == 1  # NormalizationOptions
    assert (unit.child(1).floats(0), unit.child(1).floats(1)) == ([0.0], [1.0])
    labels = probabilities.only(6)
    assert (labels.text(0), labels.byte(2)) == ("labels.txt", 2)  # TENSOR_AXIS_LABELS
    with zipfile.ZipFile(file) as archive:
        (member,) = archive.infolist()
        assert (member.filename, member.compress_type) == ("labels.txt", zipfile.ZIP_STORED)


def test_weights_stay_aligned(file):
    data = file.read_bytes()
    model = schema.Model.GetRootAs(data, 0)
    start = np.frombuffer(data, np.uint8).ctypes.data
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    places = [buffer.DataAsNumpy().ctypes.data - start for buffer in buffers if not buffer.DataIsNone()]
    assert len(places) > 4
    assert {place % 16 for place in places} == {0}


def answers(path, photos):
    model = opening.open_model(path, 1)
    assert tuple(model.classes) == ("ant", "bee", "wasp")
    return model.probabilities(photos)


@pytest.fixture(scope="module")
def photos():
    return np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


def test_a_file_whose_metadata_somebody_rewrote_answers_as_before(file, photos, tmp_path):
    """Other tools put their own description in place of ours, and may write the model without the files behind it."""
    data = file.read_bytes()

    def rewrite(model):
        for entry in model.metadata:
            if entry.name == b"TFLITE_METADATA":
                model.buffers[entry.buffer].data = np.frombuffer(b"somebody else's", np.uint8)

    path = tmp_path / "model.tflite"
    path.write_bytes(repacked(data, rewrite))
    assert not zipfile.is_zipfile(path)
    assert entries(path.read_bytes())["TFLITE_METADATA"] == b"somebody else's"
    assert np.array_equal(answers(path, photos), answers(file, photos))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("labels.txt", "x\ny\nz\n")
    assert np.array_equal(answers(path, photos), answers(file, photos))


def test_an_export_that_keeps_its_card_beside_the_labels_is_read(file, photos, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(repacked(file.read_bytes(), lambda model: model.metadata.clear()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.write(file.parent / "classes.json", "classes.json")
    assert card_text(path.read_bytes()) is None
    assert np.array_equal(answers(path, photos), answers(file, photos))


def test_texts_that_are_not_ascii(file):
    card = '{"classes": ["蜜蜂", "fourmi ailée"]}'
    model = repacked(file.read_bytes(), lambda model: model.metadata.clear())
    described = with_metadata(model, card, "été")
    assert card_text(described) == card
    assert Reader.root(entries(described)["TFLITE_METADATA"]).text(0) == "été"


def test_damaged_and_hostile_files_have_no_card(file):
    data = file.read_bytes()
    assert card_text(b"") is None
    assert card_text(b"\xff" * 100) is None
    assert card_text(io.BytesIO(data).read(200)) is None
    model = schema.Model.GetRootAs(data, 0)
    slot = model._tab.Offset(16)  # the list `metadata`
    length = model._tab.Vector(slot) - 4
    changed = bytearray(data)
    struct.pack_into("<I", changed, length, 0xFFFFFFF0)
    assert card_text(bytes(changed)) == card_text(data)
    first = model._tab.Indirect(model._tab.Vector(slot))
    struct.pack_into("<i", changed, first, 0x7FFFFFFF)  # where the fields of the first entry are said to be
    assert card_text(bytes(changed)) is None


def test_a_copy_in_another_folder_needs_nothing_beside_it(file, photos, tmp_path):
    shutil.copy(file, tmp_path / "renamed.tflite")
    assert np.array_equal(answers(tmp_path / "renamed.tflite", photos), answers(file, photos))
