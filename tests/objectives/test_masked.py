"""Masked language modelling: what is hidden follows from the draw alone, and what is asked is what was hidden."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.config import DataConfig
from isoform.contracts import IGNORE, Document, Encoded
from isoform.data.corpus import build_dataset
from isoform.errors import ConfigError
from isoform.evaluation.evaluate import evaluate
from isoform.models.bert import Bert
from isoform.objectives.masked import Masked
from isoform.registry import build_options, lookup
from isoform.text.tokenizers import TextTokenizer, train_tokenizer
from isoform.text.words import WordStarts

TEXT = "The harbourmaster's 3 boats, unlike 12 others, didn't re-enter Izmir's old harbour in 1901 again. " * 6
SPECIAL = {"unk": 0, "pad": 1, "mask": 2, "cls": 3, "sep": 4}


def trained(kind: str) -> TextTokenizer:
    options = build_options(lookup("tokenizer", kind), {"vocab_size": 300, "min_frequency": 1}, "text.tokenizer")
    return train_tokenizer(kind, options, [TEXT])


PLAIN = SimpleNamespace(special_ids=SPECIAL, vocab_size=50)
TOKENIZERS = {kind: trained(kind) for kind in ("wordpiece", "bpe")}


def build(tokenizer=PLAIN, max_tokens=64, **options) -> Masked:
    return Masked(Masked.Config(**options), tokenizer, max_tokens)


def encoded(ids) -> Encoded:
    return Encoded("d", {"text": np.asarray(ids, dtype=np.int32)}, 9)


@given(
    ids=st.lists(st.integers(0, 49), min_size=1, max_size=80),
    fraction=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
    edges=st.sampled_from([None, True, False]),
)
@settings(max_examples=150, deadline=None)
def test_targets_are_what_stood_there_and_the_rest_is_untouched(ids, fraction, seed, edges) -> None:
    objective = build(fraction=fraction, edges=edges)
    before, after = ([3], [4]) if edges is not False else ([], [])
    sample = objective.prepare(encoded(ids), np.random.default_rng(seed))
    whole = np.array([*before, *ids[: objective.window_tokens], *after])
    asked = sample.targets != IGNORE
    assert len(sample.tokens) == len(whole) <= 64
    assert objective.planned_tokens({"text": np.array([len(ids)])})[0] == len(whole)
    assert (sample.tokens[~asked] == whole[~asked]).all()
    assert (sample.targets[asked] == whole[asked]).all()
    ordinary = ~np.isin(ids[: objective.window_tokens], list(SPECIAL.values()))
    assert asked.sum() == max(1, round(fraction * (ordinary.sum() or len(ordinary))))
    if ordinary.any():
        assert not np.isin(sample.targets[asked], list(SPECIAL.values())).any()
    assert not asked[: len(before)].any() and not asked[len(whole) - len(after) :].any()
    again = objective.prepare(encoded(ids), np.random.default_rng(seed))
    assert (again.tokens == sample.tokens).all() and (again.targets == sample.targets).all()


def test_shares_are_those_of_the_paper() -> None:
    """80 % masks, 10 % random, 10 % unchanged, within five standard deviations; every place is chosen as often."""
    objective, rng = build(max_tokens=102), np.random.default_rng(0)
    ids = np.random.default_rng(1).integers(5, 50, 100)
    counts, chosen, number = np.zeros(3), np.zeros(100), 0
    drawn = np.zeros(50)
    for _ in range(1000):
        sample = objective.prepare(encoded(ids), rng)
        tokens, targets = sample.tokens[1:-1], sample.targets[1:-1]
        asked = targets != IGNORE
        masked, same = tokens[asked] == 2, tokens[asked] == targets[asked]
        counts += [masked.sum(), same.sum(), (~masked & ~same).sum()]
        drawn += np.bincount(tokens[asked][~masked & ~same], minlength=50)
        chosen += asked
        number += asked.sum()
    assert number == 15_000
    shares = np.array([0.8, 0.1 + 0.1 / 45, 0.1 - 0.1 / 45])
    assert (np.abs(counts / number - shares) < 5 * np.sqrt(shares * (1 - shares) / number)).all()
    assert (np.abs(chosen - 150) < 5 * np.sqrt(1000 * 0.15 * 0.85)).all()
    assert not drawn[:5].any() and (drawn[5:] > 0).all()


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(seed=st.integers(0, 10_000), fraction=st.sampled_from([0.02, 0.15, 0.5]))
@settings(max_examples=40, deadline=None)
def test_whole_words_are_hidden_whole_or_not_at_all(kind, seed, fraction) -> None:
    tokenizer = TOKENIZERS[kind]
    objective = build(tokenizer, whole_words=True, fraction=fraction, mask_fraction=1.0, random_fraction=0.0)
    ids = tokenizer.encode(TEXT)[seed % 50 :]
    sample = objective.prepare(encoded(ids), np.random.default_rng(seed))
    edges = len(objective.begin), len(sample.targets) - len(objective.end)
    asked = (sample.targets != IGNORE)[slice(*edges)]
    word = np.cumsum(WordStarts(tokenizer)(ids[: objective.window_tokens]))
    assert asked.any()
    for number in np.unique(word[asked]):
        assert asked[word == number].all()
    longest = np.bincount(word).max()
    assert asked.sum() <= max(round(fraction * len(asked)), longest)


def test_a_whole_window_of_unknown_or_special_tokens_still_asks_for_one() -> None:
    for options in ({}, {"whole_words": True}):
        tokenizer = TOKENIZERS["wordpiece"] if options else PLAIN
        sample = build(tokenizer, **options).prepare(
            encoded([tokenizer.special_ids["unk"]] * 4), np.random.default_rng(0)
        )
        assert (sample.targets != IGNORE).sum() == 1


def test_edges_are_the_tokenizer_s() -> None:
    bert, gpt = TOKENIZERS["wordpiece"], TOKENIZERS["bpe"]
    for tokenizer, roles in ((bert, ("cls", "sep")), (gpt, ("bos", "eos"))):
        objective = build(tokenizer)
        assert (*objective.begin, *objective.end) == tuple(tokenizer.special_ids[role] for role in roles)
    bare = SimpleNamespace(special_ids={"mask": 0}, vocab_size=9)
    assert build(bare).window_tokens == 64
    with pytest.raises(ConfigError, match=r"objective.edges: the tokenizer has no special token 'cls'"):
        build(bare, edges=True)
    with pytest.raises(ConfigError, match=r"no special token 'mask'"):
        build(SimpleNamespace(special_ids={}, vocab_size=9)).encode(Document("d", {"text": "x"}))
    assert build(None).window_tokens == 64


def test_windows_stand_end_to_end(tmp_path) -> None:
    tokenizer = TOKENIZERS["wordpiece"]
    documents = [Document("a", {"text": TEXT}), Document("b", {"text": "boats again."})]
    source = type(
        "Texts", (), {"name": "s", "fingerprint": lambda self: "s", "__iter__": lambda self: iter(documents)}
    )()
    objective = build(tokenizer, max_tokens=20)
    dataset = build_dataset(source, tokenizer, objective, DataConfig(), 20, tmp_path)
    windows = [item.fields["text"] for item in dataset]
    assert {len(window) for window in windows[:-2]} == {18}
    assert np.concatenate(windows[:-1]).tolist() == tokenizer.encode(TEXT).tolist()
    assert sum(item.num_bytes for item in dataset) == sum(len(d.fields["text"].encode()) for d in documents)


def test_logits_are_made_at_masked_places_only(collate, token_model) -> None:
    model, objective = token_model(50), build()
    samples = [objective.prepare(encoded(np.arange(5, 45)), np.random.default_rng(seed)) for seed in range(3)]
    batch = collate(samples)
    objective.loss(model, batch, model(batch))
    assert model.num_logits == 18 == objective.counts(batch)["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_fraction": 0.95}, "objective: .*more than 1 together"),
        ({"fraction": 0}, "objective.fraction"),
        ({"fractoin": 0.2}, r"objective.fractoin: unknown key \(did you mean 'fraction'\?\)"),
    ],
)
def test_refusals(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_options(Masked, options, "objective")


def test_pseudo_perplexity_hides_each_token_alone() -> None:
    tokenizer = TOKENIZERS["wordpiece"]
    model, objective = Bert.tiny(vocab_size=tokenizer.vocab_size).eval(), build(tokenizer, max_tokens=16)
    texts = ["The old harbour again", "boats"]
    dataset = [objective.encode(Document(text, {"text": text})) for text in texts]
    found = evaluate(model, objective, dataset, split="dev", metrics=["pseudo_perplexity", "loss", "masked_accuracy"])
    nats = tokens = 0.0
    for item in dataset:
        ids = item.fields["text"].tolist()
        for place, true in enumerate(ids):
            hidden = [*objective.begin, *ids, *objective.end]
            hidden[place + 1] = objective.mask
            with torch.no_grad():
                scores = model.dense(torch.tensor([hidden]))[0, place + 1].log_softmax(-1)
            nats, tokens = nats - float(scores[true]), tokens + 1
    values = {row["metric"]: row["value"] for row in found.rows}
    assert values["pseudo_perplexity"] == pytest.approx(np.exp(nats / tokens), rel=1e-5)
    assert values["loss"] > 0 and 0 <= values["masked_accuracy"] <= 1
    again = evaluate(model, objective, dataset, split="dev", batch_tokens=7)
    assert {row["metric"]: row["value"] for row in again.rows}["loss"] == pytest.approx(values["loss"], rel=1e-6)
