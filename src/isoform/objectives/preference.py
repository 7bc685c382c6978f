"""Two answers to one question: the better one is to gain on the worse one (direct preference optimisation)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from isoform.contracts import (
    Batch,
    Document,
    Encoded,
    IntArray,
    Ints,
    LossPart,
    Model,
    Output,
    Prompt,
    Sample,
    Tokenizer,
)
from isoform.errors import DataError
from isoform.layers import ragged
from isoform.objectives.crossentropy import asked_places, target_nats
from isoform.objectives.fields import place
from isoform.objectives.reference import Reference
from isoform.objectives.turns import Speaking, at, num_asked, sample_of, speaking, told
from isoform.registry import Options, register
from isoform.storage import fingerprint
from isoform.text.chat import chat_tokens, conversation
from isoform.text.conversations import Messages, conversation_of, rivals_of

SIDES = ("chosen", "rejected")


@register("objective", "preference")
class Preference(Speaking):
    """A pair of answers c, r to one prompt x, of which c was preferred.

        loss = -(1 - s) log sigmoid(m) - s log sigmoid(-m)
        m = beta (log pi(c|x) - log ref(c|x)) - beta (log pi(r|x) - log ref(r|x))

    pi: the model; ref: the model before the training, see `objectives.reference`; s: label smoothing; log p(c|x): the
    sum over the answer's tokens and the token that closes it. beta (log pi - log ref) is called an answer's reward.

    A document becomes a sample and its rival, which stand in two streams of one batch. What is too long is cut off at
    its end, and a pair of which an answer is lost whole is left out. Pairs in any form of `text.conversations`.

    Source: Rafailov et al. 2023, equation 7; smoothing: Mitchell 2023 (cDPO). Differs: nothing.
    """

    class Config(Options):
        beta: float = Field(0.1, gt=0)
        # how much a gain over the reference weighs: small values let the model move far from it
        label_smoothing: float = Field(0.0, ge=0, lt=0.5)
        # share of pairs that are taken to be the wrong way round
        template: str | None = None
        # a Jinja template of conversations; null: the tokenizer's own, else one like ChatML

    alternatives: tuple[tuple[str, ...], ...] = (
        ("prompt", *SIDES),
        ("instruction", "input", *SIDES),
        ("instruction", *SIDES),
        ("question", *SIDES),
        ("conversations", *SIDES),
        SIDES,
    )
    optional_fields: tuple[str, ...] = SIDES
    needs: frozenset[str] = frozenset({"causal"})
    stochastic: bool = False
    windowed: bool = False
    compares: bool = True
    metrics: tuple[str, ...] = ("preference_accuracy", "reward_margin", "loss")

    def __init__(self, config: Config, tokenizer: Tokenizer, max_tokens: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.window_tokens = max_tokens
        self.helper = Reference()
        self._speaking = speaking(tokenizer, config.template)

    @classmethod
    def settled(cls, config: Config, train: Iterable[Document] | None, known: Any) -> Config:
        """The options as they are: nothing in them follows from the documents."""
        return config

    def fitted(self, model: Any, seed: int) -> Any:
        """The model as it is, which is also the reference."""
        self.helper.begin(model)
        return model

    # ------------------------------------------------------------------------------------------------ pairs to samples

    def encode(self, document: Document) -> Encoded:
        if not set(SIDES) <= set(document.fields):
            messages = at(document, lambda: conversation_of(document.fields))
            return Encoded(document.id, {"prompt": chat_tokens(self._tokenizer, messages)}, 0, document)
        pair = at(document, lambda: rivals_of(document.fields))
        fields: dict[str, IntArray] = {}
        for side, messages in zip(SIDES, (pair.chosen, pair.rejected), strict=True):
            fields |= at(document, lambda m=messages, s=side: self._side(s, m, pair.num_shared))  # type: ignore[misc]
        said = sum(len(m["content"].encode()) for m in pair.chosen[pair.num_shared :] if m["role"] == "assistant")
        return Encoded(document.id, fields, said, document)

    def _side(self, side: str, messages: Messages, num_shared: int) -> dict[str, IntArray]:
        """The ids of a conversation, and where the answers stand that the other one does not share."""
        written = conversation(self._tokenizer, messages)
        spans = [span for number, span in written.answers.items() if number >= num_shared]
        return {side: written.ids, f"_{side}": np.array(spans, dtype=np.int32).ravel()}

    def encoding_key(self) -> str:
        return f"preference {fingerprint(self._tokenizer.chat_template)}"

    def planned_tokens(self, field_tokens: Mapping[str, Ints]) -> Ints:
        """Of both sequences together."""
        chosen, rejected = (np.clip(field_tokens[side], 2, self.max_tokens) - 1 for side in SIDES)
        planned: Ints = chosen + rejected
        return planned

    def asked(self, encoded: Encoded) -> tuple[int, int]:
        """(tokens of both answers, those that are left in the samples; none, where an answer is lost whole).

        Raises: DataError where there is no pair.
        """
        if "_rejected" not in encoded.fields:
            where = place(encoded.document) if encoded.document else encoded.id
            raise DataError(f"{where}: a prompt without two answers, from which nothing can be learnt; remove it")
        counts = [num_asked(encoded.fields[f"_{side}"], self.max_tokens) for side in SIDES]
        kept = [left for _, left in counts]
        return sum(whole for whole, _ in counts), sum(kept) if all(kept) else 0

    def prepare(self, encoded: Encoded, rng: np.random.Generator) -> Sample:
        chosen, rejected = (
            sample_of(encoded.id, encoded.fields[side], encoded.fields[f"_{side}"], self.max_tokens) for side in SIDES
        )
        return dataclasses.replace(chosen, rival=rejected, num_bytes=encoded.num_bytes)

    def prompt(self, encoded: Encoded) -> Prompt:
        """What both answer."""
        if "prompt" in encoded.fields:
            ids, text, gold = encoded.fields["prompt"], self.tokenizer.decode(encoded.fields["prompt"].tolist()), None
        else:
            ids = encoded.fields["chosen"][: encoded.fields["_chosen"][0]]
            text, gold, _ = self._told(encoded)
        return Prompt(encoded.id, ids[-(self.max_tokens - 1) :], self.stop, self.max_tokens, text, gold)

    def _told(self, encoded: Encoded) -> tuple[str, str, str]:
        """What both answer, and the two answers, for people to read."""
        if encoded.document is not None:
            pair = rivals_of(encoded.document.fields)
            sides = (pair.chosen, pair.rejected)
            chosen, rejected = (told(messages[pair.num_shared :]) for messages in sides)
            return told(pair.chosen[: pair.num_shared]), chosen, rejected
        starts = [int(encoded.fields[f"_{side}"][0]) for side in SIDES]
        answers = [encoded.fields[side][start:] for side, start in zip(SIDES, starts, strict=True)]
        asked, chosen, rejected = map(self.tokenizer.decode, (encoded.fields["chosen"][: starts[0]], *answers))
        return asked, chosen, rejected

    # -------------------------------------------------------------------------------------------- loss and statistics

    def counts(self, batch: Batch) -> dict[str, float]:
        """The weighted number of pairs; filler is none."""
        pairs = float(_weights(batch).double().sum())
        return dict.fromkeys(("loss", "_preference_accuracy", "_reward_margin", "_chosen_reward"), pairs)

    def loss(self, model: Model, batch: Batch, output: Output) -> dict[str, LossPart]:
        """The weighted sum of the pairs' losses; beside it, of the rewards."""
        chosen, rejected = self.rewards(model, batch, output)
        weights = _weights(batch)
        margin = (chosen - rejected).detach()
        return {
            "loss": LossPart((self._losses(chosen - rejected) * weights).sum()),
            "_preference_accuracy": LossPart((_hits(margin) * weights).sum()),
            "_reward_margin": LossPart((margin * weights).sum()),
            "_chosen_reward": LossPart((chosen.detach() * weights).sum()),
        }

    def _losses(self, margins: Tensor) -> Tensor:
        """Of each pair, `(b,)` -> `(b,)`."""
        s = self.config.label_smoothing
        return -(1 - s) * functional.logsigmoid(margins) - s * functional.logsigmoid(-margins)

    def rewards(self, model: Model, batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
        """beta (log pi - log ref) of the better and the worse answers, filler left out: `(b,)` each."""
        assert batch.rival is not None, "a batch of this objective has rivals"
        found = []
        for stream, seen in ((batch, output), (batch.rival, model(batch.rival))):
            ours = log_probabilities(model, stream, seen)
            theirs = self.helper.ask(model, stream, lambda other, quiet: log_probabilities(other, quiet, other(quiet)))
            found.append(self.config.beta * (ours - theirs)[: _num_pairs(batch)])
        return found[0], found[1]

    def statistics(self, model: Model, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Of each pair, float64 `(b,)` on the host: nats (the loss), tokens (1), examples, preferred, margin."""
        chosen, rejected = self.rewards(model, batch, output)
        margins = (chosen - rejected).double().cpu()
        ones = torch.ones_like(margins)
        shared = {"nats": self._losses(margins), "tokens": ones, "examples": ones}
        return {**shared, "preferred": _hits(margins), "margin": margins}

    def shown(self, encoded: Encoded, stats: Mapping[str, float]) -> dict[str, Any]:
        """What a row of predictions says: the better answer, and the one that the model prefers."""
        asked, chosen, rejected = self._told(encoded)
        row = {"input": asked, "gold": chosen, "prediction": chosen if stats["margin"] > 0 else rejected}
        return {**row, "rejected": rejected}


def log_probabilities(model: Model, batch: Batch, output: Output) -> Tensor:
    """log p of all targets of each sequence, `(b,)`: sum over its asked places of log p(target)."""
    asked, targets, _ = asked_places(batch)
    found = target_nats(model, output.hidden, asked, targets)
    rows = ragged.rows(batch.sequences, found.device)[asked]
    return -found.new_zeros(len(batch.sequences)).index_add(0, rows, found)


def _num_pairs(batch: Batch) -> int:
    return len(batch.sequences) - batch.num_filler


def _weights(batch: Batch) -> Tensor:
    """`(b,)`, filler left out."""
    if batch.weights is None:
        return torch.ones(_num_pairs(batch), device=batch.tokens.device)
    return batch.weights[: _num_pairs(batch)]


def _hits(margins: Tensor) -> Tensor:
    """1 where the better answer is preferred, a half where neither is."""
    return (margins > 0).to(margins.dtype) + 0.5 * (margins == 0).to(margins.dtype)
