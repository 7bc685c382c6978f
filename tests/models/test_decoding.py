"""The decoder that generation reads against the model that it was made of."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from isoform.contracts import Batch, Prompt, Sequences
from isoform.evaluation.generate import Sampling, generate, reading
from isoform.layers import kernels
from isoform.models.decoding import FastDecoder, prepared
from isoform.models.gpt2 import GPT2
from isoform.models.llama import Llama

native = pytest.mark.skipif(kernels.loaded() is None, reason="no C++ kernels here: no compiler, or it failed")


def widened(model):
    """Values far from those of the first step, so that what a layer does shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.1 if parameter.ndim == 1 else 0.15))
    return model.eval()


VARIANTS = {
    "llama": lambda: Llama.tiny(),
    "tied": lambda: Llama.tiny(tied=True, attention_bias=True, feedforward_bias=True),
    "window": lambda: Llama.tiny(window=5, head_width=12),
    "part of the channels turned": lambda: Llama.tiny(position={"kind": "rope", "fraction": 0.5}),
    "scaled positions": lambda: Llama.tiny(position={"kind": "rope", "scaling": {"kind": "yarn", "factor": 4.0}}),
    "gpt2": lambda: GPT2.tiny(),
    "norm last": lambda: GPT2.tiny(norm_first=False, position={"kind": "sinusoidal"}),
    "alibi": lambda: GPT2.tiny(position={"kind": "alibi"}, feedforward={"kind": "relu-squared"}),
    "t5": lambda: GPT2.tiny(position={"kind": "t5", "max_distance": 20}, feedforward={"kind": "geglu"}),
    "none": lambda: GPT2.tiny(position={"kind": "none"}, feedforward={"kind": "relu"}, norm={"kind": "rmsnorm"}),
    "gelu": lambda: GPT2.tiny(feedforward={"kind": "gelu"}, num_kv_heads=1),
}


def batch(pieces: list[list[int]], starts: list[int]) -> Batch:
    positions = [start + place for piece, start in zip(pieces, starts, strict=True) for place in range(len(piece))]
    return Batch(
        tokens=torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        sequences=Sequences([len(piece) for piece in pieces]),
        sample_keys=torch.zeros(len(pieces), dtype=torch.int64),
    )


def all_logits(model, tokens: list[list[int]], cuts: list[list[int]]) -> list[torch.Tensor]:
    """Logits after every token of each sequence, read in pieces through a cache; one sequence is dropped on the way."""
    cache, found = model.new_cache(len(tokens)), [[] for _ in tokens]
    rows, before = list(range(len(tokens))), [0] * len(tokens)
    for step, ends in enumerate(cuts):
        if step == 2:
            rows, before = rows[1:], before[1:]
            cache = cache.select(list(range(1, len(tokens))))
        pieces = [tokens[row][start : ends[row]] for row, start in zip(rows, before, strict=True)]
        with torch.no_grad():
            hidden = model(batch(pieces, before), cache=cache).hidden
            parts = model.logits(hidden).split([len(piece) for piece in pieces])
        for row, part in zip(rows, parts, strict=True):
            found[row].append(part)
        before = [ends[row] for row in rows]
        assert cache.lengths == before
    return [torch.cat(parts) for parts in found]


CUTS = [[3, 9, 1], [4, 10, 2], [5, 13, 21], [6, 14, 22]]


def spoken() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(61, size=24).tolist() for _ in range(3)]


@native
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_model(kernel_way, variant, kind):
    model = widened(VARIANTS[variant]())
    fast = prepared(model, kind, narrow_cache=kind == "bf16")
    assert isinstance(fast, FastDecoder)
    tokens = spoken()
    bounds = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.06}
    for ours, plain in zip(all_logits(fast, tokens, CUTS), all_logits(model, tokens, CUTS), strict=True):
        error = (ours - plain).square().mean().sqrt() / plain.std()
        assert error < bounds[kind], f"{error:.2e}"


@native
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_logits_have_the_same_bits_with_any_number_of_threads(kernel_way, kind):
    fast, tokens = prepared(widened(Llama.tiny()), kind, narrow_cache=kind == "bf16"), spoken()
    found = all_logits(fast, tokens, CUTS)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, all_logits(fast, tokens, CUTS), found))


@native
def test_what_the_kernel_does_not_know_the_model_does():
    experts = {"kind": "moe", "expert": "swiglu", "experts": 4, "active": 2}
    mixture = Llama.tiny(feedforward=experts)
    assert prepared(mixture, "fp32", narrow_cache=False) is mixture
    double = Llama.tiny().double()
    assert prepared(double, "bf16", narrow_cache=True) is double
    model = widened(Llama.tiny())
    fast = prepared(model, "fp32", narrow_cache=False)
    assert prepared(fast, "int8", narrow_cache=False) is fast
    read = batch([[1, 2, 3, 4]], [0])
    read.sequences = Sequences([4], [3])  # a prefix
    with torch.no_grad():
        assert torch.equal(fast(read, cache=fast.new_cache(1)).hidden, model(read, cache=model.new_cache(1)).hidden)


