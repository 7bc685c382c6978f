from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from isoform.contracts import Document
from isoform.data.batches import collate
from isoform.errors import ConfigError
from isoform.evaluation.evaluate import Thinned, evaluate
from isoform.models.gpt2 import GPT2
from isoform.objectives.answers import Answers
from isoform.objectives.causal import Causal
from isoform.objectives.spans import SpanCorruption
from isoform.text.kinds import Char

TEXTS = ["a cab", "dad had a bad cab", "e", "fed", "decade", "a dead beef", "cafe", "abba", "bead"]
CONTEXT = 24


@pytest.fixture(scope="module")
def tokenizer():
    return Char.train(Char.Config(), TEXTS)


@pytest.fixture(scope="module")
def model(tokenizer):
    return GPT2.tiny(vocab_size=tokenizer.vocab_size, max_positions=CONTEXT).double()


def causal(tokenizer):
    objective = Causal(Causal.Config(), tokenizer, CONTEXT)
    return objective, [objective.encode(Document(f"d{i}", {"text": text})) for i, text in enumerate(TEXTS)]


def answers(tokenizer):
    objective = Answers(Answers.Config(), tokenizer, CONTEXT)
    pairs = [(text, text[:3].strip()) for text in TEXTS]
    documents = [Document(f"d{i}", {"question": q, "answer": a}) for i, (q, a) in enumerate(pairs)]
    return objective, [objective.encode(document) for document in documents]


def spans(tokenizer):
    objective = SpanCorruption(SpanCorruption.Config(), tokenizer, CONTEXT)
    return objective, [objective.encode(Document(f"d{i}", {"text": text})) for i, text in enumerate(TEXTS)]


def values(evaluation) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in evaluation.rows}


def test_the_numbers_are_those_of_torch(model, tokenizer) -> None:
    objective, dataset = causal(tokenizer)
    result = evaluate(model, objective, dataset, split="dev")
    nats, right, tokens = 0.0, 0, 0
    for row, encoded in zip(result.predictions, dataset, strict=True):
        ids = torch.from_numpy(encoded.fields["text"].astype(np.int64))
        logits = model.dense(ids[None, :-1])[0]
        one = functional.cross_entropy(logits, ids[1:], reduction="sum").item()
        assert row["stats"]["nats"] == pytest.approx(one, rel=1e-9)
        assert row["id"] == encoded.id and row["split"] == "dev"
        nats, tokens = nats + one, tokens + len(ids) - 1
        right += int((logits.argmax(-1) == ids[1:]).sum())
    expected = {
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / math.log(2) / sum(map(len, TEXTS)),
        "token_accuracy": right / tokens,
    }
    assert values(result) == pytest.approx(expected, rel=1e-9)
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] == len(TEXTS) for row in result.rows)


@pytest.mark.parametrize("make", [causal, answers, spans])
def test_batch_size_changes_nothing(model, tokenizer, make) -> None:
    objective, dataset = make(tokenizer)
    results = [evaluate(model, objective, dataset, split="dev", batch_tokens=size) for size in (1, 60, 10_000)]
    for result in results[1:]:
        assert values(result) == pytest.approx(values(results[0]), rel=1e-9)
        assert [row["prediction"] for row in result.predictions] == [
            row["prediction"] for row in results[0].predictions
        ]


