"""Turns of a conversation: what `chat` and `preference` have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np

from isoform.contracts import IGNORE, Document, IntArray, Sample, Tokenizer
from isoform.errors import ConfigError, DataError
from isoform.objectives.fields import place
from isoform.text.chat import TEMPLATE, closing_ids
from isoform.text.conversations import Message
from isoform.text.tokenizers import TextTokenizer

T = TypeVar("T")


def speaking(tokenizer: Tokenizer | None, template: str | None) -> TextTokenizer | None:
    """The tokenizer, which has a chat template from here on: the given one, its own, or else ours.

    A tokenizer carries its template to where the model is saved. None, while there is no tokenizer yet.

    Raises: ConfigError where our template would have nothing to end an answer with.
    """
    if tokenizer is None:
        return None
    assert isinstance(tokenizer, TextTokenizer), "templates are written for tokenizers of files"
    if template is None and tokenizer.chat_template is None and "eos" not in tokenizer.special:
        known = ", ".join(tokenizer.special) or "none"
        raise ConfigError(
            f"objective.template: the tokenizer has neither a chat template nor a special token `eos` that could end "
            f"an answer (its special tokens: {known}); add `eos` to text.tokenizer.special, or give a template"
        )
    tokenizer.chat_template = template or tokenizer.chat_template or TEMPLATE
    return tokenizer


class Speaking:
    """An objective whose tokenizer writes conversations."""

    _speaking: TextTokenizer | None
    # as `speaking` gives it

    @property
    def _tokenizer(self) -> TextTokenizer:
        assert self._speaking is not None, "a draft of an objective reads no text"
        return self._speaking

    @cached_property
    def stop(self) -> tuple[int, ...]:
        """Ids that end an answer: the token that closes one, and the end of a text."""
        end = [index for role, index in self._tokenizer.special_ids.items() if role == "eos"]
        return tuple(dict.fromkeys([*closing_ids(self._tokenizer), *end]))


def at(document: Document, read: Callable[[], T]) -> T:
    """What is read of a document. Raises: DataError that begins with its source and row."""
    try:
        return read()
    except DataError as error:
        raise DataError(f"{place(document)}: {error}") from None


def sample_of(identity: str, ids: IntArray, spans: IntArray, max_tokens: int) -> Sample:
    """The conversation, cut off at its end, with the answers' tokens as targets; spans `(2 k,)`: first and end of each.

    Shapes: ids (t,); targets[i] is ids[i + 1] where that stands in an answer.
    """
    ids = ids[:max_tokens]
    said = np.full_like(ids, IGNORE)
    for first, end in spans.reshape(-1, 2).tolist():
        said[first:end] = ids[first:end]
    return Sample(identity, ids[:-1], said[1:])


def num_asked(spans: IntArray, max_tokens: int) -> tuple[int, int]:
    """(tokens of the answers, those of them among the first `max_tokens`); spans as in `sample_of`."""
    whole = spans.reshape(-1, 2)
    kept = np.minimum(whole, max_tokens)
    return int((whole[:, 1] - whole[:, 0]).sum()), int((kept[:, 1] - kept[:, 0]).sum())


def told(messages: Sequence[Message]) -> str:
    """Messages for people to read: one alone as it is, several with who says them."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
