"""A teacher's answers to every training document, computed once: a folder of the cache, mapped to be read.

manifest.json      what they were made from, sha256 of each file
values             float32, sample after sample: its answers, then its states, layer by layer
keys               int64, the hash of each sample's id, in rising order
starts, sizes      int64, where each sample's values begin and how many they are, in the order of the keys
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoform import chance, storage
from isoform.contracts import Batch, Floats, Ints
from isoform.data.batches import collate
from isoform.data.corpus import waited, whole
from isoform.data.plan import micro_batches
from isoform.data.shards import GrowingNumbers, MappedNumbers, Pages
from isoform.errors import DataError

# Samples prepared at once: enough to batch like lengths together, few enough to stream.
POOL_SAMPLES = 2048
BATCH_TOKENS = 16_384

# A batch -> (what the teacher says: an answer and states, how many rows of the answer each sample has).
Ask = Callable[[Batch], tuple[Any, list[int]]]


class Lessons:
    """What a teacher has said of each sample."""

    def __init__(self, folder: Path) -> None:
        pages = Pages()
        self._folder = folder
        self._values = MappedNumbers(folder / "values", "f4", pages)
        self._keys, self._starts, self._sizes = (
            np.fromfile(folder / name, dtype="<i8") for name in ("keys", "starts", "sizes")
        )

    def of(self, batch: Batch, rows: Sequence[Sequence[int]], widths: Sequence[int]) -> list[Tensor]:
        """Arrays `(rows of all samples, width)`, one for each entry of `rows`, which counts them by sample.

        A sample that is asked nothing this time (rank's filler) has no rows of an answer that it was asked for before.
        """
        parts: list[list[Any]] = [[] for _ in widths]
        for number, key in enumerate(batch.sample_keys[: len(rows[0])].tolist()):
            values = self._record(key, batch.sample_ids[number])
            later = sum(counts[number] * width for counts, width in zip(rows[1:], widths[1:], strict=True))
            pieces = [values[: len(values) - later], values[len(values) - later :]]
            parts[0].append(pieces[0].reshape(-1, widths[0])[: rows[0][number]])
            for at, width in enumerate(widths[1:], start=1):
                size = rows[at][number] * width
                parts[at].append(pieces[1][:size].reshape(-1, width))
                pieces[1] = pieces[1][size:]
        return [torch.from_numpy(np.concatenate(part)).to(batch.tokens.device) for part in parts]

    def _record(self, key: int, identity: str) -> Any:
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            raise DataError(f"{self._folder}: the teacher was not asked about sample {identity}; remove the folder")
        start = int(self._starts[place])
        return self._values.array(start, start + int(self._sizes[place]))


def kept_lessons(cache: Path, key: str, train: Any, objective: Any, ask: Ask, *, most_bytes: int) -> Lessons:
    """The answers called `key`: opened where the cache has them whole, else asked for, sample by sample.

    Raises: DiskError before anything is asked where there is no room for `most_bytes`.
    """
    folder = cache / "lessons" / key
    if not whole(folder, key):
        with waited(cache / "locks" / key):
            if not whole(folder, key):
                storage.require_free(folder, most_bytes)
                _write(folder, key, train, objective, ask)
    return Lessons(folder)


def _write(folder: Path, key: str, train: Any, objective: Any, ask: Ask) -> None:
    with storage.staged_folder(folder) as staged:
        values = GrowingNumbers(staged / "values", "f4")
        keys, sizes = [], []
        try:
            for first in range(0, len(train), POOL_SAMPLES):
                for sample_key, record in _asked(
                    train, range(first, min(first + POOL_SAMPLES, len(train))), objective, ask
                ):
                    values.write(record.astype("<f4").tobytes())
                    keys.append(sample_key)
                    sizes.append(len(record))
        finally:
            values.close()
        _write_index(staged, np.array(keys, dtype="<i8"), np.array(sizes, dtype="<i8"))
        files = {path.name: storage.sha256_file(path) for path in sorted(staged.iterdir())}
        storage.write_json(staged / "manifest.json", {"key": key, "samples": len(keys), "files": files})


def _write_index(folder: Path, keys: Ints, sizes: Ints) -> None:
    order = np.argsort(keys, kind="stable")
    starts = np.cumsum(sizes) - sizes
    for name, numbers in (("keys", keys), ("starts", starts), ("sizes", sizes)):
        storage.write_blocks(folder / name, [numbers[order].astype("<i8").tobytes()])


def _asked(train: Any, indices: range, objective: Any, ask: Ask) -> list[tuple[int, Floats]]:
    """(key of a sample, the numbers said of it) of some samples, which are asked in batches of like lengths."""
    encoded = [train[index] for index in indices]
    samples = [objective.prepare(one, chance.generator("teacher", one.id)) for one in encoded]
    lengths = np.array([sample.num_tokens for sample in samples])
    found = []
    for group in micro_batches(np.arange(len(samples)), lengths, BATCH_TOKENS):
        batch = collate([samples[place] for place in group])
        lesson, rows = ask(batch)
        columns = [(lesson.answers, rows), *((states, batch.sequences.lengths) for states in lesson.states)]
        pieces = [tensor.float().cpu().split(list(counts)) for tensor, counts in columns]
        for number, key in enumerate(batch.sample_keys.tolist()):
            record = np.concatenate([piece[number].numpy().ravel() for piece in pieces])
            found.append((key, record))
    return found
