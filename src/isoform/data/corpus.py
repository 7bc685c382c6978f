"""Token stores: documents encoded once, kept as memory-mapped shards, read by index.

A store is a folder under the cache, named by a hash of everything that decides its content: the source's bytes, the
tokenizer, what the objective's encoding depends on, and the options. It is built in one streaming pass, appears whole
or not at all, and is checked by hash when it is opened; a damaged one is built again.

    manifest.json            counts, report, sha256 of each file
    FIELD.00000.tokens ...   ids end to end, uint16 or uint32, `shard_tokens` a file
    FIELD.starts, .lengths   where each sample's ids begin, int64, and how many they are, int32 (-1: no such field)
    ids, ids.ends            each sample's id, UTF-8 end to end
    bytes                    UTF-8 bytes of text that each sample stands for
    documents, .starts       raw documents as JSON lines, where they are kept
"""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from isoform import storage
from isoform.config import DataConfig
from isoform.contracts import Document, Encoded, IntArray, Ints, Objective, Source, Tokenizer
from isoform.data.windows import Windower
from isoform.errors import LockedError

FORMAT = 1
# Mapped pages count as this process's memory until they are given back; they are, after so many bytes were read.
MAPPED_BYTES = 64_000_000


# ------------------------------------------------------------------------------------------------------------- reading


class _Mapped:
    """A file of numbers, mapped; pages that were read are handed back now and then, so that memory stays bounded."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.size = path.stat().st_size // self.dtype.itemsize
        self._read = 0
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if self.size else None

    def __getitem__(self, place: slice) -> npt.NDArray[Any]:
        """A copy of the numbers `place.start` to `place.stop`."""
        if self._map is None:
            return np.zeros(0, dtype=self.dtype)
        part = np.frombuffer(self._map, dtype=self.dtype)[place].copy()
        self._read += max(part.nbytes, mmap.PAGESIZE)
        if self._read > MAPPED_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0
        return part


class _Field:
    """The ids of one field over all shards."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int) -> None:
        self.shard_tokens = shard_tokens
        self.starts = _Mapped(folder / f"{name}.starts", np.int64)
        self.lengths = _Mapped(folder / f"{name}.lengths", np.int32)
        self._shards = [_Mapped(path, dtype) for path in sorted(folder.glob(f"{name}.*.tokens"))]

    def ids(self, index: int) -> IntArray | None:
        """The sample's ids, or None where it has no such field."""
        start, length = int(self.starts[index : index + 1][0]), int(self.lengths[index : index + 1][0])
        if length < 0:
            return None
        parts = []
        while length:
            shard, place = divmod(start, self.shard_tokens)
            part = self._shards[shard][place : min(place + length, self.shard_tokens)].astype(np.int32)
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


