"""`doctor.html`: the findings with their photos, in one file without scripts, as the report is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune_cli import files
from finetune_cli.doctor.examine import PROBLEMS, Examination, Finding
from finetune_cli.drawing import heatmap
from finetune_cli.errors import BadImage
from finetune_cli.evaluation.photos import pixels
from finetune_cli.parallel import ordered_map
from finetune_cli.progress import Observer
from finetune_cli.report import page
from finetune_cli.report.thumbnails import THUMBNAIL, Figure, jpeg
from finetune_cli.runs import run
from finetune_cli.text import brief, counted, shown

FILE = "doctor.html"
_MOST_BYTES = 4_000_000  # of figures
_MOST_BAD = 50
_TITLES = {
    "label": "Labels that may be wrong",
    "near-duplicate": "Near-duplicates",
    "duplicate": "Copies",
    "outlier": "Unlike all others",
    "quality": "Technical trouble",
}
_TEXTS = {
    "label": "High: a head that was fitted without the photo and its nearest photos agree. Look: one of them has "
    "doubts. Many of the photos below are labelled correctly; decide by looking.",
    "near-duplicate": "Left the photo, right the earlier one that shows the same picture.",
    "duplicate": "Left the photo, right the earlier one with the same bytes.",
    "outlier": "The photos whose tenth nearest neighbour is unusually far.",
    "quality": "As the model sees them, cropped and resized.",
}


@dataclass(frozen=True)
class Section:
    """The findings of a problem: `figures` shows the first of `count`."""

    problem: str
    title: str
    text: str
    count: int
    serious: int
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class DoctorPage:
    """All that the template reads; `bad` are lines on the first of `bad_count` photos that cannot be decoded."""

    source: str
    photos: int
    classes: int
    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    bad: tuple[str, ...]
    bad_count: int


def write(path: Path, found: Examination, observer: Observer) -> None:
    """Write the page at `path`. Raises `StorageError`."""
    sections = []
    shares = _shares(found)
    with observer.stage("thumbnails", None) as advance:
        for problem, title in _TITLES.items():
            own = sorted(
                (finding for finding in found.findings if finding.problem == problem), key=lambda each: not each.serious
            )
            figures, size = [], 0
            for figure in ordered_map(_drawer(found), own, found.settings.workers):
                size += figure.size
                if size > shares[problem]:
                    break
                figures.append(figure)
                advance(1)
            sections.append(
                Section(
                    problem=problem,
                    title=title,
                    text=_TEXTS[problem],
                    count=len(own),
                    serious=sum(finding.serious for finding in own),
                    figures=tuple(figures),
                )
            )
    notes = [
        f"{counted(size, 'photo')} look like near-duplicates of each other: too large a part of a class to be kept "
        "on one side of the split"
        for size in found.large
    ]
    data = found.data
    content = DoctorPage(
        source=run.stem(found.settings.config.data.train),
        photos=data.photos,
        classes=len(data.classes),
        sections=tuple(sections),
        notes=tuple(notes),
        bad=tuple(f"{brief(photo.name)}: {shown(photo.reason)}" for photo in found.bad[:_MOST_BAD]),
        bad_count=len(found.bad),
    )
    files.write_text(path, page.render(content, "doctor.html.j2"))


def _shares(found: Examination) -> dict[str, float]:
    """How many bytes of figures each problem may take: what some do not need goes to the others."""
    counts = {problem: sum(finding.problem == problem for finding in found.findings) for problem in PROBLEMS}
    needed = {problem: 12_000.0 * count for problem, count in counts.items()}
    total = sum(needed.values())
    if total <= _MOST_BYTES:
        return dict.fromkeys(PROBLEMS, float(_MOST_BYTES))
    even = _MOST_BYTES / len(PROBLEMS)
    spare = sum(max(even - need, 0) for need in needed.values())
    hungry = sum(need > even for need in needed.values())
    return {problem: even + (spare / hungry if need > even else 0) for problem, need in needed.items()}


def _drawer(found: Examination) -> Callable[[Finding], Figure]:
    """Draws a finding: its photo, and beside it the one that it is compared with."""
    small = replace(found.settings.image, size=THUMBNAIL)
    classes = found.data.classes

    def draw(finding: Finding) -> Figure:
        name, lines = brief(finding.path), (brief(classes[finding.photo.label]), shown(finding.evidence))
        pictures: list[NDArray[np.uint8]] = []
        for sample in (finding.photo, finding.other):
            if sample is not None:
                try:
                    pictures.append(pixels(sample, small))
                except BadImage:
                    return Figure(name, None, lines)
        picture = pictures[0] if len(pictures) == 1 else heatmap.side_by_side(*pictures, gap=4)
        return Figure(name, jpeg(picture), lines)

    return draw
