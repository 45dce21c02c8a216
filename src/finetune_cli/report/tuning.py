"""The fine-tuning section of the report: what was tried, what was kept, and which photos changed their answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_cli import places
from finetune_cli.errors import FinetuneError, RunError
from finetune_cli.parallel import cores
from finetune_cli.photos.scan import Sample
from finetune_cli.progress import ignore_progress
from finetune_cli.report import charts, thumbnails
from finetune_cli.report.thumbnails import Figure
from finetune_cli.runs.run import Run
from finetune_cli.tables import parse_csv, parse_numbers
from finetune_cli.text import brief
from finetune_cli.training.tuning.comparison import FLIPPED, FLIPPED_HEADER, HISTORY

_ON_ALL = "on all photos, which leaves none to validate, "
_IN_FOLDS = "without each fold in turn (the curves are means), "
_MOST_FLIPPED = 12  # photos shown of each kind


def section(run: Run) -> dict[str, Any] | None:
    """The values of the section; None when the run was not fine-tuned.

    `problem` is empty, or says why the rest is missing: a damaged file, or a manifest of another program.
    """
    facts = run.manifest.fine_tuning
    if facts is None:
        return None
    try:
        return {
            "problem": "",
            "kept": brief(facts["kept"]),
            "tuned": facts["kept"] != "frozen",
            "folds": "folds" in facts,
            "judges": "out-of-fold predictions" if "folds" in facts else "validation photos",
            "trainings": [_training(run, number, each) for number, each in enumerate(facts["trainings"])],
            "candidates": [_candidate(each, facts["trainings"]) for each in facts["candidates"]],
            "compared": [
                (brief(split), found["frozen"], found["kept"], found["only_frozen_right"], found["only_kept_right"],
                 float(found["p_value"]))
                for split, found in facts["compared"].items()
            ],
            **_flipped(run),
        }  # fmt: skip
    except (FinetuneError, LookupError, TypeError, ValueError, AttributeError, OSError) as exc:
        problem = exc.problem if isinstance(exc, FinetuneError) else f"run.json does not describe it: {exc}"
        return {"problem": brief(problem, 400)}


def _training(run: Run, number: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    diverged = facts.get("diverged") is True
    own = [] if diverged else [row for row in parse_numbers(run.read(HISTORY)) if row["training"] == number]
    if not own and not diverged:
        raise RunError(f"{run.folder / HISTORY} lacks training {number}", "restore the run from a copy")
    return {
        "diverged": diverged,
        "on": _ON_ALL if facts.get("final") is True else _IN_FOLDS if "folds" in facts else "",
        "above": brief(facts["first_trained"]),
        "below": brief(facts["last_frozen"]),
        "weights": f"{int(facts['weights']):,}",
        "epochs": int(facts["epochs"]),
        "rate": f"{float(facts['learning_rate']):g}",
        "views": int(facts["views"]),
        "charts": charts.learning(own) if own else [],
    }


def _candidate(facts: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    number = facts["training"]
    return {
        "name": brief(facts["name"]),
        "above": "" if number is None else brief(trainings[number]["first_trained"]),
        "rate": "" if number is None else f"{float(trainings[number]['learning_rate']):g}",
        "log_loss": float(facts["log_loss"]),
        "accuracy": float(facts["accuracy"]),
        "gain": None if number is None else float(facts["gain"]),
        "error": None if facts["gain_error"] is None else float(facts["gain_error"]),
        "kept": facts["kept"] is True,
    }


def _flipped(run: Run) -> dict[str, Any]:
    """The photos that only one of the two models gets right, of the test photos if there are any."""
    cells = parse_csv(run.read(FLIPPED), FLIPPED_HEADER)
    rows = [dict(zip(FLIPPED_HEADER, row, strict=True)) for row in cells]
    split = "test" if "test" in run.data_roots() else "folds" if "folds" in run.manifest.metrics else "val"
    recorded = "train" if split == "folds" else split
    own = [row for row in rows if row["split"] == split]
    won = [row for row in own if row["kept"] == row["true"]]
    lost = [row for row in own if row["frozen"] == row["true"]]
    chosen = [*won[:_MOST_FLIPPED], *lost[:_MOST_FLIPPED]]
    digests = {(row.split, row.path): row.digest for row in run.split()}
    root = run.data_roots().get(recorded, run.folder)
    samples = [Sample(places.join(root, row["path"]), row["path"], 0, digests[recorded, row["path"]]) for row in chosen]
    made = thumbnails.thumbnails(samples, run.image_settings, cores(), ignore_progress)
    shown = [
        Figure(
            brief(row["path"]),
            picture,
            (f"labelled {brief(row['true'])}", f"frozen {brief(row['frozen'])}", f"kept {brief(row['kept'])}"),
        )
        for row, picture in zip(chosen, made, strict=True)
    ]
    cut = len(won[:_MOST_FLIPPED])
    return {"split": split, "won": shown[:cut], "won_count": len(won), "lost": shown[cut:], "lost_count": len(lost)}
