import hashlib
import io
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import Any

import pytest

from finetune_cli import files
from finetune_cli.backbones import download, registry
from finetune_cli.errors import WeightsError


class TestImagenet:
    INFO = registry.TABLE["resnet50"]
    NAME = "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
    URL = f"https://storage.googleapis.com/tensorflow/keras-applications/resnet/{NAME}"

    @pytest.fixture
    def models(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
        return tmp_path / "keras" / "models"

    @pytest.fixture
    def info(self) -> registry.BackboneInfo:
        """A backbone whose published weights are the six bytes `kernel`."""
        digest = hashlib.md5(b"kernel").hexdigest()
        return registry.BackboneInfo("resnet50", "ResNet50", "resnet", 2048, digest=digest)

    def serve(self, monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
        asked: list[str] = []

        def urlopen(url: str, timeout: float) -> Any:
            asked.append(url)
            if isinstance(answer, Exception):
                raise answer
            response = io.BytesIO(answer)
            response.headers = Message()  # type: ignore[attr-defined]
            response.headers["Content-Length"] = str(len(answer))  # type: ignore[attr-defined]
            return response

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return asked

    def test_offline_the_error_names_file_and_folder(self, models: Path, monkeypatch: pytest.MonkeyPatch):
        self.serve(monkeypatch, urllib.error.URLError("Name or service not known"))
        with pytest.raises(WeightsError) as caught:
            download.fetch(self.INFO.published_weights(224))
        assert caught.value.problem == "cannot download the ImageNet weights: Name or service not known"
        assert f"save {self.URL} (hash 4d473c1dd8becc155b73f8504c6f6626) as {models / self.NAME}" in caught.value.remedy
        assert not models.exists()

    def test_what_is_in_the_cache_is_used_without_asking(self, models: Path, info: Any, monkeypatch: Any):
        asked = self.serve(monkeypatch, urllib.error.URLError("offline"))
        models.mkdir(parents=True)
        (models / self.NAME).write_bytes(b"kernel")
        assert download.fetch(info.published_weights(224)) == models / self.NAME
        assert asked == []

    def test_without_keras_home_the_cache_is_in_the_home_folder(self, tmp_path: Path, info: Any, monkeypatch: Any):
        monkeypatch.delenv("KERAS_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        path = tmp_path / ".keras" / "models" / self.NAME
        path.parent.mkdir(parents=True)
        path.write_bytes(b"kernel")
        assert download.fetch(info.published_weights(224)) == path

    def test_another_file_under_that_name_is_an_error_and_stays(self, models: Path, info: Any, monkeypatch: Any):
        asked = self.serve(monkeypatch, b"kernel")
        models.mkdir(parents=True)
        (models / self.NAME).write_bytes(b"the file of 2016")
        with pytest.raises(WeightsError, match="not the file that Keras publishes") as caught:
            download.fetch(info.published_weights(224))
        assert f"model.weights: {models / self.NAME}" in caught.value.remedy
        assert (models / self.NAME).read_bytes() == b"the file of 2016"
        assert asked == []

    def test_a_download_is_kept(self, models: Path, info: Any, monkeypatch: Any):
        asked = self.serve(monkeypatch, b"kernel")
        path = download.fetch(info.published_weights(224))
        assert path.read_bytes() == b"kernel"
        assert asked == [self.URL]
        assert download.fetch(info.published_weights(224)) == path
        assert len(asked) == 1

    def test_progress_of_a_download_counts_megabytes(self, models: Path, monkeypatch: Any):
        data = bytes(2_500_000)
        self.serve(monkeypatch, data)
        info = registry.BackboneInfo("resnet50", "ResNet50", "resnet", 2048, digest=hashlib.md5(data).hexdigest())
        calls: list[tuple[int, int | None]] = []
        download.fetch(info.published_weights(224), lambda n, total=None: calls.append((n, total)))
        assert calls == [(1, 2), (1, 2), (0, 2)]

    def test_a_damaged_download_leaves_nothing(self, models: Path, info: Any, monkeypatch: Any):
        self.serve(monkeypatch, b"kern")
        with pytest.raises(WeightsError, match="is damaged"):
            download.fetch(info.published_weights(224))
        assert list(models.iterdir()) == []

    def test_a_connection_that_breaks_leaves_nothing(self, models: Path, info: Any, monkeypatch: Any):
        class Breaking(io.BytesIO):
            headers = Message()

            def read(self, *_: Any) -> bytes:
                raise TimeoutError("timed out")

        monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Breaking())
        with pytest.raises(WeightsError, match=r"cannot download .* timed out"):
            download.fetch(info.published_weights(224))
        assert list(models.iterdir()) == []


def test_digests_of_both_kinds(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(b"kernel")
    assert files.has_digest(path, hashlib.md5(b"kernel").hexdigest())
    assert files.has_digest(path, hashlib.sha256(b"kernel").hexdigest())
    assert not files.has_digest(path, hashlib.sha256(b"other").hexdigest())
    assert files.has_digest(path, None)
