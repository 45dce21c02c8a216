"""Checks an OpenVINO model file before OpenVINO, which is C++, parses it.

A run carries its model as `model.xml` (the graph) and `model.bin` (the weights). Their hashes detect damage, but a run
may come from a stranger together with its hashes. In tests OpenVINO coped with truncated and changed files and with
offsets out of bounds; it did not cope with some operations in the wrong position (segmentation fault), with endless
loops, and with constants that expand to gigabytes. So
`check_ir` lets a file pass only if it is such a plain feed-forward graph as `train` writes, and `check_sizes` bounds
what comes out of it. Nothing in such a file can run code or name another file.
"""

import itertools
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.parsers import expat

from finetune_cli import files
from finetune_cli.errors import RunError
from finetune_cli.text import message_lines

if TYPE_CHECKING:
    import openvino

MAX_XML_BYTES = 64_000_000
MAX_LAYERS = 20_000
MAX_TENSOR_BYTES = 1 << 30
_ITEM_BYTES = {"boolean": 1} | {
    kind: bits // 8
    for bits, kinds in {8: "i8 u8", 16: "f16 bf16 i16 u16", 32: "f32 i32 u32", 64: "f64 i64 u64"}.items()
    for kind in kinds.split()
}
# Operations of feed-forward networks whose outputs are bounded by their inputs or by constants: no loops, no branches,
# no state, no random numbers, no strings, no detection.
OPERATIONS = frozenset(
    re.findall(
        r"\w+",
        """
        Abs AdaptiveAvgPool AdaptiveMaxPool Add AvgPool BatchNormInference BatchToSpace Broadcast Ceiling Clamp Concat
        Const Convert ConvertLike Convolution ConvolutionBackpropData Cos CumSum DepthToSpace Divide Einsum Elu Equal
        Erf Exp FakeQuantize Floor FloorMod Gather GatherElements GatherND Gelu Greater GreaterEqual GroupConvolution
        GroupConvolutionBackpropData GroupNormalization HSigmoid HSwish HardSigmoid Interpolate Less LessEqual Log
        LogSoftmax LogicalAnd LogicalNot LogicalOr MVN MatMul MaxPool Maximum Minimum Mish Mod Multiply Negative
        NormalizeL2 NotEqual PReLU Pad Parameter Power ReLU ReduceL1 ReduceL2 ReduceLogicalAnd ReduceLogicalOr ReduceMax
        ReduceMean ReduceMin ReduceProd ReduceSum Reshape Result Round ScaledDotProductAttention Select Selu ShapeOf
        Sigmoid Sign Sin Slice SoftMax SoftPlus SoftSign Softmax SpaceToBatch SpaceToDepth Split Sqrt SquaredDifference
        Squeeze StridedSlice Subtract Swish Tan Tanh Tile Transpose Unsqueeze VariadicSplit
        """,
    )
)
_SMALL = frozenset(
    [
        *("axis", "batch_dims", "block_size", "dilations", "group", "kernel", "num_splits", "output_padding"),
        *("pads_begin", "pads_end", "rates", "shape", "sizes", "strides"),
        *("begin_mask", "ellipsis_mask", "end_mask", "new_axis_mask", "shrink_axis_mask"),
    ]
)
_CHILDREN = {
    "": {"net"},
    "net": {"layers", "edges", "rt_info", "meta_data"},
    "layers": {"layer"},
    "layer": {"data", "input", "output", "rt_info"},
    "input": {"port"},
    "output": {"port"},
    "port": {"dim", "rt_info"},
    "edges": {"edge"},
}
_MANY = {"layer", "port", "dim", "edge"}
_NOTES = {"rt_info", "meta_data"}  # free text, which OpenVINO stores and does not interpret
_MAX_DEPTH = 32


class _RefusedError(Exception):
    """Why a file is refused."""


def read_files(xml: Path) -> tuple[bytes, bytes]:
    """The graph in the file `xml` and the weights in the `.bin` file beside it, unchecked. Raises `RunError`."""
    try:
        with files.open_regular(xml) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_XML_BYTES:
                raise RunError(f"{xml} is refused: it is {size} bytes large", REMEDY)
            graph = file.read(MAX_XML_BYTES)
        return graph, files.read_regular(xml.with_suffix(".bin"))
    except OSError as exc:
        raise RunError(f"{xml} cannot be read: {exc.strerror}", REMEDY) from exc


def check_ir(graph: bytes, weights: int, xml: Path) -> None:
    """Refuse a model that is not a plain feed-forward graph over so many bytes of weights. Raises `RunError`.

    xml: the file that `graph` was read from.
    """
    try:
        if len(graph) > MAX_XML_BYTES:
            raise _RefusedError(f"it is {len(graph)} bytes large")
        checked = _Graph(weights)
        checked.read(graph)
        checked.check_edges()
    except (_RefusedError, expat.ExpatError) as exc:
        raise RunError(f"{xml} is refused: {exc}", REMEDY) from exc


