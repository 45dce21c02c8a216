"""`report.html`: everything is in it, names are text whatever they hold, and a browser agrees."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import jinja2.meta
import numpy as np
import pytest
import runs_fixture
from manifest_example import EXAMPLE
from PIL import Image
from runs_fixture import TinyRun

from finetune_cli.evaluation import evaluate
from finetune_cli.evaluation.answers import Answers
from finetune_cli.evaluation.judge import Judgement
from finetune_cli.evaluation.photos import LabelledPhotos
from finetune_cli.metrics import scores
from finetune_cli.photos.decode import ImageSettings
from finetune_cli.photos.scan import BadPhoto, Sample
from finetune_cli.progress import Silent
from finetune_cli.report import html as report
from finetune_cli.report import thumbnails
from finetune_cli.report.page import Page, Refits
from finetune_cli.report.refits import LearningCurve
from finetune_cli.runs import run as run_files
from finetune_cli.runs.manifest import seal
from finetune_cli.runs.run import Run, SplitRow
from finetune_cli.tables import write_csv

IMG = "<img src=x onerror=alert(1)>"
CLASSES = (IMG, "=1+1", "bee & 'wasp' \"{{7*7}}\"")
SECTIONS = {"photos", "training", "confusion", "classes", "mistakes", "unsure", "trust", "labels", "duplicates", "more"}


def written(run: Run, **options: Any) -> Path:
    result = evaluate.evaluate(run, Silent(), evaluate.EvaluationRequest(**options))
    return report.report(result.judged, result.folder, Silent())


@pytest.fixture(scope="session")
def hostile(tmp_path_factory) -> TinyRun:
    """A run whose class and file names want to be code."""
    made = runs_fixture.build(tmp_path_factory.mktemp("hostile"), CLASSES)
    folder = made.photos / "mixed" / IMG
    shutil.copytree(made.photos / "test" / IMG, folder)
    shutil.copytree(made.photos / "test" / "=1+1", made.photos / "mixed" / "=1+1")
    names = ("<svg onload=alert(2)>.png", os.fsdecode(b"not-utf8-\xff.png"), "line\nbreak\x1b[31m.png")
    for path, name in zip(sorted(folder.iterdir()), names, strict=False):
        path.rename(folder / name)
    return made


@pytest.fixture(scope="session")
def page_file(hostile) -> Path:
    return written(hostile.run, data=hostile.photos / "mixed")


class Tags(HTMLParser):
    """All elements with their attributes, and the text outside of the style sheet."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="session")
def tags(page_file) -> Tags:
    return Tags(page_file.read_text("utf-8"))


def test_every_section_is_there(tags):
    ids = {attributes.get("id") for _tag, attributes in tags.tags}
    assert ids >= SECTIONS | {"made"}
    for text in (
        "95 % interval",
        "Did augmentation help?",
        "Which threshold to choose",
        "Resolved config",
        "numpy",
        "views: 2",
    ):
        assert text in tags.text


