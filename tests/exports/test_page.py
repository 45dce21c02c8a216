"""`page.html` beside an ONNX model: whole, harmless, and with the answers of the run."""

import base64
import gzip
import hashlib
import json
import re
import shutil
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from finetune_cli.errors import UsageError, WeightsError
from finetune_cli.exports import manifest, page, photo_files
from finetune_cli.exports.card import Card
from finetune_cli.exports.export import ExportRequest, export
from finetune_cli.inference.predictor import RunPredictor
from finetune_cli.photos.decode import ImageSettings, decode
from finetune_cli.progress import Silent

CARD = Card(("</script><script>alert(1)", "蜜蜂"), ImageSettings(64))


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Two small files in place of ONNX Runtime Web, and no connection."""
    folder = tmp_path / "library"
    folder.mkdir()
    monkeypatch.setattr(page, "library_folder", lambda: folder)
    digests = {}
    for name in page.LIBRARY:
        (folder / name).write_bytes(name.encode())
        digests[name] = hashlib.sha256(name.encode()).hexdigest()
    monkeypatch.setattr(page, "LIBRARY", digests)

    def no_connection(*_arguments, **_options):
        raise OSError("no connection")

    monkeypatch.setattr(urllib.request, "urlopen", no_connection)
    return folder


def test_everything_is_in_the_page(library, tmp_path):
    page.write(tmp_path, b"the model", CARD, "bees & ants <b>")
    text = (tmp_path / "page.html").read_text("utf-8")
    assets = dict(re.findall(r'<script type="text/plain" id="(\w+)">([\w+/=]+)</script>', text))
    contents = {name: gzip.decompress(base64.b64decode(data)) for name, data in assets.items()}
    assert contents["model"] == b"the model"
    assert contents["photo"].decode() == photo_files.text("photo.mjs")
    assert {contents["library"], contents["wasm"]} == {path.name.encode() for path in library.iterdir()}
    assert json.loads(contents["card"])["classes"] == list(CARD.classes)
    assert "alert(1)" not in text
    assert text.count("bees &amp; ants &lt;b&gt;") == 2
    assert "http" not in re.sub(r'<meta http-equiv="Content-Security-Policy"', "", text)
    assert "connect-src 'none'" in text


def test_equal_models_give_equal_pages(library, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        page.write(tmp_path / name, b"the model", CARD, "x")
    assert (tmp_path / "one" / "page.html").read_bytes() == (tmp_path / "other" / "page.html").read_bytes()


@pytest.mark.parametrize("fault", ["missing", "changed"])
def test_a_library_that_is_missing_or_changed_is_not_used(fault, library, tmp_path):
    file = next(library.iterdir())
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(b"malware")
    with pytest.raises(WeightsError, match="cannot download ONNX Runtime Web") as caught:
        page.write(tmp_path, b"the model", CARD, "x")
    assert re.fullmatch(rf"save https://\S+/{file.name} \(hash \w{{64}}\) as {file}, or leave out --page",
                        caught.value.remedy)  # fmt: skip
    assert not (tmp_path / "page.html").exists()


def test_the_page_resizes_by_itself(tiny_run, tmp_path):
    options = {"pixels": "any-size", "page": "page"}
    with pytest.raises(UsageError, match="the page resizes photos by itself"):
        export(tiny_run.run, ExportRequest(("onnx",), tmp_path / "x", options=options), Silent())


@pytest.mark.slow
@pytest.mark.browser
def test_chromium_gives_the_answers_of_the_run(tiny_run, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    if not all((page.library_folder() / name).exists() for name in page.LIBRARY):
        pytest.skip("ONNX Runtime Web is not in the cache; make test-clients brings it there")
    request = ExportRequest(("onnx",), tmp_path / "x", options={"page": "page"})
    (exported,) = export(tiny_run.run, request, Silent()).exports
    assert "page.html" in manifest.verify(exported.folder).files
    exif = Image.Exif()
    exif[0x0112] = 6
    photos = []
    for number, options in enumerate(({"quality": 95}, {"quality": 95, "exif": exif})):
        rng = np.random.default_rng(number)
        image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((120, 90))
        image.save(tmp_path / f"{number}.jpg", **options)
        photos.append(tmp_path / f"{number}.jpg")
    transparent = Image.fromarray(np.random.default_rng(9).integers(0, 256, (90, 70, 4), dtype=np.uint8))
    transparent.save(tmp_path / "2.png")
    photos.append(tmp_path / "2.png")
    expected = RunPredictor(tiny_run.run, 1).probabilities(
        np.stack([decode(path, tiny_run.run.image_settings) for path in photos])
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page()
        complaints = []
        opened.on("pageerror", lambda error: complaints.append(str(error)))
        opened.on("console", lambda message: complaints.append(message.text))
        opened.goto((exported.folder / "page.html").as_uri())
        for path, row in zip(photos, expected, strict=True):
            answer = opened.evaluate(
                "async (text) => Array.from(await (await classifier).probabilities("
                "new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))])))",
                base64.b64encode(path.read_bytes()).decode(),
            )
            assert np.abs(np.array(answer) - row).max() < 2e-3, path.name
        (tmp_path / "text.jpg").write_bytes(b"no photo")
        opened.set_input_files("#files", [*photos, tmp_path / "text.jpg"])
        deadline = time.monotonic() + 30
        while opened.locator("#results > *").count() < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert opened.locator("figcaption").count() == 3
        assert "text.jpg cannot be read as a photo" in opened.text_content(".error")
        assert complaints == []
        browser.close()
