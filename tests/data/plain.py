"""An objective that the tests of this room, and a process that they start, share."""

from __future__ import annotations

from typing import Any

import numpy as np

from isoform.contracts import Document, Encoded


class Plain:
    """An objective that encodes every field and asks for nothing else."""

    alternatives = (("text",), ("question", "answer"))
    optional_fields = ("answer",)
    stochastic = False
    metrics = ("loss",)
    needs: frozenset[str] = frozenset()

    def __init__(self, tokenizer: Any, window_tokens: int, *, windowed: bool = True) -> None:
        self.tokenizer = tokenizer
        self.windowed = windowed
        self.window_tokens = window_tokens

    def encode(self, document: Document) -> Encoded:
        ids = {name: self.tokenizer.encode(text) for name, text in document.fields.items()}
        return Encoded(document.id, ids, sum(len(text.encode()) for text in document.fields.values()), document)

    def encoding_key(self) -> str:
        return "plain"

    def planned_tokens(self, field_tokens: Any) -> Any:
        return sum(field_tokens.values(), np.zeros(1, dtype=np.int64))
