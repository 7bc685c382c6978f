"""Documents and texts a block at a time, so that work on many at once stays within bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from isoform.contracts import Document

T = TypeVar("T", Document, str)

MAX_ITEMS = 1024
MAX_CHARACTERS = 1_000_000


def blocks(items: Iterable[T]) -> Iterator[list[T]]:
    """The items in lists of at most `MAX_ITEMS`, and of about `MAX_CHARACTERS` where one alone is not longer."""
    block: list[T] = []
    size = 0
    for item in items:
        block.append(item)
        size += len(item) if isinstance(item, str) else sum(map(len, item.fields.values()))
        if len(block) >= MAX_ITEMS or size >= MAX_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block
