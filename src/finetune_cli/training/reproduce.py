"""`check --reproduce`: how this machine and its files differ from those of a run; nothing is trained or written."""

from collections.abc import Iterator
from dataclasses import dataclass

from finetune_cli import files
from finetune_cli.backbones import source
from finetune_cli.cache import folder
from finetune_cli.config.load import load_config
from finetune_cli.config.schema import Config
from finetune_cli.errors import DataError, RunError
from finetune_cli.inference import runtimes
from finetune_cli.parallel import worker_count
from finetune_cli.photos import dataset
from finetune_cli.progress import Observer
from finetune_cli.runs import environment
from finetune_cli.runs.environment import Difference
from finetune_cli.runs.run import Run
from finetune_cli.training import near, prepare, settings, start_from

_SHOWN = 5


@dataclass(frozen=True)
class Reproduction:
    """`environment`: the facts that differ; `weights`: a line for each weight file or start model that differs.

    `photos`: what differs of the photos, by split and name; `photos_problem` says why they could not be compared, and
    is empty when they were.
    """

    run: Run
    environment: tuple[Difference, ...]
    weights: tuple[str, ...]
    photos: tuple[str, ...]
    photos_problem: str = ""

    @property
    def same(self) -> bool:
        """Whether training here again, by the run's config.yaml, can be expected to give the same weights."""
        return not (self.environment or self.weights or self.photos or self.photos_problem)


def reproduce(run: Run, observer: Observer) -> Reproduction:
    """Compare packages, Python, processor, device, threads, seed, commit, weights and photos with those of `run`.

    Raises `RunError` when a file of the run is damaged, `ConfigError` when its config cannot be used here.
    """
    config = load_config(run.file("config.yaml"))
    before = environment.read_environment(run.file(environment.FILE))
    device = runtimes.choose_device(config.runtime.device)
    precision = runtimes.training_precision(device, config.runtime.feature_precision)
    now = environment.current(config, device, precision, worker_count(config.runtime.workers))
    differing = tuple(environment.differences(before.facts, now.facts))
    weights = (*_backbone(run, config), *_start(run, config))
    try:
        data = prepare.index(settings.data_settings(config), folder.locate(config.runtime.cache_dir), observer)
    except DataError as exc:
        return Reproduction(run, differing, weights, (), exc.problem.splitlines()[0])
    data = dataset.split_as_recorded(data, near.recorded(run.split()))
    skipped = {photo.path for photo in run.manifest.bad_photos}
    here = {
        (split, data.classes[sample.label], sample.digest, sample.name)
        for split, samples in data.splits.items()
        for sample in samples
        if sample.name not in skipped
    }
    there = {(row.split, row.label, row.digest, row.path) for row in run.split()}
    return Reproduction(
        run, differing, weights, (*_listed("gone or changed", there - here), *_listed("new", here - there))
    )


def _backbone(run: Run, config: Config) -> Iterator[str]:
    """What is wrong with the file that the backbone's weights came from; random ones come from the seed."""
    expected = run.manifest.backbone.weights_sha256
    path = source.weight_file(settings.wanted_backbone(config))
    if path is None or expected is None:
        return
    if not path.is_file():
        download = " and are downloaded when they are needed" if config.model.weights == "imagenet" else ""
        yield f"the backbone's weights {path} are not here{download}"
    elif (found := files.sha256(path)) != expected:
        yield f"the backbone's weights {path} have the SHA-256 {found}, and had {expected}"


def _start(run: Run, config: Config) -> Iterator[str]:
    """What is wrong with the run that `model.start_from` names."""
    path = config.model.start_from
    try:
        found = start_from.digest_of(None if path is None else Run.load(path))
    except RunError as exc:
        yield f"model.start_from: {exc.problem}"
    else:
        if found != run.manifest.start_from:
            yield f"model.start_from: {path} is another run than it was; its model.keras differs"


def _listed(what: str, rows: set[tuple[str, str, str, str]]) -> list[str]:
    """A line for each of the first rows, and one with the number of the others."""
    lines = [f"{what}: {split}/{label}: {name}" for split, label, _digest, name in sorted(rows)]
    rest = len(lines) - _SHOWN
    return lines if rest <= 0 else [*lines[:_SHOWN], f"{what}: and {rest} more"]