@pytest.mark.parametrize("parts", [{}, {"feedforward": {"kind": "moe", "experts": 2, "active": 1}}])
def test_eight_bits_are_kept_to_whatever_the_model_is_made_of(parts):
    model = widened(Llama.tiny(**parts))
    first = model.blocks[0].attention.qkv.weight.clone()
    read = reading(model, int8=True)
    assert isinstance(read, FastDecoder) or not isinstance(read.blocks[0].attention.qkv, torch.nn.Linear)
    assert generate(read, prompts([3, 8])) == generate(model, prompts([3, 8]), int8=True)
    assert torch.equal(first, model.blocks[0].attention.qkv.weight)


def prompts(lengths: list[int]) -> list[Prompt]:
    rng = np.random.default_rng(7)
    return [Prompt(f"p{i}", rng.integers(61, size=n).astype(np.int32), (5,), 12, "") for i, n in enumerate(lengths)]


@native
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1, top_k=20, top_p=0.9)])
def test_generation_is_that_of_the_model(kernel_way, sampling):
    model, asked = widened(Llama.tiny(max_positions=24)), prompts([3, 20, 1, 24, 30])
    fast = generate(model, asked, sampling=sampling, seed=3)
    kernels.switch(False)
    try:
        assert reading(model) is model
        plain = generate(model, asked, sampling=sampling, seed=3)
    finally:
        kernels.switch(True)
    assert fast == plain
    assert fast == [generate(model, [prompt], sampling=sampling, seed=3)[0] for prompt in asked]


@native
def test_a_prompt_that_is_long_is_read_by_the_model_and_goes_on_in_the_kernel():
    model = widened(Llama.tiny(max_positions=700))
    prompt = prompts([600])
    fast = generate(model, prompt)
    kernels.switch(False)
    try:
        assert generate(model, prompt) == fast
    finally:
        kernels.switch(True)


@native
def test_an_adapter_is_part_of_the_weights():
    from isoform.models.lora import Lora

    model = widened(Llama.tiny())
    Lora(Lora.Config(rank=2, targets=["query", "down"])).attach(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".up" in name and "adapters" in name:
                parameter.normal_(std=0.3)
    tokens = spoken()
    fast = prepared(model, "fp32", narrow_cache=False)
    for ours, plain in zip(all_logits(fast, tokens, CUTS), all_logits(model, tokens, CUTS), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


ONE_STEP = """
import torch
from isoform.contracts import Batch, Sequences
from isoform.models.decoding import FastDecoder, prepared
from isoform.models.llama import Llama
torch.set_num_threads(3)
fast = prepared(Llama.tiny(), "fp32", narrow_cache=False)
assert isinstance(fast, FastDecoder) and torch.get_num_threads() == 3
tokens = torch.arange(4)
batch = Batch(tokens=tokens, positions=tokens, sequences=Sequences([4]), sample_keys=torch.zeros(1, dtype=torch.int64))
with torch.no_grad():
    assert fast(batch, cache=fast.new_cache(1)).hidden.isfinite().all()
"""


@native
@pytest.mark.parametrize("limit", [1, 2])
def test_fewer_threads_than_were_asked_for_do_the_work(limit):
    environment = {**os.environ, "OMP_THREAD_LIMIT": str(limit)}
    subprocess.run([sys.executable, "-c", ONE_STEP], env=environment, timeout=60, check=True)


@native
def test_threads_may_use_one_reading_at_once():
    """Other prompts in each thread, so that what one writes for its call would be wrong for the others."""
    read = reading(widened(Llama.tiny()))
    assert isinstance(read, FastDecoder)
    asked = [prompts([3 + 5 * place] * (1 + 2 * place)) for place in range(3)]
    alone = [generate(read, some, batch_tokens=60) for some in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        for _ in range(10):
            assert list(pool.map(lambda some: generate(read, some, batch_tokens=60), asked)) == alone


@native
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_no_rows_are_no_trouble(kernel_way, kind):
    fast = prepared(Llama.tiny(), kind, narrow_cache=False)
    assert fast.logits(torch.empty(0, fast.blocks.fixed.width)).shape == (0, fast.head.fields.rows)
    read = fast(batch([[], []], [0, 0]), cache=fast.new_cache(2))
    assert read.hidden.shape == (0, fast.blocks.fixed.width)


@native
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_norms_and_biases_are_kept_as_they_were(kind):
    model = widened(GPT2.tiny(max_positions=24))
    fast = prepared(model, kind, narrow_cache=False)

    def read() -> torch.Tensor:
        with torch.no_grad():
            return fast(batch([[1, 2, 3]], [0]), cache=fast.new_cache(1)).hidden

    before = read()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(1.0)
    assert torch.equal(read(), before)


@native
@pytest.mark.parametrize(
    ("part", "value"),
    [("attention.window", 3), ("attention.scale", 0.3), ("attention.num_heads", 1), ("norm_first", False)],
)
def test_blocks_that_are_not_of_one_form_the_model_reads(part, value):
    model = Llama.tiny()
    owner, _, name = part.rpartition(".")
    setattr(model.blocks[1].get_submodule(owner), name, value)
    assert prepared(model, "fp32", narrow_cache=False) is model