class Dataset:
    """Encoded documents, or windows of them, by index.

    report: {documents, samples, tokens, bytes, unknown_tokens, documents_cut, documents_truncated, tokens_dropped,
    documents_empty, longest_tokens}. fingerprint: the hash of everything that decides the content. fields: those that
    `field_lengths` names even where no document has them.
    """

    def __init__(self, folder: Path, fields: Sequence[str] = ()) -> None:
        manifest = storage.read_json(folder / "manifest.json")
        self.folder = folder
        self.report: dict[str, int] = manifest["report"]
        self.fingerprint: str = manifest["key"]
        self._num: int = manifest["samples"]
        self._expected = fields
        self._fields = {
            name: _Field(folder, name, manifest["dtype"], manifest["shard_tokens"]) for name in manifest["fields"]
        }
        self._bytes = _Mapped(folder / "bytes", np.int64)
        self._ids = _Mapped(folder / "ids", np.uint8)
        self._id_ends = _Mapped(folder / "ids.ends", np.int64)
        self._documents = _Mapped(folder / "documents", np.uint8) if manifest["keeps_documents"] else None
        self._document_starts = _Mapped(folder / "documents.starts", np.int64) if self._documents else None

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> Encoded:
        if not 0 <= index < self._num:
            raise IndexError(index)
        fields = {name: ids for name, stored in self._fields.items() if (ids := stored.ids(index)) is not None}
        return Encoded(self.id(index), fields, int(self._bytes[index : index + 1][0]), self.document(index))

    def __iter__(self) -> Iterator[Encoded]:
        return (self[index] for index in range(len(self)))

    def id(self, index: int) -> str:
        """The sample's id: its document's, with `#k` for the k-th window."""
        ends = self._id_ends[max(index - 1, 0) : index + 1]
        start = int(ends[0]) if index else 0
        return self._ids[start : int(ends[-1])].tobytes().decode()

    @property
    def ids(self) -> list[str]:
        """Every sample's id, in order."""
        return [self.id(index) for index in range(len(self))]

    @cached_property
    def field_lengths(self) -> dict[str, Ints]:
        """Field -> number of ids of each sample `(N,)`, 0 where the field is missing."""
        absent = {name: np.zeros(self._num, dtype=np.int64) for name in self._expected}
        return absent | {
            name: np.maximum(stored.lengths[0 : self._num].astype(np.int64), 0) for name, stored in self._fields.items()
        }

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of text that all samples together stand for."""
        return self.report["bytes"]

    def document(self, index: int) -> Document | None:
        """The raw document, where it was kept and was not cut into windows."""
        if self._documents is None or self._document_starts is None:
            return None
        start = int(self._document_starts[index : index + 1][0])
        if start < 0:
            return None
        size = int.from_bytes(self._documents[start : start + 8].tobytes(), "little")
        identity, fields, meta = json.loads(self._documents[start + 8 : start + 8 + size].tobytes())
        return Document(identity, fields, meta)


# ------------------------------------------------------------------------------------------------------------ building


def build_dataset(
    source: Source,
    tokenizer: Tokenizer,
    objective: Objective,
    data: DataConfig,
    max_tokens: int,
    cache: Path,
    keep_documents: bool = False,
) -> Dataset:
    """The source's documents encoded for the objective: opened where the cache has them, else built.

    keep_documents: also keep the raw text, which an evaluation shows. Memory does not grow with the source, but for
    some tens of bytes a document.

    Raises: DataError from the source, from the objective's `encode`, and for a long document that is refused.
    """
    windower = Windower(tokenizer, objective, data.long_documents, max_tokens)
    settings = [FORMAT, source.fingerprint(), tokenizer.fingerprint(), objective.encoding_key(), windower.key]
    key = storage.fingerprint([*settings, keep_documents, data.shard_tokens])
    folder = cache / "tokens" / key
    if not _whole(folder, key):
        with _waited(cache / "locks" / key):
            if not _whole(folder, key):
                _build(folder, key, source, tokenizer, objective, windower, data.shard_tokens, keep_documents)
    return Dataset(folder, [name for fields in objective.alternatives for name in fields])


def _whole(folder: Path, key: str) -> bool:
    """Whether a store is there with every byte that it was built with."""
    try:
        manifest = storage.read_json(folder / "manifest.json")
        return manifest["key"] == key and all(
            storage.sha256_file(folder / name) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


class _waited:
    """A lock that waits: processes of one run that need the same store build it once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> None:
        while True:
            try:
                self._stack.enter_context(storage.locked(self._folder))
                return
            except LockedError:
                time.sleep(0.1)

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class _Column:
    """A file of numbers that grows."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._file = path.open("wb")
        self._dtype = np.dtype(dtype)

    def write(self, values: npt.ArrayLike) -> None:
        self._file.write(np.asarray(values, dtype=self._dtype).tobytes())

    def close(self) -> None:
        self._file.close()


class _Tokens:
    """Ids of one field, shard by shard."""

    def __init__(self, folder: Path, name: str, dtype: str, shard_tokens: int, missing: int) -> None:
        self._folder, self._name, self._dtype, self._shard_tokens = folder, name, dtype, shard_tokens
        self._starts = _Column(folder / f"{name}.starts", np.int64)
        self._lengths = _Column(folder / f"{name}.lengths", np.int32)
        self._shard: _Column | None = None
        self.num_tokens = 0
        self.num_samples = 0
        self._skip(missing)

    def _skip(self, number: int) -> None:
        self._starts.write(np.zeros(number))
        self._lengths.write(np.full(number, -1))
        self.num_samples += number

    def add(self, ids: IntArray, ranges: Sequence[tuple[int, int]]) -> None:
        """The ids of a document, and the (start, length) of each sample in them."""
        for start, length in ranges:
            self._starts.write(self.num_tokens + start)
            self._lengths.write(length)
        self.num_samples += len(ranges)
        rest = ids
        while len(rest):
            shard, place = divmod(self.num_tokens, self._shard_tokens)
            if place == 0:
                self.close_shard()
                self._shard = _Column(self._folder / f"{self._name}.{shard:05d}.tokens", self._dtype)
            assert self._shard is not None
            part = rest[: self._shard_tokens - place]
            self._shard.write(part)
            self.num_tokens += len(part)
            rest = rest[len(part) :]

    def fill(self, number: int) -> None:
        """Marks the field as missing in the samples up to `number`."""
        self._skip(number - self.num_samples)

    def close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def close(self) -> None:
        self.close_shard()
        self._starts.close()
        self._lengths.close()


@dataclass
class _Writer:
    """All files of a store that is being built."""

    folder: Path
    dtype: str
    shard_tokens: int
    keep_documents: bool
    fields: dict[str, _Tokens] = field(default_factory=dict)
    num_samples: int = 0

    def __post_init__(self) -> None:
        self._bytes = _Column(self.folder / "bytes", np.int64)
        self._ids = _Column(self.folder / "ids", np.uint8)
        self._id_ends = _Column(self.folder / "ids.ends", np.int64)
        self._id_end = 0
        self._columns = [self._bytes, self._ids, self._id_ends]
        if self.keep_documents:
            self._documents = _Column(self.folder / "documents", np.uint8)
            self._document_starts = _Column(self.folder / "documents.starts", np.int64)
            self._document_end = 0
            self._columns += [self._documents, self._document_starts]

    def add(self, document: Document, encoded: Encoded, ranges: Sequence[tuple[int, int]], num_bytes: Ints) -> None:
        """One document: one sample, or a window of its text for each of several ranges."""
        cut = len(ranges) > 1
        for name, ids in encoded.fields.items():
            if name not in self.fields:
                self.fields[name] = _Tokens(self.folder, name, self.dtype, self.shard_tokens, self.num_samples)
            self.fields[name].add(ids, ranges if name == "text" else [(0, len(ids))] * len(ranges))
        self.num_samples += len(ranges)
        for tokens in self.fields.values():
            tokens.fill(self.num_samples)
        for number in range(len(ranges)):
            name = f"{encoded.id}#{number}" if cut else encoded.id
            self._ids.write(np.frombuffer(name.encode(), dtype=np.uint8))
            self._id_end += len(name.encode())
            self._id_ends.write(self._id_end)
        self._bytes.write(num_bytes)
        if self.keep_documents:
            self._keep(document, len(ranges))

    def _keep(self, document: Document, num_samples: int) -> None:
        if num_samples > 1:
            self._document_starts.write(np.full(num_samples, -1))
            return
        line = json.dumps([document.id, dict(document.fields), dict(document.meta)], default=str).encode()
        self._document_starts.write(self._document_end)
        self._documents.write(np.frombuffer(len(line).to_bytes(8, "little") + line, dtype=np.uint8))
        self._document_end += 8 + len(line)

    def close(self) -> None:
        for column in self._columns:
            column.close()
        for tokens in self.fields.values():
            tokens.close()


def _build(
    folder: Path,
    key: str,
    source: Source,
    tokenizer: Tokenizer,
    objective: Objective,
    windower: Windower,
    shard_tokens: int,
    keep_documents: bool,
) -> None:
    for path in storage.leftovers(folder.parent):
        # only what a killed process left of this very store: another one may be in the making beside it
        if path.name.startswith(f".{key}."):
            storage.remove(path)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with storage.staged_folder(folder) as staged:
        writer = _Writer(staged, dtype, shard_tokens, keep_documents)
        try:
            report = _fill(writer, source, tokenizer, objective, windower)
        finally:
            writer.close()
        files = {path.name: storage.sha256_file(path) for path in sorted(staged.iterdir())}
        manifest = {
            "format": FORMAT,
            "key": key,
            "source": source.name,
            "samples": writer.num_samples,
            "fields": list(writer.fields),
            "dtype": dtype,
            "shard_tokens": shard_tokens,
            "keeps_documents": keep_documents,
            "report": report,
            "files": files,
        }
        storage.write_json(staged / "manifest.json", manifest)


def _fill(
    writer: _Writer, source: Source, tokenizer: Tokenizer, objective: Objective, windower: Windower
) -> dict[str, int]:
    report = dict.fromkeys(
        ("documents", "samples", "tokens", "bytes", "unknown_tokens", "documents_cut", "documents_truncated"), 0
    ) | {"tokens_dropped": 0, "documents_empty": 0, "longest_tokens": 0}
    unknown = tokenizer.special_ids.get("unk", -1)
    for document in source:
        encoded = objective.encode(document)
        num_tokens = sum(map(len, encoded.token_fields))
        report["documents"] += 1
        report["longest_tokens"] = max(report["longest_tokens"], num_tokens)
        if num_tokens == 0:
            report["documents_empty"] += 1
            continue
        ranges, num_bytes, dropped = windower.cut(document, encoded)
        writer.add(document, encoded, ranges, num_bytes)
        report["tokens"] += num_tokens
        report["bytes"] += int(num_bytes.sum())
        report["unknown_tokens"] += sum(int(np.count_nonzero(ids == unknown)) for ids in encoded.token_fields)
        report["documents_cut"] += len(ranges) > 1
        report["documents_truncated"] += dropped > 0
        report["tokens_dropped"] += dropped
    report["samples"] = writer.num_samples
    return report
