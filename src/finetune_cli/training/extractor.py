"""One backbone on its runtime, which computes the features of one split after another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from finetune_cli.backbones.build import Backbone
from finetune_cli.cache.features import FeatureStore
from finetune_cli.devices import Device, Precision
from finetune_cli.inference import runtimes
from finetune_cli.inference.runtimes import Runtime
from finetune_cli.photos.dataset import Dataset
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

    Training photos get all views, in `precision`; the others are float32 and as they are. `prove`: see
    `extract.Resources`.
    """

    settings: Settings
    backbone: AnyBackbone
    device: Device
    precision: Precision
    observer: Observer
    prove: Callable[[], object] = field(default=lambda: None)
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
        request = replace(self.first_request(split), thumbnails=thumbnails)
        if split == "train":
            request = replace(request, augmenter=self.settings.augmenter)
        return self._extract(f"features of {split}", store, samples, request, first)

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
        scratch = self.settings.cache.scratch
        resources = Resources(store, self.runtime, scratch, self.workers, self.batch_size, first, self.prove)
        with self.observer.stage(stage, len(samples)) as advance:
            return extract.extract(samples, request, self.backbone.width, resources, advance)

    def runtime(self, precision: Precision) -> Runtime:
        """The backbone, converted once and compiled once per precision."""
        if precision not in self._compiled:
            if self.device == "gpu":
                self._compiled[precision] = runtimes.TensorFlowRuntime(self._keras_model, precision)
            else:
                self._compiled[precision] = runtimes.OpenVinoRuntime(self._converted.clone(), precision, self.workers)
        return self._compiled[precision]

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
