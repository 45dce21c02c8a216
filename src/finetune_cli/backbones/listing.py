"""`backbones`: the backbones that `model.backbone` can name, without loading TensorFlow or Keras."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from finetune_cli.backbones.registry import BUNDLED, TABLE


@dataclass(frozen=True, slots=True)
class Row:
    """One backbone.

    `parameters` and `megabytes` are without the classification top, in float32; `input_size`: the side of a photo in
    pixels that the weights were trained with, `min_size`: the smallest possible; `features`: the width D of what the
    head is trained on. `weights`: `bundled`, `keras-cache` (downloaded earlier), or `download`.
    """

    name: str
    keras_name: str | None
    parameters: int
    megabytes: float
    input_size: int
    min_size: int
    features: int
    weights: str

    def to_json(self) -> dict[str, object]:
        """The row as an element of a JSON array."""
        return asdict(self)


def backbones() -> Iterator[Row]:
    """All backbones, the bundled one first and the others by the number of their parameters."""
    for name, info in sorted(TABLE.items(), key=lambda item: (item[0] != BUNDLED, item[1].parameters)):
        assert info.parameters is not None
        assert info.width is not None
        weights = "bundled"
        if info.path is None:
            weights = "keras-cache" if info.published_weights(info.default_size).path.is_file() else "download"
        yield Row(
            name,
            info.factory or None,
            info.parameters,
            round(4 * info.parameters / 1e6, 1),
            info.default_size,
            info.min_size,
            info.width,
            weights,
        )
