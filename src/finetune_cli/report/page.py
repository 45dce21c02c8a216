"""The content of the report as typed values, and how the template turns them into HTML.

All texts are plain: the template escapes them. The template reads nothing but a `Page`; an attribute that does not
exist is an error.
"""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from finetune_cli import __version__
from finetune_cli.evaluation.judge import Calibration
from finetune_cli.metrics.scores import ClassScores, Evaluation
from finetune_cli.report.charts import Chart
from finetune_cli.report.matrix import Matrix
from finetune_cli.report.sentences import percent
from finetune_cli.report.thumbnails import Figure
from finetune_cli.report.unknown import UnknownSection
from finetune_cli.text import brief


@dataclass(frozen=True)
class CountRow:
    """A class and its number of photos in each column."""

    name: str
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Counts:
    """Photos by class and split. totals: of all classes. more: classes that are left out of `rows`."""

    columns: tuple[str, ...]
    rows: tuple[CountRow, ...]
    totals: tuple[int, ...]
    more: int


@dataclass(frozen=True)
class LeftOut:
    """A photo that was not judged, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ClassTable:
    """Scores of classes; `more` are left out of `rows`, `absent` have neither photos nor predictions."""

    rows: tuple[ClassScores, ...]
    more: int
    absent: int


@dataclass(frozen=True)
class Examples:
    """Some of the `wrong` photos that were misclassified, and of the `right` ones, those with the least confidence."""

    mistakes: tuple[Figure, ...]
    wrong: int
    unsure: tuple[Figure, ...]
    right: int


@dataclass(frozen=True)
class Copies:
    """Where a photo is in one split: the first path, and how many `more` there are."""

    split: str
    path: str
    more: int


@dataclass(frozen=True)
class Duplicates:
    """For each photo that is in several splits, its copies by split; `more` photos are left out of `rows`."""

    rows: tuple[tuple[Copies, ...], ...]
    more: int


@dataclass(frozen=True)
class CurveRow:
    """A class in the learning curve: its recall for each fraction of the training photos.

    gain: of recall from half to all of its photos. error: its standard error. photos: that it is judged by. spark: the
    recalls as points of a small line.
    """

    name: str
    recall: tuple[float, ...]
    gain: float
    error: float
    photos: int
    spark: str


@dataclass(frozen=True)
class Curve:
    """The learning curve; `more` classes are left out of `rows`. used: of all `photos`, those that were refitted on.

    how: what the heads were fitted on and judged by.
    """

    sentence: str
    how: str
    chart: Chart
    fractions: tuple[str, ...]
    rows: tuple[CurveRow, ...]
    more: int
    used: int
    photos: int


@dataclass(frozen=True)
class Refits:
    """What heads refitted on the training features show.

    problem: why there is nothing at all; curve_problem: why there is neither `augmentation` nor `curve`. suspects:
    the clearest of `suspect_count` training photos whose label may be wrong. augmentation: whether it helped; empty
    without augmentation. frozen: whether the features are those of the frozen backbone, though the run tuned it.
    """

    problem: str = ""
    curve_problem: str = ""
    suspects: tuple[Figure, ...] = ()
    suspect_count: int = 0
    augmentation: str = ""
    curve: Curve | None = None
    frozen: bool = False


@dataclass(frozen=True)
class Fact:
    """A line of the environment."""

    key: str
    value: str


@dataclass(frozen=True)
class Origin:
    """How the run was made: its resolved config, without the last `config_more` characters, and its environment."""

    config: str
    config_more: int
    environment: tuple[Fact, ...]


@dataclass(frozen=True)
class Page:
    """Everything that the report shows.

    left_out: some of `left_out_count` photos that were not judged. tuning: what `report.tuning` makes of fine-tuning,
    None without it; unknown: likewise of photos that are answered `unknown`.
    """

    run: str
    source: str
    backbone: str
    created: str
    verdict: tuple[str, ...]
    evaluation: Evaluation
    calibration: Calibration | None
    counts: Counts
    notes: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    left_out_count: int
    history: tuple[Chart, ...]
    tuning: Mapping[str, Any] | None
    matrix: Matrix
    classes: ClassTable
    examples: Examples
    feature_map: bool
    cross_validated: bool
    reliability: Chart
    coverage: Chart
    unknown: UnknownSection | None
    refits: Refits
    duplicates: Duplicates
    groups: str | None
    origin: Origin


def render(page: Any, template: str = "report.html.j2") -> str:
    """The HTML of `page`: one file with its style sheet, whose hash is the only style that the page allows."""
    import jinja2

    templates = resources.files("finetune_cli.report") / "templates"
    style = (templates / "report.css").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": percent, "brief": brief}
    source = environment.from_string((templates / template).read_text("utf-8"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    return source.render(page=page, style=style, style_digest=digest, version=__version__)
