"""The score as a part of the model that answers: what NumPy gives."""

import numpy as np
import pytest
import unknown_run

from finetune_cli.inference.predictor import InsightfulPredictor, RunPredictor, Source
from finetune_cli.photos.decode import decode
from finetune_cli.runs import novelty as stored


@pytest.mark.parametrize("energy_weight", [0.0, 0.3])
def test_openvino_gives_the_score_of_numpy(tiny_run, tmp_path, energy_weight):
    run = unknown_run.build(tiny_run, tmp_path / "run", energy_weight)
    known = stored.read(run)
    pixels = np.stack([decode(path, run.image_settings) for path in sorted((tiny_run.photos / "test").rglob("*.png"))])
    predictor = InsightfulPredictor(Source.of(run, known), 1)
    insight = predictor.insight(pixels)
    logits = insight.features @ predictor.end.kernel + predictor.end.bias
    np.testing.assert_allclose(
        predictor._runtime.infer_all(pixels)[-1][:, 0], known.score(insight.features, logits), atol=2e-6
    )
    answers = RunPredictor(run, 1).answers(pixels)
    assert [answer.p_value for answer in answers] == insight.p_values.tolist()
    probabilities = [answer.probabilities for answer in answers]
    np.testing.assert_allclose(probabilities, RunPredictor(tiny_run.run, 1).probabilities(pixels), atol=1e-6)
