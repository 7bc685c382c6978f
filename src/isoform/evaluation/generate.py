"""Decoding on ragged batches with a cache: greedy, temperature, top-k, top-p; the same one by one as in a batch.

The token at place i of a sequence is drawn with a number keyed by (seed, sequence id, i), so neither the other
sequences of the batch nor their order can change it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from isoform import chance
from isoform.contracts import Batch, Cache, Floats, Model, Prompt, Sequences
from isoform.registry import Options

if TYPE_CHECKING:
    import torch

# torch is imported where it is used: see the room's docstring.


class Sampling(Options):
    """How the next token is chosen from p = softmax(z / temperature), z `(v,)` the logits."""

    temperature: float = Field(0.0, ge=0)
    # 0: greedy, the first of the most probable tokens
    top_k: int | None = Field(None, gt=0)
    # only the k most probable tokens; null, or more than there are: all
    top_p: float | None = Field(None, gt=0, le=1)
    # only the fewest most probable tokens that together have this probability; null: all


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Generation:
    """What followed a prompt: new tokens without the stop token, and whether a stop token ended them."""

    id: str
    tokens: tuple[int, ...]
    stopped: bool


@dataclass(slots=True, eq=False)
class _Sequence:
    """One sequence while it grows."""

    index: int
    prompt: Prompt
    limit: int
    tokens: list[int] = field(default_factory=list)
    # prompt and new tokens

    @property
    def new(self) -> list[int]:
        return self.tokens[len(self.prompt.tokens) :]


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    max_new_tokens: int | None = None,
    batch_tokens: int = 32_768,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> list[Generation]:
    """The continuation of each prompt, in the order given.

    A prompt asks for at most its own `max_new_tokens`, and for at most the argument's. Where prompt and new tokens
    exceed `model.max_positions`, the model sees the last `max_positions` of them, numbered anew.

    batch_tokens: the most tokens, prompts and answers, of the sequences that are decoded together.
    """
    sequences = [_sequence(index, prompt, max_new_tokens) for index, prompt in enumerate(prompts)]
    results: dict[int, Generation] = {}
    for group in _groups(sequences, batch_tokens):
        stopped: set[int] = set()
        for sequence, token in _decode(model, group, sampling, seed, device, autocast):
            if token in sequence.prompt.stop:
                stopped.add(sequence.index)
        for sequence in group:
            ended = sequence.index in stopped
            new = sequence.new[:-1] if ended else sequence.new
            results[sequence.index] = Generation(sequence.prompt.id, tuple(new), ended)
    return [results[index] for index in range(len(prompts))]


def generate_stream(
    model: Model,
    prompt: Prompt,
    *,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    max_new_tokens: int | None = None,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Iterator[int]:
    """The new tokens of one prompt as they come, without the stop token; the same tokens as `generate` gives."""
    for _, token in _decode(model, [_sequence(0, prompt, max_new_tokens)], sampling, seed, device, autocast):
        if token not in prompt.stop:
            yield token


def text_stream(decode: Callable[[list[int]], str], tokens: Iterator[int]) -> Iterator[str]:
    """Tokens as pieces of text; a character whose bytes are not complete is held back until it is or the end comes.

    decode: ids to text, such as `tokenizer.decode`.
    """
    seen: list[int] = []
    shown = ""
    for token in tokens:
        seen.append(token)
        text = decode(seen)
        if text.startswith(shown) and not text.endswith("\ufffd") and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = decode(seen)
    if len(rest) > len(shown):
        yield rest[len(shown) :]


def choose_token(logits: Floats, sampling: Sampling, uniform: float) -> int:
    """The next token: the inverse of the cumulative distribution at `uniform`, over the tokens that are kept.

    Shapes: logits (v,). Units: uniform in [0, 1); temperature above 0.
    """
    scores = (logits - logits.max()) / sampling.temperature
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum()
    if sampling.top_k is not None or sampling.top_p is not None:
        order = np.argsort(-probabilities, kind="stable")
        num_kept = min(len(order), sampling.top_k or len(order))
        if sampling.top_p is not None:
            mass = np.cumsum(probabilities[order[:num_kept]])
            num_kept = min(num_kept, int(np.searchsorted(mass, sampling.top_p * mass[-1] * (1 - 1e-12))) + 1)
        probabilities[order[num_kept:]] = 0.0
    cumulative = np.cumsum(probabilities)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


# ------------------------------------------------------------------------------------------------------------ the loop


def _sequence(index: int, prompt: Prompt, max_new_tokens: int | None) -> _Sequence:
    assert len(prompt.tokens), "a prompt has at least one token"
    limit = prompt.max_new_tokens if max_new_tokens is None else min(prompt.max_new_tokens, max_new_tokens)
    return _Sequence(index, prompt, limit, [int(token) for token in prompt.tokens])


def _groups(sequences: Sequence[_Sequence], batch_tokens: int) -> Iterator[list[_Sequence]]:
    """Sequences of like length together, as many as fit."""
    group: list[_Sequence] = []
    size = 0
    for sequence in sorted(sequences, key=lambda sequence: len(sequence.tokens)):
        tokens = len(sequence.tokens) + sequence.limit
        if group and size + tokens > batch_tokens:
            yield group
            group, size = [], 0
        group.append(sequence)
        size += tokens
    if group:
        yield group


def _decode(
    model: Model,
    group: list[_Sequence],
    sampling: Sampling,
    seed: int,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[_Sequence, int]]:
    """Each new token as it is chosen, until every sequence has ended.

    Sequences that fit into the context share a cache; those that have outgrown it are read again at every step.
    """
    reader = _Reader(model, device, autocast)
    alive = [sequence for sequence in group if sequence.limit > 0]
    while alive:
        chosen = _choose(alive, reader.next_logits(alive), sampling, seed)
        growing = []
        for sequence, token in zip(alive, chosen, strict=True):
            sequence.tokens.append(token)
            yield sequence, token
            if token not in sequence.prompt.stop and len(sequence.new) < sequence.limit:
                growing.append(sequence)
        alive = growing


def _choose(alive: list[_Sequence], logits: torch.Tensor, sampling: Sampling, seed: int) -> list[int]:
    """The next token of each sequence from its logits `(b, v)`."""
    if sampling.temperature == 0:
        return [int(token) for token in logits.argmax(-1).tolist()]
    scores = logits.cpu().double().numpy()
    keys = [chance.generator(seed, "generate", s.prompt.id, len(s.new)) for s in alive]
    return [choose_token(row, sampling, float(key.random())) for row, key in zip(scores, keys, strict=True)]


class _Reader:
    """Reads what is new of each sequence and returns the logits after its last token."""

    def __init__(
        self, model: Model, device: torch.device | str, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.model = model
        self.device = device
        self.autocast = autocast
        self.cache: Cache | None = None
        self.cached: list[int] = []
        # index of the sequence in each row of the cache

    def next_logits(self, alive: list[_Sequence]) -> torch.Tensor:
        """`(b, v)`, at least fp32."""
        import torch

        limit = self.model.max_positions
        keeps = "cache" in self.model.capabilities
        inside = [s for s in alive if keeps and (limit is None or len(s.tokens) <= limit)]
        found: dict[int, torch.Tensor] = {}
        if inside:
            cache = self._cache_of([s.index for s in inside])
            have = list(cache.lengths)
            fresh = [s.tokens[start:] for s, start in zip(inside, have, strict=True)]
            found.update(zip([s.index for s in inside], self._read(fresh, have, cache), strict=True))
        again = [s for s in alive if s.index not in found]
        if again:
            windows = [s.tokens if limit is None else s.tokens[-limit:] for s in again]
            found.update(zip([s.index for s in again], self._read(windows, [0] * len(windows), None), strict=True))
        return torch.stack([found[s.index] for s in alive])

    def _cache_of(self, wanted: list[int]) -> Cache:
        """The cache with a row for each wanted sequence, in this order; those that have ended are dropped."""
        if self.cache is None:
            self.cache = self.model.new_cache(len(wanted))
        elif self.cached != wanted:
            row = {index: row for row, index in enumerate(self.cached)}
            self.cache = self.cache.select([row[index] for index in wanted])
        self.cached = wanted
        return self.cache

    def _read(self, pieces: list[list[int]], starts: list[int], cache: Cache | None) -> torch.Tensor:
        """Logits after the last token of each piece, `(b, v)`; starts: how many tokens stand before each piece."""
        import torch

        batch = _batch(pieces, starts).to(self.device)
        last = torch.tensor(np.cumsum(batch.sequences.lengths) - 1, device=self.device)
        with torch.no_grad(), self.autocast():
            output = self.model(batch, cache=cache)
            logits = self.model.logits(output.hidden[last])
        return logits if logits.dtype == torch.float64 else logits.float()


def _batch(pieces: list[list[int]], starts: list[int]) -> Batch:
    """The pieces end to end, each numbered from where it starts; no dropout."""
    import torch

    positions = [start + place for piece, start in zip(pieces, starts, strict=True) for place in range(len(piece))]
    return Batch(
        tokens=torch.tensor([token for piece in pieces for token in piece]),
        positions=torch.tensor(positions),
        sequences=Sequences([len(piece) for piece in pieces]),
        sample_keys=torch.zeros(len(pieces), dtype=torch.int64),
    )
