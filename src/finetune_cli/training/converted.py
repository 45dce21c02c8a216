"""The converted backbone, kept in the cache: a second training with the same backbone needs no TensorFlow.

    backbones/<key>/backbone.xml .bin   photos ``(n, H, W, 3)`` -> features ``(n, D)``, OpenVINO, float32
                    classifier.keras    the same for Keras, under a head of two classes; see `head/finished.py`
                    facts.json          `Converted`, the SHA-256 of the other files, and one of its own content

The key names everything that these depend on, and needs neither Keras nor TensorFlow. A folder of which one bit is not
as it was written is made anew. When it is made, TensorFlow and OpenVINO must agree about the features. That is found
out beside the work: a training gets the graph before, and keeps nothing until they agree.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from finetune_cli import files
from finetune_cli.backbones import build, source
from finetune_cli.backbones.source import Source, Wanted
from finetune_cli.cache import backbones
from finetune_cli.cache.folder import CacheFolder
from finetune_cli.errors import FinetuneError, GateError, RunError, StorageError
from finetune_cli.head import finished
from finetune_cli.inference import runtimes
from finetune_cli.progress import Advance, ignore_progress
from finetune_cli.runs import manifest
from finetune_cli.training.keras_process import KerasProcess
from finetune_cli.training.tuning import cuts

if TYPE_CHECKING:
    import openvino

_FORMAT = 2  # part of the key: raise it when the same backbone is to be converted otherwise
_PACKAGES = ("keras", "tensorflow", "openvino")
_FACTS, _GRAPH, _WEIGHTS, _TEMPLATE = "facts.json", "backbone.xml", "backbone.bin", "classifier.keras"
_FILES = (_GRAPH, _WEIGHTS, _TEMPLATE)
_UNPROVEN = (_GRAPH, _WEIGHTS)
# Of the largest feature. Convolutions add up in another order: a few 1e-6 for all families of `keras.applications`.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Converted:
    """A backbone in the cache; see `build.Backbone` for what has the same name.

    `last_stage_share`: the part of its multiply-adds that is above the cut below its last stage, see `tuning/cuts.py`.
    `graph`: the OpenVINO form, if it was read already.
    """

    folder: Path
    name: str
    width: int
    fingerprint: str
    weights_sha256: str | None
    feature_map: bool
    parameters: int
    last_stage_share: float
    graph: "openvino.Model | None" = field(default=None, repr=False, compare=False)

    @classmethod
    def read(cls, folder: Path, names: tuple[str, ...] = _FILES) -> Self | None:
        """What `make` wrote into `folder`, the files `names`; `None` when it is not there, or not whole."""
        cache = backbones.cache_of(folder)
        try:
            facts = json.loads(files.read_own(folder / _FACTS, cache))
            hashes = {name: files.sha256_own(folder / name, cache) for name in names}
            if manifest.seal(facts) != facts or facts["files"] != hashes:
                return None
            return cls(folder, **facts["backbone"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    @property
    def original(self) -> str:
        """The fingerprint: no fine-tuning changed these weights."""
        return self.fingerprint

    @property
    def template(self) -> Path:
        """The archive that `finished.write_keras` takes."""
        return self.folder / _TEMPLATE

    def openvino_model(self) -> "openvino.Model":
        """A new copy of the OpenVINO form. Raises `RunError` when it is not such a file as `make` writes."""
        if self.graph is not None:
            return self.graph.clone()
        try:
            return runtimes.read_ir(self.folder / _GRAPH)
        except RunError as exc:
            exc.remedy = (
                f"was it put there by somebody else? remove it with: finetune cache clear, or remove {self.folder}"
            )
            raise


class Conversion:
    """A backbone on its way: out of the cache, or from a process that converts it in the meantime.

    here: convert it in this process, for a solver that needs Keras anyway: two processes that import TensorFlow would
    take longer.
    To be used in a `with` block, which ends that process.
    """

    def __init__(self, wanted: Wanted, cache: CacheFolder, here: bool) -> None:
        self._wanted, self._cache = wanted, cache
        self._here = here
        self._process = KerasProcess("tensorflow")
        self._key: str | None = None  # once begun
        self._early: Converted | None = None  # not yet compared with TensorFlow's
        self._comparing = False
        self._refused: FinetuneError | None = None
        self._found: Converted | None = None

    def __enter__(self) -> Self:
        """Nothing is begun yet."""
        return self

    def __exit__(self, *exception: object) -> None:
        """End the process."""
        self._process.__exit__(*exception)

    @property
    def downloads(self) -> bool:
        """Whether `begin` would download a weight file."""
        return source.must_download(self._wanted)

    def begin(self, advance: Advance = ignore_progress) -> None:
        """Look into the cache, and start the process if that lacks the backbone; `advance`: see `source.find_source`.

        Raises `ConfigError` and `WeightsError`.
        """
        found = source.find_source(self._wanted, advance)
        wanted, cache = replace(self._wanted, weights_sha256=found.sha256), self._cache
        key = self._key = _key(found, wanted.size, wanted.seed)
        self._found = Converted.read(backbones.entry(cache.path, key))
        if self._found is None and not cache.writable:
            self._found = Converted.read(self._folder(key))
        if self._found is not None:
            backbones.mark_used(self._found.folder)
        if self._found is None and not self._here:
            self._process.start()
            self._process.request(
                "convert", {"cache": str(cache.scratch.absolute()), "key": key, "wanted": asdict(wanted)}
            )
        self._wanted = wanted

    def start(self, advance: Advance = ignore_progress) -> Converted:
        """The backbone as soon as it has a graph, which may not have been compared with TensorFlow's.

        Nothing that it gives may be kept before `finish` has returned. Raises what `begin` and `make` raise.
        """
        self._wait_for_graph(advance)
        return self._found or self._early or self.finish()

    def finish(self, advance: Advance = ignore_progress) -> Converted:
        """The converted backbone, when it is in the cache. Raises what `begin` and `make` raise, as often as asked."""
        if self._refused is not None:
            raise self._refused
        self._wait_for_graph(advance)
        if self._found is None:
            assert self._key is not None
            try:
                if self._here:
                    make(self._cache.scratch.absolute(), self._key, self._wanted)
                else:
                    self._process.answer()
            except FinetuneError as exc:
                self._refused = exc
                raise
            found = _whole(self._folder(self._key), _FILES)
            self._found = replace(found, graph=self._early.graph) if self._early is not None else found
        return self._found

    def _wait_for_graph(self, advance: Advance) -> None:
        """Read the graph when the process has made it, and ask for its comparison with TensorFlow's."""
        if self._key is None:
            self.begin(advance)
        assert self._key is not None
        if self._found is not None or self._here or self._comparing:
            return
        place = self._process.answer()
        if place is not None:  # else another training was faster
            early = _whole(Path(os.fsdecode(place.tobytes())), _UNPROVEN)
            self._early = replace(early, folder=self._folder(self._key), graph=early.openvino_model())
        self._process.request("prove", {})
        self._comparing = True

    def _folder(self, key: str) -> Path:
        """Where the backbone is written: another folder than where it is read, if the cache can only be read."""
        return backbones.entry(self._cache.scratch, key)


