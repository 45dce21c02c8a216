"""Reads arrays from HDF5 files that may come from strangers.

HDF5 can point into other files (external links, external storage, virtual datasets), loop, and declare an array of
terabytes in a few bytes. Here every step of a path must be a plain member of the file, and an array is only read
after its declared shape was compared with the expected one.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import WeightsError
from finetune_cli.text import message_lines

_REMEDY = "fetch or copy the weight file again, from a source that you trust"
_MAX_ATTRIBUTE_BYTES = 1 << 20  # the layer names of the largest known file take 60 kB


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """Open the HDF5 file `path` for reading. Every error inside is raised as `WeightsError`."""
    import h5py

    if not path.is_file():
        raise WeightsError(f"no weight file {path}", "check model.weights")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as exc:
        # h5py raises any of these for a damaged file, when it is opened or later, when something in it is read.
        raise WeightsError(f"{path} is damaged or not an HDF5 file: {message_lines(exc)[0]}", _REMEDY) from exc


def has(group: Any, name: str) -> bool:
    """Whether `group` has a member or a link `name`; links are not followed, as ``name in group`` would."""
    import h5py

    return isinstance(group, h5py.Group) and name not in {"", "."} and group.get(name, getlink=True) is not None


def member(group: Any, path: str) -> Any:
    """The group or dataset at the relative `path` below `group`, reached without following any link.

    Raises `WeightsError` if it is missing, or if a link, external or virtual storage is in the way.
    """
    import h5py

    for part in path.split("/"):
        if not has(group, part):
            raise WeightsError(f"{group.file.filename}: {path} is missing", _REMEDY)
        link = group.get(part, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise WeightsError(
                f"{group.file.filename}: {path} is a link ({type(link).__name__}); links are refused", _REMEDY
            )
        group = group[part]
    if isinstance(group, h5py.Dataset) and (group.is_virtual or group.external):
        raise WeightsError(f"{group.file.filename}: {path} takes its data from another file; that is refused", _REMEDY)
    return group


def text_attribute(group: Any, name: str) -> list[str] | None:
    """The list of strings in attribute `name`, or in its parts `name0`, `name1`, ... (Keras splits long lists)."""
    if name in group.attrs:
        return _texts(group, name)
    if f"{name}0" not in group.attrs:
        return None
    texts: list[str] = []
    part = 0
    while f"{name}{part}" in group.attrs:
        texts += _texts(group, f"{name}{part}")
        part += 1
    return texts


def array(group: Any, path: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The numbers at `path` below `group`, which must have `shape`; floating-point ones must be finite.

    Raises `WeightsError` before anything is read when the shape differs.
    """
    import h5py

    dataset = member(group, path)
    where = f"{group.file.filename}: {dataset.name}"
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "fiu":
        raise WeightsError(f"{where} is not an array of numbers", _REMEDY)
    if dataset.shape != shape:
        raise WeightsError(f"{where} has shape {dataset.shape}, expected {shape}", _REMEDY)
    values: NDArray[Any] = np.asarray(dataset[()])
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise WeightsError(f"{where} contains values that are not finite (NaN or infinity)", _REMEDY)
    return values


def _texts(group: Any, name: str) -> list[str]:
    import h5py

    attribute = h5py.h5a.open(group.id, name.encode())
    if attribute.get_space().get_simple_extent_npoints() * attribute.get_type().get_size() > _MAX_ATTRIBUTE_BYTES:
        raise WeightsError(f"{group.file.filename}: the attribute {name} is too large", _REMEDY)
    return [item.decode("utf-8") if isinstance(item, bytes) else str(item) for item in np.ravel(group.attrs[name])]
