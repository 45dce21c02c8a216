"""What a training is going to take, stage by stage, before it begins: photos, views, seconds and disk.

Seconds are measured here on a few of the photos; nothing is trained, and nothing is left behind.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune_cli import files
from finetune_cli.backbones.build import Backbone
from finetune_cli.cache.features import KIND, FeatureStore
from finetune_cli.cache.folder import CacheFolder
from finetune_cli.config.schema import Config, FineTuningConfig
from finetune_cli.devices import Precision
from finetune_cli.errors import BadImage, DataError
from finetune_cli.head.classifier import glorot
from finetune_cli.photos.dataset import Dataset
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import Sample, decode_sample
from finetune_cli.progress import Observer, ignore_progress
from finetune_cli.training.converted import Converted
from finetune_cli.training.extract import FeatureRequest
from finetune_cli.training.prepare import Extractor, index, make_extractor
from finetune_cli.training.requirements import check_room, check_settings
from finetune_cli.training.settings import Settings
from finetune_cli.training.start_from import AnyBackbone
from finetune_cli.training.tuning import activations, plan, stage
from finetune_cli.training.tuning.activations import Lower, Scratch
from finetune_cli.training.tuning.cuts import LAST_STAGE, cut, share_above
from finetune_cli.training.tuning.plan import Trial
from finetune_cli.training.tuning.upper import Labelled, Upper, UpperSettings

_MEASURED = 48  # photos
_KEYS_A_QUERY = 10_000
# A step forward and back costs about three times one forward (the gradient by inputs and the one by weights).
_FORWARD_AND_BACK = 3


@dataclass(frozen=True, slots=True)
class Row:
    """A stage. `views` is how many are computed in it (0: it has none); seconds is None if they cannot be told."""

    stage: str
    photos: int
    views: int
    seconds: float | None
    disk: int


@dataclass(frozen=True)
class Budget:
    """The stages in their order, and the trainings of the fine-tuning stage."""

    rows: tuple[Row, ...]
    trials: tuple[Trial, ...]

    @property
    def seconds(self) -> float:
        """Of all stages that could be measured."""
        return sum(row.seconds or 0.0 for row in self.rows)

    @property
    def disk(self) -> int:
        """Bytes that are needed at most; the scratch files among them are freed at the end."""
        return sum(row.disk for row in self.rows)


def budget(config: Config, observer: Observer) -> Budget:
    """Look at photos and backbone, and measure. Raises what `train` raises for settings, files and space."""
    settings = check_settings(config)
    data = index(settings.photos, settings.cache, observer)
    extractor = make_extractor(settings, observer)
    precision, backbone = extractor.precision, extractor.backbone
    assert isinstance(backbone, Backbone)  # Keras has built it
    views = settings.augmenter
    check_room(settings, data, backbone)
    stage.checked(settings)(data, backbone)
    few = list(itertools.islice(filter(lambda sample: _can_be_decoded(sample, settings.image), data.train), _MEASURED))
    if not few:
        raise DataError("no training photo can be decoded", "list what is wrong with: finetune check CONFIG")
    meter = _Meter(settings, backbone, extractor, precision, few)
    held_out = (*data.val, *data.test)
    new = _missing(settings.cache, FeatureRequest(settings.image, backbone.fingerprint, precision, views), data.train)
    new += _missing(settings.cache, FeatureRequest(settings.image, backbone.fingerprint, "float32"), held_out)
    everything = len(data.train) * views.views + len(held_out)
    photos = len(data.train) + len(held_out)
    with observer.stage("measuring", None):
        a_view = meter.pass_seconds(backbone.model, (backbone.width,))
        rows = [
            Row("features", photos, new, new * a_view, 4 * backbone.width * (new + everything)),
            Row("head", len(data.train), 0, None, 0),
        ]
        trials: tuple[Trial, ...] = ()
        if config.fine_tuning is not None:
            trials = plan.trials(config.fine_tuning, len(data.train))
            for trial in trials:
                rows += meter.trial(trial, data)
            rows.append(
                Row("tuned features", photos, everything, everything * a_view, 4 * backbone.width * 2 * everything)
            )
    rows.append(Row("saving", 0, 0, None, 8 * backbone.model.count_params()))
    return Budget(tuple(rows), trials)


class _Meter:
    """Measures on a few photos."""

    def __init__(
        self, settings: Settings, backbone: Backbone, extractor: Extractor, precision: Precision, few: Sequence[Sample]
    ) -> None:
        self.settings, self.backbone, self.extractor = settings, backbone, extractor
        self.precision, self.few = precision, few

    def pass_seconds(self, model: Any | None, shape: tuple[int, ...]) -> float:
        """Seconds for one view through `model` on the fast runtime, decoding included."""
        return self._stored(model, shape)[1]

    def _stored(self, model: Any | None, shape: tuple[int, ...]) -> tuple[activations.ScratchFile, float]:
        request = FeatureRequest(self.settings.image, self.backbone.fingerprint, self.precision, None)
        runtime = stage.lower_runtime(model, self.extractor.device, self.precision, self.extractor.workers)
        lower = Lower(request, runtime, shape, self.extractor.workers, self.extractor.batch_size)
        folder = self.settings.cache.scratch
        files.make_folder(folder)
        scratch = Scratch(folder, 1, np.float32)
        activations.stored(self.few[:8], lower, scratch, ignore_progress)  # the first calls are slower
        started = time.perf_counter()
        file = activations.stored(self.few, lower, scratch, ignore_progress)
        return file, (time.perf_counter() - started) / len(self.few)

    def trial(self, trial: Trial, data: Dataset) -> list[Row]:
        """The stages of one training of the upper part."""
        section = self.settings.config.fine_tuning
        assert section is not None
        part = cut(self.backbone.model, trial.unfreeze)
        views = self.settings.augmenter.views
        store = plan.store(part, len(data.train), views, len(data.val), plan.limit(section))
        file, a_row = self._stored(part.lower, part.shape)
        n, classes = len(self.few), len(data.classes)
        labels = np.array([sample.label for sample in self.few])
        upper = Upper(part.upper, glorot(self.backbone.width, classes, 0))
        before = upper.weights()
        settings = UpperSettings(2, min(section.batch_size, n), trial.learning_rate, section.weight_decay, 0.0, 0)
        few = Labelled(file, labels, np.ones(n))
        *_, last = upper.train(few, few, settings)
        upper.assign(before)
        self.backbone.model.trainable = False
        # Of the second epoch: the first one builds the graph. Its validation pass is a third of a training pass more.
        a_photo = last.history[-1]["seconds"] / n
        trained = _FORWARD_AND_BACK * len(data.train) + len(data.val)
        epoch = a_photo * trained / (_FORWARD_AND_BACK + 1)
        recomputed = store.storage == "recomputed"
        rows = []
        if recomputed:
            epoch += a_row * (len(data.train) + len(data.val))
        else:
            stored = len(data.train) * store.views + len(data.val)
            rows.append(Row("activations", len(data.train) + len(data.val), stored, stored * a_row, store.bytes))
        weights = 4 * sum(array.size for array in before)
        rows.append(
            Row(
                f"fine-tuning, {trial.epochs} epochs of {trial.unfreeze} at {trial.learning_rate:g}",
                len(data.train),
                trial.epochs * len(data.train),
                trial.epochs * epoch,
                3 * 3 * weights,  # weights and both moments of AdamW in up to three checkpoints
            )
        )
        again = len(data.train) * store.views
        rows.append(Row("head again", len(data.train), again, again * a_photo / (_FORWARD_AND_BACK + 1), 0))
        return rows


def _can_be_decoded(sample: Sample, image: ImageSettings) -> bool:
    try:
        decode_sample(sample, image)
    except BadImage:
        return False
    return True


def _missing(folder: CacheFolder, request: FeatureRequest, samples: Sequence[Sample]) -> int:
    """How many views of `samples` the feature cache in `folder` lacks; nothing is created."""
    keys = list({request.key(sample.digest, view) for sample in samples for view in range(request.views)})
    if not (folder.path / KIND.name).is_file():
        return len(keys)
    with FeatureStore(folder.path, writable=False) as store:
        return len(keys) - sum(
            len(store.has(keys[start : start + _KEYS_A_QUERY])) for start in range(0, len(keys), _KEYS_A_QUERY)
        )


def rough_seconds(backbone: AnyBackbone, photos: int, views: int, a_view: float) -> float:
    """About how much longer than the head alone ``fine_tuning=auto`` would take, without measuring anything.

    photos: training photos, of `views` views each; a_view: seconds that the feature pass took for a view.
    """
    share = backbone.last_stage_share if isinstance(backbone, Converted) else share_above(backbone.model, LAST_STAGE)
    total = 0.0
    for trial in plan.trials(FineTuningConfig(), photos):
        # Once through the network for the activations and for the head's second fit, which share it between them.
        total += views + trial.epochs * _FORWARD_AND_BACK * share
    return photos * a_view * (total + views)  # and once for the features of the tuned backbone
