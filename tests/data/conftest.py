"""Small objectives and tokenizers that the tests of this room share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from isoform.contracts import Document, Encoded
from isoform.registry import component
from isoform.text.tokenizers import TextTokenizer, train_tokenizer


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


@pytest.fixture(scope="session")
def characters() -> TextTokenizer:
    _, config = component("tokenizer", {"kind": "char"}, "text.tokenizer")
    return train_tokenizer("char", config, ["abcdefghijklmnopqrstuvwxyz .,0123456789\né漢"])
