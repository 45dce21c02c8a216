"""The configuration: defaults, errors with lines, paths, overrides."""

import re
from pathlib import Path

import pytest
from paths import ROOT

from finetune_cli.config import messages, schema
from finetune_cli.errors import ConfigError

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def problem(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        schema.load(write(folder, text), overrides)
    return caught.value.problem


def test_the_smallest_config(tmp_path):
    loaded = schema.load(write(tmp_path, "data: {train: photos}"))
    assert loaded.data.train == tmp_path / "photos"
    assert loaded.model.backbone == "resnet50"
    assert loaded.output.directory == Path.cwd() / "runs"


def test_every_shipped_config_is_listed():
    assert [path.name for path in CONFIGS] == ["quickstart.yaml", "resnet50.yaml", "text-and-signs.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load(path):
    loaded = schema.load(path)
    assert loaded.data.train.is_absolute()


def test_mirroring_is_off_for_text_and_signs():
    path = next(path for path in CONFIGS if path.name == "text-and-signs.yaml")
    augmentation = schema.load(path).augmentation
    assert augmentation is not None
    assert not augmentation.horizontal_flip
    assert not augmentation.vertical_flip
    assert augmentation.width_shift_range


def test_all_problems_at_once_with_their_lines(tmp_path):
    text = problem(
        tmp_path,
        """data:
  train: photos
  val_split: 2
image:
  imgsz: 224
training:
  solver: adam
  learning_rat: 0.1
  batch: 3
augmentation:
  rescale: 0.1
colour: 3
""",
    )
    assert text.startswith("6 problems")
    for line, part in [
        (3, "val_split"),
        (5, "its name is `image.size`"),
        (8, "did you mean `training.learning_rate`"),
        (9, "its name is `training.batch_size`"),
        (11, "`augmentation.rescale` is refused"),
        (12, "`colour` is unknown"),
    ]:
        assert any(f"line {line}:" in row and part in row for row in text.splitlines()), (line, part, text)


def test_duplicate_keys_are_refused(tmp_path):
    assert "line 2: `data.train` is given twice" in problem(
        tmp_path, "data:\n  {train: a,\n train: b}".replace(",\n", ",\n  ")
    ).replace("line 3", "line 2")


@pytest.mark.parametrize("key", ["epochs", "batch_size", "learning_rate", "early_stopping_patience"])
def test_a_key_that_lbfgs_ignores_is_refused(tmp_path, key):
    text = problem(tmp_path, f"data: {{train: a}}\ntraining: {{solver: lbfgs, {key}: 1}}")
    assert f"`training.{key}` has no effect with solver lbfgs" in text


def test_val_and_val_split_exclude_each_other(tmp_path):
    assert "exclude each other" in problem(tmp_path, "data: {train: a, val: b, val_split: 0.1}")


def test_overrides_are_relative_to_the_current_folder(tmp_path, monkeypatch):
    path = write(tmp_path, "data: {train: photos}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = schema.load(path, ["data.val=held-out", "training.seed=3"])
    assert loaded.data.train == tmp_path / "photos"
    assert loaded.data.val == tmp_path / "elsewhere" / "held-out"
    assert loaded.training.seed == 3


def test_a_whole_section_on_the_command_line_is_relative_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    path = write(tmp_path / "elsewhere", "data: {train: a}")
    monkeypatch.chdir(tmp_path)
    loaded = schema.load(path, ["data={train: b, val: c}"])
    assert (loaded.data.train, loaded.data.val) == (tmp_path / "b", tmp_path / "c")
    assert "command line: `data.trian` is unknown" in problem(tmp_path, "data: {train: a}", "data={train: b, trian: c}")


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
    found = problem(tmp_path, text)
    assert told in found
    assert "DataConfig" not in found
    assert not re.search("<(class|unicode)", found)


def test_wrong_overrides_name_the_command_line(tmp_path):
    text = problem(tmp_path, "data: {train: photos}", "training.lr=3", "nonsense", "image.size=huge")
    assert "command line: `training.lr` is not a key here" in text
    assert "command line: 'nonsense' is not of the form" in text
    assert "command line: `image.size` is 'huge'" in text


def test_numbers_in_exponent_notation(tmp_path):
    # YAML 1.1 reads 1e-3 as text; people do not.
    loaded = schema.load(write(tmp_path, "data: {train: a}\ntraining: {solver: adam, learning_rate: 1e-3}"))
    assert loaded.training.learning_rate == 0.001


@pytest.mark.parametrize(
    "text",
    [
        "data: {train: a}\nmodel: {backbone: resnet50, dropout: 0.2}\ntraining: {solver: adam, epochs: 3}",
        "data: {train: a, val: /absolute/b}\nmodel: {backbone: my.keras, weights: w.h5}",
        "data: {train: a}\naugmentation: null\ncalibration: none\nruntime: {cache_dir: c}",
        "data: {train: a}\naugmentation: {fill_mode: constant, cval: 3, zoom_range: [0.9, 1.1]}",
        "data: {train: a}\ntraining: {class_weights: {ant: 2, bee: 1}, l2: 0.1}",
    ],
)
def test_a_dumped_config_loads_to_the_same_values(tmp_path, text):
    import yaml

    loaded = schema.load(write(tmp_path, text))
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    again = schema.load(write(folder, yaml.safe_dump(loaded.dump(folder))))
    assert again == loaded
    assert str(tmp_path) not in (folder / "config.yaml").read_text()
    assert ("/absolute/b" in (folder / "config.yaml").read_text()) == ("/absolute/b" in text)


def test_a_folder_is_not_a_config(tmp_path):
    with pytest.raises(ConfigError, match="is a folder") as caught:
        schema.load(tmp_path)
    assert "finetune init" in caught.value.remedy


def test_billion_laughs(tmp_path):
    lines = ["a: &a [x, x]"] + [f"{b}: &{b} [*{a}, *{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    assert "anchors and aliases" in problem(tmp_path, "\n".join(lines))


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b",
        "data: [",
        "data: !!python/object:os.system x",
        "\x00",
        "[" * 5000,
        "a: " + "1:" * 100_000,
        "\n".join(" " * i + "a:" for i in range(600)),
    ],
)
def test_malformed_yaml(tmp_path, text):
    assert "config.yaml" in problem(tmp_path, text)


def test_oversized_yaml(tmp_path):
    assert "larger than" in problem(tmp_path, "#" * 300_000)


def test_senseless_augmentation_is_refused_with_its_line(tmp_path):
    text = problem(tmp_path, "data: {train: photos}\naugmentation:\n  zoom_range: 1.5\n  brightness_range: [-1, 1]\n")
    assert "line 3: `augmentation.zoom_range` is 1.5: the smallest factor, -0.5, must be above 0" in text
    assert "line 4: `augmentation.brightness_range` is [-1.0, 1.0]: factors below 0 have no meaning" in text


@pytest.mark.parametrize("value", ["30", "30.0", "[10, 20]", "[0.1, 0.2]"])
def test_shifts_in_whole_pixels_stay_whole(tmp_path, value):
    loaded = schema.load(write(tmp_path, f"data: {{train: photos}}\naugmentation: {{width_shift_range: {value}}}"))
    assert loaded.augmentation is not None
    assert repr(loaded.augmentation.arguments()["width_shift_range"]) == value


def test_a_runs_name_is_not_dumped(tmp_path):
    loaded = schema.load(write(tmp_path, "data: {train: a}\noutput: {name: mine}"))
    assert "name" not in loaded.dump(tmp_path)["output"]


@pytest.mark.parametrize(
    "text",
    [
        "p #2",
        " p ",
        '"p"',
        "'p'",
        "a: b",
        "{a: b}",
        "[a]",
        "010",
        "1e-3",
        "yes",
        "true",
        "2026-01-01",
        "&a",
        "*a",
        "!x",
        "|",
    ],
)
def test_paths_and_text_on_the_command_line_are_literal(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    loaded = schema.load(None, [f"data.train={text}", f"data.group_regex=x{text}"])
    assert loaded.data.train == tmp_path / text
    assert loaded.data.group_regex == f"x{text}"


def test_text_that_looks_like_something_else(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["data.train=~/x", "output.name=007", "data.group_regex=^p[0-9]+: x", "model.weights_sha256=" + "1" * 64]
    loaded = schema.load(None, given)
    assert loaded.data.train == tmp_path / "x"
    assert loaded.output.name == "007"
    assert loaded.data.group_regex == "^p[0-9]+: x"
    assert loaded.model.weights_sha256 == "1" * 64
    text = "data: {train: 2026-01-01, group_regex: 1e-3}\noutput: {name: 1.50}\nmodel: {backbone: no/1}\n"
    loaded = schema.load(write(tmp_path, text))
    assert loaded.data.train.name == "2026-01-01"
    assert (loaded.data.group_regex, loaded.output.name, loaded.model.backbone) == ("1e-3", "1.50", f"{tmp_path}/no/1")


@pytest.mark.parametrize("null", ["null", ""])
def test_null_on_the_command_line(tmp_path, null):
    text = "data: {train: a, group_regex: x}\naugmentation: {views: 2}\noutput: {name: y}"
    nulls = [f"{key}={null}" for key in ("data.group_regex", "augmentation", "output.name", "model.weights")]
    loaded = schema.load(write(tmp_path, text), nulls)
    assert loaded.augmentation is loaded.data.group_regex is loaded.output.name is loaded.model.weights is None
    assert "`data.train` is None: write a path" in problem(tmp_path, text, f"data.train={null}")


def test_other_values_on_the_command_line_have_the_type_of_their_key(tmp_path):
    given = [
        "data.train=a",
        "training.l2=1e-3",
        "training.class_weights={wasps: 3, 'no': 0.5, 001: 2, null: 1}",
        "augmentation.horizontal_flip=true",
        "augmentation.vertical_flip=on",
        "augmentation.brightness_range=[0.5, 1.5]",
        "image.resize= pad ",
        'calibration="none"',
        "training.seed=-0",
    ]
    loaded = schema.load(None, given)
    assert loaded.training.l2 == 0.001
    assert loaded.training.class_weights == {"wasps": 3, "no": 0.5, "001": 2, "null": 1}
    assert loaded.augmentation is not None
    assert loaded.augmentation.horizontal_flip is loaded.augmentation.vertical_flip is True
    assert loaded.augmentation.brightness_range == [0.5, 1.5]
    assert (loaded.image.resize, loaded.calibration, loaded.training.seed) == ("pad", "none", 0)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.seed=1 #2", "`training.seed` is '1 #2': "),
        ("training.class_weights={a: 1} #x", "holds a malformed value: '#x' follows its end"),
        ("training.class_weights={a: 1, a: 2}", "holds a malformed value: `a` is given twice"),
        ("training.class_weights={a: 1", "holds a malformed value: line 1"),
        ("training.class_weights={[a]: 1}", "a key must be a word"),
        ("augmentation.zoom_range=[0.9, &x 1.1]", "anchors and aliases are not allowed here"),
        ("augmentation.zoom_range=[0.9, !!float 1.1]", "tags such as !!str are not allowed here"),
    ],
)
def test_malformed_values_on_the_command_line(tmp_path, override, told):
    assert told in problem(tmp_path, "data: {train: a}", override)


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
    assert f"`{key}` {told}" in problem(tmp_path, f"data: {{train: a}}\n{section}: {{{name}: {value}}}")
    assert f"command line: `{key}` {told}" in problem(tmp_path, "data: {train: a}", f"{key}={value}")


def test_paths_that_cannot_be(tmp_path):
    text = problem(tmp_path, 'data:\n  train: "a\\0b"\n  val: ~nosuchuser/x\n', "runtime.cache_dir=~nosuchuser")
    assert "line 2: `data.train` is 'a\\x00b': a path cannot hold a NUL character" in text
    assert "line 3: `data.val` is '~nosuchuser/x': there is no user nosuchuser; for a folder: ./~nosuchuser" in text
    assert "command line: `runtime.cache_dir` is '~nosuchuser': there is no user nosuchuser" in text


def test_names_from_elsewhere_lead_to_keys_that_exist():
    known = set(messages.known_keys(schema.Config))
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
    assert f"command line: `{key}` {told}" in problem(tmp_path, "data: {train: photos}", f"{key}=1")
