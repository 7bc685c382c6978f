"""Conversations: supervised fine-tuning with loss on what the assistant says, and on the token that closes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from isoform.contracts import Document, Encoded, Ints, Prompt, Sample, Tokenizer
from isoform.errors import DataError
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.fields import place
from isoform.objectives.turns import Speaking, at, num_asked, sample_of, speaking, told
from isoform.registry import Options, register
from isoform.storage import fingerprint
from isoform.text.chat import chat_tokens, conversation
from isoform.text.conversations import conversation_of

# First and end of each answer, one after the other, in the ids of the conversation.
ANSWERS = "_answers"


@register("objective", "chat")
class Chat(Speaking, TokenObjective):
    """loss = -sum over answer tokens i of log p(s_i | s_1 .. s_i-1), s the conversation as its template writes it.

    Every answer is asked, from its first token to the token that closes it; what others say and what the template adds
    is read. Where answers stand is told by what the template writes, never by how tokens look, see `text.chat`. A
    conversation that is longer than `text.max_tokens` is cut off at its end: the answer tokens that are lost are
    counted, and a conversation that would lose all of them is left out.

    Documents are conversations in any form of `text.conversations`. The template is the tokenizer's own; one that has
    none is given ours, and carries it to the folder of the tuned model.

    Source: Ouyang et al. 2022, section 3.4. Differs: nothing.
    """

    class Config(Options):
        template: str | None = None
        # a Jinja template of conversations; null: the tokenizer's own, else one like ChatML

    alternatives: tuple[tuple[str, ...], ...] = (
        ("messages",),
        ("conversations",),
        ("instruction", "input", "output"),
        ("instruction", "output"),
        ("question", "answer"),
    )
    optional_fields: tuple[str, ...] = ("output", "answer")
    needs: frozenset[str] = frozenset({"causal"})
    stochastic: bool = False
    windowed: bool = False
    metrics: tuple[str, ...] = ("loss", "perplexity", "token_accuracy", "ended")

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        super().__init__(config, tokenizer, max_tokens)
        self._speaking = speaking(tokenizer, config.template)

    def encode(self, document: Document) -> Encoded:
        messages = at(document, lambda: conversation_of(document.fields))
        written = at(document, lambda: conversation(self._tokenizer, messages))
        ids = written.ids if written.answers else at(document, lambda: chat_tokens(self._tokenizer, messages))
        spans = np.array(list(written.answers.values()), dtype=np.int32).ravel()
        said = sum(len(messages[number]["content"].encode()) for number in written.answers)
        return Encoded(document.id, {"messages": ids, ANSWERS: spans}, said, document)

    def encoding_key(self) -> str:
        return f"chat {fingerprint(self._tokenizer.chat_template)}"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        return np.clip(field_tokens["messages"], 2, self.max_tokens) - 1

    def asked(self, encoded: Encoded) -> tuple[int, int]:
        """(tokens of the answers, those that are left in the sample). Raises: DataError where nobody answers."""
        if not len(encoded.fields[ANSWERS]):
            where = place(encoded.document) if encoded.document else encoded.id
            raise DataError(f"{where}: a conversation without an answer, from which nothing can be learnt; remove it")
        return num_asked(encoded.fields[ANSWERS], self.max_tokens)

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        self.asked(encoded)
        sample = sample_of(encoded.id, encoded.fields["messages"], encoded.fields[ANSWERS], self.max_tokens)
        return dataclasses.replace(sample, num_bytes=encoded.num_bytes)

    def prompt(self, encoded: Encoded) -> Prompt:
        """All that stands before the last answer, to be answered."""
        ids, spans = encoded.fields["messages"], encoded.fields[ANSWERS]
        answered = len(spans) > 0
        ids = ids[: spans[-2]] if answered else ids
        text, gold = self.tokenizer.decode(ids.tolist()), None
        if encoded.document is not None:
            messages = conversation_of(encoded.document.fields)
            turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            last = turns[-1] if answered else len(messages)
            text, gold = told(messages[:last]), messages[last]["content"] if answered else None
        return Prompt(encoded.id, ids[-(self.max_tokens - 1) :], self.stop, self.max_tokens, text, gold)