def _whole(folder: Path, names: tuple[str, ...]) -> Converted:
    """What was just written. Raises `StorageError` when it is not there, or not whole."""
    found = Converted.read(folder, names)
    if found is None:
        raise StorageError(f"{folder} is not what was just written there", "check that disk for faults")
    return found


def _key(found: Source, size: int, seed: int) -> str:
    parts = {
        "format": _FORMAT,
        "name": found.info.name,
        "weights": found.sha256 or f"random {seed}",
        "size": size,
        "packages": {name: _version(name) for name in _PACKAGES},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # TensorFlow has builds of other names
        return None


def make(cache: Path, key: str, wanted: Wanted) -> None:
    """Build the backbone with Keras on TensorFlow, convert it, and put it into `cache` under `key`.

    Raises what `build.build` raises, `FinetuneError` when it cannot be converted, `GateError` when TensorFlow and
    OpenVINO disagree, `StorageError` when it cannot be written.
    """
    for _graph in making(cache, key, wanted):
        pass


def making(cache: Path, key: str, wanted: Wanted) -> Iterator[Path]:
    """`make`, in two steps: yields the folder that has the graph, before that is compared, and lasts until after.

    Yields nothing when another training has made the backbone in the meantime.
    """
    folder = backbones.entry(cache, key)
    backbones.make_parent(cache)
    with files.lock(folder.parent, wait=backbones.BUSY_SECONDS):
        files.remove_leftovers(folder.parent, cache)
        if Converted.read(folder) is not None:
            return
        backbone = build.build(wanted)
        model = runtimes.convert(backbone.model)
        parameters = backbone.parameters
        facts = {
            "name": backbone.name,
            "width": backbone.width,
            "fingerprint": backbone.fingerprint,
            "weights_sha256": backbone.weights_sha256,
            "feature_map": backbone.feature_map,
            "parameters": parameters,
            "last_stage_share": cuts.share_above(backbone.model, cuts.LAST_STAGE),
        }
        if os.path.lexists(folder):
            files.remove_folder(folder, cache)
        with files.atomic_folder(folder, 2 * 4 * parameters, cache) as temporary:
            runtimes.save_ir(model, temporary / _GRAPH, folder, 4 * parameters)
            _write_facts(temporary, facts, _UNPROVEN)
            yield temporary
            _compare(backbone.model, model, wanted.size)
            finished.template(backbone.model).save(temporary / _TEMPLATE)
            _write_facts(temporary, facts, _FILES)


def _write_facts(folder: Path, facts: dict[str, Any], names: tuple[str, ...]) -> None:
    hashes = {name: files.sha256_own(folder / name) for name in names}
    files.write_json(folder / _FACTS, manifest.seal({"backbone": facts, "files": hashes}))


def _compare(keras_model: Any, model: "openvino.Model", size: int) -> None:
    """Raise `GateError` unless both forms give the same features for two pictures, of noise and of a ramp."""
    ramp = np.linspace(0, 255, size * size * 3).reshape(size, size, 3)
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3))
    pictures = np.stack([ramp, noise]).astype(np.uint8)
    wanted = np.asarray(keras_model(pictures.astype(np.float32), training=False))
    found = runtimes.OpenVinoRuntime(model.clone(), "float32", latency=True).infer(pictures)
    apart = float(np.abs(found - wanted).max() / max(float(np.abs(wanted).max()), 1e-12))
    if not apart <= _TOLERANCE:
        raise GateError(
            f"OpenVINO's form of this backbone disagrees with TensorFlow's: features differ by {apart:.2g} of the "
            f"largest, the limit is {_TOLERANCE:g}",
            "choose another model.backbone, and please report this one",
        )
