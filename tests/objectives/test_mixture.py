from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from isoform import chance
from isoform.contracts import Document
from isoform.errors import ConfigError, DataError
from isoform.objectives.answers import Answers
from isoform.objectives.mixture import Mixture
from isoform.objectives.spans import SpanCorruption

PARTS = {"facts": {"kind": "span-corruption"}, "pairs": {"kind": "answers", "weight": 2.5}}
TEXT = Document("t", {"text": "Ada Lovelace. Born in London ."})
PAIR = Document("p", {"question": "Where?", "answer": "London"})


def build(tokenizer, parts=PARTS) -> Mixture:
    return Mixture(Mixture.Config(parts=parts), tokenizer, 64)


def test_each_document_goes_to_the_part_that_reads_it(letters) -> None:
    mixture = build(letters)
    alone = {
        "t": SpanCorruption(SpanCorruption.Config(), letters, 64),
        "p": Answers(Answers.Config(), letters, 64),
    }
    for document, weight in ((TEXT, 1.0), (PAIR, 2.5)):
        encoded = mixture.encode(document)
        mixed = mixture.prepare(encoded, chance.generator(1))
        sample = alone[document.id].prepare(alone[document.id].encode(document), chance.generator(1))
        assert mixed.tokens.tolist() == sample.tokens.tolist() and mixed.targets.tolist() == sample.targets.tolist()
        assert mixed.weight == weight
    assert mixture.prompt(mixture.encode(PAIR)).gold == "London"
    assert mixture.alternatives == (("text",), ("question", "answer"))
    assert mixture.stochastic and not mixture.windowed and mixture.needs == {"causal"}


def test_the_plan_is_that_of_the_part(letters) -> None:
    tokens = {"text": np.array([30, 0]), "question": np.array([0, 6]), "answer": np.array([0, 6])}
    assert build(letters).planned_tokens(tokens).tolist() == [32, 13]
    assert build(letters).planned_tokens({"text": np.array([30])}).tolist() == [32]


def test_loss_is_weighted_by_part(letters, token_model, collate) -> None:
    mixture, model = build(letters), token_model(letters.vocab_size)
    samples = [mixture.prepare(mixture.encode(document), chance.generator(1)) for document in (TEXT, PAIR)]
    together = collate(samples, [sample.weight for sample in samples])
    totals = [
        mixture.loss(model, b, model(b))["loss"].total for b in (together, collate(samples[:1]), collate(samples[1:]))
    ]
    assert totals[0].item() == pytest.approx(totals[1].item() + 2.5 * totals[2].item())
    assert mixture.counts(together)["loss"] == len(samples[0].targets) + 2.5 * 7


def test_mistakes_name_their_field(letters) -> None:
    with pytest.raises(ConfigError, match=r"objective\.parts\.a\.viw.*did you mean 'view'"):
        build(letters, {"a": {"kind": "span-corruption", "viw": "named"}})
    with pytest.raises(ConfigError, match=r"objective\.parts\.a: `kind` is missing"):
        build(letters, {"a": {}})
    with pytest.raises(ConfigError, match=r"objective\.parts\.a\.kind.*cannot be mixed"):
        build(letters, {"a": {"kind": "mixture", "parts": PARTS}})
    with pytest.raises(ValidationError, match=r"a\.weight is 0"):
        Mixture.Config(parts={"a": {"kind": "causal", "weight": 0}})
    with pytest.raises(DataError, match=r"label given, text or question \+ answer expected"):
        build(letters).encode(Document("x", {"label": "1"}))
