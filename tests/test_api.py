"""The Python API: its names, what it loads, and that it answers as the command line does."""

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import finetune_cli
from finetune_cli import errors
from finetune_cli.config.load import load_config
from finetune_cli.errors import BadImage, BadPhotos, ConfigError, DataError, FinetuneError, RunError, UsageError
from finetune_cli.inference import predict as command_predict
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.training import pipeline as command_train

NAMES = [
    "Classifier", "Console", "Evaluation", "FinetuneError", "Observer", "Prediction", "Run",
    "__version__", "errors", "load", "train",
]  # fmt: skip


@pytest.fixture(scope="module")
def classifier(tiny_run):
    return finetune_cli.load(tiny_run.run.folder)


@pytest.fixture
def photo(tiny_run) -> Path:
    return tiny_run.photos / "val" / "bee" / "bee-03.png"


# Names


def test_the_public_names():
    assert finetune_cli.__all__ == NAMES
    assert dir(finetune_cli) == NAMES
    for name in NAMES:
        assert getattr(finetune_cli, name) is not None
    assert finetune_cli.errors.FinetuneError is finetune_cli.FinetuneError
    with pytest.raises(AttributeError, match="predict"):
        _ = finetune_cli.predict


def test_all_public_names_are_documented():
    public = [getattr(finetune_cli, name) for name in NAMES if name not in {"__version__", "Console", "Observer"}]
    methods = [getattr(finetune_cli.Classifier, name) for name in ("classes", "predict", "evaluate", "export")]
    for item in (*public, *methods):
        assert item.__doc__
        assert not item.__doc__.startswith(f"{getattr(item, '__name__', '')}(")  # what dataclass makes by itself


def test_the_package_is_typed_for_those_who_use_it(tmp_path):
    program = """
import numpy as np
import finetune_cli
run = finetune_cli.train("config.yaml", training={"seed": 1})
classifier = finetune_cli.load(run)
reveal_type(classifier.predict("photo.jpg"))
reveal_type(classifier.predict(["photo.jpg", b"", np.zeros((2, 2, 3), np.uint8)]))
reveal_type(classifier.predict(["photo.jpg"], on_bad_image="skip"))
reveal_type(classifier.evaluate().accuracy.value)
reveal_type(classifier.export("onnx", "models"))
classifier.predict(3)
"""
    (tmp_path / "program.py").write_text(program)
    source = Path(finetune_cli.__file__).parents[1]
    assert (source / "finetune_cli" / "py.typed").is_file()
    command = [sys.executable, "-m", "mypy", "--config-file", os.devnull, "--ignore-missing-imports", "program.py"]
    environment = {**os.environ, "MYPYPATH": str(source)}
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    types = [line.split('"')[1] for line in answer.stdout.splitlines() if "Revealed type" in line]
    short = [text.replace("finetune_cli.api.", "").replace("builtins.", "") for text in types]
    assert short == ["Prediction", "list[Prediction]", "list[Prediction | None]", "float", "pathlib.Path"]
    assert "program.py:11: error: No overload variant" in answer.stdout


def test_errors_reach_another_process():
    """A worker's error is pickled on its way out of a process pool."""
    kinds = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, FinetuneError)]
    assert len(kinds) > 10
    for kind in kinds:
        error = kind("first", "second")
        same = pickle.loads(pickle.dumps(error))
        assert type(same) is kind
        assert (str(same), vars(same), same.args) == (str(error), vars(error), error.args)


# What is loaded


