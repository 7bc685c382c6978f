"""BERT and RoBERTa: what holds for every variant; parity with transformers is in `test_encoder.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isoform.contracts import Batch, Sequences
from isoform.errors import ConfigError
from isoform.layers import ragged
from isoform.models.bert import Bert
from isoform.models.roberta import Roberta

LENGTHS = [5, 1, 17, 9, 30]
VARIANTS: dict[str, dict[str, Any]] = {
    "learned": {},
    "none": {"position": "none"},
    "sinusoidal": {"position": "sinusoidal"},
    "rope": {"position": "rope"},
    "alibi": {"position": "alibi"},
    "t5": {"position": "t5"},
    "window": {"window": 4, "position": "rope"},
    "rmsnorm, swiglu, untied": {"norm": "rmsnorm", "feedforward": "swiglu", "tied": False},
    "no segments": {"num_segments": 0},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def tiny(variant: str, cls: type[Bert] = Bert, **changes: Any) -> Bert:
    """A model whose every parameter is random and large enough to matter."""
    model = cls.tiny(**VARIANTS[variant], **changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def one(batch: Batch, row: int) -> tuple[Batch, slice]:
    """One sequence of a batch, and where it stood."""
    first, length = ragged.starts(batch.sequences)[row], batch.sequences.lengths[row]
    span = slice(first, first + length)
    keys, segments = batch.sample_keys[row : row + 1], batch.segments
    alone = Batch(batch.tokens[span], batch.positions[span], Sequences([length]), keys, dropout_key=batch.dropout_key)
    alone.segments = None if segments is None else segments[span]
    return alone, span


# ------------------------------------------------------------------------------------------------- every variant


@variants
@pytest.mark.parametrize("cls", [Bert, Roberta])
def test_a_sequence_does_not_know_its_batch(variant: str, cls: type[Bert], make_batch: Any) -> None:
    model, batch = tiny(variant, cls, attention_dropout=0.2).double(), make_batch(LENGTHS, dropout_key=5)
    if model.config.num_segments > 1:
        batch.segments = torch.arange(sum(LENGTHS)) % 2
    hidden = model(batch).hidden
    for row in range(len(LENGTHS)):
        alone, span = one(batch, row)
        torch.testing.assert_close(model(alone).hidden, hidden[span], rtol=1e-9, atol=1e-9)


@variants
def test_every_token_sees_both_sides_and_no_farther_than_its_window(variant: str, make_batch: Any) -> None:
    model, batch = tiny(variant, num_layers=1), make_batch([21])
    hidden = model(batch).hidden
    changed = batch.tokens.clone()
    changed[10] = (changed[10] + 1) % 61
    after = model(Batch(changed, batch.positions, batch.sequences, batch.sample_keys)).hidden
    moved = (after != hidden).any(dim=1).nonzero().flatten().tolist()
    assert moved == (list(range(21)) if model.config.window is None else [8, 9, 10, 11, 12])


@variants
@pytest.mark.parametrize("cls", [Bert, Roberta])
def test_every_parameter_gets_a_gradient(variant: str, cls: type[Bert], make_batch: Any) -> None:
    model, batch = tiny(variant, cls, pooler="plain"), make_batch(LENGTHS)
    hidden = model(batch).hidden
    (model.logits(hidden).logsumexp(-1).sum() + model.pooled(hidden, batch.sequences).square().sum()).backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


def test_order_matters_but_without_positions(make_batch: Any) -> None:
    batch = make_batch([12])
    back = Batch(batch.tokens.flip(0), batch.positions, batch.sequences, batch.sample_keys)
    for kind in ("learned", "sinusoidal", "rope", "alibi", "none"):
        model = tiny(kind).double()
        same = torch.allclose(model(batch).hidden, model(back).hidden.flip(0))
        # ALiBi alone is a distance, which a mirror does not change.
        assert same == (kind in ("none", "alibi")), kind


def test_dropout_is_a_function_of_the_key(make_batch: Any) -> None:
    model, batch = tiny("learned", dropout=0.3), make_batch(LENGTHS, dropout_key=7)
    hidden = model(batch).hidden
    assert torch.equal(model(batch).hidden, hidden)
    for key in (None, 8):
        batch.dropout_key = key
        assert not torch.allclose(model(batch).hidden, hidden)


def test_layers_on_request(make_batch: Any) -> None:
    model, batch = Bert.tiny(), make_batch(LENGTHS)
    output = model(batch, all_layers=True)
    assert model(batch).layers is None
    assert output.layers is not None
    assert [tuple(layer.shape) for layer in output.layers] == [(62, 32)] * 3
    assert torch.equal(output.layers[-1], output.hidden)


def test_first_values_are_those_of_the_paper() -> None:
    model = Bert(Bert.Config(num_layers=2, width=64, num_heads=4, vocab_size=300, max_positions=64))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.2), name
        else:
            assert set(parameter.tolist()) == {0.0 if name.endswith("bias") else 1.0}, name


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Bert, {"num_heads": 5}, r"model.num_heads: 5 given, a divisor of model.width 32"),
        (Bert, {"vocab_size": None}, r"model.vocab_size: missing"),
        (
            Bert,
            {"position": "ropes"},
            r"model.position.kind: 'ropes' is not a known position",
        ),
    ],
)
def test_refusals(cls: type[Bert], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls.tiny(**options)


def test_what_an_encoder_cannot_do_is_refused_with_the_reason(make_batch: Any) -> None:
    model = Bert.tiny(head="none")
    with pytest.raises(ConfigError, match=r"model.head: none: .* without a head that guesses tokens"):
        model.logits(model(make_batch([3])).hidden)
    with pytest.raises(ConfigError, match="reads a text from both sides and cannot continue one"):
        model.new_cache(1)
    for cls in (Bert, Roberta):
        with pytest.raises(ConfigError, match=r"model.max_positions: 48 learned positions, a sequence of 49 tokens"):
            cls.tiny()(make_batch([3, 49]))
    assert Bert.tiny(position="rope")(make_batch([49])).hidden.shape == (49, 32)


@pytest.mark.parametrize("cls", [Bert, Roberta])
@pytest.mark.parametrize("variant", ["sinusoidal", "none", "no segments"])
def test_fixed_parts_are_written_into_tables_and_read_again(variant: str, cls: type[Bert]) -> None:
    model = tiny(variant, cls)
    form, _ = model.hf_form(model.config)
    assert form is not None
    back = cls(cls.from_hf(form), seed=None)
    assert back.config == model.config
    back.load_state_dict(cls.state_from_hf(form, model.state_to_hf()))
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("variant", ["rope", "alibi", "window", "rmsnorm, swiglu, untied"])
def test_without_a_form_the_reason_is_said(variant: str) -> None:
    form, reason = Bert.hf_form(Bert.tiny(**VARIANTS[variant]).config)
    assert form is None
    assert reason is not None and reason.startswith("bert in transformers has no ")
    with pytest.raises(ConfigError, match="no Hugging Face form"):
        Bert.tiny(**VARIANTS[variant]).state_to_hf()
