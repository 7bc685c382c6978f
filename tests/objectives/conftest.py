"""Tokenizers and a model small enough to check by hand."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from isoform.contracts import IGNORE, Batch, Output, Sequences

SPECIAL = {"unk": 0, "pad": 1, "mask": 2, "bos": 3, "eos": 4}


class Letters:
    """One id a character."""

    kind = "char"
    special_ids = SPECIAL
    vocab_size = 5 + 0x250

    def encode(self, text):
        return np.array([ord(c) + 5 if ord(c) < 0x250 else 0 for c in text], dtype=np.int32)

    def decode(self, ids, *, skip_special=True):
        return "".join(chr(i - 5) for i in ids if i >= 5)


class Chunks:
    """Up to three letters a token, a space going with the letters after it, as byte-level BPE does."""

    kind = "bpe"
    special_ids = SPECIAL

    def __init__(self):
        self.words = {}

    @property
    def vocab_size(self):
        return 5 + len(self.words)

    def encode(self, text):
        pieces = re.findall(r" ?\w{1,3}| ?[^\w ]| ", text)
        return np.array([5 + self.words.setdefault(piece, len(self.words)) for piece in pieces], dtype=np.int32)

    def decode(self, ids, *, skip_special=True):
        names = list(self.words)
        return "".join(names[i - 5] for i in ids if i >= 5)


class TokenModel(nn.Module):
    """Scores the next token by the last one alone."""

    capabilities = frozenset({"causal"})
    max_positions = None

    def __init__(self, vocab_size, dtype=torch.float64):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Parameter(torch.randn(vocab_size, 6, generator=generator, dtype=torch.float64).to(dtype))
        self.head = nn.Parameter(torch.randn(vocab_size, 6, generator=generator, dtype=torch.float64).to(dtype))
        self.num_logits = 0

    def forward(self, batch, *, cache=None, all_layers=False):
        return Output(self.embedding[batch.tokens])

    def logits(self, hidden):
        self.num_logits += len(hidden)
        return hidden @ self.head.T


def ragged_batch(samples, weights=None):
    def cat(arrays):
        return torch.from_numpy(np.concatenate(arrays)).long()

    lengths = [len(s.tokens) for s in samples]
    return Batch(
        tokens=cat([s.tokens for s in samples]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        sequences=Sequences(lengths),
        sample_keys=torch.zeros(len(samples), dtype=torch.int64),
        targets=cat([s.targets for s in samples]),
        weights=None if weights is None else torch.tensor(weights),
        sample_ids=tuple(s.id for s in samples),
    )


def asked_tokens(sample):
    """[(place, target)] of what is asked."""
    return [(i, int(t)) for i, t in enumerate(sample.targets) if t != IGNORE]


@pytest.fixture(scope="session")
def letters():
    return Letters()


@pytest.fixture(scope="session")
def chunks():
    return Chunks()


@pytest.fixture(scope="session")
def token_model():
    return TokenModel


@pytest.fixture(scope="session")
def collate():
    return ragged_batch


@pytest.fixture(scope="session")
def asked():
    return asked_tokens