REMEDY = "restore the run from a copy that you trust, or train again"


def foreign_operations(model: "openvino.Model") -> list[str]:
    """The kinds of operations in `model` that `check_ir` would refuse."""
    # In memory, OpenVINO spells some names differently than in files.
    known = {name.lower() for name in OPERATIONS} | {"constant"}
    return sorted({kind for node in model.get_ops() if (kind := node.get_type_name()).lower() not in known})


def check_sizes(model: "openvino.Model", xml: Path) -> None:
    """Refuse a model in which one photo becomes a tensor of unknown size or of more than `MAX_TENSOR_BYTES`.

    `model` keeps its shapes. Raises `RunError`.
    """
    try:
        shape = model.input(0).partial_shape
        types = {model.input(0).element_type.get_type_name(), model.output(0).element_type.get_type_name()}
        if types != {"f32"}:
            raise _RefusedError("its input and its output are not float32")
        if shape.rank.is_dynamic or not len(shape) or shape[0].is_static:
            raise _RefusedError("it does not take any number of photos")
        model.reshape([1, *list(shape)[1:]])
        for operation in model.get_ops():
            for output in operation.outputs():
                found = output.partial_shape
                if not found.is_static:
                    raise _RefusedError(f"the size of {operation.get_friendly_name()!r} depends on the photo")
                if math.prod(found.to_shape()) * output.element_type.size > MAX_TENSOR_BYTES:
                    raise _RefusedError(f"{operation.get_friendly_name()!r} makes {found} numbers of one photo")
        model.reshape(shape)
    except (_RefusedError, RuntimeError) as exc:
        raise RunError(f"{xml} is refused: {reason(exc)}", REMEDY) from exc


def reason(exc: Exception) -> str:
    """The last line of an exception of OpenVINO; those before name lines of its source code."""
    return message_lines(exc)[-1]


