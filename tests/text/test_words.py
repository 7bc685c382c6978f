"""Word starts are those that the tokenizer's own pre-tokenizer finds."""

from __future__ import annotations

import numpy as np
import pytest

from isoform.registry import build_options, lookup
from isoform.text.tokenizers import TextTokenizer, train_tokenizer
from isoform.text.words import WordStarts

TEXT = "The harbourmaster's 3 boats, unlike 12.5 others; didn't re-enter Izmir's old harbour (1901)! naive words again."


def tokenizer(kind: str) -> TextTokenizer:
    options = build_options(lookup("tokenizer", kind), {"vocab_size": 320, "min_frequency": 1}, "text.tokenizer")
    return train_tokenizer(kind, options, [TEXT])


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "word"])
def test_words_are_those_of_the_pre_tokenizer(kind: str) -> None:
    """Oracle: `word_ids` of the tokenizers library."""
    backend = tokenizer(kind).backend
    # GPT-2 keeps the letters of 's with their apostrophe, of which we make a word of its own.
    whole = TEXT.replace("'", " ") if kind == "bpe" else TEXT
    for text in (whole, "unseen harbours 7th words, 99% of 1234", "boats"):
        encoding = backend.encode(text, add_special_tokens=False)
        expected = np.diff([-1, *encoding.word_ids]) != 0
        starts = WordStarts(tokenizer(kind))(np.array(encoding.ids, dtype=np.int32))
        assert starts.tolist() == expected.tolist()


def test_letters_of_a_word_belong_together() -> None:
    chars = tokenizer("char")
    starts = WordStarts(chars)(chars.encode("The old 3 boats, again."))
    words = "".join("|" * bool(start) + c for start, c in zip(starts, "The old 3 boats, again.", strict=True))
    assert words == "|The| old| 3| boats|,| again|."


def test_the_first_token_begins_a_word_and_nothing_is_nothing() -> None:
    pieces = tokenizer("wordpiece")
    starts = WordStarts(pieces)
    vocab = pieces.backend.get_vocab()
    inside = np.array([vocab["##a"], vocab["##s"]], dtype=np.int32)
    assert starts(inside).tolist() == [True, False]
    assert starts(inside[:0]).tolist() == []
