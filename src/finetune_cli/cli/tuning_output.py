"""What `finetune train` prints of fine-tuning: what is planned, and what was tried and kept."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetune_cli.cli.console import Console
from finetune_cli.files import human_bytes
from finetune_cli.text import counted

if TYPE_CHECKING:
    from finetune_cli.training.tuning.budget import Budget


def fine_tuned(console: Console, facts: Mapping[str, Any]) -> None:
    """What fine-tuning tried and kept, and what that is worth on the photos."""
    judges = "validation photos" if "folds" not in facts else "out-of-fold predictions"
    console.print(f"\nfine-tuning, by the {judges}:")
    rows = []
    for each in facts["candidates"]:
        trial = facts["trainings"][each["training"]] if each["training"] is not None else None
        rows.append(
            (
                "kept" if each["kept"] else "",
                each["name"],
                "" if trial is None else trial["first_trained"],
                "" if trial is None else f"{trial['learning_rate']:g}",
                f"{each['log_loss']:.4f}",
                "" if trial is None else _gain(each["gain"], each["gain_error"]),
                f"{each['accuracy']:.1%}",
            )
        )
    console.table(
        ("", "model", "trained from", "learning rate", "log loss", "gain", "accuracy"), rows, right=(3, 4, 5, 6)
    )
    for trial in facts["trainings"]:
        if trial.get("diverged"):
            console.print(f"the training from {trial['first_trained']} at {trial['learning_rate']:g} diverged")
    for split, found in facts["compared"].items():
        if facts["kept"] != "frozen":
            console.print(
                f"{split}: frozen {found['frozen']['accuracy']:.1%}, kept {found['kept']['accuracy']:.1%}; only frozen "
                f"is right on {counted(found['only_frozen_right'], 'photo')}, only kept on "
                f"{found['only_kept_right']} (McNemar's exact test, p = {found['p_value']:.2g}); see flipped.csv"
            )
    console.print()


def _gain(gain: float, error: float | None) -> str:
    return f"{gain:+.4f}" if error is None else f"{gain:+.4f} ± {error:.4f}"


def planned(console: Console, budget: "Budget") -> None:
    """The end of `train --dry-run`: the stages, and what they take."""

    def row(name: str, photos: object, views: object, seconds: float | None, disk: int) -> tuple[object, ...]:
        return name, photos, views, "-" if seconds is None else f"{seconds:.0f}", human_bytes(disk) if disk else ""

    rows = [row(each.stage, each.photos or "", each.views or "", each.seconds, each.disk) for each in budget.rows]
    total = "total, at most" if len(budget.trials) > 1 else "total"
    rows.append(row(total, "", "", budget.seconds, budget.disk))
    console.table(("stage", "photos", "views", "seconds", "disk"), rows, right=(1, 2, 3, 4))
    console.print("seconds were measured here on a few photos; those marked - are a few; nothing was trained")
