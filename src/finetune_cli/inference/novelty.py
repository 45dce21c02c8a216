"""The novelty score of `metrics/novelty.py` as a part of an OpenVINO model: one more output, from the same pass.

NumPy would compute it with the threads of its BLAS, which fight with those of OpenVINO for the same cores: a score of
0.5 ms took 100 ms on two busy cores.
"""

from typing import TYPE_CHECKING

import numpy as np

from finetune_cli.inference.linear_end import ModelEnd
from finetune_cli.inference.runtimes import import_openvino
from finetune_cli.metrics.novelty import NEIGHBOURS, NoveltyScore

if TYPE_CHECKING:
    import openvino


def add_score(model: "openvino.Model", end: ModelEnd, score: NoveltyScore) -> None:
    """Add the output `score`, ``float32 (n, 1)``, to `model`, whose linear end is `end`."""
    import_openvino()
    from openvino import opset8 as operations

    axis = np.int64(1)
    flat = operations.reshape(end.features, np.array([-1, len(end.kernel)], np.int64), False)
    unit = operations.normalize_l2(flat, axis, 1e-24, "max")
    similarities = operations.matmul(unit, score.references, False, True)
    nth = np.int64(min(NEIGHBOURS, len(score.references)))
    nearest = operations.topk(similarities, nth, 1, "max", "value").output(0)
    found = operations.subtract(np.float32(1), operations.reduce_min(nearest, axis, True))
    if score.energy_weight:
        logits = operations.add(operations.matmul(flat, end.kernel, False, False), end.bias)
        largest = operations.reduce_max(logits, axis, True)
        others = operations.reduce_sum(operations.exp(operations.subtract(logits, largest)), axis, True)
        energy = operations.negative(operations.add(largest, operations.log(others)))
        found = operations.add(found, operations.multiply(np.float32(score.energy_weight), energy))
    model.add_outputs([found.output(0)])
