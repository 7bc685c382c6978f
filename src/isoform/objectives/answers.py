"""Question to answer: supervised fine-tuning on pairs, with loss on the answer alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from isoform.contracts import IGNORE, Document, Encoded, IntArray, Ints, Prompt, Sample, Tokenizer
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.fields import needed, special_id, tokens_of
from isoform.objectives.pairs import encode_pair, texts_of
from isoform.registry import Options, register


@register("objective", "answers")
class Answers(TokenObjective):
    """`question SEP answer END`, asked: the answer's tokens and END, each from all that stands before it.

    The text is never changed: characters that the tokenizer does not know become its unknown token. A question that
    leaves no room for its answer is cut off on the left, unless `data.long_documents` refuses it.

    Source: CS224N assignment 5, `NameDataset` (question MASK place MASK).
    Differs: that one also asks for the separator after the question, which says nothing about the answer, drops
    characters outside ASCII from training texts, and pads.
    """

    class Config(Options):
        separator: str = "mask"
        # role of the special token between question and answer
        end: str = "mask"
        # role of the special token after the answer

    alternatives: tuple[tuple[str, ...], ...] = (("question", "answer"),)
    optional_fields: tuple[str, ...] = ("answer",)
    needs: frozenset[str] = frozenset({"causal"})
    stochastic: bool = False
    windowed: bool = False
    metrics: tuple[str, ...] = ("exact_match", "loss", "token_accuracy")

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        super().__init__(config, tokenizer, max_tokens)
        self.window_tokens = max_tokens + 1

    @cached_property
    def separator(self) -> int:
        return special_id(self.tokenizer, self.config.separator, "objective.separator")

    @cached_property
    def end(self) -> int:
        return special_id(self.tokenizer, self.config.end, "objective.end")

    def encode(self, document: Document) -> Encoded:
        return encode_pair(document, self.tokenizer, self.max_tokens)

    def encoding_key(self) -> str:
        return f"answers in {self.max_tokens}"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        lengths: Ints = field_tokens["question"] + field_tokens["answer"] + 1
        return np.minimum(lengths, self.max_tokens)

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        answer = needed(encoded, "answer")
        question = _right(encoded.fields["question"], self.max_tokens - 1 - len(answer))
        tokens = tokens_of(question, self.separator, answer)
        targets = np.full_like(tokens, IGNORE)
        targets[len(question) :] = tokens_of(answer, self.end)
        return Sample(encoded.id, tokens, targets, num_bytes=encoded.num_bytes)

    def prompt(self, encoded: Encoded) -> Prompt:
        """`question SEP`, answered until END; the expected answer is the text itself, not its tokens."""
        text, gold = texts_of(encoded, self.tokenizer)
        tokens = tokens_of(_right(encoded.fields["question"], self.max_tokens - 1), self.separator)
        return Prompt(encoded.id, tokens, (self.end,), self.max_tokens, text, gold)


def _right(tokens: IntArray, num_tokens: int) -> IntArray:
    """The last `num_tokens` tokens."""
    return tokens[max(0, len(tokens) - num_tokens) :]
