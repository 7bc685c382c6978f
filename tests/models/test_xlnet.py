"""XLNet: two streams as transformers has them, in values and gradients, and what no order may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import XLNetConfig, XLNetForSequenceClassification, XLNetLMHeadModel, XLNetModel

from isoform.checkpoints.doctor import examine
from isoform.checkpoints.folders import load_model
from isoform.checkpoints.forms import save_model
from isoform.checkpoints.tensors import read_model
from isoform.contracts import Batch, Sequences
from isoform.errors import CheckpointError, ConfigError
from isoform.layers import ragged
from isoform.layers.two_stream import diagonals
from isoform.models.xlnet import XLNet

LENGTHS = [5, 1, 17, 9, 30]
BASE = {"vocab_size": 61, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 80, "dropout": 0.0, "pad_token_id": 0}
FORMS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "xlnet": (XLNetLMHeadModel, {}),
    "untied, relu, near": (
        XLNetLMHeadModel,
        {"tie_word_embeddings": False, "ff_activation": "relu", "clamp_len": 6, "layer_norm_eps": 1e-3},
    ),
    "encoder": (XLNetModel, {}),
    "classifier": (XLNetForSequenceClassification, {"id2label": {0: "cold", 1: "warm", 2: "wet"}}),
}
forms = pytest.mark.parametrize("form", FORMS)


def hf_model(form: str) -> Any:
    cls, changes = FORMS[form]
    torch.manual_seed(0)
    model = cls(XLNetConfig(**{**BASE, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def stored(model: Any) -> dict[str, Tensor]:
    """The tensors as a file of `save_pretrained` holds them."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def from_theirs(hf: Any) -> XLNet:
    config = {**hf.config.to_dict(), "architectures": [type(hf).__name__]}
    tensors = stored(hf)
    model = XLNet(XLNet.from_hf({**config, "tensor_names": list(tensors)}), seed=None)
    model.load_state_dict(XLNet.state_from_hf(config, tensors))
    return model


def orders(lengths: list[int], seed: int = 0) -> Tensor:
    """Ranks `(n,)`: half of each text is guessed, in a random order; of one token nothing."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        guessed = length // 2
        ranks = torch.cat([torch.zeros(length - guessed, dtype=torch.int64), torch.arange(1, guessed + 1)])
        rows.append(ranks[torch.randperm(length, generator=draw)])
    return torch.cat(rows)


def tiny(**changes: Any) -> XLNet:
    """A model whose every parameter is random and large enough to matter."""
    model = XLNet.tiny(**changes)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def rectangle(values: Tensor, lengths: list[int]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True)


def their_inputs(batch: Batch) -> dict[str, Tensor]:
    lengths = list(batch.sequences.lengths)
    mask = rectangle(torch.ones_like(batch.tokens), lengths)
    inputs = {"input_ids": rectangle(batch.tokens, lengths), "attention_mask": mask.float()}
    if batch.segments is not None:
        inputs["token_type_ids"] = rectangle(batch.segments, lengths)
    return inputs


def their_order(batch: Batch) -> tuple[dict[str, Tensor], list[int]]:
    """perm_mask `(b, t, t)` and target_mapping `(b, p, t)` of the batch's ranks, and how many are guessed of each."""
    assert batch.ranks is not None
    ranks = rectangle(batch.ranks, list(batch.sequences.lengths))
    hidden = ranks[:, None, :] >= ranks.clamp(min=1)[:, :, None]
    places = [(row > 0).nonzero().squeeze(1) for row in ranks]
    mapping = torch.zeros(len(ranks), max(map(len, places)), ranks.shape[1])
    for row, some in enumerate(places):
        mapping[row, torch.arange(len(some)), some] = 1.0
    return {"perm_mask": hidden.float(), "target_mapping": mapping}, [len(some) for some in places]


def agree(ours: Tensor, theirs: Tensor) -> bool:
    return float((ours - theirs).detach().norm() / theirs.detach().norm()) < 1e-5


