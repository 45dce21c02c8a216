"""How fast and how accurate exports are: each answers all test photos of the run, one at a time, on all cores.

Photos are decoded in blocks between the answers, so that decoding takes no time from them. All runtimes get the same
cores; TensorFlow takes those of the process by itself.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli.errors import BadImage, DataError
from finetune_cli.evaluation import photos as run_photos
from finetune_cli.inference.predictor import Predictor, RunPredictor
from finetune_cli.metrics.scores import Proportion, wilson
from finetune_cli.parallel import cores, ordered_map
from finetune_cli.photos.scan import Sample
from finetune_cli.places import Place
from finetune_cli.progress import Advance, Observer
from finetune_cli.runs.run import Run

_BLOCK = 64
_WARM_UP = 3  # runtimes prepare themselves in the first calls


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured on `photos` photos, which are `source`, with `threads` threads.

    milliseconds: the median of one photo. accuracy: share of right answers. agreement: share of the answers that are
    those of the run. largest, mean: of a photo's largest difference of a probability from the run.
    """

    photos: int
    source: str
    threads: int
    milliseconds: float
    accuracy: Proportion
    agreement: Proportion
    largest: float
    mean: float

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {
            "photos": self.photos,
            "source": self.source,
            "threads": self.threads,
            "milliseconds": self.milliseconds,
            "accuracy": self.accuracy.value,
            "accuracy_interval": [self.accuracy.low, self.accuracy.high],
            "top1_agreement": self.agreement.value,
            "top1_agreement_interval": [self.agreement.low, self.agreement.high],
            "largest_difference": self.largest,
            "mean_difference": self.mean,
        }


class Benchmark:
    """The test photos of `run`, else its validation photos, below `root` if they were moved. The run answers first.

    Raises `DataError` when none can be read.
    """

    def __init__(self, run: Run, root: Place | None, observer: Observer) -> None:
        with observer.stage("looking for photos of the benchmark", None, "files") as advance:
            found = run_photos.photos_of_run(run, root, cores(), advance)
        self._settings, self._source = run.image_settings, found.source
        self._samples = [sample for sample in found.samples if self._readable(sample)]
        self.photos = len(self._samples)
        if not self._samples:
            raise DataError(f"none of the {found.source} can be read", "name the folder with them: --data ROOT")
        if unusable := len(found.bad) + len(found.samples) - self.photos:
            observer.warn(f"{unusable} of the {found.source} cannot be read; the benchmark is without them")
        self._labels = np.array([sample.label for sample in self._samples])
        self._reference: NDArray[np.float32] | None = None
        with observer.stage("run: benchmark", self.photos) as advance:
            self.run_figures = self.measure(RunPredictor(run, workers=1, latency=True), advance)

    def measure(self, model: Predictor, advance: Advance) -> Figures:
        """The figures of `model`; calls `advance` with the number of photos after every one."""
        rows: list[NDArray[np.float32]] = []
        seconds = []
        for photo in self._decoded():
            for _ in range(0 if rows else _WARM_UP):
                model.probabilities(photo[np.newaxis])
            started = time.perf_counter()
            rows.append(model.probabilities(photo[np.newaxis]))
            seconds.append(time.perf_counter() - started)
            advance(1)
        answers, n = np.concatenate(rows), len(rows)
        reference = answers if self._reference is None else self._reference
        self._reference = reference
        differences = np.abs(answers - reference).max(axis=1)
        given = answers.argmax(axis=1)
        return Figures(
            photos=n,
            source=self._source,
            threads=cores(),
            milliseconds=float(np.median(seconds)) * 1000,
            accuracy=wilson(int((given == self._labels).sum()), n),
            agreement=wilson(int((given == reference.argmax(axis=1)).sum()), n),
            largest=float(differences.max()),
            mean=float(differences.mean()),
        )

    def _decoded(self) -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(self._samples), _BLOCK):
            block = self._samples[start : start + _BLOCK]
            yield from list(ordered_map(lambda one: run_photos.pixels(one, self._settings), block, cores()))

    def _readable(self, sample: Sample) -> bool:
        try:
            run_photos.pixels(sample, self._settings)
        except BadImage:
            return False
        return True
