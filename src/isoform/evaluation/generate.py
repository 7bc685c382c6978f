"""Decoding on ragged batches with a cache: greedy, temperature, top-k, top-p, beams; the same one by one as in a batch.

Decoders continue a prompt; the decoder of an encoder-decoder begins with its start token and looks at a source.

The token at place i of a sequence is drawn with a number keyed by (seed, sequence id, i), so neither the other
sequences of the batch nor their order can change it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from isoform import chance
from isoform.config import Beams
from isoform.contracts import Floats, Model, Prompt
from isoform.evaluation.beams import beam_search
from isoform.evaluation.reading import Growing, Reader, groups_of, growing
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


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling = GREEDY,
    beams: Beams | None = None,
    seed: int = 0,
    max_new_tokens: int | None = None,
    batch_tokens: int = 32_768,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    int8: bool = False,
) -> list[Generation]:
    """The continuation of each prompt, in the order given.

    A prompt asks for at most its own `max_new_tokens`, and for at most the argument's. Where prompt and new tokens
    exceed `model.max_positions`, the model sees the last `max_positions` of them, numbered anew.

    beams: more than one takes the place of `sampling`. batch_tokens: the most tokens, prompts, sources and answers, of
    the sequences that are decoded together. int8: see `reading`.
    """
    model = reading(model, autocast, int8=int8)
    sequences = [growing(index, prompt, max_new_tokens) for index, prompt in enumerate(prompts)]
    results: dict[int, Generation] = {}
    copies = 1 if beams is None else beams.num_beams
    for group in groups_of(sequences, batch_tokens, copies):
        if copies > 1:
            assert beams is not None
            beam_search(Reader(model, device, autocast), group, beams)
        else:
            for _ in _decode(model, group, sampling, seed, device, autocast):
                pass
        for sequence in group:
            new = sequence.new
            ended = bool(new) and new[-1] in sequence.prompt.stop
            results[sequence.index] = Generation(sequence.prompt.id, tuple(new[:-1] if ended else new), ended)
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
    int8: bool = False,
) -> Iterator[int]:
    """The new tokens of one prompt as they come, without the stop token; the same tokens as `generate` gives."""
    model = reading(model, autocast, int8=int8)
    for _, token in _decode(model, [growing(0, prompt, max_new_tokens)], sampling, seed, device, autocast):
        if token not in prompt.stop:
            yield token


def reading(
    model: Model, autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext, *, int8: bool = False
) -> Model:
    """The model with its weights as they are now, laid out for decoding in the precision that `autocast` sets.

    int8: weights of 8 bits in place of that precision's. What `generate` does of itself; do it once for many calls, as
    long as the weights stay what they are: matrices of float32 are the model's own. The model itself where there is no
    kernel for its parts, see `models.decoding`.
    """
    import torch

    from isoform.models.decoding import prepared

    with autocast():
        narrow = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    made: Model = prepared(model, "int8" if int8 else "bf16" if narrow else "fp32", narrow_cache=narrow)
    return made


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


def _decode(
    model: Model,
    group: list[Growing],
    sampling: Sampling,
    seed: int,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[Growing, int]]:
    """Each new token as it is chosen, until every sequence has ended.

    Sequences that fit into the context share a cache; those that have outgrown it are read again at every step.
    """
    reader = Reader(model, device, autocast)
    alive = [sequence for sequence in group if sequence.limit > 0]
    while alive:
        chosen = _choose(alive, reader.next_logits(alive), sampling, seed)
        still = []
        for sequence, token in zip(alive, chosen, strict=True):
            sequence.tokens.append(token)
            yield sequence, token
            if token not in sequence.prompt.stop and len(sequence.new) < sequence.limit:
                still.append(sequence)
        alive = still


def _choose(alive: list[Growing], logits: torch.Tensor, sampling: Sampling, seed: int) -> list[int]:
    """The next token of each sequence from its logits `(b, v)`."""
    if sampling.temperature == 0:
        return [int(token) for token in logits.argmax(-1).tolist()]
    scores = logits.cpu().double().numpy()
    keys = [chance.generator(seed, "generate", s.prompt.id, len(s.new)) for s in alive]
    return [choose_token(row, sampling, float(key.random())) for row, key in zip(scores, keys, strict=True)]
