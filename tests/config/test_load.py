"""A YAML file and overrides in, a `Config` or one error out: defaults, paths, overrides, contradictions."""

from pathlib import Path

import pytest
from config_files import problem_of, write_config
from paths import ROOT

from finetune_cli.config.load import load_config

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_the_smallest_config(tmp_path):
    loaded = load_config(write_config(tmp_path, "data: {train: photos}"))
    assert loaded.data.train == tmp_path / "photos"
    assert loaded.model.backbone == "resnet50"
    assert loaded.output.directory == Path.cwd() / "runs"


def test_every_shipped_config_is_listed():
    assert [path.name for path in CONFIGS] == ["quickstart.yaml", "resnet50.yaml", "text-and-signs.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load(path):
    loaded = load_config(path)
    assert loaded.data.train.is_absolute()


def test_mirroring_is_off_for_text_and_signs():
    path = next(path for path in CONFIGS if path.name == "text-and-signs.yaml")
    augmentation = load_config(path).augmentation
    assert augmentation is not None
    assert not augmentation.horizontal_flip
    assert not augmentation.vertical_flip
    assert augmentation.width_shift_range


def test_all_problems_at_once_with_their_lines(tmp_path):
    text = problem_of(
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


@pytest.mark.parametrize("key", ["epochs", "batch_size", "learning_rate", "early_stopping_patience"])
def test_a_key_that_lbfgs_ignores_is_refused(tmp_path, key):
    text = problem_of(tmp_path, f"data: {{train: a}}\ntraining: {{solver: lbfgs, {key}: 1}}")
    assert f"`training.{key}` has no effect with solver lbfgs" in text


@pytest.mark.parametrize(
    ("rest", "line", "key"),
    [
        ("  val: b\n", 3, "data.val"),
        ("  val_split: 0.2\n", 3, "data.val_split"),
    ],
)
def test_folds_exclude_what_validates_otherwise(tmp_path, rest, line, key):
    found = problem_of(tmp_path, f"data:\n  train: a\n{rest}  folds: 5\n")
    assert f"line {line}: `{key}` and `data.folds` exclude each other" in found


def test_folds_replace_val_split_in_the_stored_config(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {train: a, folds: 5}")
    stored = load_config(tmp_path / "c.yaml").dump(tmp_path)
    assert stored["data"]["folds"] == 5
    assert "val_split" not in stored["data"]


def test_val_and_val_split_exclude_each_other(tmp_path):
    assert "exclude each other" in problem_of(tmp_path, "data: {train: a, val: b, val_split: 0.1}")


def test_overrides_are_relative_to_the_current_folder(tmp_path, monkeypatch):
    path = write_config(tmp_path, "data: {train: photos}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load_config(path, ["data.val=held-out", "training.seed=3"])
    assert loaded.data.train == tmp_path / "photos"
    assert loaded.data.val == tmp_path / "elsewhere" / "held-out"
    assert loaded.training.seed == 3


def test_a_whole_section_on_the_command_line_is_relative_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    path = write_config(tmp_path / "elsewhere", "data: {train: a}")
    monkeypatch.chdir(tmp_path)
    loaded = load_config(path, ["data={train: b, val: c}"])
    assert (loaded.data.train, loaded.data.val) == (tmp_path / "b", tmp_path / "c")
    assert "command line: `data.trian` is unknown" in problem_of(
        tmp_path, "data: {train: a}", "data={train: b, trian: c}"
    )


def test_wrong_overrides_name_the_command_line(tmp_path):
    text = problem_of(tmp_path, "data: {train: photos}", "training.lr=3", "nonsense", "image.size=huge")
    assert "command line: `training.lr` is not a key here" in text
    assert "command line: 'nonsense' is not of the form" in text
    assert "command line: `image.size` is 'huge'" in text


def test_numbers_in_exponent_notation(tmp_path):
    # YAML 1.1 reads 1e-3 as text; people do not.
    loaded = load_config(write_config(tmp_path, "data: {train: a}\ntraining: {solver: adam, learning_rate: 1e-3}"))
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

    loaded = load_config(write_config(tmp_path, text))
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    again = load_config(write_config(folder, yaml.safe_dump(loaded.dump(folder))))
    assert again == loaded
    assert str(tmp_path) not in (folder / "config.yaml").read_text()
    assert ("/absolute/b" in (folder / "config.yaml").read_text()) == ("/absolute/b" in text)


def test_invalid_augmentation_is_refused_with_its_line(tmp_path):
    text = problem_of(
        tmp_path, "data: {train: photos}\naugmentation:\n  zoom_range: 1.5\n  brightness_range: [-1, 1]\n"
    )
    assert "line 3: `augmentation.zoom_range` is 1.5: the smallest factor, -0.5, must be above 0" in text
    assert "line 4: `augmentation.brightness_range` is [-1.0, 1.0]: factors below 0 have no meaning" in text


@pytest.mark.parametrize("value", ["30", "30.0", "[10, 20]", "[0.1, 0.2]"])
def test_shifts_in_whole_pixels_stay_whole(tmp_path, value):
    loaded = load_config(
        write_config(tmp_path, f"data: {{train: photos}}\naugmentation: {{width_shift_range: {value}}}")
    )
    assert loaded.augmentation is not None
    assert repr(loaded.augmentation.arguments()["width_shift_range"]) == value


def test_a_runs_name_is_not_dumped(tmp_path):
    loaded = load_config(write_config(tmp_path, "data: {train: a}\noutput: {name: mine}"))
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
    loaded = load_config(None, [f"data.train={text}", f"data.group_regex=x{text}"])
    assert loaded.data.train == tmp_path / text
    assert loaded.data.group_regex == f"x{text}"


def test_text_that_looks_like_something_else(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["data.train=~/x", "output.name=007", "data.group_regex=^p[0-9]+: x", "model.weights_sha256=" + "1" * 64]
    loaded = load_config(None, given)
    assert loaded.data.train == tmp_path / "x"
    assert loaded.output.name == "007"
    assert loaded.data.group_regex == "^p[0-9]+: x"
    assert loaded.model.weights_sha256 == "1" * 64
    text = "data: {train: 2026-01-01, group_regex: 1e-3}\noutput: {name: 1.50}\nmodel: {backbone: no/1}\n"
    loaded = load_config(write_config(tmp_path, text))
    assert loaded.data.train.name == "2026-01-01"
    assert (loaded.data.group_regex, loaded.output.name, loaded.model.backbone) == ("1e-3", "1.50", f"{tmp_path}/no/1")


@pytest.mark.parametrize("null", ["null", ""])
def test_null_on_the_command_line(tmp_path, null):
    text = "data: {train: a, group_regex: x}\naugmentation: {views: 2}\noutput: {name: y}"
    nulls = [f"{key}={null}" for key in ("data.group_regex", "augmentation", "output.name", "model.weights")]
    loaded = load_config(write_config(tmp_path, text), nulls)
    assert loaded.augmentation is loaded.data.group_regex is loaded.output.name is loaded.model.weights is None
    assert "`data.train` is None: write a path" in problem_of(tmp_path, text, f"data.train={null}")


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
    loaded = load_config(None, given)
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
    assert told in problem_of(tmp_path, "data: {train: a}", override)


def test_paths_that_cannot_be(tmp_path):
    text = problem_of(tmp_path, 'data:\n  train: "a\\0b"\n  val: ~nosuchuser/x\n', "runtime.cache_dir=~nosuchuser")
    assert "line 2: `data.train` is 'a\\x00b': a path cannot hold a NUL character" in text
    assert "line 3: `data.val` is '~nosuchuser/x': there is no user nosuchuser; for a folder: ./~nosuchuser" in text
    assert "command line: `runtime.cache_dir` is '~nosuchuser': there is no user nosuchuser" in text
