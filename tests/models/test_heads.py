"""Classifiers of every family are those of transformers, both ways, and pooling never sees another text."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from isoform.checkpoints.folders import load_model
from isoform.checkpoints.forms import save_model
from isoform.contracts import Batch, Sequences
from isoform.errors import ConfigError
from isoform.models import heads
from isoform.registry import build_options, lookup
from isoform.storage import read_json

FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama"]
LENGTHS = (7, 1, 12)
PADDING = 60


def classifying(family: str, **changes):
    cls = lookup("model", family)
    body = cls.tiny()
    pooling = cls.classifier_shape.poolings[0]
    wanted = {"labels": ("neg", "pos", "unsure"), "pooling": pooling, **changes}
    return heads.attach(body, heads.Classifier(**wanted), seed=3)


def ragged_batch(lengths=LENGTHS, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return Batch(
        tokens=torch.randint(2, PADDING, (sum(lengths),), generator=draw),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        sequences=Sequences(lengths),
        sample_keys=torch.arange(len(lengths)),
    )


def scores(model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.classifier(model(batch).hidden, batch)


def padded(batch: Batch, padding: int) -> dict[str, torch.Tensor]:
    ids = torch.full((len(batch.sequences), batch.sequences.max_length), padding)
    mask = torch.zeros_like(ids)
    first = 0
    for row, length in enumerate(batch.sequences.lengths):
        ids[row, :length] = batch.tokens[first : first + length]
        mask[row, :length] = 1
        first += length
    return {"input_ids": ids, "attention_mask": mask}


def config_of(folder):
    """Theirs, with a padding token that its vocabulary has."""
    config = AutoConfig.from_pretrained(folder)
    if config.pad_token_id is None or config.pad_token_id >= config.vocab_size:
        config.pad_token_id = PADDING
    return config


def theirs_of(folder) -> torch.nn.Module:
    model, told = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config_of(folder), output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_classifier_gives_the_logits_of_transformers(family: str, tmp_path) -> None:
    model, batch = classifying(family), ragged_batch()
    save_model(tmp_path / "out", model, None)
    theirs = theirs_of(tmp_path / "out")
    assert theirs.config.id2label == {0: "neg", 1: "pos", 2: "unsure"}
    assert theirs.config.problem_type == "single_label_classification"
    with torch.no_grad():
        expected = theirs(**padded(batch, theirs.config.pad_token_id)).logits
    torch.testing.assert_close(scores(model, batch), expected, rtol=1e-4, atol=1e-6)
    again = load_model(tmp_path / "out").model
    assert again.config == model.config
    assert torch.equal(scores(again, batch), scores(model, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_classifier_of_transformers_loads_with_its_labels(family: str, tmp_path) -> None:
    model, batch = classifying(family, task="multi-label"), ragged_batch()
    save_model(tmp_path / "out", model, None)
    torch.manual_seed(1)
    theirs = AutoModelForSequenceClassification.from_config(config_of(tmp_path / "out")).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.config.classifier.labels == ("neg", "pos", "unsure")
    assert ours.config.classifier.task == "multi-label"
    with torch.no_grad():
        expected = theirs(**padded(batch, theirs.config.pad_token_id)).logits
    torch.testing.assert_close(scores(ours.model, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "pooling"), [("modernbert", "mean"), ("bert", "mean"), ("gpt2", "cls")])
def test_pooling_that_transformers_has_not_makes_a_native_folder(family: str, pooling: str, tmp_path) -> None:
    model, batch = classifying(family, pooling=pooling), ragged_batch()
    save_model(tmp_path / "out", model, None)
    because = read_json(tmp_path / "out" / "isoform.json")["native_because"]
    assert (because is None) == (family == "modernbert")
    assert because is None or f"pooling {pooling}" in because
    assert torch.equal(scores(load_model(tmp_path / "out").model, batch), scores(model, batch))
    if because is None:
        with torch.no_grad():
            expected = theirs_of(tmp_path / "out")(**padded(batch, 0)).logits
        torch.testing.assert_close(scores(model, batch), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_text_alone_is_scored_as_in_company(family: str, pooling: str) -> None:
    model, batch = classifying(family, pooling=pooling), ragged_batch()
    together, first = scores(model, batch), 0
    for row, length in enumerate(LENGTHS):
        alone = ragged_batch((length,))
        alone.tokens = batch.tokens[first : first + length]
        torch.testing.assert_close(scores(model, alone)[0], together[row])
        first += length


@pytest.mark.parametrize(
    ("family", "options", "source", "place"),
    [
        ("bert", {"pooler": "plain"}, "pooler.weight", "classifier.dense.weight"),
        ("modernbert", {}, "head.norm.weight", "classifier.norm.weight"),
        ("llama", {}, "embedding.weight", "embedding.weight"),
    ],
)
def test_what_a_pretrained_model_has_learnt_is_kept(family: str, options, source: str, place: str) -> None:
    cls = lookup("model", family)
    body = cls.tiny(**options)
    torch.nn.init.normal_(body.get_parameter(source))
    shape = cls.classifier_shape
    wanted = heads.Classifier(labels=("a", "b"), pooling=shape.poolings[0])
    grown = heads.attach(body, wanted, seed=0)
    assert torch.equal(grown.get_parameter(place), body.get_parameter(source))
    fresh = [heads.attach(body, wanted, seed=seed).classifier.scores.weight for seed in (0, 0, 1)]
    assert torch.equal(fresh[0], fresh[1]) and not torch.equal(fresh[0], fresh[2])
    assert getattr(grown, "head", None) is None


def test_dropout_before_the_scores_is_keyed() -> None:
    model, batch = classifying("roberta", dropout=0.5), ragged_batch()
    plain = scores(model, batch)
    batch.dropout_key = 1
    first, second = scores(model, batch), scores(model, batch)
    assert torch.equal(first, second) and not torch.equal(first, plain)


@pytest.mark.parametrize(
    ("labels", "message"), [(("a", "a"), "a name stands there twice"), (("a",), "there is nothing to tell apart")]
)
def test_labels_that_tell_nothing_apart_are_refused(labels, message: str) -> None:
    cls = lookup("model", "bert")
    with pytest.raises(ConfigError, match=message):
        build_options(cls, {"classifier": {"labels": labels}}, "model")
