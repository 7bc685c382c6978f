"""The files of a token store: numbers that are mapped to be read, and that grow while they are written."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from isoform.contracts import IntArray
from isoform.errors import DataError

# Mapped pages count as this process's memory until they are given back; they are, after so many bytes were read.
MAPPED_BYTES = 32_000_000
# A read maps the pages around it too.
LEAST_READ_BYTES = 1 << 16
HELD_NUMBERS = 1 << 14

# ------------------------------------------------------------------------------------------------------------- reading


class Pages:
    """The mapped files of a store: hands all pages back when enough were read, so that memory stays bounded."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []
        self._read = self._size = 0

    def map(self, path: Path) -> mmap.mmap:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self._maps.append(mapped)
        self._size += len(mapped)
        return mapped

    def count(self, num_bytes: int) -> None:
        """Notes a read."""
        self._read += max(num_bytes, LEAST_READ_BYTES)
        if self._read > MAPPED_BYTES < self._size:
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
            self._read = 0


class MappedNumbers:
    """A file of little-endian numbers, mapped."""

    def __init__(self, path: Path, dtype: str, pages: Pages) -> None:
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._pages = pages
        self._map = pages.map(path) if path.stat().st_size else b""

    def read(self, start: int, end: int) -> bytes:
        """The bytes of the numbers `start` to `end`."""
        width = self._dtype.itemsize
        part: bytes = self._map[start * width : end * width]
        self._pages.count(len(part))
        return part

    def array(self, start: int, end: int) -> npt.NDArray[Any]:
        return np.frombuffer(self.read(start, end), dtype=self._dtype)

    def number(self, index: int) -> int:
        return int.from_bytes(self.read(index, index + 1), "little", signed=self._dtype.kind == "i")


def stem(field: str) -> str:
    """The name of a field's files: any column may be a field, not every name is one of files."""
    return quote(field, safe="")


class FieldReader:
    """The ids of one field over all shards."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int, pages: Pages) -> None:
        self.folder, self.name, self.shard_tokens = folder, name, shard_tokens
        self.starts = MappedNumbers(folder / f"{stem(name)}.starts", "i8", pages)
        self.lengths = MappedNumbers(folder / f"{stem(name)}.lengths", "i4", pages)
        self._shards = [MappedNumbers(path, dtype, pages) for path in sorted(folder.glob(f"{stem(name)}.*.tokens"))]

    def ids(self, index: int) -> IntArray | None:
        """The sample's ids, or None where it has no such field."""
        start, length = self.starts.number(index), self.lengths.number(index)
        if length < 0:
            return None
        parts = []
        while length:
            shard, place = divmod(start, self.shard_tokens)
            part = self._shards[shard].array(place, min(place + length, self.shard_tokens)).astype(np.int32)
            if not len(part):
                raise DataError(f"{self.folder}: the stored field {self.name!r} ends early; remove the folder")
            parts.append(part)
            start, length = start + len(part), length - len(part)
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


# ------------------------------------------------------------------------------------------------------------- writing


class GrowingNumbers:
    """A file of little-endian numbers that grows."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._held: list[int] = []

    def append(self, values: Iterable[int]) -> None:
        self._held.extend(values)
        if len(self._held) >= HELD_NUMBERS:
            self._flush()

    def write(self, data: bytes) -> None:
        """Bytes as they are."""
        self._file.write(data)

    def _flush(self) -> None:
        self._file.write(np.array(self._held, dtype=self._dtype).tobytes())
        self._held.clear()

    def close(self) -> None:
        self._flush()
        self._file.close()


class FieldWriter:
    """Ids of one field, shard by shard."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int) -> None:
        self._folder, self._name, self._dtype, self._shard_tokens = folder, name, dtype, shard_tokens
        self._starts = GrowingNumbers(folder / f"{stem(name)}.starts", "i8")
        self._lengths = GrowingNumbers(folder / f"{stem(name)}.lengths", "i4")
        self._shard: GrowingNumbers | None = None
        self._num_tokens = 0
        self._num_samples = 0

    def add(self, ids: IntArray, ranges: Sequence[tuple[int, int]]) -> None:
        """The ids of a document, and the (start, length) of each sample in them."""
        self._starts.append(self._num_tokens + start for start, _ in ranges)
        self._lengths.append(length for _, length in ranges)
        self._num_samples += len(ranges)
        while len(ids):
            shard, place = divmod(self._num_tokens, self._shard_tokens)
            if place == 0:
                self._close_shard()
                self._shard = GrowingNumbers(self._folder / f"{stem(self._name)}.{shard:05d}.tokens", self._dtype)
            assert self._shard is not None
            part = ids[: self._shard_tokens - place]
            self._shard.write(part.astype(np.dtype(self._dtype).newbyteorder("<")).tobytes())
            self._num_tokens += len(part)
            ids = ids[len(part) :]

    def fill(self, number: int) -> None:
        """Marks the field as missing in the samples up to `number`."""
        missing = number - self._num_samples
        self._starts.append([0] * missing)
        self._lengths.append([-1] * missing)
        self._num_samples = number

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def close(self) -> None:
        self._close_shard()
        self._starts.close()
        self._lengths.close()
