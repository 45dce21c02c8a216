"""What a backbone is built from, found out without Keras: its row of the table, and its weight file."""

from dataclasses import dataclass
from pathlib import Path

from finetune_cli import files
from finetune_cli.backbones import download
from finetune_cli.backbones.registry import BUNDLED, BackboneInfo, PublishedWeights, find, similar
from finetune_cli.errors import ConfigError, WeightsError
from finetune_cli.progress import Advance, ignore_progress


@dataclass(frozen=True)
class Wanted:
    """A backbone as it is asked for, in values that JSON can hold.

    `name`: in any spelling, or the path of a `.keras` file. `weights`: ``"imagenet"`` (for the bundled backbone and for
    a `.keras` file: its own), a weight file, or `None` for random ones drawn from `seed`. `size`: of the photos, pixels
    of a side. `weights_sha256`: what the weight file must be.
    """

    name: str
    weights: str | None
    size: int
    seed: int
    weights_sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """What a backbone is built from: its row of the table, and its weight file with the SHA-256 of that, if any."""

    info: BackboneInfo
    file: Path | None
    sha256: str | None


def resolve(name_or_path: str) -> BackboneInfo:
    """The table row of a backbone, in any spelling; a path that ends in ``.keras`` gives a row of its own.

    Raises `ConfigError` for an unknown name, with the closest known names.
    """
    if name_or_path.endswith(".keras"):
        return BackboneInfo(Path(name_or_path).stem, path=Path(name_or_path))
    info = find(name_or_path)
    if info is None:
        near = similar(name_or_path)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"model.backbone: there is no backbone {name_or_path!r}",
            f"{meant}list them with: finetune backbones; or give the path of a .keras file",
        )
    return info


def weight_file(wanted: Wanted) -> Path | None:
    """The file that the weights come from, whether it is there or not; `None` for random ones."""
    info = resolve(wanted.name)
    published = _published(info, wanted)
    return _own_file(info, wanted) if published is None else published.path


def must_download(wanted: Wanted) -> bool:
    """Whether `find_source` would download the weight file."""
    published = _published(resolve(wanted.name), wanted)
    return published is not None and not published.path.exists()


def find_source(wanted: Wanted, advance: Advance = ignore_progress) -> Source:
    """Find, or download, what `wanted` is built from; `advance` counts the megabytes of a download.

    Raises `ConfigError`, and `WeightsError` when the weight file is missing or not the wanted one.
    """
    info, sha256 = resolve(wanted.name), wanted.weights_sha256
    if wanted.size < info.min_size:
        problem = f"image.size: {info.name} needs at least {info.min_size} pixels, not {wanted.size}"
        raise ConfigError(problem, "raise it")
    if info.path is not None and info.name != BUNDLED and wanted.weights != "imagenet":
        raise ConfigError("model.weights has no effect with a .keras file, which brings its own", "delete the key")
    published = _published(info, wanted)
    file = _own_file(info, wanted) if published is None else download.fetch(published, advance)
    if file is None:
        if sha256 is not None:
            raise ConfigError("model.weights_sha256 has no effect with random weights", "delete the key")
        return Source(info, None, None)
    if not file.is_file():
        raise WeightsError(f"no weight file {file}", "check model.backbone and model.weights")
    digest = files.sha256(file)
    if sha256 is not None and digest != sha256.lower():
        raise WeightsError(f"{file} has SHA-256 {digest}, not {sha256.lower()}", "check model.weights_sha256")
    return Source(info, file, digest)


def _published(info: BackboneInfo, wanted: Wanted) -> PublishedWeights | None:
    """The weights that Keras publishes, if those are wanted."""
    return info.published_weights(wanted.size) if wanted.weights == "imagenet" and info.path is None else None


def _own_file(info: BackboneInfo, wanted: Wanted) -> Path | None:
    """The file of weights that are not published; `None` for random ones."""
    if wanted.weights is None:
        return None
    return info.path if wanted.weights == "imagenet" else Path(wanted.weights)