def loaded_after(code: str, *arguments: object) -> set[str]:
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(answer.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy():
    heavy = {
        "tensorflow",
        "keras",
        "openvino",
        "scipy",
        "matplotlib",
        "cv2",
        "numpy",
        "PIL",
        "pydantic",
        "yaml",
        "rich",
    }
    assert not loaded_after("import finetune_cli; dir(finetune_cli); finetune_cli.errors") & heavy


def test_load_and_predict_and_evaluate_need_no_tensorflow(tiny_run, photo):
    code = """
import finetune_cli
classifier = finetune_cli.load(sys.argv[1])
classifier.predict([sys.argv[2]])
classifier.predict(sys.argv[2])
classifier.evaluate()
"""
    loaded = loaded_after(code, tiny_run.run.folder, photo)
    assert "openvino" in loaded
    assert not loaded & {"tensorflow", "keras", "scipy", "matplotlib", "cv2", "jinja2", "rich", "typer"}


# predict


def test_a_photo_has_one_answer_in_whatever_form_it_comes(classifier, tiny_run, photo):
    (expected,) = command_predict.predict(RunPredictor(tiny_run.run, 1), [photo], 2)
    with Image.open(photo) as image:
        forms = [photo, str(photo), photo.read_bytes(), image, image.copy(), np.array(image), image.convert("RGBA")]
        answers = [classifier.predict(form, top_k=2) for form in forms]
        listed = classifier.predict(forms, top_k=2)
    for answer in (*answers, *listed):
        assert answer.label == expected.label
        assert [name for name, _probability in answer.top] == [name for name, _probability in expected.top]
        assert answer.probability == answer.top[0][1] == pytest.approx(expected.probability, abs=1e-6)
    assert len(listed) == len(forms)


def test_a_prediction_is_whole_and_frozen(classifier, photo):
    answer = classifier.predict(photo)
    assert [name for name, _probability in answer.top] == sorted(
        classifier.classes, key=dict(zip(classifier.classes, -answer.probabilities, strict=True)).get
    )
    assert answer.probabilities.sum() == pytest.approx(1)
    assert answer == classifier.predict(photo)
    with pytest.raises(ValueError, match="read-only"):
        answer.probabilities[0] = 1
    with pytest.raises(AttributeError):
        answer.label = "wasp"
    assert len(classifier.predict(photo, top_k=100).top) == 3
    assert classifier.predict([]) == []


@pytest.mark.parametrize("change", ["file", "loaded", "converted"])
def test_a_picture_is_turned_by_its_exif_data(classifier, photo, tmp_path, change):
    """However a program opened it: the answer is that of the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(photo) as image:
        wide = image.resize((120, 50))
    for kind in ("png", "jpg", "tif"):
        wide.save(tmp_path / f"x.{kind}", exif=exif)
        with Image.open(tmp_path / f"x.{kind}") as image:
            if change == "loaded":
                image.load()
            given = image.convert("RGB") if change == "converted" else image
            answer = classifier.predict(given)
        assert answer == classifier.predict(tmp_path / f"x.{kind}"), kind
        assert answer != classifier.predict(wide)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((4, 4, 3)), "array of float64"),
        (np.zeros((4, 4, 3), np.int64), "array of int64"),
        (np.zeros((4, 4), np.uint8), "shape (4, 4)"),
        (np.zeros((3, 4, 4), np.uint8), "shape (3, 4, 4)"),
        (np.zeros((4, 4, 4), np.uint8), "shape (4, 4, 4)"),
        (np.zeros((0, 4, 3), np.uint8), "shape (0, 4, 3)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "several photos"),
        (7, "is a int"),
        (None, "is a NoneType"),
        ({"photo.jpg"}, "is a set"),
    ],
)
def test_what_is_no_photo_is_refused(classifier, photo, given, words):
    with pytest.raises(UsageError) as caught:
        classifier.predict(given)
    assert caught.value.problem.startswith("the photo is a")
    assert words in caught.value.problem
    with pytest.raises(UsageError) as caught:
        classifier.predict([photo, given])
    assert caught.value.problem.startswith("photos[1] is a")


def test_wrong_options_of_predict(classifier, photo):
    with pytest.raises(UsageError, match="top_k"):
        classifier.predict(photo, top_k=0)
    with pytest.raises(UsageError, match="on_bad_image"):
        classifier.predict([photo], on_bad_image="ignore")


def test_a_photo_that_cannot_be_decoded(classifier, photo, tmp_path, caplog):
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:-100])
    with pytest.raises(BadImage, match="truncated"):
        classifier.predict(cut)
    with Image.open(cut) as image, pytest.raises(BadImage, match="truncated"):
        classifier.predict(image)
    with pytest.raises(BadImage) as caught:
        classifier.predict([photo, b"no image"])
    assert caught.value.path == "photos[1]"
    found = classifier.predict([photo, cut, photo, b"no image"], on_bad_image="skip")
    assert [answer is None for answer in found] == [False, True, False, True]
    assert found[0] == found[2] == classifier.predict(photo)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        f"no prediction for {cut}",
        "no prediction for photos[3]",
    ]


def test_many_threads_share_a_classifier(classifier, tiny_run):
    photos = sorted((tiny_run.photos / "val").rglob("*.png"))
    expected = [classifier.predict(path) for path in photos]
    gate = threading.Barrier(8)

    def work(_n):
        gate.wait()
        return [classifier.predict(path) for path in photos], classifier.predict(photos)

    with ThreadPoolExecutor(8) as pool:
        for singly, together in pool.map(work, range(8)):
            assert singly == expected
            for answer, same in zip(together, expected, strict=True):
                np.testing.assert_allclose(answer.probabilities, same.probabilities, atol=1e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_is_told_so_instead_of_waiting_for_ever(tiny_run, photo):
    code = """
import os, sys
import finetune_cli
classifier = finetune_cli.load(sys.argv[1])
classifier.predict(sys.argv[2])
child = os.fork()
if not child:
    for use in (lambda: classifier.predict(sys.argv[2]), lambda: finetune_cli.load(sys.argv[1])):
        try:
            use()
        except finetune_cli.FinetuneError as exc:
            print(exc.problem, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    command = [sys.executable, "-c", code, tiny_run.run.folder, photo]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.count("before this process was forked") == 2


# load, evaluate, export


def test_load_takes_a_path_or_a_run(classifier, tiny_run, photo, tmp_path):
    for run in (tiny_run.run, str(tiny_run.run.folder)):
        other = finetune_cli.load(run)
        assert other.predict(photo) == classifier.predict(photo)
        assert other.classes == ("ant", "bee", "wasp")
        assert other.run == tiny_run.run
    with pytest.raises(RunError):
        finetune_cli.load(tmp_path)


def test_evaluate_judges_the_runs_test_photos_or_others_and_writes_nothing(classifier, tiny_run, caplog, tmp_path):
    before = sorted(tiny_run.run.folder.rglob("*"))
    assert classifier.evaluate().to_json()["accuracy"] == tiny_run.run.manifest.metrics["test"].document["accuracy"]
    assert "was trained on 1 of these photos" in caplog.text  # the twin
    for path in (tiny_run.photos / "val").rglob("*-0[0-4].png"):
        target = tmp_path / path.relative_to(tiny_run.photos / "val")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "bee" / "cut.png").write_bytes(b"\x89PNG")
    evaluation = classifier.evaluate(tmp_path)
    assert evaluation.photos == 15
    assert f"left out {tmp_path / 'bee' / 'cut.png'}: " in caplog.text
    right = [classifier.predict(path).label == path.parent.name for path in sorted(tmp_path.rglob("*-*.png"))]
    assert evaluation.accuracy.value == pytest.approx(np.mean(right))
    assert evaluation.confusion.trace() == sum(right)
    assert sorted(tiny_run.run.folder.rglob("*")) == before
    with pytest.raises(DataError):
        classifier.evaluate(tmp_path / "bee", root=None)


def test_export_gives_the_folder_of_the_model(classifier, tmp_path):
    folder = classifier.export("openvino", tmp_path / "model", quantize="float16")
    assert folder == tmp_path / "model"
    assert {"model.xml", "parity.json", "manifest.json"} <= {path.name for path in folder.iterdir()}
    with pytest.raises(UsageError, match="unknown format"):
        classifier.export("caffe", tmp_path / "other")


# train: what arrives at the command


@pytest.fixture
def trained(monkeypatch):
    """The (config, observer) that `train` was called with; nothing is trained."""
    calls = []

    def pretend(config, observer):
        calls.append((config, observer))
        return "run"

    monkeypatch.setattr(command_train, "train", pretend)
    return calls


def test_a_config_comes_as_a_file_a_dict_or_loaded(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "scenes.yaml"
    path.write_text("data: {train: ../photos}\nimage: {size: 96}\naugmentation: {views: 2}\noutput: {name: x}\n")
    values = {"data": {"train": Path("photos")}, "image": {"size": np.int64(96)}, "output": {"name": "x"}}
    given = {"augmentation": {"views": 2}}
    assert finetune_cli.train(path) == "run"
    finetune_cli.train(str(path))
    finetune_cli.train(load_config(path))
    finetune_cli.train(values, **given)
    finetune_cli.train(**values, **given)
    first = trained[0][0]
    assert first.data.train == tmp_path / "photos"
    assert [call[0] for call in trained] == [first.model_copy(update={"output": call[0].output}) for call in trained]
    assert [call[0].output.name for call in trained] == ["x"] * 5
    assert values["image"] == {"size": 96}  # and is not changed
    assert values["data"] == {"train": Path("photos")}


def test_sections_change_keys_of_any_config(trained, tmp_path):
    path = tmp_path / "scenes.yaml"
    path.write_text("data: {train: photos}\ntraining: {seed: 5, solver: adam}\naugmentation: {views: 2}\n")
    rates = np.logspace(-3, -1, 2)
    for config in (path, load_config(path), {"data": {"train": tmp_path / "photos"}, "training": {"solver": "adam"}}):
        finetune_cli.train(
            config,
            training={"seed": 1, "learning_rate": rates[0], "class_weights": {"ant": np.float32(2)}},
            augmentation=None,
            calibration="none",
        )
        settings = trained[-1][0]
        assert settings.training.seed == 1
        assert settings.training.solver == "adam"
        assert settings.training.learning_rate == pytest.approx(1e-3)
        assert settings.training.class_weights == {"ant": 2}
        assert settings.augmentation is None
        assert settings.calibration == "none"
        assert settings.data.train == tmp_path / "photos"


def test_wrong_settings_are_told_with_where_they_stand(trained, tmp_path):
    path = tmp_path / "scenes.yaml"
    path.write_text("data: {train: photos}\nimage: {sise: 5}\n")
    with pytest.raises(ConfigError) as caught:
        finetune_cli.train(path, training={"lr": 1})
    assert f"{path}, line 2: `image.sise` is unknown" in caught.value.problem
    assert "arguments: `training.lr` is not a key here; its name is `training.learning_rate`" in caught.value.problem
    with pytest.raises(ConfigError, match=r"arguments: `data.train` is required"):
        finetune_cli.train()
    with pytest.raises(ConfigError, match="arguments: `trainin"):
        finetune_cli.train(trainin={"seed": 1})
    with pytest.raises(UsageError, match=r"write training=\{'seed': ...\}"):
        finetune_cli.train(path, **{"training.seed": 1})
    with pytest.raises(UsageError, match="config is a int"):
        finetune_cli.train(3)
    assert not trained


def test_training_is_silent_but_for_warnings(trained, tmp_path, caplog, capfd):
    finetune_cli.train(data={"train": tmp_path})
    observer = trained[0][1]
    with observer.stage("features", 10) as advance:
        advance(3)
    observer.note("120 photos")
    observer.warn("skipped x.jpg")
    assert [(record.name, record.levelno) for record in caplog.records] == [("finetune_cli", logging.WARNING)]
    assert capfd.readouterr() == ("", "")
    mine = object()
    finetune_cli.train(data={"train": tmp_path}, observer=mine)
    assert trained[1][1] is mine


def test_bad_photos_are_skipped_by_what_the_error_says(tmp_path):
    photos = tmp_path / "photos"
    for label, name in enumerate(("ant", "bee")):
        (photos / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (40, 40), (i * 9, 60, label)).save(photos / name / f"{i}.png")
    for i in range(20):
        Image.new("RGB", (40, 40), (i, 90, 9)).save(photos / "ant" / f"more-{i}.png")
    (photos / "ant" / "bad.png").write_bytes(b"no image")
    with pytest.raises(BadPhotos) as caught:
        finetune_cli.train(
            data={"train": photos},
            model={"backbone": "efficientnet_lite0"},
            output={"directory": tmp_path / "runs"},
            runtime={"cache_dir": tmp_path / "cache"},
        )
    assert caught.value.remedy.endswith('data={"on_bad_image": "skip"}')
