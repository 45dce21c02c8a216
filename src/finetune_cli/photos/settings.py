"""Image settings in JSON: written into the manifest of a run and the card of an export, and checked when read."""

from finetune_cli.config.image import LARGEST_SIZE, LEAST_MAX_PIXELS, RESIZINGS, SMALLEST_SIZE
from finetune_cli.fields import Fields
from finetune_cli.photos.decode import ImageSettings


def to_json(settings: ImageSettings) -> dict[str, str | int]:
    """`settings` as plain JSON values."""
    return {"size": settings.size, "resize": settings.resize, "max_pixels": settings.max_pixels}


def from_json(fields: Fields) -> ImageSettings:
    """The settings in `fields`, within the limits of the config. Raises `FieldError`."""
    return ImageSettings(
        fields.integer("size", SMALLEST_SIZE, LARGEST_SIZE),
        fields.choice("resize", RESIZINGS),
        fields.integer("max_pixels", LEAST_MAX_PIXELS),
    )
