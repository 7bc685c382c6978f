"""The text of a document's fields and the tokenizer's special tokens, with errors that say where to look."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from isoform.contracts import Document, Encoded, IntArray, Tokenizer
from isoform.errors import ConfigError, DataError
from isoform.models.heads import Keep
from isoform.registry import nearest
from isoform.text.frames import Frame

# What begins and ends a text that is read from both sides: the first of these roles that the tokenizer has.
BEGIN, END = ("cls", "bos"), ("sep", "eos")


def place(document: Document) -> str:
    """`source:row` of a document, or its id where the source did not say."""
    source, row = document.meta.get("source"), document.meta.get("row")
    if source is None:
        return f"document {document.id}"
    return str(source) if row is None else f"{source}:{row}"


def required_text(document: Document, field: str) -> str:
    """The field's text. Raises: DataError naming source and row where it is missing or blank."""
    text = document.fields.get(field)
    if text is None:
        given = ", ".join(document.fields) or "none"
        raise DataError(f"{place(document)}: no field {field!r} (fields: {given}); name its column with `data.{field}`")
    if not text.strip():
        raise DataError(f"{place(document)}: the field {field!r} is empty; give it a text or remove the row")
    return text


def special_id(tokenizer: Tokenizer, role: str, where: str) -> int:
    """The id of the special token called `role`. Raises: ConfigError naming the config field `where`."""
    ids = tokenizer.special_ids
    if role not in ids:
        known = ", ".join(sorted(ids)) or "none"
        raise ConfigError(
            f"{where}: the tokenizer has no special token {role!r}{nearest(role, ids)}; its special tokens: {known}"
        )
    return ids[role]


def edge_ids(tokenizer: Tokenizer, roles: Sequence[str], wanted: bool | None, where: str) -> tuple[int, ...]:
    """The special token at an edge of a text, none or one: the first of `roles` that the tokenizer has.

    wanted: None: where it has one. Raises: ConfigError naming the config field `where` where it is wanted and missing.
    """
    found = next((role for role in roles if role in tokenizer.special_ids), roles[0])
    if wanted is False or (wanted is None and found not in tokenizer.special_ids):
        return ()
    return (special_id(tokenizer, found, where),)


class Edged:
    """An objective whose option `edges` says whether special tokens stand around what is read.

    Which ones, the tokenizer's file says where it lays any around a text, so that others read the same; else roles do.
    """

    config: Any
    tokenizer: Tokenizer

    @cached_property
    def frame(self) -> Frame:
        """What stands around a text, and around a pair."""
        wanted = self.config.edges
        own: Frame | None = getattr(self.tokenizer, "frame", None)
        if own is not None and wanted is not False:
            return own
        begin, end = (edge_ids(self.tokenizer, roles, wanted, "objective.edges") for roles in (BEGIN, END))
        return Frame.of_edges(begin, end)

    @cached_property
    def begin(self) -> tuple[int, ...]:
        """Ids before a text, window or sentence."""
        return self.frame.before

    @cached_property
    def end(self) -> tuple[int, ...]:
        """Ids after each."""
        return self.frame.after


class Decoded:
    """An objective whose options `start` and `end` name what a decoder begins with, and what ends both streams."""

    config: Any
    tokenizer: Tokenizer

    @cached_property
    def start(self) -> int:
        return special_id(self.tokenizer, self.config.start, "objective.start")

    @cached_property
    def end(self) -> int:
        return special_id(self.tokenizer, self.config.end, "objective.end")

    def fitted(self, model: Any, seed: int) -> Any:
        """The model, which remembers what its decoder begins with."""
        model.config = model.config.model_copy(update={"start_id": self.start})
        return model


def at_length(objective: Any, max_tokens: int) -> Any:
    """The same objective where texts are cut at so many tokens; what it needs beside the model is shared."""
    made = type(objective)(objective.config, objective.tokenizer, max_tokens)
    made.helper = objective.helper
    return made


def needed(encoded: Encoded, field: str) -> IntArray:
    """Ids of a field (`_field`: what is kept of it) that may be missing where nothing is asked. Raises: DataError."""
    if field not in encoded.fields:
        where = place(encoded.document) if encoded.document else encoded.id
        raise DataError(
            f"{where}: no field {field.removeprefix('_')!r}; training and scoring need one, `isoform predict` does not"
        )
    return encoded.fields[field]


def tokens_of(*pieces: IntArray | Sequence[int] | int) -> IntArray:
    """Token ids end to end, int32 `(t,)`."""
    return np.concatenate(
        [piece if isinstance(piece, np.ndarray) else np.array(piece, dtype=np.int32, ndmin=1) for piece in pieces]
    )


def cut_to_fit(parts: Sequence[IntArray], room: int, keep: Keep = "start") -> list[IntArray]:
    """What is kept of one or two texts that must fit together, the longer one shortened first."""
    if len(parts) == 1:
        return [_shortened(parts[0], room, keep)]
    first, second = parts
    if len(first) + len(second) <= room:
        return [first, second]
    shorter = min(len(first), len(second), room // 2)
    rooms = (room - shorter, shorter) if len(first) >= len(second) else (shorter, room - shorter)
    return [_shortened(part, length, keep) for part, length in zip(parts, rooms, strict=True)]


def _shortened(ids: IntArray, length: int, keep: Keep) -> IntArray:
    if len(ids) <= length:
        return ids
    head = {"start": length, "end": 0, "ends": length // 4}[keep]
    return np.concatenate([ids[:head], ids[len(ids) - (length - head) :]])
