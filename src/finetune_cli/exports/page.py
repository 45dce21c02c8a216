"""`page.html` beside an ONNX model: one file that classifies photos in a browser, opened from disk, without a server.

It holds the model, `photo.mjs` and ONNX Runtime Web, which is downloaded once into the cache folder; its SHA-256 is
known here, so a changed file never gets into a page. The page asks for nothing from the network and sends nothing.
"""

import base64
import gzip
import json
from importlib import resources
from pathlib import Path

from finetune_cli import files
from finetune_cli.backbones.download import Published, download
from finetune_cli.cache.folder import default_folder
from finetune_cli.exports import photo_files
from finetune_cli.exports.card import Card

FILE = "page.html"
VERSION = "1.30.0"  # of ONNX Runtime Web
_WHERE = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist"
_SCRIPT, _WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
LIBRARY = {
    _SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    _WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}


def library_folder() -> Path:
    """Where the files of ONNX Runtime Web are kept. Raises `StorageError` for a user without a home directory."""
    return default_folder() / f"onnxruntime-web-{VERSION}"


def write(folder: Path, model: bytes, card: Card, title: str) -> None:
    """Write `page.html` into `folder`.

    model: an ONNX file with the input ``image float32 (N, size, size, 3)``. Raises `WeightsError` when the library
    cannot be downloaded, or is damaged.
    """
    import jinja2

    assets = {
        "library": _library_file(_SCRIPT),
        "wasm": _library_file(_WASM),
        "photo": photo_files.text("photo.mjs").encode(),
        "card": json.dumps(card.to_json()).encode(),
        "model": model,
    }
    template = (resources.files("finetune_cli.exports") / "templates" / FILE).read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(template).render(
        title=title, assets={name: _packed(data) for name, data in assets.items()}
    )
    files.write_text(folder / FILE, page)


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def _library_file(name: str) -> bytes:
    path, digest = library_folder() / name, LIBRARY[name]
    if not path.exists() or not files.has_digest(path, digest):
        files.make_folder(path.parent)
        download(Published(f"{_WHERE}/{name}", digest, "ONNX Runtime Web", "leave out --page"), path)
    return files.read_regular(path)