# -------------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("segments", [True, False])
@pytest.mark.parametrize("form", ["xlnet", "untied, relu, near"])
def test_both_streams_and_gradients_equal_transformers(form: str, segments: bool, make_batch: Any) -> None:
    hf, batch = hf_model(form), make_batch(LENGTHS)
    model = from_theirs(hf)
    if segments:
        batch.segments = torch.arange(sum(LENGTHS)) % 3 // 2
    real = their_inputs(batch)["attention_mask"].bool()
    whole = hf(**their_inputs(batch)).logits[real]
    assert agree(model.logits(model(batch).hidden), whole)
    batch.ranks = orders(LENGTHS)
    order, numbers = their_order(batch)
    output = hf(**their_inputs(batch), **order, output_hidden_states=True)
    theirs = torch.cat([output.logits[row, :number] for row, number in enumerate(numbers)])
    found = model(batch, all_layers=True)
    ours = model.logits(found.second[batch.ranks > 0])
    assert agree(ours, theirs)
    # The content stream too, whose states stand before those of the query stream of each layer.
    assert agree(found.layers[-1], output.hidden_states[-2][real])
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    named = {name: parameter for name, parameter in hf.named_parameters() if name in stored(hf)}
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    expected = XLNet.state_from_hf(hf.config.to_dict(), grads)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # of the segments, where there are none
            assert not expected[name].any()
            continue
        assert float((parameter.grad - expected[name]).norm() / expected[name].norm()) < 1e-4, name


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_of_transformers_comes_back_as_it_was(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hf = hf_model(form).to(dtype)
    hf.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    assert loaded.family == "xlnet"
    save_model(tmp_path / "ours", loaded.model, None)
    before, after = read_model(tmp_path / "theirs"), read_model(tmp_path / "ours")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    assert load_model(tmp_path / "ours").config == loaded.config
    again = type(hf).from_pretrained(tmp_path / "ours", dtype=dtype)
    ids = torch.randint(1, 61, (2, 9))
    if dtype == torch.float32:  # there it computes in no other
        with torch.no_grad():
            assert torch.equal(again(ids)[0], hf(ids)[0])


@forms
def test_the_doctor_finds_that_transformers_makes_the_same_of_a_folder(form: str, tmp_path: Path) -> None:
    hf_model(form).save_pretrained(tmp_path)
    findings = examine(tmp_path)
    assert not [found for found in findings if found.level == "error"]
    assert any("relative error" in found.what and found.level == "ok" for found in findings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_type": "uni"}, "attn_type is 'uni'"),
        ({"bi_data": True}, "bi_data is True"),
        ({"summary_type": "first"}, "summary_type is 'first'"),
        ({"ff_activation": "mish"}, "ff_activation 'mish' is not known"),
        ({"sliding_window": 8}, "sliding_window is 8 and is not known for xlnet"),
    ],
)
def test_forms_that_are_not_ours_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        XLNet.from_hf({**hf_model("xlnet").config.to_dict(), **changes})


def test_a_renamed_tensor_is_named() -> None:
    hf = hf_model("xlnet")
    tensors = stored(hf)
    tensors["transformer.layer.1.rel_attn.rr_bias"] = tensors.pop("transformer.layer.1.rel_attn.r_r_bias")
    with pytest.raises(CheckpointError, match=r"did you mean 'transformer.layer.1.rel_attn.r_r_bias'"):
        XLNet.state_from_hf(hf.config.to_dict(), tensors)


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_batch_of_one_equals_a_batch_of_many(dropout: float, make_batch: Any) -> None:
    model = tiny(dropout=dropout).double()
    batch = make_batch(LENGTHS, dropout_key=5 if dropout else None)
    batch.ranks = orders(LENGTHS)
    output, first = model(batch), ragged.starts(batch.sequences)
    for row in (3, 0, 4, 1):
        span = slice(first[row], first[row] + LENGTHS[row])
        keys = batch.sample_keys[row : row + 1]
        alone = Batch(batch.tokens[span], batch.positions[span], Sequences([LENGTHS[row]]), keys)
        alone.ranks, alone.dropout_key = batch.ranks[span], batch.dropout_key
        found = model(alone)
        torch.testing.assert_close(found.hidden, output.hidden[span], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.second, output.second[span], rtol=1e-9, atol=1e-9)


def test_a_guess_knows_what_came_before_it_and_not_itself(make_batch: Any) -> None:
    model, batch = tiny().double(), make_batch([12])
    batch.ranks = orders([12], seed=3)
    before = model(batch)
    for rank in (1, 3, 6):
        changed = make_batch([12])
        changed.ranks, place = batch.ranks, batch.ranks == rank
        changed.tokens[place] = (batch.tokens[place] + 1) % 61
        after = model(changed)
        moved = (after.second - before.second).abs().amax(dim=1) > 0
        assert torch.equal(moved, batch.ranks > rank)
        # Of the content stream itself too, and of what is known nothing.
        assert torch.equal((after.hidden - before.hidden).abs().amax(dim=1) > 0, batch.ranks >= rank)


def test_where_nothing_is_known_a_guess_sees_nothing(make_batch: Any) -> None:
    model = tiny().double()
    batch, other = make_batch([4, 7]), make_batch([4, 7], seed=9)
    batch.ranks = other.ranks = torch.tensor([1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 1])
    torch.testing.assert_close(model(other).second[0], model(batch).second[0])
    assert not torch.equal(model(other).second[1], model(batch).second[1])


def test_every_parameter_gets_a_gradient(make_batch: Any) -> None:
    model, batch = tiny(), make_batch(LENGTHS)
    batch.ranks, batch.segments = orders(LENGTHS), torch.arange(sum(LENGTHS)) % 2
    output = model(batch)
    model.logits(output.second[batch.ranks > 0]).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


def test_diagonals_hold_distances() -> None:
    t = 5
    distance = torch.arange(t - 1, -t, -1).float().expand(2, t, 2 * t - 1)
    place = torch.arange(t)
    assert torch.equal(diagonals(distance)[1], (place[:, None] - place).float())


@pytest.mark.parametrize("field", ["position", "norm", "window"])
def test_parts_that_are_its_own_are_not_swapped(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.{field}: XLNet's two streams are bound to relative positions"):
        XLNet.tiny(**{field: {"kind": "rope"}})


def test_what_it_cannot_do_is_said(make_batch: Any) -> None:
    with pytest.raises(ConfigError, match="reads a text from both sides and cannot continue one"):
        tiny().new_cache(1)
    model = tiny(head="none")
    with pytest.raises(ConfigError, match="an encoder without a head"):
        model.logits(model(make_batch([3])).hidden)
