"""Where the weights are that a person speaks of: a run, a folder, a file, a package, the hub.

runs/NAME                     its final model
FOLDER                        a folder that holds config.json, or an adapter's adapter_config.json
FILE.gguf                     one file with weights, tokenizer and config in it
pkg:NAME[/PATH]               what an installed Python package carries; PATH: which of several
hf:OWNER/NAME[@REVISION]      a folder of the Hugging Face hub
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

from isoform.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")
# Files that mean that a folder with a config.json holds a model, read here or not.
WEIGHTS = (".safetensors", ".onnx", ".h5", ".msgpack", *PICKLES)
# What a folder of a model holds: a whole one, or an adapter on another.
CONFIGS = ("config.json", "adapter_config.json")
EXPECTED = "a model folder, a run folder, a .gguf file, pkg:NAME or hf:owner/name[@revision] is expected"


def resolve_model(source: str | Path) -> Path:
    """The folder with a config.json, or the .gguf file, that `source` speaks of; no package is imported for it.

    Raises: CheckpointError that says what was expected.
    """
    text = str(source)
    if text.startswith("hf:"):
        return _fetch(text.removeprefix("hf:"))
    if text.startswith("pkg:"):
        return _in_package(text.removeprefix("pkg:"))
    path = Path(source)
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise CheckpointError(f"{source}: no such folder; {EXPECTED}")
    for folder in (path, path / "final"):
        if any((folder / name).is_file() for name in CONFIGS):
            return folder
    states = sorted((path / "checkpoints").glob("step-*")) or sorted(path.glob("step-*"))
    if states:
        raise CheckpointError(
            f"{source}: no final model yet: the run has not ended; its newest checkpoint is {states[-1]}"
        )
    raise CheckpointError(
        f"{source}: no config.json here and none in final/: this is no model folder and no run folder"
    )


def is_named(source: str | Path) -> bool:
    """Whether the source is a name (`hf:`, `pkg:`), not a path that a root folder could stand before."""
    return str(source).startswith(("hf:", "pkg:"))


def _file(path: Path) -> Path:
    if path.suffix in PICKLES:
        raise pickle_error(path)
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path}: {EXPECTED}")
    return path


def pickles(folder: Path) -> list[Path]:
    """Files directly in the folder whose names say that they are pickles."""
    return sorted(path for path in folder.iterdir() if path.suffix in PICKLES)


def pickle_error(path: Path) -> CheckpointError:
    """Why a pickle is not read, and what to do."""
    return CheckpointError(
        f"{path}: a pickle, which can run code when it is opened; only .safetensors is read: where you trust the file, "
        "open it with transformers and write it again with save_pretrained"
    )


def _in_package(name: str) -> Path:
    """The only model that the files of an installed package hold, or the one whose path ends as `name` says."""
    package, _, wanted = name.partition("/")
    try:
        listed = importlib.metadata.distribution(package).files or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise CheckpointError(f"pkg:{name}: no such package is installed; pip install {package or 'NAME'}") from None
    files = [Path(str(file.locate())) for file in listed]
    found = {path for path in files if path.suffix == ".gguf"} | {
        path.parent for path in files if path.name == "config.json" and _holds_model(path)
    }
    matching = sorted(path for path in found if not wanted or path.as_posix().endswith(f"/{wanted.rstrip('/')}"))
    if len(matching) == 1:
        return matching[0]
    if not found:
        raise CheckpointError(f"pkg:{name}: the package holds no folder with a config.json and weights, and no .gguf")
    known = ", ".join(f"pkg:{package}/{path.name}" for path in sorted(found))
    raise CheckpointError(f"pkg:{name}: {len(matching)} models of the package fit, one is expected: {known}")


def _holds_model(config: Path) -> bool:
    """Whether weights stand beside a config.json that names a model (others configure parts of a pipeline)."""
    try:
        names_model = "model_type" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
    return names_model and any(path.suffix in WEIGHTS for path in config.parent.iterdir())


def _fetch(name: str) -> Path:
    """A folder of the Hugging Face hub, from its cache or the network."""
    repository, _, revision = name.partition("@")
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(f"hf:{name}: huggingface_hub is not installed; pip install 'isoform[hf]'") from None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision or None, allow_patterns=["*.json", "*.safetensors", "*.txt"]
            )
        )
    except Exception as error:  # the hub raises many kinds, of several libraries
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"hf:{name}: not in the local cache and not fetched: {first_line[:200]}") from None
