"""safetensors files, in and out: written block by block, and never read before their header has been checked.

A file is: header length (8 bytes, little-endian), a JSON header {name: {dtype, shape, data_offsets}}, the bytes of
all tensors end to end. A model may be cut into several files with an index {tensor name: file name}.
Source: the safetensors format description and the index files of Hugging Face transformers.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from isoform import storage
from isoform.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
MAX_HEADER_BYTES = 10_000_000
MAX_TENSORS = 50_000
# A line is shown where reading takes longer, and again as often.
PATIENCE_SECONDS = 3.0
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\.safetensors")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors take on disk, without the header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file; only one tensor at a time is copied to the host."""
    storage.write_blocks(path, _blocks(tensors))


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    # Wide types first, as the safetensors library does, so that every tensor starts aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def read_header(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of a safetensors file, after checking that they fit its size exactly.

    Raises: CheckpointError where the file is cut short, claims more than it holds, or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, f"a header of {length} bytes is announced in a file of {size}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise _damaged(path, f"the header is not JSON ({error})") from None
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise _damaged(path, f"the header is not a table of at most {MAX_TENSORS} tensors")
    header.pop("__metadata__", None)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        dtype, shape, span = _entry(path, name, entry)
        found[name] = (dtype, shape)
        spans.append(span)
    end = 0
    for begin, next_end in sorted(spans):
        if begin != end:
            raise _damaged(path, f"tensors overlap or leave a hole at byte {min(begin, end)}")
        end = next_end
    if end != size - 8 - length:
        raise _damaged(path, f"{size - 8 - length} bytes of tensors are there, the header speaks of {end}")
    return found


def _entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    """dtype, shape and byte span of one row of the header."""

    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 48 for item in value)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the header's row of {name!r:.80} is not dtype, shape, data_offsets")
    if entry["dtype"] not in _DTYPES if isinstance(entry["dtype"], str) else True:
        raise _damaged(path, f"{name!r:.80} has the type {entry['dtype']!r:.20}; known: {', '.join(_DTYPES)}")
    if not sizes(entry["shape"]) or not sizes(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
        raise _damaged(path, f"{name!r:.80} has a shape or place that is no list of sizes")
    dtype, (begin, end) = _DTYPES[entry["dtype"]], entry["data_offsets"]
    if len(entry["shape"]) > 16 or math.prod(entry["shape"]) * dtype.itemsize != end - begin:
        raise _damaged(path, f"{name!r:.80} of shape {entry['shape']!r:.80} does not fill its {end - begin} bytes")
    return dtype, tuple(entry["shape"]), (begin, end)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one checked file, on the host. Raises: CheckpointError."""
    read_header(path)
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def write_model(folder: Path, tensors: Mapping[str, Tensor], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes `model.safetensors`, or several files and their index where the model is larger than one file may be."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and num_bytes(shards[-1]) + num_bytes({name: tensor}) > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_tensors(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file_name, shard)
        weight_map.update(dict.fromkeys(shard, file_name))
    storage.write_json(
        folder / INDEX, {"metadata": {"total_size": num_bytes(tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    )


def read_model(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder, from one file or from an index and its files.

    Raises: CheckpointError where a file is missing, damaged, or named outside the folder.
    """
    if (folder / SINGLE).is_file():
        return read_tensors(folder / SINGLE)
    index = folder / INDEX
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: `weight_map` is missing; a table of tensor names and files is expected")
    tensors: dict[str, Tensor] = {}
    for file_name in sorted(set(map(str, weight_map.values()))):
        if not _FILE_NAME.fullmatch(file_name):
            raise CheckpointError(f"{index}: {file_name!r:.120} is no plain name of a .safetensors file in this folder")
        if not (folder / file_name).is_file():
            raise CheckpointError(f"{folder / file_name}: missing, but {INDEX} names it; fetch the folder again")
        shard = read_tensors(folder / file_name)
        stray = sorted(name for name in shard if weight_map.get(name) != file_name)
        if stray:
            raise CheckpointError(f"{folder / file_name}: holds {stray[0]!r:.120}, which {INDEX} does not place there")
        tensors.update(shard)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{folder / weight_map[missing[0]]}: {missing[0]!r:.120} is missing, but {INDEX} names it"
        )
    return tensors


def stored_names(folder: Path) -> list[str]:
    """Names of all tensors of a model folder, from the headers alone. Raises: CheckpointError."""
    if (folder / SINGLE).is_file():
        return list(read_header(folder / SINGLE))
    weight_map = read_object(folder / INDEX).get("weight_map")
    return [str(name) for name in weight_map] if isinstance(weight_map, dict) else []


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The precision of each tensor of a model folder, from the headers alone. Raises: CheckpointError."""
    single = (folder / SINGLE).is_file()
    shards = [SINGLE] if single else sorted(set(read_object(folder / INDEX)["weight_map"].values()))
    return {name: dtype for shard in shards for name, (dtype, _) in read_header(folder / shard).items()}


def read_object(path: Path, *, max_bytes: int = 50_000_000) -> dict[str, Any]:
    """A JSON file that holds one object. Raises: CheckpointError that names the file."""
    try:
        if path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path}: larger than {max_bytes} bytes; it cannot be what its name says")
        value = storage.read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {type(value).__name__} given, a JSON object is expected")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is given twice")
    return table


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or no safetensors file: {what}; restore the file or fetch it again")


class Progress:
    """Lines on standard error while something is read, once it takes longer than a few seconds.

    what: `reading model.gguf`; unit: what is counted.
    """

    def __init__(self, what: str, unit: str) -> None:
        self.what, self.unit = what, unit
        self.began = self.shown = time.monotonic()

    def at(self, number: int, of: int) -> None:
        """So much of all is read."""
        now = time.monotonic()
        if now - self.shown > PATIENCE_SECONDS:
            self.shown = now
            print(f"{self.what}: {number} of {of} {self.unit}, {now - self.began:.0f} s", file=sys.stderr)

    def done(self) -> None:
        """Everything is read."""
        if self.shown > self.began:
            print(f"{self.what}: done in {time.monotonic() - self.began:.0f} s", file=sys.stderr)
