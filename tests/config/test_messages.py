"""Validation errors name the key, the line and what was probably meant."""

import re

import pytest
from config_files import problem_of

from finetune_cli.config import messages
from finetune_cli.config.schema import Config


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: {train: a}\naugmentation: none", "`augmentation` is 'none': write its keys below it, or null"),
        ("data: photos", "`data` is 'photos': write its keys below it"),
        ("data: {train: [a]}", "`data.train` is ['a']: write a path"),
        ("data: {train: a}\noutput: {name: ../x}", "`output.name` is '../x': write letters, digits"),
        (
            "data: {train: a}\ntraining: {class_weights: {ants: 0}}",
            "`training.class_weights` is 0: write none, balanced, or class names",
        ),
        ("data: {train: a}\naugmentation: {width_shift_range: true}", "`augmentation.width_shift_range` is True: "),
        ("data: {train: a}\naugmentation: {shear_range: 1.0e+9}", "`augmentation.shear_range` is 1000000000.0: "),
        ("data: {train: a}\n  x: [", "line 2, column 3: "),
    ],
)
def test_problems_are_told_in_the_words_of_a_config(tmp_path, text, told):
    found = problem_of(tmp_path, text)
    assert told in found
    assert "DataConfig" not in found
    assert not re.search("<(class|unicode)", found)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("training.seed", "010", "is '010': input should be a valid integer; a number has no quotes, leading zeros"),
        ("training.seed", "0x10", "is '0x10': input should be a valid integer; a number has no quotes"),
        ("training.seed", "1_000", "is '1_000': input should be a valid integer; a number has no quotes"),
        ("training.seed", "1:30", "is '1:30': input should be a valid integer; a number has no quotes"),
        ("training.seed", "yes", "is 'yes': input should be a valid integer"),
        ("training.seed", "true", "is True: input should be a valid integer"),
        ("training.seed", "1.5", "is 1.5: input should be a valid integer"),
        ("training.label_smoothing", "on", "is 'on': input should be a valid number"),
        ("training.label_smoothing", ".inf", "is inf: "),
        ("training.class_weights", "{ants: yes}", "is 'yes': write none, balanced, or class names with numbers"),
        ("training.class_weights", "{ants: true}", "is True: write none, balanced, or class names with numbers"),
        ("augmentation.rotation_range", "True", "is True: input should be a valid number"),
        ("augmentation.horizontal_flip", "maybe", "is 'maybe': input should be a valid boolean"),
    ],
)
def test_a_value_that_another_reader_of_yaml_takes_for_a_number_is_refused(tmp_path, key, value, told):
    section, name = key.split(".")
    assert f"`{key}` {told}" in problem_of(tmp_path, f"data: {{train: a}}\n{section}: {{{name}: {value}}}")
    assert f"command line: `{key}` {told}" in problem_of(tmp_path, "data: {train: a}", f"{key}={value}")


def test_names_from_elsewhere_lead_to_keys_that_exist():
    known = set(messages.known_keys(Config))
    assert set(messages.KNOWN_ELSEWHERE.values()) <= known
    assert all(name.isalnum() and name.islower() for name in messages.KNOWN_ELSEWHERE)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("augmentation.RandomFlip", "is not a key here; its name is `augmentation.horizontal_flip`"),
        ("augmentation.random_horizontal_flip", "is not a key here; its name is `augmentation.horizontal_flip`"),
        ("training.amp", "is not a key here; its name is `runtime.feature_precision`"),
        ("training.weight-decay", "is not a key here; its name is `training.l2`"),
        ("training.loss", "is unknown; known are: training.solver, training.epochs, "),
        ("training.momentum", "is unknown; known are: training.solver, training.epochs, "),
        ("augmentation.mixup", "is unknown; known are: augmentation.views, "),
        ("augmentation.cutmix", "is unknown; known are: augmentation.views, "),
        ("frozen", "is unknown; known are: data, image, model, "),
        ("data.trian", "is unknown; did you mean `data.train`?"),
        ("training.epoches", "is unknown; did you mean `training.epochs`?"),
        ("training.device", "is unknown; did you mean `runtime.device`?"),
        ("training.batchsize", "is unknown; did you mean `training.batch_size`?"),
        ("runtime.batchsize", "is unknown; did you mean `runtime.batch_size`?"),
        ("model.frozen", "is unknown; known are: model.backbone, "),
    ],
)
def test_an_unknown_key_is_corrected_only_when_its_meaning_is_clear(tmp_path, key, told):
    assert f"command line: `{key}` {told}" in problem_of(tmp_path, "data: {train: photos}", f"{key}=1")
