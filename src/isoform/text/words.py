"""Where words begin in a sequence of token ids, by the marks of the tokenizer itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from isoform.contracts import IntArray
from isoform.text.tokenizers import TextTokenizer, byte_characters

# What a character is for the tokenizers that part words where its kind changes (GPT-2's pattern).
LETTER, DIGIT, SPACE, WHITE, OTHER = range(5)
METASPACE = "▁"


class WordStarts:
    """Tells which tokens begin a word.

    | tokenizer        | a token goes on with the word before it where                                       |
    |------------------|-------------------------------------------------------------------------------------|
    | WordPiece        | it is marked `##`                                                                   |
    | word             | never                                                                               |
    | byte-level, char | it does not begin with a space, and its first character is of the kind of the last  |
    | and others       | one before it (letters, digits, other signs; bytes beyond ASCII are letters), or    |
    |                  | that one is a space, which belongs to the word after it                             |

    So an apostrophe or a full stop is a word of its own, as it is for the patterns that part words in training.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
        self.marked = tokenizer.kind == "wordpiece"
        self.alone = tokenizer.kind == "word"
        self.goes_on = np.zeros(tokenizer.vocab_size, dtype=bool)
        self.first, self.last = np.full((2, tokenizer.vocab_size), OTHER, dtype=np.int8)
        byte_level = {character: chr(byte) for byte, character in byte_characters().items()}
        for token, index in vocab.items():
            if self.marked:
                self.goes_on[index] = token.startswith("##")
                continue
            text = "".join(byte_level.get(c, c) for c in token) if tokenizer.kind == "bpe" else token
            if text:
                self.first[index], self.last[index] = _kind(text[0]), _kind(text[-1])

    def __call__(self, ids: IntArray) -> npt.NDArray[np.bool_]:
        """bool `(t,)`: whether each token begins a word; the first always does."""
        if self.marked or self.alone:
            starts = ~self.goes_on[ids]
        else:
            first, before = self.first[ids], np.concatenate([[-1], self.last[ids][:-1]])
            starts = (first == SPACE) | ((first != before) & (before != SPACE))
        starts[:1] = True
        return starts


def _kind(character: str) -> int:
    if character in (" ", METASPACE):
        return SPACE
    if character.isspace():
        return WHITE
    if character.isascii() and not character.isalnum():
        return OTHER
    return DIGIT if character.isdigit() and character.isascii() else LETTER
