"""`report.html` of an evaluation: one small file, no network, no script; names are text whatever they hold.

Every list has a limit, and says how much it leaves out; the photos behind the confusion matrix take the room that the
rest leaves. Sections that need the training features take them from the cache; without them, the section says so.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune_cli import files, places
from finetune_cli.config.load import load_config
from finetune_cli.drawing import figures
from finetune_cli.errors import FinetuneError
from finetune_cli.evaluation.judge import Judgement
from finetune_cli.inference.predictor import InsightfulPredictor
from finetune_cli.parallel import cores
from finetune_cli.photos.groups import propose
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Observer
from finetune_cli.report import charts, refit_data, refits, sentences, thumbnails, tuning, unknown
from finetune_cli.report import matrix as confusion
from finetune_cli.report.page import (
    ClassTable,
    Copies,
    CountRow,
    Counts,
    Curve,
    CurveRow,
    Duplicates,
    Examples,
    Fact,
    LeftOut,
    Origin,
    Page,
    Refits,
    render,
)  # fmt: skip
from finetune_cli.report.refit_data import Material
from finetune_cli.report.refits import FRACTIONS, Judges, LearningCurve, Suspect
from finetune_cli.report.thumbnails import Figure
from finetune_cli.runs.run import Run
from finetune_cli.tables import parse_numbers
from finetune_cli.text import brief, shown

NAME = "report.html"
LIMIT = 5_000_000  # bytes of the file
_EXAMPLES = 12
_MOST_SUSPECTS = 24
# If more than this share of the photos was trained on, they say nothing about heads that were fitted on them.
_MOST_SEEN = 0.1
_MOST_ROWS = 100
_MOST_CONFIG = 20_000  # characters


def report(judged: Judgement, folder: Path, observer: Observer) -> Path:
    """Write report.html, whose path is returned, and confusion_matrix.png into `folder`. Raises `StorageError`."""
    run = judged.run
    with observer.stage("pictures for the report", None) as advance:
        pictures = confusion.pictures(judged, cores(), advance)
        examples = _examples(judged)
    evaluation, calibration, answers = judged.evaluation, judged.calibration, judged.answers
    page = Page(
        run=shown(run.name),
        source=shown(judged.photos.source),
        backbone=shown(run.manifest.backbone.name),
        created=shown(run.manifest.created[:10]),
        verdict=tuple(sentences.verdict(judged)),
        evaluation=evaluation,
        calibration=calibration,
        counts=_counts(judged),
        notes=tuple(brief(note, 400) for note in judged.photos.notes),
        left_out=tuple(LeftOut(brief(bad.name), brief(bad.reason, 200)) for bad in judged.bad[:_MOST_ROWS]),
        left_out_count=len(judged.bad),
        history=_history(run),
        tuning=tuning.section(run),
        matrix=confusion.matrix(judged, pictures),
        classes=_classes(judged),
        examples=examples,
        feature_map=run.manifest.backbone.feature_map,
        cross_validated=judged.photos.part == "folds",
        reliability=charts.reliability(
            None if calibration is None else calibration.before,
            evaluation.calibration if calibration is None else calibration.after,
        ),
        coverage=charts.coverage(
            answers.probabilities.max(axis=1), answers.predicted == answers.labels, evaluation.coverage
        ),
        unknown=unknown.section(judged),
        refits=_refits(judged, observer),
        duplicates=_duplicates(judged),
        groups=_likely_groups(run),
        origin=_origin(run),
    )
    path = folder / NAME
    root = run.folder if folder.is_relative_to(run.folder) else folder
    files.write_text(path, _within_limit(page, judged, pictures), root)
    figures.write_figures(folder, evaluation, root=root)
    return path


def _within_limit(page: Page, judged: Judgement, pictures: Mapping[int, str | None]) -> str:
    """The HTML of `page`, with as many of the `pictures` behind its confusion matrix as `LIMIT` allows."""
    html = render(page)
    for budget in (confusion.BUDGET // 2, confusion.BUDGET // 4, 0):
        if len(html.encode("utf-8", "replace")) < LIMIT:
            break
        html = render(replace(page, matrix=confusion.matrix(judged, pictures, budget)))
    return html


def _counts(judged: Judgement) -> Counts:
    """Photos by class and split; evaluated photos that are not the run's have a column of their own.

    Of very many classes, those with the fewest training photos.
    """
    rows = judged.run.split()
    counts = Counter((row.label, row.split) for row in rows)
    columns = [split for split in ("train", "val", "test") if any(row.split == split for row in rows)]
    names = {"train": "training", "val": "validation", "test": "test", "data": "evaluated"}
    if judged.photos.part == "data":
        columns.append("data")
        counts.update((judged.run.classes[sample.label], "data") for sample in judged.answers.samples)
    classes = judged.run.classes
    if len(classes) > _MOST_ROWS:
        classes = tuple(sorted(classes, key=lambda name: counts[name, columns[0]])[:_MOST_ROWS])
    return Counts(
        columns=tuple(names[column] for column in columns),
        rows=tuple(CountRow(brief(name), tuple(counts[name, column] for column in columns)) for name in classes),
        totals=tuple(sum(counts[name, column] for name in judged.run.classes) for column in columns),
        more=len(judged.run.classes) - len(classes),
    )


def _classes(judged: Judgement) -> ClassTable:
    """The scores of the classes that occur; of very many, the weakest."""
    rows = [row for row in judged.evaluation.per_class if row.support or row.predicted]
    found = rows if len(rows) <= _MOST_ROWS else sorted(rows, key=lambda row: row.f1 or 0.0)[:_MOST_ROWS]
    return ClassTable(tuple(found), len(rows) - len(found), len(judged.run.classes) - len(rows))


def _history(run: Run) -> tuple[charts.Chart, ...]:
    if "history.csv" not in run.manifest.files:
        return ()
    rows = parse_numbers(run.read("history.csv"))
    return tuple(charts.learning(rows)) if rows else ()


def _examples(judged: Judgement) -> Examples:
    """The most confident mistakes and the least confident correct predictions, with heat maps."""
    answers, classes = judged.answers, [brief(name) for name in judged.run.classes]
    confidence, right = answers.probabilities.max(axis=1), answers.predicted == answers.labels
    order = np.argsort(-confidence, kind="stable")
    mistakes = [int(i) for i in order if not right[i]][:_EXAMPLES]
    unsure = [int(i) for i in order[::-1] if right[i]][:_EXAMPLES]
    second = np.argsort(-answers.probabilities, axis=1, kind="stable")[:, 1]
    pairs = [(int(answers.predicted[i]), int(answers.labels[i])) for i in mistakes]
    pairs += [(int(answers.predicted[i]), int(second[i])) for i in unsure]
    chosen = [answers.samples[i] for i in mistakes + unsure]
    pictures = thumbnails.contrasts(InsightfulPredictor(judged.run, cores()), chosen, pairs, cores())

    def figure(i: int, pair: tuple[int, int], picture: str | None) -> Figure:
        label = () if right[i] else (f"labelled {classes[answers.labels[i]]}",)
        shares = [f"{sentences.percent(float(answers.probabilities[i, j]))} {classes[j]}" for j in pair]
        return Figure(brief(answers.samples[i].name), picture, (*label, *shares))

    figures = [figure(*item) for item in zip(mistakes + unsure, pairs, pictures, strict=True)]
    return Examples(
        mistakes=tuple(figures[: len(mistakes)]),
        wrong=int((~right).sum()),
        unsure=tuple(figures[len(mistakes) :]),
        right=int(right.sum()),
    )


def _duplicates(judged: Judgement) -> Duplicates:
    """Photos that are, byte for byte, in two splits of the run, or evaluated and in what it was trained on."""
    paths: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # digest -> split -> paths
    for row in judged.run.split():
        paths[row.digest][row.split].append(row.path)
    if judged.photos.part == "data":
        for sample in judged.answers.samples:
            if {"train", "val", "evaluated"} & paths[sample.digest].keys():
                paths[sample.digest]["evaluated"].append(sample.name)
    found = [by_split for by_split in paths.values() if len(by_split) > 1]
    rows = tuple(
        tuple(Copies(split, brief(copies[0]), len(copies) - 1) for split, copies in by_split.items())
        for by_split in found[:_MOST_ROWS]
    )
    return Duplicates(rows, len(found) - len(rows))


def _likely_groups(run: Run) -> str | None:
    """A sentence about photos that seem to belong together but were split, if no groups were given."""
    splits: dict[str, list[tuple[str, str]]] = defaultdict(list)
    folds: list[int | None] = []
    for row in run.split():
        if row.group:
            return None
        splits[row.split].append((row.path, row.label))
        if row.split == "train":
            folds.append(row.fold)
    proposal = propose(splits, folds)
    if proposal is None or not proposal.shared:
        return None
    return (
        f"{proposal}. If they do, the accuracy may look better than it is: train with data.group_regex={proposal.regex}"
    )


def _refits(judged: Judgement, observer: Observer) -> Refits:
    """The sections that need the training features, or the reason why there are none."""
    run, out_of_fold = judged.run, judged.photos.part == "folds"
    try:
        config = load_config(run.file("config.yaml"))
        material = refits.with_strength(refit_data.load(run, config, out_of_fold))
    except FinetuneError as exc:
        return Refits(problem="; ".join(map(shown, filter(None, (exc.problem, exc.remedy)))))
    photos_are_new = judged.seen <= _MOST_SEEN * len(judged.answers.samples)
    if out_of_fold:
        judges = Judges.of_folds(material)
    else:
        judges = Judges(judged.answers.features, judged.answers.labels[:: judged.answers.stride])
    sides = len(judges.sides(material))
    fits = refits.folds(material) + photos_are_new * (refits.fits(sides) + 2 * (material.views > 1))
    with observer.stage("refits for the report", fits, "fits") as advance:
        suspects = refits.suspects(material, advance)
        figures = _suspects(judged, suspects[:_MOST_SUSPECTS])
        found = Refits(suspects=figures, suspect_count=len(suspects), frozen=material.frozen)
        if not photos_are_new:
            problem = "Photos that the run was trained on cannot answer this; evaluate on others."
            return replace(found, curve_problem=problem)
        curve = refits.learning_curve(material, judges, advance)
        found = replace(found, curve=_curve(curve, judges, material, run))
        if material.views > 1:
            found = replace(found, augmentation=sentences.augmentation(refits.effect_of_views(material, judges)))
            advance(2)
    return found


def _suspects(judged: Judgement, found: Sequence[Suspect]) -> tuple[Figure, ...]:
    run, moved = judged.run, judged.photos.moved
    root = run.data_roots().get("train", run.folder)
    samples = [
        Sample(moved.get(row.digest, places.join(root, row.path)), row.path, 0, row.digest)
        for row in (suspect.row for suspect in found)
    ]
    pictures = thumbnails.thumbnails(samples, run.image_settings, cores(), lambda _n: None)
    return tuple(
        Figure(
            brief(suspect.row.path),
            picture,
            (
                f"labelled {brief(suspect.row.label)} ({sentences.percent(suspect.probability)})",
                f"perhaps {brief(suspect.suggested)} ({sentences.percent(suspect.suggested_probability)})",
            ),
        )
        for suspect, picture in zip(found, pictures, strict=True)
    )


def _curve(curve: LearningCurve, judges: Judges, material: Material, run: Run) -> Curve:
    """The learning curve: the classes that gained most from the second half of the photos first."""
    order = [int(i) for i in np.argsort(-np.nan_to_num(curve.gain, nan=-2)) if curve.support[i]]
    low = float(np.nanmin(curve.recall))
    parts = "mean of three random parts" if judges.folds is None else "without each fold in turn, which judges it"
    recalls = {i: tuple(float(share) for share in curve.recall[:, i]) for i in order[:_MOST_ROWS]}
    rows = tuple(
        CurveRow(
            name=brief(run.classes[i]),
            recall=recall,
            gain=float(curve.gain[i]),
            error=float(curve.error[i]),
            photos=int(curve.support[i]),
            spark=charts.spark(recall, low),
        )
        for i, recall in recalls.items()
    )
    return Curve(
        sentence=sentences.more_photos(curve, run.classes),
        how=f"The head fitted on a part of the photos of every class; {parts}.",
        chart=charts.by_photos(curve.photos, [float(share) for share in curve.accuracy]),
        fractions=tuple(f"{fraction:.0%}" for fraction in FRACTIONS),
        rows=rows,
        more=len(order) - len(rows),
        used=len(material.labels),
        photos=material.photos,
    )


def _origin(run: Run) -> Origin:
    """The resolved config as text, and the environment as rows."""
    try:
        text = run.read("config.yaml").decode("utf-8")
        environment = json.loads(run.read("environment.json"))
    except (FinetuneError, ValueError) as exc:
        return Origin(f"not readable: {exc}", 0, ())
    packages = environment.pop("packages", {})
    return Origin(
        config=text[:_MOST_CONFIG],
        config_more=max(0, len(text) - _MOST_CONFIG),
        environment=tuple(
            Fact(brief(key), brief(_as_text(value), 400)) for key, value in (*environment.items(), *packages.items())
        ),
    )


def _as_text(value: Any) -> str:
    """A value of environment.json on one line."""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_as_text(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
