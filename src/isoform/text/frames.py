"""What stands around a text that is read whole: the special tokens at its edges, and between two texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from isoform.contracts import IntArray

PROBES = ("a", "b")


class Part(NamedTuple):
    """A special token, or where `text` is not None the first (0) or second (1) text; segment: its type id."""

    text: int | None
    id: int
    segment: int


@dataclass(frozen=True)
class Frame:
    """How one text, and how a pair, is laid out."""

    single: tuple[Part, ...]
    pair: tuple[Part, ...]

    @classmethod
    def of_edges(cls, begin: Sequence[int], end: Sequence[int]) -> Frame:
        """`begin A end`, and `begin A end B end`, in which the second text and its end are of segment 1."""
        single = *(Part(None, index, 0) for index in begin), Part(0, -1, 0), *(Part(None, index, 0) for index in end)
        return cls(single, (*single, Part(1, -1, 1), *(Part(None, index, 1) for index in end)))

    @property
    def before(self) -> tuple[int, ...]:
        """Ids before a single text."""
        return tuple(part.id for part in self.single[: self._place])

    @property
    def after(self) -> tuple[int, ...]:
        """Ids after a single text."""
        return tuple(part.id for part in self.single[self._place + 1 :])

    @property
    def _place(self) -> int:
        return next(at for at, part in enumerate(self.single) if part.text is not None)

    def num_added(self, num_texts: int) -> int:
        """How many special tokens there are around one text or two."""
        return len(self._parts(num_texts)) - num_texts

    def around(self, texts: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
        """Ids of one text or two, framed, and the segment of each, int32 `(t,)`."""
        parts = self._parts(len(texts))
        pieces = [np.array([part.id], dtype=np.int32) if part.text is None else texts[part.text] for part in parts]
        segments = [np.full(len(piece), part.segment, np.int32) for piece, part in zip(pieces, parts, strict=True)]
        return np.concatenate(pieces), np.concatenate(segments)

    def _parts(self, num_texts: int) -> tuple[Part, ...]:
        return self.single if num_texts == 1 else self.pair


def own_frame(backend: Backend) -> Frame | None:
    """The frame that a tokenizer.json lays around texts itself; None where it adds nothing, or cannot be told."""
    if backend.post_processor is None:
        return None
    single, pair = (_laid_out(backend, PROBES[:count]) for count in (1, 2))
    whole = [part.text for part in single].count(0) == 1 and {part.text for part in pair} >= {0, 1}
    return Frame(single, pair) if whole and len(single) > 1 else None


def _laid_out(backend: Backend, texts: Sequence[str]) -> tuple[Part, ...]:
    encoding = backend.encode(texts[0], texts[1] if len(texts) > 1 else None)
    parts: list[Part] = []
    for index, text, segment in zip(encoding.ids, encoding.sequence_ids, encoding.type_ids, strict=True):
        if text is None or not parts or parts[-1].text != text:
            parts.append(Part(text, index if text is None else -1, segment))
    return tuple(parts)


def processor(backend: Backend, frame: Frame) -> processors.PostProcessor:
    """The post-processor of a tokenizer.json that lays this frame around texts."""
    names = {part.id: backend.id_to_token(part.id) for part in (*frame.single, *frame.pair) if part.text is None}

    def spelled(parts: Sequence[Part]) -> list[str]:
        said = ["$A" if part.text == 0 else "$B" if part.text == 1 else names[part.id] for part in parts]
        return [f"{name}:{part.segment}" for name, part in zip(said, parts, strict=True)]

    special = [(name, index) for index, name in names.items()]
    return processors.TemplateProcessing(single=spelled(frame.single), pair=spelled(frame.pair), special_tokens=special)
