"""The limits of image settings are the same in a config, in the manifest of a run and in the card of an export."""

import json
from pathlib import Path

import pytest
from manifest_example import EXAMPLE
from pydantic import ValidationError

from finetune_cli.config.schema import ImageConfig
from finetune_cli.errors import WeightsError
from finetune_cli.exports.card import Card
from finetune_cli.fields import FieldError
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.runs.manifest import Manifest, seal

GOOD = {"size": 224, "resize": "crop", "max_pixels": 1000}


def in_config(image):
    found = ImageConfig(**image)
    return ImageSettings(found.size, found.resize, found.max_pixels)


def in_manifest(image):
    content = {key: value for key, value in EXAMPLE.to_json().items() if key != "sha256"}
    return Manifest.from_json(seal({**content, "image": image})).image


def in_card(image):
    card = {"format": 1, "classes": ["ant", "bee"], "image": image}
    return Card.parse(json.dumps(card), Path("classes.json")).settings


@pytest.mark.parametrize(
    ("read", "error"), [(in_config, ValidationError), (in_manifest, FieldError), (in_card, WeightsError)]
)
def test_image_settings_have_the_same_limits_everywhere(read, error):
    for good in ({"size": 32}, {"size": 1024}, {"resize": "squash"}, {"resize": "pad"}, {"max_pixels": 1}):
        image = {**GOOD, **good}
        assert read(image) == ImageSettings(image["size"], image["resize"], image["max_pixels"])
    for bad in ({"size": 31}, {"size": 1025}, {"size": "224"}, {"size": True}, {"size": 64.5}, {"resize": "fold"},
                {"resize": None}, {"max_pixels": 0}, {"max_pixels": 1e6}):  # fmt: skip
        with pytest.raises(error):
            read({**GOOD, **bad})
