"""Preferences: the published formula on the logits of transformers, its gradient, pairs that stay together.

Oracles: the formula written out on a LLaMA of transformers; each pair alone for the batch of all.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from isoform.checkpoints.forms import save_model
from isoform.contracts import IGNORE, Document, Sample
from isoform.data.batches import collate
from isoform.errors import ConfigError, DataError
from isoform.models.llama import Llama
from isoform.models.lora import Lora, active_adapter, adapter_state
from isoform.objectives.preference import Preference
from isoform.objectives.reference import base_alone
from isoform.text.chat import TEMPLATE
from isoform.text.kinds import Bpe
from isoform.text.tokenizers import TextTokenizer

PAIRS = [
    ("hi", "Hello there", "Go away"),
    ("What is a river?", "Water that runs", "No"),
    ("so", "and so on", "on and on"),
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    words = ["user assistant What is a river? Hello there and so on Go away Water that runs"] * 3
    return Bpe.train(Bpe.Config(vocab_size=320, special=("pad", "bos", "eos")), words)


def build(tokenizer: TextTokenizer, max_tokens: int = 64, **options: Any) -> Preference:
    own = TextTokenizer(tokenizer.backend, tokenizer.special)
    return Preference(Preference.Config(**options), own, max_tokens)


def document(prompt: str, chosen: str, rejected: str) -> Document:
    return Document(prompt, {"prompt": prompt, "chosen": chosen, "rejected": rejected}, {"source": "p.jsonl", "row": 4})


def samples(objective: Preference) -> list[Sample]:
    return [objective.prepare(objective.encode(document(*pair)), np.random.default_rng(0)) for pair in PAIRS]


def noisy(model: Any, seed: int, names: Any = None) -> Any:
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if names is None or name in names:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return model


def pair_of_models(tokenizer: TextTokenizer) -> tuple[Any, Any]:
    """(the model that is trained, its reference)."""
    reference = noisy(Llama.tiny(vocab_size=tokenizer.vocab_size).double(), 1)
    return noisy(copy.deepcopy(reference), 2), reference


@pytest.mark.parametrize("options", [{}, {"beta": 0.5, "label_smoothing": 0.2}])
def test_loss_and_gradient_are_the_formula_on_the_logits_of_transformers(tokenizer, options, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    objective = build(tokenizer, **options)
    model, reference = pair_of_models(tokenizer)
    theirs = []
    for name, each in (("policy", model), ("reference", reference)):
        save_model(tmp_path / name, each, tokenizer)
        theirs.append(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float64))

    def log_p(network: Any, sample: Sample) -> torch.Tensor:
        logits = network(torch.tensor(sample.tokens[None]).long()).logits[0].log_softmax(-1)
        asked = [(place, int(target)) for place, target in enumerate(sample.targets) if target != IGNORE]
        return torch.stack([logits[place, target] for place, target in asked]).sum()

    beta, smoothing = options.get("beta", 0.1), options.get("label_smoothing", 0.0)
    losses = []
    for sample in samples(objective):
        gains = [log_p(theirs[0], side) - log_p(theirs[1], side).detach() for side in (sample, sample.rival)]
        margin = beta * (gains[0] - gains[1])
        losses.append(-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin))
    expected = torch.stack(losses).sum()
    expected.backward()
    objective.helper.begin(reference)
    batch = collate(samples(objective), filler_to=16)
    assert batch.num_filler and batch.rival is not None and batch.rival.num_filler
    parts = objective.loss(model, batch, model(batch))
    parts["loss"].total.backward()
    # transformers keeps its angles in float32
    torch.testing.assert_close(parts["loss"].total, expected, rtol=1e-6, atol=1e-7)
    assert objective.counts(batch)["loss"] == 3
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    back = type(model).state_from_hf(
        theirs[0].config.to_dict(), {name: p.grad for name, p in theirs[0].named_parameters() if p.grad is not None}
    )
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, back[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_pairs_stay_together_and_see_no_other(tokenizer) -> None:
    objective = build(tokenizer)
    model, reference = pair_of_models(tokenizer)
    objective.helper.begin(reference)
    every = samples(objective)
    batch = collate(every, filler_to=8)
    together = objective.statistics(model, batch, model(batch))
    for at, sample in enumerate(every):
        one = collate([sample])
        alone = objective.statistics(model, one, model(one))
        for name, values in together.items():
            torch.testing.assert_close(values[at], alone[name][0], rtol=1e-9, atol=1e-10)
    assert batch.num_tokens == batch.sequences.num_tokens + batch.rival.sequences.num_tokens  # type: ignore[union-attr]
    whole = [len(sample.tokens) + len(sample.rival.tokens) for sample in every]  # type: ignore[union-attr]
    assert [sample.num_tokens for sample in every] == whole
    assert collate(every).longest_tokens == max(whole)


def test_the_reference_forgets_what_autocast_converted(tokenizer) -> None:
    """A matrix that is trained whole is converted once in a pass; the reference has other values of it."""
    model = Llama.tiny(vocab_size=tokenizer.vocab_size)
    Lora(Lora.Config(rank=2, targets=["query"], train=["blocks.0.feedforward.up"])).attach(model, seed=0)
    layer, rows = model.blocks[0].feedforward.up, torch.ones(2, model.blocks[0].feedforward.up.in_features)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        first = layer(rows)
        layer.weight.add_(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        trained = layer(rows).detach()
        with torch.no_grad(), base_alone(model):
            assert torch.equal(layer(rows), first)
        assert torch.equal(layer(rows), trained) and not torch.equal(first, trained)


@pytest.mark.parametrize("whole", [[], ["norm"]])
def test_the_base_under_an_adapter_is_the_reference(tokenizer, whole: list[str]) -> None:
    objective = build(tokenizer)
    base = noisy(Llama.tiny(vocab_size=tokenizer.vocab_size).double(), 1)
    model = copy.deepcopy(base)
    Lora(Lora.Config(rank=2, targets=["query", "value"], train=whole)).attach(model, seed=0)
    model.double()
    objective.fitted(model, 0)
    batch = collate(samples(objective))
    first = objective.statistics(model, batch, model(batch))
    assert first["margin"].abs().max() < 1e-12 and first["preferred"].tolist() == [0.5] * 3
    noisy(model, 3, set(adapter_state(model)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = objective.loss(model, batch, model(batch))
    parts["loss"].total.backward()
    assert active_adapter(model) is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    plain = build(tokenizer)
    plain.helper.begin(base)
    twin = copy.deepcopy(model)
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert expected.keys() == set(adapter_state(model))
    # The same by a copy of the base: an objective that finds no adapter asks its own reference.
    chosen = [plain.helper.ask(base, stream, _summed) for stream in (batch, batch.rival)]  # type: ignore[arg-type]
    found = [objective.helper.ask(twin, stream, _summed) for stream in (batch, batch.rival)]  # type: ignore[arg-type]
    for ours, theirs in zip(found, chosen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def _summed(model: Any, batch: Any) -> torch.Tensor:
    return model(batch).hidden


def test_a_copy_is_frozen_when_the_training_begins(tokenizer) -> None:
    objective = build(tokenizer)
    model = noisy(Llama.tiny(vocab_size=tokenizer.vocab_size), 1)
    assert objective.fitted(model, 0) is model
    objective.helper.join({}, model, 0)
    objective.helper.rehearse(None, Path(), None, "fp32", lambda: None)
    batch = collate(samples(objective))
    before = objective.statistics(model, batch, model(batch))["margin"]
    noisy(model, 2)
    after = objective.statistics(model, batch, model(batch))["margin"]
    assert before.abs().max() < 1e-6 < after.abs().max()
    bare = build(tokenizer)
    with pytest.raises(ConfigError, match="is not kept of a run without an adapter"):
        bare.statistics(model, batch, model(batch))


def test_rivals_share_their_prompt_and_differ_in_the_answer(tokenizer) -> None:
    objective = build(tokenizer)
    encoded = objective.encode(document(*PAIRS[0]))
    sample = objective.prepare(encoded, np.random.default_rng(0))
    prompt = objective.prompt(encoded)
    assert (prompt.text, prompt.gold) == PAIRS[0][:2]
    for side, answer in zip((sample, sample.rival), PAIRS[0][1:], strict=True):
        size = len(prompt.tokens)
        assert side is not None and side.targets is not None
        assert side.tokens[:size].tolist() == prompt.tokens.tolist()
        assert (side.targets[: size - 1] == IGNORE).all()
        assert tokenizer.decode(side.targets[size - 1 :]) == answer and side.targets[-1] == tokenizer.special_ids["eos"]
    lengths = {name: np.array([len(ids)]) for name, ids in encoded.fields.items()}
    assert objective.planned_tokens(lengths)[0] == sample.num_tokens
    row = objective.shown(encoded, {"margin": -1.0})
    assert row == {"input": "hi", "gold": "Hello there", "prediction": "Go away", "rejected": "Go away"}
    asked = objective.prompt(objective.encode(Document("x", {"prompt": "hi"}, {})))
    assert asked.tokens.tolist() == prompt.tokens.tolist() and asked.gold is None


def test_a_shared_beginning_is_in_neither_answer(tokenizer) -> None:
    objective = build(tokenizer)
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    other = [*turns[:3], {"role": "assistant", "content": "no"}]
    fields = {"chosen": json.dumps(turns), "rejected": json.dumps(other)}
    sample = objective.prepare(objective.encode(Document("x", fields, {})), np.random.default_rng(0))
    said = [tokenizer.decode(side.targets[side.targets != IGNORE]) for side in (sample, sample.rival)]
    assert said == ["d", "no"]


def test_what_is_lost_and_what_is_refused(tokenizer) -> None:
    objective = build(tokenizer, 20)
    short, long = objective.encode(document("hi", "so", "on")), objective.encode(document("hi", "so", "river " * 20))
    assert objective.asked(short)[0] == objective.asked(short)[1]
    asked, kept = objective.asked(long)
    assert 0 < kept < asked
    assert objective.asked(objective.encode(document("river? " * 30, "so", "on")))[1] == 0
    with pytest.raises(DataError, match=r"p\.jsonl:4: message 2 \(assistant\) is an empty answer"):
        objective.encode(document("hi", "", "on"))
    with pytest.raises(DataError, match="a prompt without two answers"):
        objective.asked(objective.encode(Document("x", {"prompt": "hi"}, {})))
    assert objective.tokenizer.chat_template == TEMPLATE  # type: ignore[attr-defined]
