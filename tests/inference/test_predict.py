"""`predict` by itself, with a predictor that needs no model: the answers, their order and their forms."""

from collections.abc import Sequence

import numpy as np
import pytest
from photo_files import write_photo

from finetune_cli.config import schema
from finetune_cli.errors import UsageError
from finetune_cli.inference.predict import predict
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.progress import Silent
from finetune_cli.training import prepare


class Guess:
    """Answers 0.6 for the first class, and the rest for the second."""

    def __init__(self, classes: Sequence[str] = ("ant", "bee")) -> None:
        self.classes = classes
        self.settings = ImageSettings(32)
        self.calls: list[int] = []

    def probabilities(self, photos: np.ndarray) -> np.ndarray:
        self.calls.append(len(photos))
        return np.tile(np.float32([0.6, 0.4]), (len(photos), 1))


def test_a_class_named_unsure_is_not_mixed_up_with_the_answer(tmp_path):
    write_photo(tmp_path / "a.png", "a")
    [row] = predict(Guess(), [tmp_path / "a.png"], top_k=1, min_confidence=0.7)
    assert row.label == "unsure"
    guess = Guess(("unsure", "bee"))
    with pytest.raises(UsageError, match="a class named unsure"):
        predict(guess, [tmp_path / "a.png"], top_k=1, min_confidence=0.7)
    [row] = predict(guess, [tmp_path / "a.png"], top_k=1)  # such a model can still be used
    assert (row.label, row.probability) == ("unsure", pytest.approx(0.6))


@pytest.mark.parametrize(("name", "warned"), [("unsure", True), ("Unsure things", False)])
def test_training_warns_of_a_class_named_unsure(tmp_path, name, warned):
    for i in range(12):
        write_photo(tmp_path / "photos" / ("ant" if i % 2 else name) / f"{i}.png", str(i))
    warnings: list[str] = []

    class Listening(Silent):
        def warn(self, text: str) -> None:
            warnings.append(text)

    settings = [f"data.train={tmp_path / 'photos'}", f"runtime.cache_dir={tmp_path / 'cache'}"]
    prepare.index(schema.load(None, settings), Listening())
    assert any("--min-confidence" in text for text in warnings) == warned
