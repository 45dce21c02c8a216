"""How many photos of an evaluation are answered `unknown`, although they show a class of the run."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_cli.evaluation.answers import Answers
from finetune_cli.metrics.scores import Proportion, wilson
from finetune_cli.runs.run import Run


@dataclass(frozen=True, eq=False)
class Refused:
    """The photos that are answered `unknown`.

    rate: the share that the run promises at most; approximate: that it expects, and does not promise. photos: ``bool
    (n,)``, which are refused. counted: how many photos `share`, the share that is refused, is computed on: neither
    training photos nor those that chose the score or set its threshold; None if all are such. right: the accuracy on
    the photos that are not refused, None if all are.
    """

    rate: float
    approximate: bool
    photos: NDArray[np.bool_]
    counted: int
    share: Proportion | None
    right: Proportion | None

    def to_json(self) -> dict[str, Any]:
        """The numbers under stable key names."""
        return {
            "false_rejects": self.rate,
            "approximate": self.approximate,
            "refused": int(self.photos.sum()),
            "counted": self.counted,
            **_share("share", self.share),
            **_share("accuracy_of_others", self.right),
        }


def refused(run: Run, answers: Answers) -> Refused | None:
    """Which of the photos in `answers` the run refuses at its own rate; None if it cannot tell.

    It cannot if it was trained without `unknown`; recorded out-of-fold predictions have no p-values.
    """
    facts = run.manifest.unknown
    if facts is None or answers.p_values is None:
        return None
    photos = answers.p_values <= facts.false_rejects
    seen = {row.digest for row in run.split() if row.split in ("train", "val")}
    new = np.array([sample.digest not in seen for sample in answers.samples])
    right = (answers.predicted == answers.labels)[~photos]
    return Refused(
        facts.false_rejects,
        facts.approximate,
        photos,
        int(new.sum()),
        wilson(int(photos[new].sum()), int(new.sum())) if new.any() else None,
        wilson(int(right.sum()), len(right)) if len(right) else None,
    )


def _share(name: str, share: Proportion | None) -> dict[str, Any]:
    if share is None:
        return {name: None, f"{name}_interval": None}
    return {name: share.value, f"{name}_interval": [share.low, share.high]}