def test_batch_size_changes_single_precision_by_its_rounding_alone(model, tokenizer) -> None:
    objective, dataset = causal(tokenizer)
    single = GPT2.tiny(vocab_size=tokenizer.vocab_size, max_positions=CONTEXT)
    losses = [
        values(evaluate(single, objective, dataset, split="dev", batch_tokens=size))["loss"] for size in (1, 9999)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_order_of_the_documents_and_ranks_change_nothing(model, tokenizer) -> None:
    objective, dataset = spans(tokenizer)
    whole = evaluate(model, objective, dataset, split="dev")
    back = evaluate(model, objective, dataset[::-1], split="dev")
    assert values(back) == pytest.approx(values(whole), rel=1e-12)
    parts: list = []
    evaluate(model, objective, dataset, split="dev", rank=1, world=2, gather=lambda rows: parts.extend(rows) or rows)
    both = evaluate(model, objective, dataset, split="dev", rank=0, world=2, gather=lambda rows: rows + parts)
    assert both.rows == whole.rows and both.predictions == whole.predictions


def test_draws_are_fixed_and_touch_no_random_stream(model, tokenizer) -> None:
    objective, dataset = spans(tokenizer)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global stream must be left alone
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = evaluate(model, objective, dataset, split="dev")
    torch.manual_seed(2)
    assert evaluate(model, objective, dataset, split="dev").rows == first.rows
    torch.manual_seed(1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_dropout_is_off_and_no_gradient_is_kept(tokenizer) -> None:
    objective, dataset = causal(tokenizer)
    dropping = GPT2.tiny(vocab_size=tokenizer.vocab_size, max_positions=CONTEXT, dropout=0.5)
    dropping.train()
    results = [evaluate(dropping, objective, dataset, split="dev").rows for _ in range(2)]
    assert results[0] == results[1]
    assert all(parameter.grad is None for parameter in dropping.parameters()) and dropping.training


def test_answers_are_generated_and_compared(tokenizer, model) -> None:
    objective, dataset = answers(tokenizer)

    class Knows(torch.nn.Module):
        """Says the true answer to every question but the third, where it says nothing."""

        capabilities = frozenset({"causal"})
        max_positions = None
        config = model.config

        def __init__(self) -> None:
            super().__init__()
            self.next = {}
            for index, encoded in enumerate(dataset):
                sample = objective.prepare(encoded, np.random.default_rng(0))
                asked = sample.targets.tolist() if index != 2 else [objective.end] * len(sample.targets)
                for place, target in enumerate(asked):
                    self.next[tuple(sample.tokens[: place + 1].tolist())] = target

        def forward(self, batch, *, cache=None, all_layers=False):
            from isoform.contracts import Output

            hidden = torch.zeros(len(batch.tokens), self.config.vocab_size)
            start = 0
            for length in batch.sequences.lengths:
                seen = batch.tokens[start : start + length].tolist()
                for place in range(length):
                    hidden[start + place, max(0, self.next.get(tuple(seen[: place + 1]), 0))] = 1.0
                start += length
            return Output(hidden)

        def logits(self, hidden):
            return hidden

    result = evaluate(Knows(), objective, dataset, split="dev", metrics=["exact_match"])
    assert [row["stats"] for row in result.predictions] == [
        {"correct": float(i != 2), "examples": 1.0} for i in range(len(TEXTS))
    ]
    assert result.predictions[0] == {
        "id": "d0",
        "split": "dev",
        "input": "a cab",
        "gold": "a c",
        "prediction": "a c",
        "stats": {"correct": 1.0, "examples": 1.0},
    }
    assert result.rows[0]["value"] == pytest.approx(8 / 9)


@pytest.mark.parametrize("max_new_tokens", [None, 2])
def test_answers_are_judged_without_being_generated(tokenizer, max_new_tokens, monkeypatch) -> None:
    """A model trained until it answers some of the questions is scored alike both ways."""
    objective, dataset = answers(tokenizer)
    learner = GPT2.tiny(vocab_size=tokenizer.vocab_size, max_positions=CONTEXT).double()
    optimizer = torch.optim.Adam(learner.parameters(), 3e-3)
    batch = collate([objective.prepare(encoded, np.random.default_rng(0)) for encoded in dataset])
    shares = []
    for _ in range(12):
        for _ in range(4):
            optimizer.zero_grad()
            objective.loss(learner, batch, learner(batch))["loss"].total.backward()
            optimizer.step()
        way = {"split": "dev", "metrics": ["exact_match", "loss"], "max_new_tokens": max_new_tokens}
        generated = evaluate(learner, objective, dataset, **way)
        with monkeypatch.context() as patch:
            if max_new_tokens is None:
                patch.setattr("isoform.evaluation.evaluate.generate", lambda _, prompts, **__: [*map(refuse, prompts)])
            assert evaluate(learner, objective, dataset, **way, keep_predictions=0).rows == generated.rows
        shares.append(generated.rows[0]["value"])
    assert max_new_tokens == 2 or (shares[0] < 0.5 < shares[-1] and len(set(shares)) > 2)


def refuse(prompt):
    raise AssertionError(f"{prompt.text} was generated")


def test_an_answer_with_unknown_characters_is_never_right(tokenizer) -> None:
    objective, _ = answers(tokenizer)
    encoded = objective.encode(Document("d", {"question": "a", "answer": "cab東"}))
    model = GPT2.tiny(vocab_size=tokenizer.vocab_size, max_positions=CONTEXT).double()
    for keep in (None, 0):
        way = {"split": "dev", "metrics": ["exact_match"], "keep_predictions": keep}
        assert evaluate(model, objective, [encoded], **way).rows[0]["value"] == 0.0


def test_few_predictions_are_kept_but_all_are_counted(model, tokenizer) -> None:
    objective, dataset = causal(tokenizer)
    for keep, expected in ((None, len(TEXTS)), (2, 2), (0, 0)):
        result = evaluate(model, objective, dataset, split="dev", keep_predictions=keep)
        assert len(result.predictions) == expected and result.rows[0]["n"] == len(TEXTS)


def test_equal_documents_get_distinct_rows(model, tokenizer) -> None:
    objective, dataset = causal(tokenizer)
    result = evaluate(model, objective, [dataset[0], dataset[1], dataset[0]], split="dev")
    assert [row["id"] for row in result.predictions] == ["d0", "d1", "d0#2"]


def test_an_empty_split_is_null_everywhere(model, tokenizer) -> None:
    for make in (causal, answers):
        objective, _ = make(tokenizer)
        result = evaluate(model, objective, [], split="dev")
        assert [row["value"] for row in result.rows] == [None] * len(objective.metrics)


def test_a_metric_that_needs_answers_is_refused_without_questions(model, tokenizer) -> None:
    objective, dataset = causal(tokenizer)
    with pytest.raises(ConfigError, match="metrics of answers need questions with known answers"):
        evaluate(model, objective, dataset, split="dev", metrics=["exact_match"])


def test_thinned_examples_are_evenly_spaced_and_no_more_than_there_are() -> None:
    assert list(Thinned(range(10), 4)) == [0, 2, 5, 7]  # type: ignore[arg-type]
    assert list(Thinned(range(3), 9)) == list(Thinned(range(3), None)) == [0, 1, 2]  # type: ignore[arg-type]
