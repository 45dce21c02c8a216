"""A process that does nothing but checkpoint, for `test_faults.py` to kill.

    python checkpointer.py FOLDER EPOCHS

A stand-in for a training: each epoch changes the arrays in a way that depends on all before. It resumes from the last
whole checkpoint, saves after every epoch, and prints the epoch once it is safe.
"""

import sys
from pathlib import Path

import numpy as np

from finetune_cli.runs import checkpoints


def main(folder: Path, epochs: int) -> None:
    found = checkpoints.load_latest(folder)
    epoch, arrays, history = 0, {"kernel": np.zeros((256, 8)), "moments": np.zeros((256, 8))}, []
    if found is not None:
        epoch, arrays, history = found.epoch, dict(found.arrays), list(found.state["history"])
    while epoch < epochs:
        epoch += 1
        step = np.random.default_rng(epoch).normal(size=(256, 8))
        arrays["moments"] = 0.9 * arrays["moments"] + step
        arrays["kernel"] = np.tanh(arrays["kernel"] + 0.1 * arrays["moments"])
        history = [*history, float(np.abs(arrays["kernel"]).mean())]
        best = history[-1] == max(history)
        checkpoints.save(folder, epoch, arrays, {"history": history}, best)
        print(epoch, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
