from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from isoform.contracts import Output, Prompt
from isoform.evaluation.generate import Sampling, choose_token, generate, generate_stream, text_stream

VOCAB = 13


def prompts(lengths: list[int], stop: tuple[int, ...] = (), max_new_tokens: int = 12) -> list[Prompt]:
    rng = np.random.default_rng(7)
    return [
        Prompt(f"p{i}", rng.integers(VOCAB, size=length).astype(np.int32), stop, max_new_tokens, "")
        for i, length in enumerate(lengths)
    ]


def slow_greedy(model, prompt: Prompt) -> list[int]:
    """Reads everything again for every token."""
    tokens = prompt.tokens.tolist()
    for _ in range(prompt.max_new_tokens):
        seen = tokens if model.max_positions is None else tokens[-model.max_positions :]
        state = None
        for place, token in enumerate(seen):
            inputs = model.embedding[token] + model.positions[place]
            state = inputs if state is None else 0.7 * state + inputs
        tokens.append(int(model.logits(state).argmax()))
        if tokens[-1] in prompt.stop:
            return tokens[len(prompt.tokens) : -1]
    return tokens[len(prompt.tokens) :]


@pytest.mark.parametrize("max_positions", [None, 6, 64])
@pytest.mark.parametrize("stop", [(), (3, 4)])
def test_greedy_equals_reading_everything_again(running_model, max_positions, stop) -> None:
    model = running_model(VOCAB, max_positions)
    asked = prompts([1, 5, 2, 9, 5], stop)
    assert [list(g.tokens) for g in generate(model, asked)] == [slow_greedy(model, prompt) for prompt in asked]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    temperature=st.sampled_from([0.0, 0.5, 2.0]),
    batch_tokens=st.sampled_from([1, 40, 10_000]),
    max_positions=st.sampled_from([None, 7]),
)
@settings(max_examples=30, deadline=None)
def test_a_batch_says_what_each_says_alone(running_model, lengths, temperature, batch_tokens, max_positions) -> None:
    model = running_model(VOCAB, max_positions)
    asked = prompts(lengths, stop=(3,))
    sampling = Sampling(temperature=temperature)
    together = generate(model, asked, sampling=sampling, seed=5, batch_tokens=batch_tokens)
    alone = [generate(model, [prompt], sampling=sampling, seed=5)[0] for prompt in asked]
    assert together == alone
    streams = [list(generate_stream(model, prompt, sampling=sampling, seed=5)) for prompt in asked]
    assert streams == [list(generation.tokens) for generation in together]


def test_the_cache_is_used(running_model) -> None:
    model = running_model(VOCAB, None)
    generate(model, prompts([5, 5]))
    assert model.num_read == 2 * (5 + 11)


def test_finished_sequences_leave_the_batch(running_model) -> None:
    model = running_model(VOCAB, None)
    alone = generate(model, prompts([4]))[0]
    model.num_read = 0
    first, second = prompts([4, 4], stop=(alone.tokens[0],))
    generate(model, [first, Prompt("q", second.tokens, (), 12, "")])
    assert model.num_read == 8 + 11


def test_stop_token_is_left_out_and_reported(running_model) -> None:
    model = running_model(VOCAB, None)
    free = generate(model, prompts([4]))[0]
    assert not free.stopped and len(free.tokens) == 12
    place = 5
    stop = free.tokens[place]
    stopped = generate(model, prompts([4], stop=(stop,)))[0]
    assert stopped.stopped and stopped.tokens == free.tokens[: free.tokens.index(stop)]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1, top_k=1), Sampling(temperature=1e-9), Sampling(temperature=1, top_p=1e-9), Sampling()],
)
def test_limits_are_greedy(running_model, sampling) -> None:
    model = running_model(VOCAB, None)
    asked = prompts([3, 8])
    assert generate(model, asked, sampling=sampling) == generate(model, asked)


def test_more_candidates_than_tokens_is_all_of_them(running_model) -> None:
    model = running_model(VOCAB, None)
    asked = prompts([3, 8])
    plain = generate(model, asked, sampling=Sampling(temperature=1))
    assert generate(model, asked, sampling=Sampling(temperature=1, top_k=10 * VOCAB, top_p=1)) == plain
    assert generate(model, asked, sampling=Sampling(temperature=1), seed=1) != plain


def test_zero_new_tokens(running_model) -> None:
    assert generate(running_model(VOCAB, None), prompts([3]), max_new_tokens=0)[0].tokens == ()
    assert generate(running_model(VOCAB, None), []) == []


