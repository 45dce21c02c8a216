"""The same training with one thread and with two, each from an empty cache, by the real command: the same bits.

What this cannot show is described in docs/reliability.md: another processor, other versions, or a GPU may round
differently.
"""

import pytest
import runs_fixture
import trainings
from trainings import SAME, Command, contents

SOLVERS = {
    "adam": ["training.solver=adam", "training.epochs=8", "training.batch_size=16", "model.dropout=0.3"],
    "lbfgs": ["training.solver=lbfgs"],
}


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_threads_change_no_bit(tmp_path, solver, record_property):
    runs_fixture.draw_photos(tmp_path / "photos", ("ant", "bee", "wasp"))
    trainings.build_backbone(tmp_path / "tiny.keras")
    found = []
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        folder.mkdir()
        settings = ["data.train=../photos/train", "model.backbone=../tiny.keras", f"image.size={runs_fixture.SIZE}"]
        settings += ["augmentation.horizontal_flip=true", "runtime.cache_dir=cache", f"runtime.workers={threads}"]
        variables = {"OMP_NUM_THREADS": str(threads)}
        ended = Command(folder, "train", *settings, *SOLVERS[solver], variables=variables).end()
        assert ended.code == 0, ended.errors
        found.append(contents(folder / "runs" / "photos-1"))
    one, two = found
    different = {name for name in one if one[name] != two[name]}
    assert different == {"config.yaml", "environment.json"}, "these two say how many threads there were"
    record_property("tries", len(SAME))
