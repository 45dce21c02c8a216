"""The forms that `finetune export` writes: one entry here and one module beside it for each.

To add a form, write a module with a class that follows `forms.Form`, and an entry below. The command line, its help,
`predict --model` and the manifest take everything else from the entry. The modules are imported when they are needed.
"""

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from finetune_cli.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from finetune_cli.exports.forms import Form

ALL = "all"


@dataclass(frozen=True)
class Entry:
    """What is known about a form without importing its module.

    main: the file that other programs load; None: the folder itself. aliases: other names that people type.
    extra: the extra of this package that installs `packages`, the modules that the form needs. versions: the
    distributions whose versions the manifest records. knows_classes: the main file alone holds the class
    names. options: what its class takes, option -> choices, the default first; forms share an option that means the
    same in all of them. quantizer: the package that `quantize=int8` needs, too, and the extra that installs it.
    numbered: exports always go into folders of their version. triton: the backend of Triton Inference Server that runs
    it. load: imports the module and returns the class.
    """

    name: str
    main: str | None
    load: Callable[[], "type[Form]"]
    packages: tuple[str, ...]
    versions: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    extra: str | None = None
    knows_classes: bool = False
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    quantizer: tuple[str, str] | None = None
    numbered: bool = False
    triton: str | None = None

    def chosen(self, options: Mapping[str, str | None]) -> dict[str, str]:
        """The value of each option that the form takes: that in `options`, where None stands for the default."""
        return {key: options.get(key) or default for key, (default, *_) in self.options.items()}

    def made_with(self, options: Mapping[str, str | None]) -> "Entry":
        """The entry with everything that the form needs when it is made with `options`."""
        if self.quantizer is None or self.chosen(options)["quantize"] != "int8":
            return self
        package, extra = self.quantizer
        return replace(
            self, packages=(*self.packages, package), versions=(*self.versions, package), extra=self.extra or extra
        )

    @property
    def installed(self) -> bool:
        """Whether the packages that the form needs can be imported."""
        return all(importlib.util.find_spec(name) for name in self.packages)


def _savedmodel() -> "type[Form]":
    from finetune_cli.exports.savedmodel import SavedModel

    return SavedModel


def _keras() -> "type[Form]":
    from finetune_cli.exports.keras import KerasFile

    return KerasFile


def _onnx() -> "type[Form]":
    from finetune_cli.exports.onnx import Onnx

    return Onnx


def _litert() -> "type[Form]":
    from finetune_cli.exports.litert import LiteRt

    return LiteRt


def _openvino() -> "type[Form]":
    from finetune_cli.exports.openvino import OpenVino

    return OpenVino


# The order is that of the work, whatever order is asked for: TensorFlow numbers functions through the life of a
# process, and writes the numbers.
_TENSORFLOW = ("tensorflow", "keras")
# `float16` halves the weights, which are calculated with in float32; `int8` quantizes weights and activations with
# ranges seen on training photos of the run.
_QUANTIZE = ("none", "float16", "int8")
# `fixed`: float32 of the model's size; `any-size`: uint8 of any size, which the model resizes as training did.
_PIXELS = ("fixed", "any-size")
_ENTRIES = (
    Entry("savedmodel", None, _savedmodel, ("tensorflow",), _TENSORFLOW, aliases=("saved_model",), numbered=True),
    Entry("keras", "model.keras", _keras, ("keras",), _TENSORFLOW),
    Entry(
        "onnx",
        "model.onnx",
        _onnx,
        ("tf2onnx", "onnx", "onnxruntime"),
        (*_TENSORFLOW, "tf2onnx", "onnx", "onnxruntime"),
        extra="onnx",
        knows_classes=True,
        options={"quantize": _QUANTIZE, "layout": ("nhwc", "nchw"), "pixels": _PIXELS, "page": ("no page", "page")},
        triton="onnxruntime",
    ),
    Entry(
        "litert",
        "model.tflite",
        _litert,
        ("ai_edge_litert",),
        (*_TENSORFLOW, "ai-edge-litert"),
        aliases=("tflite",),
        extra="litert",
        knows_classes=True,
        options={"quantize": _QUANTIZE},
    ),
    Entry(
        "openvino",
        "model.xml",
        _openvino,
        ("openvino",),
        ("openvino",),
        knows_classes=True,
        options={"quantize": _QUANTIZE, "pixels": _PIXELS},
        quantizer=("nncf", "int8"),
        triton="openvino",
    ),
)
FORMS: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def parse(texts: Iterable[str]) -> tuple[str, ...]:
    """The names that `texts` ask for: names and aliases, also several with commas between them, or `all`.

    Each is there once, in the order of `FORMS`. Raises `UsageError` for an unknown one, and for none.
    """
    known = {alias: entry.name for entry in FORMS.values() for alias in (entry.name, *entry.aliases)}
    wanted: set[str] = set()
    for name in (part.strip().lower() for text in texts for part in text.split(",")):
        if name == ALL:
            wanted |= set(FORMS)
        elif name in known:
            wanted.add(known[name])
        elif name:
            near = difflib.get_close_matches(name, known, 1)
            listed = f"known are {', '.join(FORMS)}, and {ALL}"
            raise UsageError(f"unknown format {name!r}", f"did you mean {near[0]}? {listed}" if near else listed)
    if not wanted:
        raise UsageError("no format is named", f"known are {', '.join(FORMS)}, and {ALL}")
    return tuple(name for name in FORMS if name in wanted)


def owners(option: str) -> tuple[Entry, ...]:
    """The forms that take `option`."""
    return tuple(entry for entry in FORMS.values() if option in entry.options)


def choices(option: str) -> tuple[str, ...]:
    """The values that `option` takes, the default first."""
    return owners(option)[0].options[option]


def by_suffix(path: PurePath) -> Entry | None:
    """The form whose main file ends as `path` does."""
    return next((e for e in FORMS.values() if e.main and PurePath(e.main).suffix == path.suffix.lower()), None)


def suffixes() -> Sequence[str]:
    """The endings of all main files."""
    return [PurePath(entry.main).suffix for entry in FORMS.values() if entry.main]


def missing_extras(entries: Iterable[Entry]) -> MissingExtra:
    """The error that names all `entries` that are not installed, and the one command that installs what they need."""
    listed = list(entries)
    names = " and ".join(entry.name for entry in listed)
    extras = [entry.extra for entry in listed if entry.extra is not None]
    return MissingExtra(f"the format {names}" if len(listed) == 1 else f"the formats {names}", *extras)
