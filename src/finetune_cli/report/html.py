"""`report.html` of an evaluation: one small file, no network, no script; names are text whatever they hold.

Every list has an end, which is said; the photos behind the confusion matrix take the room that the rest leaves.
Sections that need the training features take them from the cache; where those are gone, the section says so.
"""

import base64
import csv
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from finetune_cli import __version__, files
from finetune_cli.config.load import load_config
from finetune_cli.drawing import figures
from finetune_cli.errors import FinetuneError
from finetune_cli.evaluation.judge import Judged
from finetune_cli.inference.predictor import InsightfulPredictor
from finetune_cli.parallel import cores
from finetune_cli.photos.groups import propose
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import Observer
from finetune_cli.report import charts, refit_data, refits, sentences, thumbnails, tuning
from finetune_cli.report import matrix as confusion
from finetune_cli.report.refits import FRACTIONS, Judges, LearningCurve, Suspect
from finetune_cli.report.thumbnails import Figure
from finetune_cli.runs.run import Run
from finetune_cli.text import brief, shown

NAME = "report.html"
LIMIT = 5_000_000  # bytes of the file
_EXAMPLES = 12
_MOST_SUSPECTS = 24
_MOST_SEEN = 0.1  # of more photos that were trained on, nothing follows about heads that were fitted on them
_MOST_ROWS = 100
_MOST_CONFIG = 20_000  # characters

Values = dict[str, Any]


def report(judged: Judged, folder: Path, observer: Observer) -> Path:
    """Write report.html, whose path is returned, and confusion_matrix.png into `folder`. Raises `StorageError`."""
    run = judged.run
    with observer.stage("pictures for the report", None) as advance:
        made = confusion.pictures(judged, cores(), advance)
        examples = _examples(judged)
    values = {
        "run": shown(run.name),
        "source": shown(judged.photos.source),
        "version": __version__,
        "backbone": shown(run.manifest.backbone.name),
        "created": shown(run.manifest.created[:10]),
        "verdict": sentences.verdict(judged),
        "evaluation": judged.evaluation,
        "calibration": judged.calibration,
        "counts": _counts(judged),
        "history": _history(run),
        "tuning": tuning.section(run),
        "classes": _classes(judged),
        "examples": examples,
        "feature_map": run.manifest.backbone.feature_map,
        "reliability": charts.reliability(
            None if judged.calibration is None else judged.calibration.before,
            judged.evaluation.calibration if judged.calibration is None else judged.calibration.after,
        ),
        "coverage": charts.coverage(
            judged.answers.probabilities.max(axis=1),
            judged.answers.predicted == judged.answers.labels,
            judged.evaluation.coverage,
        ),
        "duplicates": _duplicates(judged),
        "groups": _likely_groups(judged.run),
        "notes": [brief(note, 400) for note in judged.photos.notes],
        "bad": [(brief(photo.name), brief(photo.reason, 200)) for photo in judged.bad[:_MOST_ROWS]],
        "bad_count": len(judged.bad),
        **_from_training(judged, observer),
        **_surroundings(run),
    }
    path = folder / NAME
    root = judged.run.folder if folder.is_relative_to(judged.run.folder) else folder
    files.write_text(path, _page(values, judged, made), root)
    figures.write_figures(folder, judged.evaluation, root=root)
    return path


