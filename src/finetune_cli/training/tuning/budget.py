"""What a training is going to take, stage by stage, before it begins: photos, views, seconds and disk.

Seconds are measured here on a few of the photos; nothing is trained, and nothing is left behind.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from finetune_cli import files
from finetune_cli.backbones.build import Backbone
from finetune_cli.cache.features import KIND, FeatureStore
from finetune_cli.cache.folder import CacheFolder
from finetune_cli.config.schema import Config, FineTuningConfig
from finetune_cli.errors import BadImage, DataError
from finetune_cli.head.classifier import glorot
from finetune_cli.inference import runtimes
from finetune_cli.photos.dataset import Dataset
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import Sample, decode_sample
from finetune_cli.progress import Observer, ignore_progress
from finetune_cli.text import duration
from finetune_cli.training.converted import Converted
from finetune_cli.training.extract import FeatureRequest
from finetune_cli.training.extractor import Extractor
from finetune_cli.training.prepare import index, make_extractor
from finetune_cli.training.requirements import check_room, check_settings
from finetune_cli.training.settings import Settings
from finetune_cli.training.start_from import AnyBackbone
from finetune_cli.training.tuning import activations, inputs, plan, stage
from finetune_cli.training.tuning.activations import Lower, Scratch
from finetune_cli.training.tuning.cuts import Cut, cut, share_above
from finetune_cli.training.tuning.plan import Counts, Store, Trial
from finetune_cli.training.tuning.upper import Labelled, UpperSettings

_MEASURED = 48  # photos
_KEYS_A_QUERY = 10_000
# What a step costs, in passes forward: one forward, one for the gradient by inputs and one by weights (measured with
# the bundled backbone: 2.7).
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
        """Of all stages that could be measured, if all trainings are needed."""
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
    few = _few(settings, data)
    if not few:
        raise DataError("no training photo can be decoded", "list what is wrong with: finetune check CONFIG")
    meter = _Meter(backbone, extractor, few)
    held_out = (*data.val, *data.test)
    new = _missing(settings.cache, FeatureRequest(settings.image, backbone.fingerprint, precision, views), data.train)
    photos = len(data.train) + len(held_out)
    if config.data.folds is not None and precision != "float32":
        held_out = (*held_out, *data.train)  # each is held out once, as it is and in float32
    new += _missing(settings.cache, FeatureRequest(settings.image, backbone.fingerprint, "float32"), held_out)
    everything = len(data.train) * views.views + len(held_out)
    with observer.stage("measuring", None):
        a_view = meter.a_view()
        rows = [
            Row("features", photos, new, new * a_view, 4 * backbone.width * (new + everything)),
            Row("head", len(data.train), 0, None, 0),
            *([] if config.data.folds is None else [Row(f"{config.data.folds} folds", len(data.train), 0, None, 0)]),
        ]
        trials: tuple[Trial, ...] = ()
        if config.fine_tuning is not None:
            trials = plan.trials(config.fine_tuning, len(data.train))
            rows += meter.trials(config.fine_tuning, trials, data, config.data.folds)
            rows.append(
                Row("tuned features", photos, everything, everything * a_view, 4 * backbone.width * 2 * everything)
            )
    rows.append(Row("saving", 0, 0, None, 8 * backbone.model.count_params()))
    return Budget(tuple(rows), trials)


@dataclass(frozen=True, slots=True)
class _Measured:
    """What a training from a cut takes on this machine.

    a_row: seconds for a view of the inputs, decoding included; a_photo: seconds for one photo in a step and in a
    validation; weights: how many numbers learn.
    """

    a_row: float
    a_photo: float
    weights: int


class _Meter:
    """Measures on a few photos."""

    def __init__(self, backbone: Backbone, extractor: Extractor, few: Sequence[Sample]) -> None:
        self.backbone, self.extractor, self.few = backbone, extractor, few
        self._measured: dict[str, _Measured] = {}

    def a_view(self) -> float:
        """Seconds for one view through the whole backbone on the fast runtime, decoding included."""
        extractor, precision = self.extractor, self.extractor.precision
        request = FeatureRequest(extractor.settings.image, self.backbone.fingerprint, precision)
        runtime, shape = extractor.runtime(precision), (self.backbone.width,)
        return self._stored(Lower(request, runtime, shape, extractor.workers, extractor.batch_size))[1]

    def _stored(self, lower: Lower) -> tuple[activations.ScratchFile, float]:
        folder = self.extractor.settings.cache.scratch
        files.make_folder(folder)
        scratch = Scratch(folder, 1, np.float32)
        activations.stored(self.few[:8], lower, scratch, ignore_progress)  # the first calls are slower
        started = time.perf_counter()
        file = activations.stored(self.few, lower, scratch, ignore_progress)
        return file, (time.perf_counter() - started) / len(self.few)

    def _of_cut(self, part: Cut, section: FineTuningConfig, classes: int) -> _Measured:
        if part.below not in self._measured:
            file, a_row = self._stored(inputs.lower(part, self.extractor, self.extractor.precision, None))
            n, device = len(self.few), self.extractor.device
            labels = np.array([sample.label for sample in self.few])
            upper = inputs.upper(part, glorot(self.backbone.width, classes, 0), device)
            before = upper.weights()
            policy = runtimes.training_policy(device, self.extractor.precision)
            settings = UpperSettings(2, min(section.batch_size, n), 1e-6, section.weight_decay, 0.0, 0, policy)
            few = Labelled(file, labels, np.ones(n))
            *_, last = upper.train(few, few, settings)
            upper.assign(before)
            self.backbone.model.trainable = False
            # Of the second epoch: the first one builds the graph.
            a_photo = last.history[-1]["seconds"] / n
            self._measured[part.below] = _Measured(a_row, a_photo, sum(array.size for array in before))
        return self._measured[part.below]

    def trials(
        self, section: FineTuningConfig, trials: Sequence[Trial], data: Dataset, folds: int | None
    ) -> Iterator[Row]:
        """The stages of all trainings of the upper part: with folds, each photo is learned from in all but one."""
        val = len(data.val) if folds is None else len(data.train)
        counts = Counts(len(data.train), self.extractor.settings.augmenter.views, val)
        times, of_folds = (1, "") if folds is None else (folds - 1, f", without each of {folds} folds")
        kept: tuple[str, Store] | None = None
        longest = max(trials, key=lambda trial: trial.epochs)
        for trial in trials:
            part = cut(self.backbone.model, trial.unfreeze)
            store = plan.store(part, trial.epochs, self.extractor.device, counts, plan.limit(section))
            found = self._of_cut(part, section, len(data.classes))
            # In what was measured, each photo was also validated.
            trained = _FORWARD_AND_BACK * counts.photos * times + counts.val_photos
            epoch = found.a_photo * trained / (_FORWARD_AND_BACK + 1)
            both = counts.photos + counts.val_photos
            if store.storage in {"recomputed", "none"}:
                epoch += found.a_row * (counts.photos * times + counts.val_photos)
            elif kept != (part.below, store):
                kept = part.below, store
                stored = counts.photos * store.views + counts.val_photos
                yield Row("activations", both, stored, stored * found.a_row, store.bytes)
            otherwise = "" if trial is trials[0] else "otherwise "
            yield Row(
                f"{otherwise}fine-tuning, {trial.epochs} epochs of {trial.unfreeze} at {trial.learning_rate:g}"
                f"{of_folds}",
                counts.photos,
                trial.epochs * counts.photos * times,
                trial.epochs * epoch,
                # Weights and both moments of AdamW in up to three checkpoints; the weights of finished trainings.
                (3 * 3 + (folds or 0)) * 4 * found.weights,
            )
            again = counts.photos * plan.views_again(store, counts) * times
            a_pass = found.a_photo / (_FORWARD_AND_BACK + 1)
            yield Row(f"{otherwise}head again{of_folds}", counts.photos, again, again * a_pass, 0)
            if folds is not None and trial == longest:
                final = Row(
                    f"fine-tuning on all photos, {trial.epochs} epochs at most",
                    counts.photos,
                    trial.epochs * counts.photos,
                    trial.epochs * counts.photos * _FORWARD_AND_BACK * a_pass,
                    4 * found.weights,
                )
        if folds is not None:
            yield final


def announced(settings: Settings, observer: Observer) -> Callable[[Dataset, AnyBackbone], None]:
    """A check for `prepare` that tells what fine-tuning in folds is going to take, measured on a few photos."""

    def check(data: Dataset, backbone: AnyBackbone) -> None:
        config, folds = settings.config, settings.config.data.folds
        if config.fine_tuning is None or folds is None or not (few := _few(settings, data)):
            return
        assert isinstance(backbone, Backbone)  # as `changes_backbone` says
        precision = runtimes.training_precision(settings.device, config.runtime.feature_precision)
        extractor = Extractor(settings, backbone, settings.device, precision, observer)
        a_view = _Meter(backbone, extractor, few).a_view()
        counts = Counts(len(data.train), settings.augmenter.views, len(data.train))
        seconds = rough_seconds(backbone, config, counts, a_view)
        trials = len(plan.trials(config.fine_tuning, len(data.train)))
        most = "at most " if trials > 1 else ""
        trainings = f"{most}{folds * trials + 1} trainings, {most}about {duration(seconds)}"
        observer.note(f"cross-validation of the fine-tuning: {trainings}")

    return check


def _few(settings: Settings, data: Dataset) -> list[Sample]:
    """A few training photos that can be decoded."""
    readable = filter(lambda sample: _can_be_decoded(sample, settings.image), data.train)
    return list(itertools.islice(readable, _MEASURED))


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


def rough_seconds(backbone: AnyBackbone, config: Config, counts: Counts, a_view: float) -> float:
    """About how much longer than the head alone, at most, the fine-tuning of `config` takes, by default of ``auto``.

    Nothing is measured but `a_view`, seconds that the feature pass takes for a view.
    """
    section, folds = config.fine_tuning or FineTuningConfig(), config.data.folds
    # Once through the network for the activations and for the head's second fit, which share it between them, and once
    # for the features of the tuned backbone.
    passes = 2.0 * counts.views
    on_all_photos = []
    for number, trial in enumerate(plan.trials(section, counts.photos)):
        share = (
            backbone.last_stage_share
            if isinstance(backbone, Converted)
            else share_above(backbone.model, trial.unfreeze)
        )
        on_all_photos.append(trial.epochs * _FORWARD_AND_BACK * share)
        if folds is not None:
            # Every photo is learned from in all folds but its own, where it validates once an epoch.
            steps = trial.epochs * (_FORWARD_AND_BACK * (folds - 1) + 1)
            passes += share * (steps + (counts.views * (folds - 1) if number == 0 else 0))
    passes += sum(on_all_photos) if folds is None else max(on_all_photos)
    return counts.photos * a_view * passes
