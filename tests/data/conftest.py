"""A tokenizer that the tests of this room share."""

from __future__ import annotations

import pytest

from isoform.registry import component
from isoform.text.tokenizers import TextTokenizer, train_tokenizer


@pytest.fixture(scope="session")
def characters() -> TextTokenizer:
    _, config = component("tokenizer", {"kind": "char"}, "text.tokenizer")
    return train_tokenizer("char", config, ["abcdefghijklmnopqrstuvwxyz .,0123456789\né漢"])