class _Graph:
    """Reads the XML event by event, so that a hostile file cannot fill the memory."""

    def __init__(self, bin_size: int) -> None:
        self._bin_size = bin_size
        # The open elements, outermost first, each with the names of the children that it has had so far.
        self._open: list[tuple[str, set[str]]] = [("", set())]
        self._notes = 0  # how many elements deep in free text
        self._layer = ""
        self._kinds: dict[str, str] = {}
        self._constants: dict[str, list[int]] = {}  # layer -> shape
        self._inputs: set[tuple[str, str]] = set()
        self._outputs: set[tuple[str, str]] = set()
        self._edges: dict[tuple[str, str], tuple[str, str]] = {}

    def read(self, text: bytes) -> None:
        """Parse `text`. Raises `_RefusedError` or `expat.ExpatError`."""
        if b"\0" in text:  # OpenVINO's parser might see another document in it: UTF-16, or one that ends there
            raise _RefusedError("it is not UTF-8 text")
        parser = expat.ParserCreate("utf-8")
        parser.StartDoctypeDeclHandler = _no_doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.Parse(text, True)

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        parent, siblings = self._open[-1]
        self._open.append((name, set()))
        if len(self._open) > _MAX_DEPTH:
            raise _RefusedError("its elements are nested too deeply")
        if self._notes or name in _NOTES:
            self._notes += 1
            return
        if name not in _CHILDREN.get(parent, ()):
            raise _RefusedError(f"it has an element {name[:40]!r} where none belongs")
        if name in siblings and name not in _MANY:  # of two, OpenVINO would see the first
            raise _RefusedError(f"it has two elements {name!r} where one belongs")
        siblings.add(name)
        if name == "layer":
            self._start_layer(attributes)
        elif name == "data" and self._kinds[self._layer] == "Const":
            self._check_constant(attributes)
        elif name == "data":
            self._check_settings(attributes)
        elif name == "port":
            self._add_port(self._inputs if parent == "input" else self._outputs, attributes.get("id", ""))
        elif name == "edge":
            self._add_edge(attributes)

    def _end(self, _name: str) -> None:
        self._open.pop()
        self._notes = max(0, self._notes - 1)

    def _add_port(self, ports: set[tuple[str, str]], number: str) -> None:
        if (self._layer, number) in ports:
            raise _RefusedError(f"layer {self._layer[:40]!r} has two ports of one number")
        ports.add((self._layer, number))

    def _add_edge(self, attributes: dict[str, str]) -> None:
        source, target = (
            (attributes.get(f"{end}-layer", ""), attributes.get(f"{end}-port", "")) for end in ("from", "to")
        )
        if target in self._edges:
            raise _RefusedError(f"two edges end at layer {target[0][:40]!r}")
        self._edges[target] = source

    def _start_layer(self, attributes: dict[str, str]) -> None:
        kind, version = attributes.get("type", ""), attributes.get("version", "")
        self._layer = attributes.get("id", "")
        if kind not in OPERATIONS or not re.fullmatch(r"opset\d{1,2}", version):
            raise _RefusedError(f"it uses the operation {kind[:40]!r} of {version[:40]!r}, which is not allowed")
        if self._layer in self._kinds or len(self._kinds) == MAX_LAYERS:
            raise _RefusedError(
                "it has two layers of one number" if self._layer in self._kinds else "it has too many layers"
            )
        self._kinds[self._layer] = kind

    def _check_constant(self, attributes: dict[str, str]) -> None:
        """The numbers of a constant must be inside the weights, and as many as its shape requires."""
        item = _ITEM_BYTES.get(attributes.get("element_type", ""))
        shape = [_integer(part) for part in attributes.get("shape", "").split(",") if part.strip()]
        offset, size = (_integer(attributes.get(key, "")) for key in ("offset", "size"))
        if item is None or math.prod(shape) * item != size:
            raise _RefusedError(f"constant {self._layer[:40]!r} has a size that does not match its shape")
        if offset + size > self._bin_size:
            raise _RefusedError(f"constant {self._layer[:40]!r} lies outside the weights")
        self._constants[self._layer] = shape

    def _check_settings(self, attributes: dict[str, str]) -> None:
        """Strides, paddings and the like stay below 10,000: OpenVINO computes with them in 32 bits."""
        for key in _SMALL.intersection(attributes):
            if re.search(r"\d{5}", attributes[key]):
                raise _RefusedError(f"layer {self._layer[:40]!r} has {key} of {attributes[key][:40]!r}")

    def check_edges(self) -> None:
        """Every input has its edge, and all but constants comes from the one input of the model."""
        counts = Counter(self._kinds.values())
        if counts["Parameter"] != 1 or counts["Result"] != 1:
            raise _RefusedError("it has not exactly one input and one output")
        if len(self._constants) != counts["Const"]:
            raise _RefusedError("it has a constant without numbers")
        if self._edges.keys() != self._inputs or not self._outputs.issuperset(self._edges.values()):
            raise _RefusedError("its edges do not fit its layers")
        following: dict[str, list[str]] = {}
        for (target, _), (source, _) in self._edges.items():
            following.setdefault(source, []).append(target)
        waiting = [layer for layer, kind in self._kinds.items() if kind == "Parameter"]
        reached = set(waiting)
        while waiting:
            new = set(following.get(waiting.pop(), ())) - reached
            reached |= new
            waiting += new
        # The converter computes what depends on constants alone (but for weights in float16 and int8, which are
        # converted and scaled when loaded); left to OpenVINO, it may expand to gigabytes.
        for layer in self._kinds.keys() - reached:
            if self._kinds[layer] not in {"Const", "Convert"} and not self._scales_weights(layer):
                raise _RefusedError("a part of it does not depend on the photo")
        if any(self._kinds[layer] in {"Const", "Parameter"} for layer, _port in self._inputs):
            raise _RefusedError("a constant or the input has inputs of its own")

    def _scales_weights(self, layer: str) -> bool:
        """Whether `layer` multiplies two constants, perhaps converted ones, to no more numbers than one of them has."""
        if self._kinds[layer] != "Multiply":
            return False
        shapes = [self._constants.get(self._converted(source)) for source in self._sources(layer)]
        if len(shapes) != 2 or shapes[0] is None or shapes[1] is None:
            return False
        pairs = itertools.zip_longest(reversed(shapes[0]), reversed(shapes[1]), fillvalue=1)
        product = math.prod(max(one, other) for one, other in pairs)
        return product <= max(math.prod(shapes[0]), math.prod(shapes[1]))

    def _converted(self, layer: str) -> str:
        """The layer that a Convert converts; `layer` itself if it is of another kind."""
        return next(iter(self._sources(layer)), layer) if self._kinds.get(layer) == "Convert" else layer

    def _sources(self, layer: str) -> list[str]:
        """The layers whose outputs `layer` takes."""
        return [source for (target, _), (source, _) in self._edges.items() if target == layer]


def _no_doctype(*_arguments: Any) -> None:
    raise _RefusedError("it has a document type, and so perhaps entities")


def _integer(text: str) -> int:
    if not re.fullmatch(r" *[0-9]{1,18} *", text):
        raise _RefusedError(f"{text[:40]!r} is not a size")
    return int(text)
