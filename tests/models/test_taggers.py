"""Classifiers of words are those of transformers, both ways."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForTokenClassification

from isoform.checkpoints.doctor import examine
from isoform.checkpoints.folders import load_model
from isoform.checkpoints.forms import save_model
from isoform.contracts import Batch, Sequences
from isoform.errors import ConfigError
from isoform.models import heads
from isoform.registry import lookup
from isoform.storage import read_json

FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "xlnet"]
LENGTHS = (7, 1, 12)
TAGS = ("O", "B-PER", "I-PER")


def tagging(family: str, **changes):
    body = lookup("model", family).tiny(**changes)
    return heads.attach(body, heads.Classifier(labels=TAGS, pooling="none", dropout=0.1), seed=3)


def batch_of() -> Batch:
    tokens = torch.randint(2, 60, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return Batch(tokens, positions, Sequences(LENGTHS), torch.arange(len(LENGTHS)))


def theirs_of(folder) -> torch.nn.Module:
    """Theirs, with a padding token that its vocabulary has."""
    config = AutoConfig.from_pretrained(folder)
    if config.pad_token_id is None or config.pad_token_id >= config.vocab_size:
        config.pad_token_id = 60
    model, told = AutoModelForTokenClassification.from_pretrained(folder, config=config, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return model.eval()


def scores(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.classifier(model(batch).hidden, batch)


def their_scores(theirs, batch: Batch) -> torch.Tensor:
    """Of real tokens `(n, c)`, from a padded call."""
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(batch.tokens.split(list(LENGTHS))):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    ids[mask == 0] = theirs.config.pad_token_id or 0
    with torch.no_grad():
        return theirs(input_ids=ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_tagger_gives_the_logits_of_transformers(family: str, tmp_path) -> None:
    model, batch = tagging(family), batch_of()
    save_model(tmp_path / "out", model, None)
    assert read_json(tmp_path / "out" / "isoform.json")["native_because"] is None
    theirs = theirs_of(tmp_path / "out")
    assert theirs.config.id2label == dict(enumerate(TAGS))
    torch.testing.assert_close(scores(model, batch), their_scores(theirs, batch), rtol=1e-4, atol=1e-6)
    again = load_model(tmp_path / "out").model
    assert again.config == model.config and torch.equal(scores(again, batch), scores(model, batch))
    if family != "modernbert":  # its padding is an id that a tiny vocabulary has not
        told = [finding for finding in examine(tmp_path / "out") if "ForTokenClassification" in finding.what]
        assert {finding.level for finding in told} == {"ok"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tagger_of_transformers_loads_with_its_tags(family: str, tmp_path) -> None:
    save_model(tmp_path / "out", tagging(family), None)
    theirs = theirs_of(tmp_path / "out")
    for number, parameter in enumerate(theirs.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.config.classifier.labels == TAGS and ours.config.classifier.pooling == "none"
    assert ours.config.classifier.dropout == pytest.approx(0.1)
    batch = batch_of()
    torch.testing.assert_close(scores(ours.model, batch), their_scores(theirs, batch), rtol=1e-4, atol=1e-5)


def test_a_pooler_that_no_score_depends_on_is_left_out(tmp_path) -> None:
    """Folders of BERT taggers before 2020 have one."""
    save_model(tmp_path / "out", tagging("bert"), None)
    (tmp_path / "out" / "isoform.json").unlink()
    (tmp_path / "out" / "manifest.json").unlink()
    weights = tmp_path / "out" / "model.safetensors"
    more = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    save_file({**load_file(weights), **more}, weights, metadata={"format": "pt"})
    assert load_model(tmp_path / "out").config.classifier.labels == TAGS


def test_what_a_modernbert_has_learnt_of_its_head_is_kept() -> None:
    body = lookup("model", "modernbert").tiny()
    torch.nn.init.normal_(body.head.dense.weight)
    grown = heads.attach(body, heads.Classifier(labels=TAGS, pooling="none"), seed=0)
    assert torch.equal(grown.classifier.dense.weight, body.head.dense.weight)


def test_dropout_falls_on_each_token_for_itself() -> None:
    model, batch = tagging("bert"), batch_of()
    batch.dropout_key = 1
    first, second = scores(model, batch), scores(model, batch)
    batch.dropout_key = None
    assert torch.equal(first, second)
    assert bool(((first - scores(model, batch)).abs().sum(dim=1) > 0).any())


def test_decoders_have_none() -> None:
    with pytest.raises(
        ConfigError, match=r"model.classifier.pooling: none: each token is scored for itself in encoders"
    ):
        tagging("gpt2")
