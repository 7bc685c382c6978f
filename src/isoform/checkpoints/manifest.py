"""The list of a folder's files with size and SHA-256, written last, so that damage is seen and named before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isoform import storage
from isoform.checkpoints.tensors import Progress, read_object
from isoform.errors import CheckpointError

NAME = "manifest.json"
MEGABYTE = 1_000_000


def write(folder: Path, **facts: Any) -> None:
    """Lists every file below `folder` with its size and hash, together with `facts`; call it after the last write."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": storage.sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / NAME
    }
    value = {**facts, "files": files}
    storage.write_text(folder / NAME, _render({**value, "sha256": _digest(value)}))


def read(folder: Path) -> dict[str, Any]:
    """The manifest, after checking its own hash. Raises: CheckpointError where it is missing, damaged or edited."""
    path = folder / NAME
    value = read_object(path)
    unsigned = {key: item for key, item in value.items() if key != "sha256"}
    if value.get("sha256") != _digest(unsigned) or path.read_bytes() != _render(value).encode():
        raise CheckpointError(f"{path}: damaged or edited: it does not agree with its own hash")
    files = value.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} for entry in files.values()
    ):
        raise CheckpointError(f"{path}: `files` is no table of sizes and hashes; this is no manifest of a model folder")
    return value


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after checking every file that it lists. Raises: CheckpointError that names the first bad file."""
    value = read(folder)
    progress, total, before = Progress(f"checking {folder.name}", "MB"), _num_bytes(value["files"]), 0

    def told(num_bytes: int) -> None:
        progress.at((before + num_bytes) // MEGABYTE, total // MEGABYTE)

    for name, expected in value["files"].items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(f"{path}: damaged: {size} bytes long, {expected['bytes']} in {NAME}")
            if storage.sha256_file(path, told) != expected["sha256"]:
                raise CheckpointError(f"{path}: damaged or edited: its SHA-256 is not the one in {NAME}")
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}), but {NAME} lists it") from None
        before += size
    progress.done()
    return value


def _num_bytes(files: Mapping[str, Any]) -> int:
    return sum(entry["bytes"] for entry in files.values() if isinstance(entry["bytes"], int))


def unlisted(folder: Path) -> list[Path]:
    """Files in `folder` that its manifest does not know."""
    listed = {folder / name for name in read(folder)["files"]} | {folder / NAME}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path not in listed)


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(_render(value).encode()).hexdigest()


def _render(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
