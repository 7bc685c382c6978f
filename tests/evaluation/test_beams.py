"""Decoding of encoder-decoders, and beam search of both kinds, against `generate` of transformers on equal weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from isoform.config import Beams, EvaluateConfig
from isoform.contracts import Prompt
from isoform.evaluation.generate import Generation, Sampling, generate
from isoform.models.gpt2 import GPT2
from isoform.models.t5 import T5

VOCAB = 19
LENGTHS = [1, 4, 9, 6]
RULES: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 3, "length_penalty": 0.6, "early_stopping": "never"},
]


def decoders(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "n_positions": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    form = theirs.config.to_dict()
    ours = GPT2(GPT2.from_hf(form), seed=None)
    ours.load_state_dict(GPT2.state_from_hf(form, dict(theirs.named_parameters())))
    return ours.eval(), theirs


def encoder_decoders(seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    theirs = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    theirs.config.decoder_start_token_id = theirs.generation_config.decoder_start_token_id = 0
    form = theirs.config.to_dict()
    ours = T5(T5.from_hf(form), seed=None)
    ours.load_state_dict(T5.state_from_hf(form, dict(theirs.named_parameters())))
    return ours.eval(), theirs


def prompts(seed: int, stop: tuple[int, ...], limit: int, *, source: bool) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, VOCAB, size=length).astype(np.int32) for length in LENGTHS]
    start = np.zeros(1, dtype=np.int32)
    return [
        Prompt(f"p{i}", start if source else ids, stop, limit, "", source=ids if source else None)
        for i, ids in enumerate(texts)
    ]


def said_by_transformers(theirs: Any, prompt: Prompt, **options: Any) -> list[int]:
    ids = torch.from_numpy((prompt.tokens if prompt.source is None else prompt.source).astype(np.int64))[None]
    stop = list(prompt.stop)
    with torch.no_grad():
        output = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=prompt.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=stop,
            **options,
        )
    tokens = output[0, len(prompt.tokens) :].tolist()
    ends = [place for place, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens


def assert_equal(asked: list[Prompt], found: list[Generation], theirs: Any, **options: Any) -> None:
    for prompt, generation in zip(asked, found, strict=True):
        expected = said_by_transformers(theirs, prompt, **options)
        stopped = expected[-1] in prompt.stop
        assert generation.stopped == stopped
        assert list(generation.tokens) == (expected[:-1] if stopped else expected)


def likely_ends(model: Any, asked: list[Prompt], number: int) -> tuple[int, ...]:
    """The tokens that the model says most often after its first two."""
    said = Counter(token for generation in generate(model, asked) for token in generation.tokens[2:])
    return tuple(token for token, _ in said.most_common(number))


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("rule", RULES)
def test_beam_search_equals_transformers(kind: str, rule: dict[str, Any]) -> None:
    ended = 0
    for seed in range(2):
        ours, theirs = decoders(seed) if kind == "decoder" else encoder_decoders(seed)
        source = kind != "decoder"
        stop = likely_ends(ours, prompts(seed, (), 9, source=source), 1 + seed * 2)
        asked = prompts(seed, stop, 9, source=source)
        found = generate(ours, asked, beams=Beams(**rule))
        assert_equal(asked, found, theirs, **rule)
        ended += sum(generation.stopped for generation in found)
    # A high penalty on short answers leaves none that ends before its time.
    assert ended or rule.get("length_penalty") == 2.0


def test_greedy_decoding_of_an_encoder_decoder_equals_transformers() -> None:
    for seed in range(2):
        ours, theirs = encoder_decoders(seed)
        stop = likely_ends(ours, prompts(seed, (), 9, source=True), 1 + seed)
        asked = prompts(seed, stop, 9, source=True)
        assert_equal(asked, generate(ours, asked), theirs)
        assert generate(ours, asked, beams=Beams(num_beams=1)) == generate(ours, asked)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_encoder_decoder_says_the_same_alone_in_a_batch_and_without_a_cache(temperature: float) -> None:
    ours, _ = encoder_decoders(1)
    ours, sampling = ours.double(), Sampling(temperature=temperature, top_p=0.9)
    asked = prompts(5, (7,), 12, source=True)
    together = generate(ours, asked, sampling=sampling, seed=4)
    assert together == [generate(ours, [prompt], sampling=sampling, seed=4)[0] for prompt in asked]
    assert together == generate(ours, asked, sampling=sampling, seed=4, batch_tokens=1)

    class Forgetful(T5):
        capabilities = T5.capabilities - {"cache"}

    ours.__class__ = Forgetful
    assert generate(ours, asked, sampling=sampling, seed=4) == together
    if temperature == 0:
        searched = generate(ours, asked, beams=Beams(num_beams=3))
        ours.__class__ = T5
        assert generate(ours, asked, beams=Beams(num_beams=3)) == searched


def test_beams_in_a_batch_say_what_they_say_alone() -> None:
    ours, _ = decoders(3)
    ours, beams = ours.double(), Beams(num_beams=3, early_stopping=True)
    asked = prompts(2, (7, 3), 10, source=False)
    together = generate(ours, asked, beams=beams)
    assert together == [generate(ours, [prompt], beams=beams)[0] for prompt in asked]
    assert together == generate(ours, asked, beams=beams, batch_tokens=60)


def test_beams_beyond_the_context_see_its_end() -> None:
    ours = GPT2.tiny(max_positions=8, vocab_size=VOCAB).double().eval()
    asked = prompts(2, (), 10, source=False)
    found = generate(ours, asked, beams=Beams(num_beams=2))
    assert [len(generation.tokens) for generation in found] == [10] * len(asked)
    assert generate(ours, asked[2:3], beams=Beams(num_beams=2)) == found[2:3]


def test_no_room_and_no_prompts() -> None:
    ours, _ = decoders(0)
    asked = prompts(0, (7,), 9, source=False)
    assert [g.tokens for g in generate(ours, asked, beams=Beams(num_beams=3), max_new_tokens=0)] == [()] * len(asked)
    assert generate(ours, [], beams=Beams()) == []


def test_the_config_names_beams_by_number_or_in_full() -> None:
    assert EvaluateConfig(beams=3).beams == Beams(num_beams=3)
    assert EvaluateConfig(beams={"num_beams": 2, "early_stopping": True}).beams == Beams(
        num_beams=2, early_stopping=True
    )
    assert EvaluateConfig().beams is None
    with pytest.raises(ValidationError):
        EvaluateConfig(beams=0)


@pytest.mark.parametrize("position", ["learned", "rope", "t5"])
def test_a_prompt_that_is_a_prefix_is_read_both_ways(position: str) -> None:
    model = GPT2.tiny(max_positions=12, vocab_size=VOCAB, position=position).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    causal = prompts(1, (), 8, source=False)
    asked = [Prompt(p.id, p.tokens, p.stop, p.max_new_tokens, "", prefix=len(p.tokens)) for p in causal]
    with_cache = generate(model, asked)

    class Forgetful(GPT2):
        capabilities = GPT2.capabilities - {"cache"}

    model.__class__ = Forgetful
    assert generate(model, asked) == with_cache
    assert generate(model, causal) != with_cache
