"""One backbone on its runtime, which computes the features of one split after another."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_cli.backbones.build import Backbone
from finetune_cli.cache.digests import Facts
from finetune_cli.cache.features import FeatureStore
from finetune_cli.devices import Device, Precision
from finetune_cli.engines.engine import Engine, Local
from finetune_cli.inference import runtimes
from finetune_cli.inference.runtimes import Runtime
from finetune_cli.photos.dataset import Dataset
from finetune_cli.photos.listing import ListedPhoto
from finetune_cli.photos.objects import Examined
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Observer
from finetune_cli.training import extract
from finetune_cli.training.converted import Converted
from finetune_cli.training.extract import FeatureRequest, Features, Resources
from finetune_cli.training.settings import Settings
from finetune_cli.training.start_from import AnyBackbone


@dataclass
class Extractor:
    """Computes the features of one split after another with one backbone.

    Training photos get all views, in `precision`; the others are float32 and as they are. `prove`: what a
    `FeatureStore` asks before it keeps any of them. `engine`: None for the threads of this process. `looked`: how many
    views `look` has computed.
    """

    settings: Settings
    backbone: AnyBackbone
    device: Device
    precision: Precision
    observer: Observer
    prove: Callable[[], object] = field(default=lambda: None)
    engine: Engine | None = None
    looked: int = field(default=0, init=False)
    _compiled: dict[Precision, Runtime] = field(default_factory=dict, init=False)

    @property
    def workers(self) -> int:
        """Threads that decode and infer."""
        return self.settings.workers

    def __call__(
        self,
        store: FeatureStore,
        split: str,
        samples: Sequence[Sample],
        thumbnails: bool = False,
        first: Sequence[Features] = (),
    ) -> Features:
        """The features of `samples`, `float32 (n, views, D)`, through `store`.

        `first`: view 0 of some of them, if it was computed before in the precision of this split.
        """
        return self._extract(f"features of {split}", store, samples, self.request(split, thumbnails), first)

    def look(self, store: FeatureStore, photos: Sequence[ListedPhoto], request: FeatureRequest) -> Iterator[Examined]:
        """Read photos in a store for the first time, with what `request` asks; see `extract.look`."""
        for facts, version in extract.look(photos, request, self._resources(store)):
            self.looked += request.views * isinstance(facts, Facts)
            yield facts, version

    def request(self, split: str, thumbnails: bool = False) -> FeatureRequest:
        """What is computed of the photos of a split."""
        request = replace(self.first_request(split), thumbnails=thumbnails)
        return replace(request, augmenter=self.settings.augmenter) if split == "train" else request

    def first_request(self, split: str) -> FeatureRequest:
        """What `first_views` computes."""
        precision = self.precision if split == "train" else "float32"
        return FeatureRequest(self.settings.image, self.backbone.fingerprint, precision, thumbnails=True)

    def first_views(self, store: FeatureStore, data: Dataset) -> dict[str, Features]:
        """View 0 of the photos of each split, with thumbnails: what near-duplicates are found by.

        Photos of an automatic split are computed in the precision of the split that they are in before near-duplicates
        are known: most of them stay there.
        """
        return {
            split: self._extract(f"view 0 of {split}", store, samples, self.first_request(split))
            for split, samples in data.splits.items()
        }

    def _extract(
        self,
        stage: str,
        store: FeatureStore,
        samples: Sequence[Sample],
        request: FeatureRequest,
        first: Sequence[Features] = (),
    ) -> Features:
        with self.observer.stage(stage, len(samples)) as advance:
            return extract.extract(samples, request, self.backbone.width, self._resources(store, first), advance)

    def _resources(self, store: FeatureStore, first: Sequence[Features] = ()) -> Resources:
        scratch = self.settings.cache.scratch
        engine = self.engine or Local(self.workers)
        return Resources(store, self.runtime, scratch, engine, self.batch_size, first, self.files)

    def runtime(self, precision: Precision) -> Runtime:
        """The backbone, converted once and compiled once per precision."""
        if precision not in self._compiled:
            if self.device == "gpu":
                self._compiled[precision] = runtimes.TensorFlowRuntime(self._keras_model, precision)
            else:
                self._compiled[precision] = runtimes.OpenVinoRuntime(self._converted.clone(), precision, self.workers)
        return self._compiled[precision]

    def files(self) -> tuple[bytes, bytes]:
        """The two files of the converted backbone, as it is compiled here."""
        return self._files

    @cached_property
    def _files(self) -> tuple[bytes, bytes]:
        with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
            graph = Path(folder, "backbone.xml")
            runtimes.save_ir(self._converted.clone(), graph, Path(folder), 4 * self.backbone.parameters)
            return graph.read_bytes(), graph.with_suffix(".bin").read_bytes()

    @cached_property
    def _keras_model(self) -> Any:
        assert isinstance(self.backbone, Backbone)  # on a GPU, see `Settings.builds_backbone`
        return self.backbone.model

    @cached_property
    def _converted(self) -> Any:
        if isinstance(self.backbone, Converted):
            return self.backbone.openvino_model()
        return runtimes.convert(self.backbone.model)

    @property
    def batch_size(self) -> int:
        """Views in a call of the runtime."""
        batch_size = self.settings.config.runtime.batch_size
        if batch_size != "auto":
            return batch_size
        # On a CPU the activations of a few photos stay in the cache of a core; a GPU needs larger batches.
        return 4 if self.device == "cpu" else 64
