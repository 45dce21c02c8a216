"""What a LiteRT file says about itself, for the libraries that prepare photos by themselves on phones.

MediaPipe's and the Task Library's `ImageClassifier` refuse a model that does not say how its input is normalized and
which file names its outputs (``TFLITE_METADATA``, the schema `metadata_schema.fbs` of
https://ai.google.dev/edge/litert/models/metadata). The card of the export is a second entry of the same list.
Tools that rewrite the metadata keep entries that they do not know, and may drop the files behind the model.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from finetune_cli.exports.card import KEY

LABELS = "labels.txt"
_NAME = "TFLITE_METADATA"
_MODEL_ID, _METADATA_ID = b"TFL3", b"M001"
_PARSER_VERSION = "1.0.0"  # the first that knows all that is written here
# Kinds and choices of the schema.
_FEATURE, _IMAGE = 1, 2
_NORMALIZATION = 1
_RGB = 1
_TENSOR_AXIS_LABELS = 2
# The interpreter wants the weights at multiples of so many bytes (`force_align` in schema.fbs).
_ALIGNMENT = 16
# A file holds two or three entries; a hostile one may claim billions.
_MOST_ENTRIES = 64

_Field = tuple[int, Callable[[Any], None]]


def with_metadata(model: bytes, card: str, run: str) -> bytes:
    """`model` with the metadata of an image classifier, and with the text `card` under its own name.

    model: a LiteRT file with the input RGB 0 to 255 and one row of probabilities. run: the name to give it.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    class Aligned(flatbuffers.Builder):  # type: ignore[misc]
        """Keeps weights aligned: the generated code for Python ignores `force_align`."""

        def CreateNumpyVector(self, x: Any) -> Any:  # noqa: N802 - overrides
            self.Prep(_ALIGNMENT, x.nbytes)
            return super().CreateNumpyVector(x)

    content = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model, 0))
    content.metadata = content.metadata or []
    for name, data in ((_NAME, _metadata(run)), (KEY, card.encode())):
        content.metadata.append(schema.MetadataT(name=name, buffer=len(content.buffers)))
        content.buffers.append(schema.BufferT(data=np.frombuffer(data, np.uint8)))
    builder = Aligned(len(model) + 1024)
    builder.Finish(content.Pack(builder), _MODEL_ID)
    return bytes(builder.Output())


def card_text(model: bytes) -> str | None:
    """The text that `with_metadata` put into `model`; None if there is none, or the file is damaged."""
    from ai_edge_litert import schema_py_generated as schema

    try:
        content = schema.Model.GetRootAs(model, 0)
        for i in range(min(content.MetadataLength(), _MOST_ENTRIES)):
            entry = content.Metadata(i)
            if entry.Name() == KEY.encode():
                return bytes(content.Buffers(entry.Buffer()).DataAsNumpy()).decode()
    # Nothing checks the offsets in the file before they are followed.
    except (struct.error, ValueError, TypeError, AttributeError, IndexError):
        pass
    return None


def _metadata(run: str) -> bytes:
    """The flatbuffer `ModelMetadata`: the normalization of the input, and the names of the outputs in `LABELS`."""
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    image = _tensor(
        builder,
        ("image", "A photo, RGB from 0 to 255; scaling is inside the model."),
        (0.0, 255.0),
        (_IMAGE, _table(builder, _number(0, _RGB))),
        _offset(4, _vector(builder, [_normalization(builder, mean=0.0, std=1.0)])),
    )
    labels = _table(builder, _offset(0, builder.CreateString(LABELS)), _number(2, _TENSOR_AXIS_LABELS))
    probabilities = _tensor(
        builder,
        ("probabilities", "The probability of each class."),
        (0.0, 1.0),
        (_FEATURE, _table(builder)),
        _offset(6, _vector(builder, [labels])),
    )
    graph = _table(builder, _offset(2, _vector(builder, [image])), _offset(3, _vector(builder, [probabilities])))
    model = _table(
        builder,
        _offset(0, builder.CreateString(run)),
        _offset(1, builder.CreateString("An image classifier, exported by finetune-cli.")),
        _offset(3, _vector(builder, [graph])),
        _offset(7, builder.CreateString(_PARSER_VERSION)),
    )
    builder.Finish(model, _METADATA_ID)
    return bytes(builder.Output())


def _normalization(builder: Any, mean: float, std: float) -> int:
    options = _table(builder, _offset(0, _floats(builder, mean)), _offset(1, _floats(builder, std)))
    return _table(builder, _number(0, _NORMALIZATION), _offset(1, options))


def _tensor(
    builder: Any, texts: tuple[str, str], extent: tuple[float, float], content: tuple[int, int], field: _Field
) -> int:
    """A `TensorMetadata`. texts: name and description; extent: least and largest value; content: kind and table."""
    name, description = (builder.CreateString(text) for text in texts)
    least, largest = (_floats(builder, value) for value in extent)
    described = _table(builder, _number(0, content[0]), _offset(1, content[1]))
    stats = _table(builder, _offset(0, largest), _offset(1, least))
    return _table(builder, _offset(0, name), _offset(1, description), _offset(3, described), _offset(5, stats), field)


def _table(builder: Any, *fields: _Field) -> int:
    """A table in which each field is set at its position in the schema; a union takes two, the first for its kind."""
    builder.StartObject(max((position for position, _set in fields), default=-1) + 1)
    for _position, set_field in fields:
        set_field(builder)
    offset: int = builder.EndObject()
    return offset


def _offset(position: int, offset: int) -> _Field:
    return position, lambda builder: builder.PrependUOffsetTRelativeSlot(position, offset, 0)


def _number(position: int, value: int) -> _Field:
    return position, lambda builder: builder.PrependByteSlot(position, value, 0)


def _vector(builder: Any, offsets: Sequence[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    vector: int = builder.EndVector()
    return vector


def _floats(builder: Any, value: float) -> int:
    vector: int = builder.CreateNumpyVector(np.array([value], np.float32))
    return vector