def _page(values: Values, judged: Judged, made: Mapping[int, str | None]) -> str:
    """The page with as many of the photos `made` as `LIMIT` lets it hold."""
    for budget in (confusion.BUDGET, confusion.BUDGET // 2, confusion.BUDGET // 4, 0):
        page = _render({**values, "matrix": confusion.matrix(judged, made, budget)})
        if len(page.encode("utf-8", "replace")) < LIMIT:
            break
    return page


def _render(values: Values) -> str:
    import jinja2

    templates = resources.files("finetune_cli.report") / "templates"
    style = (templates / "report.css").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": sentences.percent, "brief": brief}
    template = environment.from_string((templates / "report.html.j2").read_text("utf-8"))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    return template.render(style=style, style_digest=digest, **values)


def _counts(judged: Judged) -> Values:
    """Photos by class and split; the evaluated ones have a column of their own when they are not of the run.

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
    return {
        "columns": [names[column] for column in columns],
        "rows": [(brief(name), [counts[name, column] for column in columns]) for name in classes],
        "totals": [sum(counts[name, column] for name in judged.run.classes) for column in columns],
        "more": len(judged.run.classes) - len(classes),
    }


def _classes(judged: Judged) -> Values:
    """The scores of the classes that occur; of very many, the weakest."""
    rows = [row for row in judged.evaluation.per_class if row.support or row.predicted]
    found = rows if len(rows) <= _MOST_ROWS else sorted(rows, key=lambda row: row.f1 or 0.0)[:_MOST_ROWS]
    return {"rows": found, "more": len(rows) - len(found), "absent": len(judged.run.classes) - len(rows)}


def _history(run: Run) -> list[charts.Chart]:
    if "history.csv" not in run.manifest.files:
        return []
    text = io.StringIO(run.read("history.csv").decode("utf-8"), newline="")
    rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(text)]
    return charts.learning(rows) if rows else []


def _examples(judged: Judged) -> Values:
    """The most confident mistakes and the least sure right answers, with what speaks for one class against another."""
    answers, classes = judged.answers, [brief(name) for name in judged.run.classes]
    confidence, right = answers.probabilities.max(axis=1), answers.predicted == answers.labels
    order = np.argsort(-confidence, kind="stable")
    mistakes = [int(i) for i in order if not right[i]][:_EXAMPLES]
    unsure = [int(i) for i in order[::-1] if right[i]][:_EXAMPLES]
    second = np.argsort(-answers.probabilities, axis=1, kind="stable")[:, 1]
    pairs = [(int(answers.predicted[i]), int(answers.labels[i])) for i in mistakes]
    pairs += [(int(answers.predicted[i]), int(second[i])) for i in unsure]
    chosen = [answers.samples[i] for i in mistakes + unsure]
    made = thumbnails.contrasts(InsightfulPredictor(judged.run, cores()), chosen, pairs, cores())

    def figure(i: int, pair: tuple[int, int], picture: str | None) -> Figure:
        one, other = pair
        p = answers.probabilities[i]
        true = (f"labelled {classes[answers.labels[i]]}",) if not right[i] else ()
        told = (
            f"{sentences.percent(float(p[one]))} {classes[one]}",
            f"{sentences.percent(float(p[other]))} {classes[other]}",
        )
        return Figure(brief(answers.samples[i].name), picture, (*true, *told))

    figures = [figure(*item) for item in zip(mistakes + unsure, pairs, made, strict=True)]
    return {
        "mistakes": figures[: len(mistakes)],
        "wrong": int((~right).sum()),
        "unsure": figures[len(mistakes) :],
        "right": int(right.sum()),
    }


def _duplicates(judged: Judged) -> Values:
    """Photos that lie, byte for byte, in two splits of the run, or among those evaluated and in what it learnt from."""
    places: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in judged.run.split():
        places[row.digest][row.split].append(row.path)
    if judged.photos.part == "data":
        for sample in judged.answers.samples:
            if {"train", "val", "evaluated"} & places[sample.digest].keys():
                places[sample.digest]["evaluated"].append(sample.name)
    found = [of_split for of_split in places.values() if len(of_split) > 1]
    rows = [
        [(split, brief(paths[0]), len(paths) - 1) for split, paths in of_split.items()]
        for of_split in found[:_MOST_ROWS]
    ]
    return {"rows": rows, "more": len(found) - len(rows)}


def _likely_groups(run: Run) -> str | None:
    """A sentence about photos that seem to belong together but were split, if no groups were given."""
    splits: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in run.split():
        if row.group:
            return None
        splits[row.split].append((row.path, row.label))
    proposal = propose(splits)
    if proposal is None or not proposal.shared:
        return None
    return (
        f"{proposal}. If they do, the accuracy may look better than it is: train with data.group_regex={proposal.regex}"
    )


def _from_training(judged: Judged, observer: Observer) -> Values:
    """The sections that need the training features; `training_problem` says why they are empty."""
    run = judged.run
    values: Values = {
        "training_problem": "", "suspects": [], "suspect_count": 0, "views": "", "curve": None, "photos_used": (0, 0),
        "refits_problem": "",
    }  # fmt: skip
    try:
        stuff = refits.with_strength(refit_data.load(run, load_config(run.file("config.yaml"))))
    except FinetuneError as exc:
        return {**values, "training_problem": "; ".join(map(shown, filter(None, (exc.problem, exc.remedy))))}
    if judged.seen > _MOST_SEEN * len(judged.answers.samples):
        with observer.stage("refits for the report", refits.FOLDS, "fits") as advance:
            suspects = refits.suspects(stuff, advance)
        return {
            **values,
            "suspects": _suspects(judged, suspects[:_MOST_SUSPECTS]),
            "suspect_count": len(suspects),
            "refits_problem": "Photos that the run was trained on cannot tell; evaluate on others.",
        }
    judges = Judges(judged.answers.features, judged.answers.labels[:: judged.answers.stride])
    with observer.stage(
        "refits for the report", refits.FOLDS + refits.fits() + 2 * (stuff.views > 1), "fits"
    ) as advance:
        suspects = refits.suspects(stuff, advance)
        curve = refits.learning_curve(stuff, judges, advance)
        if stuff.views > 1:
            values["views"] = sentences.augmentation(refits.effect_of_views(stuff, judges))
            advance(2)
    return {
        **values,
        "suspects": _suspects(judged, suspects[:_MOST_SUSPECTS]),
        "suspect_count": len(suspects),
        "curve": _curve(curve, run),
        "photos_used": (len(stuff.labels), stuff.photos),
    }


def _suspects(judged: Judged, found: Sequence[Suspect]) -> list[Figure]:
    run, places = judged.run, judged.photos.places
    root = run.data_roots().get("train", run.folder)
    samples = [
        Sample(places.get(row.digest, root / row.path), row.path, 0, row.digest) for row in (one.row for one in found)
    ]
    made = thumbnails.thumbnails(samples, run.image_settings, cores(), lambda _n: None)
    return [
        Figure(
            brief(suspect.row.path),
            picture,
            (
                f"labelled {brief(suspect.row.label)} ({sentences.percent(suspect.probability)})",
                f"perhaps {brief(suspect.suggested)} ({sentences.percent(suspect.suggested_probability)})",
            ),
        )
        for suspect, picture in zip(found, made, strict=True)
    ]


def _curve(curve: LearningCurve, run: Run) -> Values:
    """The learning curve: the classes that gained most from the second half of the photos first."""
    order = [int(i) for i in np.argsort(-np.nan_to_num(curve.gain, nan=-2)) if curve.support[i]]
    low = float(np.nanmin(curve.recall))
    rows = [
        {
            "name": brief(run.classes[i]),
            "recall": [float(share) for share in curve.recall[:, i]],
            "gain": float(curve.gain[i]),
            "error": float(curve.error[i]),
            "photos": int(curve.support[i]),
            "spark": charts.spark([float(share) for share in curve.recall[:, i]], low),
        }
        for i in order[:_MOST_ROWS]
    ]
    return {
        "sentence": sentences.more_photos(curve, run.classes),
        "chart": charts.by_photos(curve.photos, [float(share) for share in curve.accuracy]),
        "fractions": [f"{fraction:.0%}" for fraction in FRACTIONS],
        "rows": rows,
        "more": len(order) - len(rows),
    }


def _surroundings(run: Run) -> Values:
    """The resolved config as text, and the environment as rows."""
    try:
        text = run.read("config.yaml").decode("utf-8")
        environment = json.loads(run.read("environment.json"))
    except (FinetuneError, ValueError) as exc:
        return {"config": f"not readable: {exc}", "config_more": 0, "environment": []}
    packages = environment.pop("packages", {})
    rows = [*environment.items(), *packages.items()]
    return {
        "config": text[:_MOST_CONFIG],
        "config_more": max(0, len(text) - _MOST_CONFIG),
        "environment": [(brief(key), brief(_told(value), 400)) for key, value in rows],
    }


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_told(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