def test_it_reaches_for_nothing(tags):
    """No script, no handler, no address but data and places in the page; and a policy that would stop them."""
    for tag, attributes in tags.tags:
        assert tag not in {"script", "iframe", "object", "embed", "form", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name != "style"
            if name in {"src", "href"}:
                assert value is not None
                assert value.startswith(("data:", "#")), (tag, name, value)
    policy = next(a["content"] for t, a in tags.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_names_are_text(tags):
    for name in (*CLASSES, "<svg onload=alert(2)>.png", "not-utf8-\\xff.png", "line\\nbreak\\x1b[31m.png"):
        assert name in tags.text, name
    assert not [1 for tag, attributes in tags.tags if tag == "img" and attributes.get("src") == "x"]
    assert "49" not in {word for word in re.split(r"\W+", tags.text) if "wasp" in word}


def test_cells_a_spreadsheet_would_run_are_defused(page_file):
    text = (page_file.parent / "predictions.csv").read_text("utf-8", "surrogateescape")
    assert ",'=1+1," in text
    assert ",=1+1," not in text


def test_a_subset_of_the_classes_is_told(tags):
    assert "they show 2 of the 3 classes" in tags.text


def test_a_picture_of_the_matrix_comes_with_it(page_file):
    assert (page_file.parent / "confusion_matrix.png").stat().st_size > 5000
    assert page_file.stat().st_size < 5_000_000


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """What JPEG can do least about."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def thousand(tmp_path_factory) -> Judgement:
    """1,000 classes and 5,000 confused pairs, photos of noise, and the longest names, all to be escaped."""
    folder = tmp_path_factory.mktemp("thousand")
    digests = []
    for i in range(20):
        Image.fromarray(noise(i, 150, 150)).save(folder / f"{i}.png")
        digests.append(hashlib.sha256((folder / f"{i}.png").read_bytes()).hexdigest())
    classes = tuple(f"{i:04}{'&' * 250}" for i in range(1000))
    labels = np.repeat(np.arange(1000), 21)
    predicted = (labels + np.tile([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 5], 1000)) % 1000
    samples = tuple(
        Sample(folder / f"{i % 20}.png", f"{i}{'&' * 3000}.png", int(label), digests[i % 20])
        for i, label in enumerate(labels)
    )
    rng = np.random.default_rng(0)
    probabilities = np.full((len(labels), 1000), 2e-4, np.float32)
    probabilities[np.arange(len(labels)), predicted] = rng.uniform(0.3, 0.8, len(labels))
    home = folder / "run"
    home.mkdir()
    rows = [SplitRow(split, classes[i % 1000], f"{i % 1500}", f"{i}{'&' * 3000}.png")
            for i in range(4000) for split in ("train", "val", "test")]  # fmt: skip
    run_files.write_split(home / "split.csv", rows)
    write_csv(
        home / "history.csv", ("loss", "val_loss", "accuracy", "val_accuracy"), [rng.random(4) for _ in range(9000)]
    )
    (home / "config.yaml").write_text("\n".join(f"{name}: 1" for name in classes * 4))
    (home / "environment.json").write_text(json.dumps({f"{i}{'&' * 300}": "&" * 3000 for i in range(60)}))
    names = ["split.csv", "history.csv", "config.yaml", "environment.json"]
    manifest = replace(EXAMPLE, classes=classes, image=ImageSettings(64), temperature=1.0, metrics={})
    bad = tuple(BadPhoto(folder / "x", "&" * 3000, "&" * 3000) for _ in range(300))
    return Judgement(
        run_files.finish(home, manifest, names),
        LabelledPhotos("data", "photos of a folder", samples, bad),
        Answers(samples, probabilities, np.zeros((0, 4), np.float32), 1, ()),
        scores.evaluate(probabilities, labels, classes),
        None,
    )


@pytest.fixture(scope="session")
def thousand_pages(thousand, tmp_path_factory) -> tuple[Path, Path]:
    """Its report, with everything that comes from model and training as large as it can be; and one with less room."""
    run = thousand.run

    def from_training(_judged, _observer):
        figure = thumbnails.Figure("&" * 100, thumbnails.jpeg(noise(0, 112, 112)), ("&" * 100, "&" * 100))
        recall = np.random.default_rng(1).random((4, 1000))
        every = np.full(1000, 5)
        curve = LearningCurve((1, 2, 3, 4), recall.mean(axis=1), recall, every, recall[3] - recall[1], recall[0])
        return Refits(
            suspects=(figure,) * report._MOST_SUSPECTS,
            suspect_count=900,
            augmentation="&" * 1000,
            curve=report._curve(curve, SimpleNamespace(folds=None), SimpleNamespace(labels=[0], photos=2), run),
        )

    wide = thumbnails.jpeg(noise(0, thumbnails.LARGE, 2 * thumbnails.LARGE + 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_refits", from_training)
        patch.setattr(report, "InsightfulPredictor", lambda *_args: None)
        patch.setattr(thumbnails, "contrasts", lambda _predictor, chosen, *_rest: [wide] * len(chosen))
        full = report.report(thousand, tmp_path_factory.mktemp("full"), Silent())
        patch.setattr(report, "LIMIT", full.stat().st_size - 2_900_000)
        patch.setattr(report.figures, "write_figures", lambda *_args, **_options: None)
        return full, report.report(thousand, tmp_path_factory.mktemp("less"), Silent())


def test_no_report_exceeds_five_million_bytes_and_what_is_left_out_is_said(thousand_pages):
    page = thousand_pages[0]
    size = page.stat().st_size
    found = Tags(page.read_text("utf-8"))
    assert 3_000_000 < size < 5_000_000
    pairs = [attributes for tag, attributes in found.tags if tag == "details"]
    assert len(pairs) == 100
    assert "… and 4900 more pairs with 14400 photos together" in found.text  # 5000 pairs, 15000 photos
    figures = sum(tag == "figure" for tag, _attributes in found.tags)
    assert "of them are in this file" in found.text
    assert 150 < figures < 700
    for text in (
        "The 100 classes with the fewest training photos, and 900 more",
        "The 100 classes with the lowest F1, and 900 more",
        "The 100 classes that gained most, and 900 more",
        "… and 200 more, in metrics.json",
        "… and 1400 more.",
        "the clearest 24 of 900",
        "12 of 15000;",
        "12 of 6000.",
        "more characters, in config.yaml",
    ):
        assert text in found.text, text


def test_the_template_reads_all_values_of_the_page_and_no_others():
    text = (resources.files("finetune_cli.report") / "templates" / "report.html.j2").read_text("utf-8")
    environment = jinja2.Environment()
    environment.filters |= {"percent": str, "brief": str}
    template = environment.parse(text)
    read = {
        node.attr
        for node in template.find_all(jinja2.nodes.Getattr)
        if isinstance(node.node, jinja2.nodes.Name) and node.node.name == "page"
    }
    assert read == {value.name for value in fields(Page)}
    assert jinja2.meta.find_undeclared_variables(template) == {"page", "style", "style_digest", "version"}


def test_a_value_that_does_not_exist_is_an_error(tiny_run, monkeypatch):
    monkeypatch.setattr(report, "_origin", lambda _run: SimpleNamespace(config="", config_more=0))
    with pytest.raises(jinja2.UndefinedError, match="environment"):
        written(tiny_run.run)


def test_less_room_means_fewer_photos(thousand_pages):
    """The rest of the page is as it was; without room for any, the pairs are a list that does not open."""
    full, less = (page.read_text("utf-8") for page in thousand_pages)
    assert (full.count("<details"), full.count('<div class="row">')) == (100, 0)
    assert (less.count("<details"), less.count('<div class="row">')) == (0, 100)
    assert "The 100 classes with the lowest F1" in less


def test_what_is_odd_about_the_photos_is_found(tiny_run):
    found = Tags(written(tiny_run.run).read_text("utf-8"))
    labels = found.text[found.text.index("Suspected wrong labels") : found.text.index("Would more photos help?")]
    assert tiny_run.wrong in labels
    assert f"train: {tiny_run.twin}; test: bee/twin.png" in labels


def test_likely_groups_in_two_splits_are_found(tiny_run, monkeypatch):
    assert "Groups in two splits" not in written(tiny_run.run).read_text("utf-8")
    rows = tiny_run.run.split()
    renamed = [replace(row, path=f"{row.label}/{IMG}{i // 4}-{i % 4}.png") for i, row in enumerate(rows)]
    torn = [replace(row, split="val" if i % 4 == 0 else "train") for i, row in enumerate(renamed)]
    found = report._likely_groups(SimpleNamespace(split=lambda: torn))
    assert "are in both train and val. If they do" in found
    assert "train with data.group_regex=" in found
    assert report._likely_groups(SimpleNamespace(split=lambda: [replace(row, group="g") for row in torn])) is None
    monkeypatch.setattr(report, "_likely_groups", lambda _run: found)
    text = written(tiny_run.run).read_text("utf-8")
    assert "Groups in two splits" in text
    assert IMG not in text
    assert "are in both train and val" in Tags(text).text


def test_evaluated_photos_that_the_run_learnt_from_are_told_and_its_test_photos_are_not(tiny_run):
    found = Tags(written(tiny_run.run, data=tiny_run.photos / "test").read_text("utf-8"))
    assert f"train: {tiny_run.twin}; test: bee/twin.png; evaluated: bee/twin.png" in found.text
    assert found.text.count("evaluated: ") == 1


@pytest.fixture
def copy(tiny_run, tmp_path) -> TinyRun:
    shutil.copytree(tiny_run.photos, tmp_path / "photos")
    shutil.copytree(tiny_run.run.folder, tmp_path / "runs" / "tiny-1")
    return replace(tiny_run, run=Run.load(tmp_path / "runs" / "tiny-1"), photos=tmp_path / "photos")


def test_without_the_training_photos_names_must_do(copy):
    shutil.rmtree(copy.photos / "train")
    text = Tags(written(copy.run).read_text("utf-8")).text
    assert "the photo was moved or has changed" in text
    assert copy.wrong in text


def test_moved_training_photos_are_found_by_content(copy):
    """Also the pictures of suspected wrong labels, with names of their own below --data."""
    where = copy.photos.rename(copy.photos.with_name("elsewhere"))
    for path in where.rglob("*.png"):
        path.rename(path.with_name(f"renamed-{path.name}"))
    text = written(copy.run, root=where).read_text("utf-8")
    labels = text[text.index("Suspected wrong labels") : text.index("Would more photos help?")]
    assert copy.wrong in labels
    assert labels.count('<img src="data:image/jpeg') == labels.count("<figure>") > 0
    assert "the photo was moved or has changed" not in text


def test_without_the_cache_it_says_so(copy, monkeypatch):
    monkeypatch.setattr(report.refit_data.cachefolder, "own_folder", lambda _asked: copy.photos / "none")
    text = Tags(written(copy.run).read_text("utf-8")).text
    assert text.count("the training features are not in the feature cache") == 3
    assert "Most confident mistakes" in text
    assert not (copy.photos / "none").exists()


def test_without_a_feature_map_there_are_no_heat_maps(copy):
    manifest = json.loads((copy.run.folder / "run.json").read_text())
    manifest["backbone"]["feature_map"] = False
    (copy.run.folder / "run.json").write_text(json.dumps(seal(manifest)))
    text = Tags(written(Run.load(copy.run.folder)).read_text("utf-8")).text
    assert "no exact heat map" in text
    assert "Red areas" not in text


def test_photos_that_vanish_between_judging_and_drawing(copy):
    result = evaluate.evaluate(copy.run, Silent())
    shutil.rmtree(copy.photos / "test" / "bee")
    text = Tags(report.report(result.judged, result.folder, Silent()).read_text("utf-8")).text
    assert "the photo was moved or has changed" in text


def test_photos_left_out_are_listed(copy):
    (copy.photos / "test" / "bee" / "bee-01.png").write_bytes(b"GIF89a")
    text = Tags(written(copy.run).read_text("utf-8")).text
    assert "Left out: 1" in text
    assert "bee/bee-01.png: the file is not the one that was indexed" in text


def test_a_comparison_is_in_the_verdict(copy):
    text = Tags(written(copy.run, other=copy.run).read_text("utf-8")).text
    assert "McNemar's exact test, p = 1" in text


def test_no_training_package_is_loaded(copy):
    code = (
        "import sys; from pathlib import Path\n"
        "from finetune_cli.evaluation import evaluate; from finetune_cli.report import html\n"
        "from finetune_cli.progress import Silent\n"
        "from finetune_cli.runs.run import Run\n"
        "result = evaluate.evaluate(Run.load(Path(sys.argv[1])), Silent())\n"
        "html.report(result.judged, result.folder, Silent())\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}))"
    )
    command_line = [sys.executable, "-c", code, str(copy.run.folder)]
    answer = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "'tensorflow'" not in answer.stdout
    assert "'keras'" not in answer.stdout


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")], ids=str)
def page(browser, page_file, request) -> Iterator[Any]:
    """The report in a window; whatever the page says, asks for or pops up fails the test."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: complaints.append(dialog.message))
    opened.on(
        "request", lambda r: None if r.url.startswith(("data:", page_file.as_uri())) else complaints.append(r.url)
    )
    opened.goto(page_file.as_uri())
    opened.scheme = scheme
    yield opened
    assert complaints == []
    context.close()


@pytest.mark.browser
def test_a_click_on_a_cell_shows_its_photos(page):
    cells = page.locator("table.matrix a")
    for i in range(cells.count()):
        cell = cells.nth(i)
        cell.click()
        gallery = page.locator(f"[id='{cell.get_attribute('href')[1:]}']")
        assert gallery.is_visible()
        assert page.locator(".gallery:visible").count() == 1
        images = gallery.locator("img")
        assert images.count() == int(cell.inner_text())
        for j in range(images.count()):
            assert images.nth(j).evaluate("image => image.complete && image.naturalWidth") == 112
    page.get_by_text("close").locator("visible=true").click()
    assert page.locator(".gallery:visible").count() == 0


@pytest.mark.browser
def test_nothing_is_wider_than_the_window(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.browser
def test_tables_fit_a_window_of_1280_pixels(page):
    if page.viewport_size["width"] < 1280:
        return
    tables = page.locator("#more .scroll")
    assert tables.count() == 1
    assert tables.first.evaluate("box => box.scrollWidth <= box.clientWidth")


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_click_on_a_confused_pair_shows_its_photos(browser, thousand_pages, width):
    opened = browser.new_page(viewport={"width": width, "height": 800})
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.goto(thousand_pages[0].as_uri())
    pair = opened.locator("details").nth(3)
    assert "0003" in pair.locator("summary").inner_text()
    assert not pair.locator("img").first.is_visible()
    pair.locator("summary").click()
    assert opened.locator("details img:visible").count() == pair.locator("img").count() > 0
    assert pair.locator("img").first.evaluate("image => image.complete && image.naturalWidth") == 112
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert complaints == []
    opened.close()


@pytest.mark.browser
def test_hostile_names_do_nothing(page):
    assert page.locator("img[onerror], svg[onload], script").count() == 0
    assert page.get_by_text(IMG).count() > 3


@pytest.mark.browser
def test_light_and_dark_are_legible(page):
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = page.evaluate("getComputedStyle(document.body).color")
    dark, light = sorted((background, ink), key=lambda colour: sum(map(int, re.findall(r"\d+", colour))))
    assert (background == dark) == (page.scheme == "dark")
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 765 for colour in (dark, light)]
    assert brightness[1] - brightness[0] > 0.7
