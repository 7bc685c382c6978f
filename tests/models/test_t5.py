"""T5 and T5 v1.1: what holds for every variant, and parity with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from isoform.checkpoints.folders import load_model
from isoform.checkpoints.forms import save_model
from isoform.checkpoints.tensors import read_model
from isoform.config import run_config
from isoform.contracts import Batch, Sequences
from isoform.errors import CheckpointError, ConfigError
from isoform.layers import ragged
from isoform.models import names, t5_forms
from isoform.models.t5 import T5
from isoform.reading import read_config, recipe_names
from isoform.text.kinds import Char

SOURCES, TARGETS = [5, 1, 17, 9, 30], [3, 7, 1, 12, 20]
VARIANTS: dict[str, dict[str, Any]] = {
    "t5": {},
    "v1.1": {"feedforward": "geglu-tanh", "tied": False},
    "deeper decoder, wide heads": {"num_decoder_layers": 3, "head_width": 16},
    "tied and not scaled": {"scale_logits": False, "feedforward": "swiglu"},
    "few buckets": {"num_buckets": 6, "max_distance": 5},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
FORMS: dict[str, dict[str, Any]] = {
    "t5": {"feed_forward_proj": "relu"},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "other sizes": {"feed_forward_proj": "gated-silu", "num_decoder_layers": 3, "d_kv": 12},
    "near": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 6, "feed_forward_proj": "gelu"},
}
forms = pytest.mark.parametrize("form", FORMS)


def tiny(variant: str, **changes: Any) -> T5:
    """A model whose every parameter is random and large enough to matter."""
    model = T5.tiny(**VARIANTS[variant], **changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def two_streams(make_batch: Any, sources: list[int] = SOURCES, targets: list[int] = TARGETS, **changes: Any) -> Batch:
    batch: Batch = make_batch(targets, **changes)
    batch.source = make_batch(sources, seed=1, **changes)
    return batch


def part(batch: Batch, order: list[int]) -> tuple[Batch, Tensor]:
    """Some of the sequences, and where their tokens stood."""
    first, lengths = ragged.starts(batch.sequences), batch.sequences.lengths
    index = torch.cat([torch.arange(first[row], first[row] + lengths[row]) for row in order])
    chosen = Batch(
        batch.tokens[index],
        batch.positions[index],
        Sequences([lengths[row] for row in order]),
        batch.sample_keys[order],
        dropout_key=batch.dropout_key,
        source=None if batch.source is None else part(batch.source, order)[0],
    )
    return chosen, index


def padded(batch: Batch) -> tuple[Tensor, Tensor]:
    """Ids and mask `(b, t)`, padded on the right."""
    rows = batch.tokens.split(batch.sequences.lengths)
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


# ------------------------------------------------------------------------------------------------- every variant


@variants
def test_a_batch_of_one_equals_a_batch_of_many_in_any_order(variant: str, make_batch: Any) -> None:
    model, batch = tiny(variant).double(), two_streams(make_batch)
    hidden = model(batch).hidden
    for order in ([3, 0, 4, 2, 1], [2], [4, 1]):
        chosen, index = part(batch, order)
        torch.testing.assert_close(model(chosen).hidden, hidden[index], rtol=1e-9, atol=1e-9)


def test_dropout_does_not_depend_on_the_rest_of_the_batch(make_batch: Any) -> None:
    model = tiny("v1.1", dropout=0.3).double()
    batch = two_streams(make_batch, dropout_key=5)
    hidden = model(batch).hidden
    chosen, index = part(batch, [3, 1])
    torch.testing.assert_close(model(chosen).hidden, hidden[index], rtol=1e-9, atol=1e-9)
    assert not torch.equal(model(two_streams(make_batch)).hidden, hidden)


@variants
def test_the_decoder_sees_its_past_and_the_whole_source(variant: str, make_batch: Any) -> None:
    model, batch = tiny(variant), two_streams(make_batch)
    assert batch.source is not None
    hidden = model(batch).hidden
    places = ragged.places(batch.sequences, torch.device("cpu"))
    later = two_streams(make_batch)
    later.tokens = torch.where(places >= 6, (batch.tokens + 1) % 61, batch.tokens)
    assert torch.equal(model(later).hidden[places < 6], hidden[places < 6])
    last = two_streams(make_batch)
    assert last.source is not None
    ends = ragged.last_tokens(last.source.sequences, torch.device("cpu"))
    last.source.tokens[ends] = (last.source.tokens[ends] + 1) % 61
    moved = (model(last).hidden - hidden).abs().amax(dim=1)
    assert bool((moved > 0).all())


@variants
def test_decoding_with_caches_equals_the_full_pass(variant: str, make_batch: Any) -> None:
    model, batch = tiny(variant).double().eval(), two_streams(make_batch)
    full = model(batch).hidden.split(TARGETS)
    cache = model.new_cache(len(TARGETS))
    rows, done = list(range(len(TARGETS))), [0] * len(TARGETS)
    tokens = batch.tokens.split(TARGETS)
    for step, size in enumerate([2, 1, 3, 1, 20]):
        alive = [row for row in rows if done[row] < TARGETS[row]]
        cache = cache.select([rows.index(row) for row in alive])
        rows = alive
        pieces = [tokens[row][done[row] : done[row] + size] for row in rows]
        piece = Batch(
            torch.cat(pieces),
            torch.cat([done[row] + torch.arange(len(p)) for row, p in zip(rows, pieces, strict=True)]),
            Sequences([len(p) for p in pieces]),
            batch.sample_keys[rows],
            source=batch.source if step == 0 else None,
        )
        with torch.no_grad():
            found = model(piece, cache=cache).hidden.split(piece.sequences.lengths)
        for row, states in zip(rows, found, strict=True):
            torch.testing.assert_close(states, full[row][done[row] : done[row] + len(states)], rtol=1e-9, atol=1e-9)
            done[row] += len(states)
    assert cache.lengths == [done[row] for row in rows]


def test_beams_of_a_source_share_its_states(make_batch: Any) -> None:
    model, batch = tiny("t5"), two_streams(make_batch, [4, 9], [1, 1])
    cache = model.new_cache(2)
    model(batch, cache=cache)
    doubled = cache.select([0, 0, 1, 1])
    assert doubled.select([1, 1, 3, 2]).source is doubled.source
    assert doubled.source.sequences is not None
    assert doubled.source.sequences.lengths == (4, 4, 9, 9)


def test_a_batch_without_a_source_is_refused(make_batch: Any) -> None:
    with pytest.raises(ConfigError, match="a T5 needs text-to-text or t5-spans"):
        T5.tiny()(make_batch([3]))


@variants
def test_every_parameter_gets_a_gradient(variant: str, make_batch: Any) -> None:
    model, batch = tiny(variant), two_streams(make_batch)
    model.logits(model(batch).hidden).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


@variants
def test_shared_parameters_have_equal_first_values(variant: str) -> None:
    ours, plain = T5.tiny(**VARIANTS[variant]).state_dict(), T5.tiny().state_dict()
    same = [name for name in ours if name in plain and ours[name].shape == plain[name].shape]
    assert len(same) > 10
    assert all(torch.equal(ours[name], plain[name]) for name in same)


def test_first_values_give_scores_and_logits_of_unit_size(make_batch: Any) -> None:
    model = T5.tiny(width=128, num_heads=4, feedforward_width=256, vocab_size=500)
    logits = model.logits(model(two_streams(make_batch)).hidden)
    assert 0.5 < float(logits.detach().std()) < 2.0


# ------------------------------------------------------------------------------------------------- transformers


def hf_model(form: str) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**{**sizes, "dropout_rate": 0.0, **FORMS[form]})).eval()
    if form == "v1.1":
        model.lm_head.weight = nn.Parameter(torch.randn(61, 32))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


def test_a_v11_without_a_head_of_its_own_stays_tied(tmp_path: Path) -> None:
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    hf = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    hf.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    assert loaded.config.tied and not loaded.config.scaled
    loaded.save(tmp_path / "ours")
    assert set(read_model(tmp_path / "theirs")) == set(read_model(tmp_path / "ours"))
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert again.config.scale_decoder_outputs is False
    assert load_model(tmp_path / "ours").config == loaded.config


def their_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def from_theirs(hf: T5ForConditionalGeneration) -> T5:
    form = {**hf.config.to_dict(), "scale_decoder_outputs": hf.config.scale_decoder_outputs}
    model = T5(T5.from_hf(form), seed=None)
    model.load_state_dict(T5.state_from_hf(form, their_tensors(hf)))
    return model


@forms
def test_logits_and_gradients_equal_transformers(form: str, make_batch: Any) -> None:
    hf, batch = hf_model(form), two_streams(make_batch)
    model = from_theirs(hf)
    assert batch.source is not None
    (ids, mask), (target_ids, target_mask) = padded(batch.source), padded(batch)
    theirs = hf(
        input_ids=ids, attention_mask=mask, decoder_input_ids=target_ids, decoder_attention_mask=target_mask
    ).logits[target_mask.bool()]
    ours = model.logits(model(batch).hidden)
    assert float((ours - theirs).detach().norm() / theirs.detach().norm()) < 1e-5
    torch.testing.assert_close(model.dense(ids, target_ids, mask, target_mask)[target_mask.bool()], ours)
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(4))
    (theirs * weight).sum().backward()
    (ours * weight).sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    got = names.to_theirs(grads, t5_forms.table(model.config), 1)
    expected = {name: parameter.grad for name, parameter in hf.named_parameters()}
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        assert gradient is not None
        assert float((got[name] - gradient).norm() / gradient.norm()) < 1e-4, name


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_of_transformers_comes_back_as_it_was(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hf = hf_model(form).to(dtype)
    hf.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs")
    assert loaded.family == "t5"
    save_model(tmp_path / "ours", loaded.model, None)
    before, after = read_model(tmp_path / "theirs"), read_model(tmp_path / "ours")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=dtype)
    ids, targets = torch.randint(1, 61, (2, 9)), torch.randint(1, 61, (2, 5))
    with torch.no_grad():
        expected = hf(input_ids=ids, decoder_input_ids=targets).logits
        assert torch.equal(again(input_ids=ids, decoder_input_ids=targets).logits, expected)
    assert load_model(tmp_path / "ours").config == loaded.config


def test_a_folder_of_two_precisions_loses_nothing(tmp_path: Path) -> None:
    """transformers keeps the second matrix of each feed-forward layer in float32 where the rest is float16."""
    hf_model("t5").save_pretrained(tmp_path / "hf")
    half = T5ForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    before = read_model(tmp_path / "half")
    assert {tensor.dtype for tensor in before.values()} == {torch.float16, torch.float32}
    save_model(tmp_path / "ours", load_model(tmp_path / "half").model, None)
    after = read_model(tmp_path / "ours")
    assert all(torch.equal(after[name].float(), tensor.float()) for name, tensor in before.items())


def test_what_the_decoder_begins_with_is_kept(tmp_path: Path) -> None:
    hf = hf_model("t5")
    hf.config.decoder_start_token_id = 7
    hf.save_pretrained(tmp_path / "hf")
    loaded = load_model(tmp_path / "hf")
    assert loaded.config.start_id == 7
    save_model(tmp_path / "ours", loaded.model, Char.train(Char.Config(special=("pad", "unk", "eos")), ["abcdefgh"]))
    assert T5Config.from_pretrained(tmp_path / "ours").decoder_start_token_id == 7


def test_copies_of_the_embedding_in_old_checkpoints() -> None:
    hf = hf_model("t5")
    tensors, form = their_tensors(hf), hf.config.to_dict()
    shared = tensors["shared.weight"]
    stems = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    old = {**tensors, **dict.fromkeys(stems, shared)}
    old["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 4)
    assert set(T5.state_from_hf(form, old)) == set(T5.state_from_hf(form, tensors))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: holds values that this model has no parameter for"):
        T5.state_from_hf(form, {**tensors, "lm_head.weight": shared + 1})
    with pytest.raises(CheckpointError, match=r"unknown: encoder.block.9.layer.0.layer_norm.weight"):
        T5.state_from_hf(form, {**tensors, "encoder.block.9.layer.0.layer_norm.weight": torch.ones(32)})
    del tensors["decoder.block.1.layer.2.layer_norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing: decoder.block.1.layer.2.layer_norm.weight"):
        T5.state_from_hf(form, tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "gated-mish"}, "feed_forward_proj 'gated-mish' is not known"),
        ({"is_decoder": True}, "is_decoder is True, False is expected"),
        ({"relative_attention_num_bucket": 16}, r"relative_attention_num_bucket is 16 and is not known .*_num_buckets"),
    ],
)
def test_forms_that_are_not_ours_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        T5.from_hf({**hf_model("t5").config.to_dict(), **changes})


@variants
def test_transformers_reads_the_config_that_we_write(variant: str) -> None:
    config = T5.tiny(**VARIANTS[variant]).config
    form = T5.to_hf(config)
    theirs = T5Config(**form)
    assert theirs.scale_decoder_outputs == config.scaled
    again = T5.from_hf(form)
    assert {**T5.to_hf(again), "isoform": None} == {**form, "isoform": None}


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name.startswith("t5-")])
def test_recipes_have_the_published_sizes(recipe: str) -> None:
    config = run_config(read_config(recipe))
    options = {name: value for name, value in config.model.items() if name != "family"}
    with torch.device("meta"):
        model = T5(T5.Config(**options, vocab_size=config.text.tokenizer["vocab_size"]), seed=None)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert f"({millions:,.1f} M parameters)" in config.about


@pytest.mark.parametrize("field", ["position", "norm", "window"])
def test_parts_that_are_its_own_are_not_swapped(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.{field}: T5's stacks share one table of learned scores"):
        T5.tiny(**{field: {"kind": "rope"}})


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"a divisor of model.width 32 is expected where model.head_width is not given"
    ):
        T5.tiny(num_heads=5)
    with pytest.raises(ConfigError, match=r"model.vocab_size: missing"):
        T5(T5.Config())
