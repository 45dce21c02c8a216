"""A copy of the tiny run that can answer `unknown`, made without another training."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from runs_fixture import TinyRun

from finetune_cli.evaluation.photos import photos_of_run
from finetune_cli.inference.predictor import InsightfulPredictor
from finetune_cli.metrics.novelty import NoveltyScore
from finetune_cli.photos import scan
from finetune_cli.runs import novelty as stored
from finetune_cli.runs import run as runs
from finetune_cli.runs.manifest import Unknown
from finetune_cli.runs.run import Run
from finetune_cli.training import unknown


def features(run: Run, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Features ``(n, D)`` and logits ``(n, C)`` of the photos of a split."""
    predictor = InsightfulPredictor(run, 1)
    samples = photos_of_run(run, None, 1, lambda _n: None, split).samples
    pixels = np.stack([scan.decode_sample(sample, run.image_settings) for sample in samples])
    found = predictor.insight(pixels).features
    return found, found @ predictor.end.kernel + predictor.end.bias


def build(tiny: TinyRun, folder: Path, energy_weight: float = 0.0) -> Run:
    """The run in `folder`; all of its 30 validation photos set the threshold."""
    shutil.copytree(tiny.run.folder, folder, ignore=shutil.ignore_patterns("evaluations"))
    references = unknown.as_stored(features(tiny.run, "train")[0])
    scores = np.sort(NoveltyScore(references, energy_weight)(*features(tiny.run, "val")))
    names = stored.write(folder, references.astype(np.float16), scores)
    facts = Unknown(
        false_rejects=0.05,
        interval=unknown.interval(0.05, len(scores)),
        references=len(references),
        held_out=len(scores),
        energy_weight=energy_weight,
        detection={"ant": 0.25, "bee": 0.5, "wasp": 0.75},
        compared={"distance": 0.4, "distance and energy": 0.5},
        tuned=False,
    )
    roots = {split: str(tiny.photos / split) for split in tiny.run.manifest.roots}
    manifest = replace(tiny.run.manifest, unknown=facts, roots=roots)
    return runs.finish(folder, manifest, [*tiny.run.manifest.files, *names])