@given(
    logits=st.lists(st.floats(-8, 8), min_size=2, max_size=12),
    temperature=st.floats(0.2, 5),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(0.05, 1),
)
@settings(max_examples=60, deadline=None)
def test_draws_follow_the_kept_distribution(logits, temperature, top_k, top_p) -> None:
    z = np.array(logits)
    p = torch.softmax(torch.tensor(z / temperature), 0).numpy()
    order = np.argsort(-p, kind="stable")[: top_k or len(p)]
    if top_p is not None:
        before = np.cumsum(p[order]) - p[order]
        order = order[before < top_p * p[order].sum() * (1 - 1e-12)]
    kept = np.zeros_like(p)
    kept[order] = p[order] / p[order].sum()
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    grid = (np.arange(4000) + 0.5) / 4000
    drawn = np.bincount([choose_token(z, sampling, u) for u in grid[::8]], minlength=len(p)) / 500
    assert np.abs(drawn - kept).max() <= 2 / 500 + 1e-9
    assert not drawn[kept == 0].any()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.8), (12, 0.6), (40, 0.95)])
def test_draws_follow_the_distribution_of_transformers(temperature, top_k, top_p) -> None:
    z = np.random.default_rng(3).normal(scale=2.0, size=30)
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(z)[None])
    scores = scores if top_k is None else TopKLogitsWarper(top_k)(None, scores)
    scores = scores if top_p is None else TopPLogitsWarper(top_p)(None, scores)
    theirs = scores[0].softmax(-1).numpy()
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = [choose_token(z, sampling, u) for u in (np.arange(5000) + 0.5) / 5000]
    ours = np.bincount(drawn, minlength=len(z)) / 5000
    assert np.abs(ours - theirs).max() <= 1 / 5000 + 1e-9
    assert not ours[theirs == 0].any()


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}, {"beams": 2}])
def test_senseless_sampling_is_refused(options) -> None:
    with pytest.raises(ValidationError):
        Sampling(**options)


def test_text_stream_holds_incomplete_characters_back() -> None:
    text = "aé🙂b"
    pieces = list(text_stream(lambda ids: bytes(ids).decode("utf-8", "replace"), iter(text.encode())))
    assert pieces == ["a", "é", "🙂", "b"]
    torn = list(text_stream(lambda ids: bytes(ids).decode("utf-8", "replace"), iter(text.encode()[:2])))
    assert torn == ["a", "\ufffd"]


# --------------------------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def gpt2():
    from isoform.models.gpt2 import GPT2

    return GPT2.tiny(max_positions=24).double()


@pytest.mark.parametrize("position", ["learned", "rope", "alibi", "t5"])
def test_decoding_with_the_cache_equals_decoding_without(position) -> None:
    from isoform.models.gpt2 import GPT2

    model = GPT2.tiny(max_positions=24, position={"kind": position}).double()
    asked = prompts([3, 20, 1, 24, 30], stop=(5,), max_new_tokens=10)
    with_cache = generate(model, asked)

    class Forgetful(GPT2):
        capabilities = GPT2.capabilities - {"cache"}

    model.__class__ = Forgetful
    assert generate(model, asked) == with_cache
    assert [generate(model, [prompt])[0] for prompt in asked] == with_cache


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_real_model_in_a_batch_and_alone(gpt2, temperature) -> None:
    asked = prompts([3, 20, 1, 24, 30], stop=(5,), max_new_tokens=10)
    sampling = Sampling(temperature=temperature, top_k=20, top_p=0.9)
    together = generate(gpt2, asked, sampling=sampling, seed=3)
    assert together == [generate(gpt2, [prompt], sampling=sampling, seed=3)[0] for prompt in asked]


class Borrowed(torch.nn.Module):
    """A transformers model behind our protocol, one sequence at a time."""

    capabilities = frozenset({"causal"})

    def __init__(self, theirs) -> None:
        super().__init__()
        self.theirs = theirs
        self.max_positions = theirs.config.n_positions

    def forward(self, batch, *, cache=None, all_layers=False) -> Output:
        sequences = batch.tokens.split(batch.sequences.lengths)
        return Output(torch.cat([self.theirs.transformer(ids[None]).last_hidden_state[0] for ids in sequences]))

    def logits(self, hidden):
        return self.theirs.lm_head(hidden)


def test_greedy_equals_transformers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.5}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=7)).double().eval()
    asked = prompts([1, 4, 9], stop=(7,), max_new_tokens=12)
    ours = generate(Borrowed(theirs), asked)
    for prompt, generation in zip(asked, ours, strict=True):
        ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
        said = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        expected = said[0, len(prompt.tokens) :].tolist()
        assert [*generation.tokens, 7][: len(expected)] == expected
    assert len({token for generation in ours for token in generation.tokens}) > 5
