"""Text to text: an encoder-decoder reads one text and says another; questions, translations, summaries alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from isoform.contracts import Document, Encoded, IntArray, Ints, Prompt, Sample
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.fields import Decoded, needed, tokens_of
from isoform.objectives.pairs import encode_pair, texts_of
from isoform.registry import Options, register


@register("objective", "text-to-text")
class TextToText(Decoded, TokenObjective):
    """loss = -sum_i log p(a_i | a_1 .. a_i-1, question), a the answer and END.

    encoder   prefix question END        decoder   START answer      asked   answer END

    Each of the two may be as long as `text.max_tokens`. A longer question is cut off on the right, as T5 cuts it,
    unless `data.long_documents` refuses it; an answer that does not fit is an error. The columns are called `question`
    and `answer`; `data.question` and `data.answer` name others.

    Source: Raffel et al. 2020, section 2.4. Differs: nothing.
    """

    class Config(Options):
        prefix: str = ""
        # text before every question, such as `translate English to German: `
        start: str = "pad"
        # role of the special token that the decoder begins with; T5 begins with `pad`
        end: str = "eos"
        # role of the special token after both texts

    alternatives: tuple[tuple[str, ...], ...] = (("question", "answer"),)
    optional_fields: tuple[str, ...] = ("answer",)
    needs: frozenset[str] = frozenset({"encoder-decoder"})
    stochastic: bool = False
    windowed: bool = False
    metrics: tuple[str, ...] = ("exact_match", "loss", "token_accuracy")

    def encode(self, document: Document) -> Encoded:
        return encode_pair(document, self.tokenizer, self.max_tokens, prefix=self.config.prefix)

    def encoding_key(self) -> str:
        return f"text-to-text in {self.max_tokens} start={self.start} end={self.end} prefix={self.config.prefix!r}"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        """Of both streams together."""
        read: Ints = np.minimum(field_tokens["question"] + 1, self.max_tokens)
        return read + field_tokens["answer"] + 1

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        answer = needed(encoded, "answer")
        return Sample(
            encoded.id,
            tokens_of(self.start, answer),
            tokens_of(answer, self.end),
            source=Sample(encoded.id, self._source(encoded.fields["question"])),
            num_bytes=encoded.num_bytes,
        )

    def _source(self, question: IntArray) -> IntArray:
        return tokens_of(question[: self.max_tokens - 1], self.end)

    def prompt(self, encoded: Encoded) -> Prompt:
        """The question for the encoder, START for the decoder; the expected answer is the text, not its tokens."""
        text, gold = texts_of(encoded, self.tokenizer)
        source = self._source(encoded.fields["question"])
        return Prompt(encoded.id, tokens_of(self.start), (self.end,), self.max_tokens, text, gold, source)
