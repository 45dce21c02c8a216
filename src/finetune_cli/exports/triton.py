"""What Triton Inference Server reads beside the folders of versions: `config.pbtxt`, and `labels.txt` for its labels.

    models/scenes/config.pbtxt
    models/scenes/labels.txt
    models/scenes/1/model.onnx

`models` is the model repository and `scenes` the name of the model. OpenVINO Model Server takes the same folders and
leaves the two files alone. Source of the format:
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_cli import files
from finetune_cli.errors import UsageError
from finetune_cli.text import shown

CONFIG, LABELS = "config.pbtxt", "labels.txt"
# Photos in one call. A server collects as many requests as wait, up to this; GPUs and NPUs reserve memory for as many.
MOST_PHOTOS = 64


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or an output: its name, its type in NumPy's words, and its shape without the number of photos.

    A length that is free is -1.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


_TYPES = {"float32": "TYPE_FP32", "uint8": "TYPE_UINT8"}


def config(backend: str, image: Tensor, probabilities: Tensor) -> str:
    """The content of `config.pbtxt` for a model that `backend` runs."""
    layout = "FORMAT_NCHW" if image.shape[0] == 3 else "FORMAT_NHWC"
    return f"""\
backend: "{backend}"
max_batch_size: {MOST_PHOTOS}
input [
  {{
    name: "{image.name}"
    data_type: {_TYPES[image.dtype]}
    format: {layout}
    dims: [ {", ".join(map(str, image.shape))} ]
  }}
]
output [
  {{
    name: "{probabilities.name}"
    data_type: {_TYPES[probabilities.dtype]}
    dims: [ {", ".join(map(str, probabilities.shape))} ]
    label_filename: "{LABELS}"
  }}
]
dynamic_batching {{ }}
"""


def labels(classes: Sequence[str]) -> str:
    """The content of `labels.txt`: a class on each line, in the order of the outputs."""
    return "".join(f"{shown(name)}\n" for name in classes)


def check(folder: Path, classes: Sequence[str], force: bool) -> None:
    """Raise `UsageError` when the versions in `folder` have other classes: Triton has one list for all of them."""
    if not force and _differs(folder / LABELS, labels(classes)):
        raise UsageError(
            f"{folder / LABELS} lists other classes, and all versions of a model share it",
            "choose another --output, or replace the list with --force",
        )


def write(folder: Path, text: str, classes: Sequence[str], force: bool) -> str | None:
    """Write both files into `folder`; `text` is that of `config.pbtxt`. Raises `StorageError`.

    A `config.pbtxt` that is there already stays as it is without `force`, because people edit it; if it differs, a
    warning is returned.
    """
    files.write_text(folder / LABELS, labels(classes))
    if not force and _differs(folder / CONFIG, text):
        return f"{folder / CONFIG} was left as it is; this version would have got another one (--force replaces it)"
    files.write_text(folder / CONFIG, text)
    return None


def _differs(path: Path, text: str) -> bool:
    try:
        return files.read_own(path) != text.encode("utf-8")
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise UsageError(f"{path} cannot be read: {exc.strerror}", "remove it, or choose another --output") from exc
