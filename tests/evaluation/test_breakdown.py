"""Where a classifier errs, counted while it is scored: scikit-learn's table, scipy's temperature, constant memory."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.metrics import confusion_matrix

from isoform.contracts import Document, Encoded
from isoform.evaluation import evaluate as evaluating
from isoform.evaluation.breakdown import MAX_MISTAKES, Breakdown, Temperature, scaled
from isoform.evaluation.evaluate import evaluate
from isoform.evaluation.metrics import wilson
from isoform.models.bag_of_words import NaiveBayes
from isoform.models.heads import Classifier
from isoform.objectives.classify import Classify
from isoform.text.ngrams import NGrams

LABELS = ("bad", "good", "mixed")


def example(at: int, gold: int, shares: np.ndarray, words: int = 3) -> tuple[dict[str, Any], dict[str, float]]:
    row = {"id": f"d{at}", "input": " ".join(["word"] * words)}
    stats = {f"gold.{k}": float(k == gold) for k in range(len(shares))}
    return row, stats | {f"probability.{k}": float(share) for k, share in enumerate(shares)}


def drawn(n: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores `(n, 3)` that are sharpness times as large as their labels `(n,)` deserve."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(size=(n, 3)) * 2
    gold = np.array([rng.choice(3, p=shares) for shares in softmax(honest, axis=1)])
    return honest * sharpness, gold


def test_the_table_is_that_of_scikit_learn_and_the_error_that_of_the_metric() -> None:
    scores, gold = drawn(700, 2.0)
    shares = softmax(scores, axis=1)
    watch = Breakdown(LABELS)
    for at in range(700):
        watch.add(*example(at, gold[at], shares[at]))
    found = watch.values()
    said = shares.argmax(axis=1)
    assert found["confusion"] == confusion_matrix(gold, said).tolist() and found["n"] == 700
    confidence = shares.max(axis=1)
    bins = np.clip(np.ceil(confidence * 15), 1, 15)
    gaps = [abs((confidence - (said == gold))[bins == at].sum()) for at in range(1, 16)]
    assert found["reliability"]["error"] == pytest.approx(sum(gaps) / 700)
    assert found["reliability"]["nats"] == pytest.approx(-log_softmax(scores, axis=1)[np.arange(700), gold].mean())
    assert sum(part["n"] for part in found["reliability"]["bins"]) == 700
    for at, part in enumerate(part for part in found["slices"] if part["kind"] == "label"):
        right = int((said[gold == at] == at).sum())
        number = int((gold == at).sum())
        expected = (LABELS[at], number, *wilson(right, number, 1.959963984540054))
        assert (part["name"], part["n"], part["low"], part["high"]) == pytest.approx(expected)


def test_quarters_of_length_are_alike_and_hold_every_text_once() -> None:
    draw = random.Random(1)
    lengths = [draw.randint(1, 60) for _ in range(400)]
    watch = Breakdown(LABELS)
    for at, length in enumerate(lengths):
        watch.add(*example(at, at % 3, np.eye(3)[0] * 0.8 + 0.1, length))
    parts = [part for part in watch.values()["slices"] if part["kind"] == "length"]
    assert parts[0]["name"].startswith(f"{min(lengths)} to ") and len(parts) == 4
    assert sum(part["n"] for part in parts) == 400 and all(80 <= part["n"] <= 120 for part in parts)
    for lengths in ([7] * 9, [1, 1, 1, 1, 50]):
        watch = Breakdown(LABELS)
        for at, length in enumerate(lengths):
            watch.add(*example(at, 0, np.eye(3)[0] * 0.8 + 0.1, length))
        parts = [part for part in watch.values()["slices"] if part["kind"] == "length"]
        assert sum(part["n"] for part in parts) == len(lengths)
    assert not Breakdown(LABELS).values()["slices"]


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 3.7])
def test_the_temperature_is_the_most_likely_one_and_makes_probabilities_honest(sharpness: float) -> None:
    scores, gold = drawn(1500, sharpness)
    watch = Temperature(LABELS)
    for at in range(1500):
        watch.add(*example(at, gold[at], softmax(scores[at])))
    temperature = watch.value()

    def loss(log_temperature: float) -> float:
        return -log_softmax(scores / np.exp(log_temperature), axis=1)[np.arange(1500), gold].sum()

    assert temperature == pytest.approx(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x), rel=2e-3)
    assert temperature == pytest.approx(sharpness, rel=0.15)
    assert scaled(softmax(scores, axis=1), temperature) == pytest.approx(softmax(scores / temperature, axis=1))
    others, answers = drawn(1500, sharpness, seed=5)
    judged = Breakdown(LABELS, temperature)
    for at in range(1500):
        judged.add(*example(at, answers[at], softmax(others[at])))
    found = judged.values()
    if sharpness != 1.0:
        assert found["scaled"]["error"] < found["reliability"]["error"] / 2
        assert found["scaled"]["nats"] < found["reliability"]["nats"]
    assert Temperature(LABELS).value() is None


def test_a_perfect_classifier_has_a_temperature_at_the_end_of_the_row() -> None:
    watch = Temperature(LABELS)
    for at in range(20):
        watch.add(*example(at, at % 3, np.eye(3)[at % 3] * 0.7 + 0.1))
    assert watch.value() == pytest.approx(1 / 32)


def test_the_surest_mistakes_are_kept() -> None:
    rng = np.random.default_rng(2)
    shares = rng.dirichlet(np.ones(3), size=900)
    watch = Breakdown(LABELS)
    for at, row in enumerate(shares):
        watch.add(*example(at, (row.argmax() + 1 + at % 2) % 3 if at % 3 else row.argmax(), row))
    kept = watch.values()["mistakes"]
    wrong = sorted((shares[at].max() for at in range(900) if at % 3), reverse=True)
    assert [row["probability"] for row in kept] == pytest.approx(wrong[:MAX_MISTAKES])
    assert all(row["gold"] != row["prediction"] for row in kept)


class Endless:
    """Texts that are made when they are asked for."""

    def __init__(self, number: int, objective: Classify) -> None:
        self.number, self.objective = number, objective

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Encoded:
        text = " ".join(["fine", "dull", "film"][index % 3 : index % 3 + 1] * (1 + index % 7)) + f" x{index % 5}"
        return self.objective.encode(Document(f"d{index}", {"text": text, "label": LABELS[(index // 2) % 3]}))


def test_memory_does_not_grow_with_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "POOL_SAMPLES", 256)
    tokenizer = NGrams(["fine", "dull", "film"], 1, 1)
    objective = Classify(Classify.Config(labels=list(LABELS)), tokenizer, 1000)
    model = NaiveBayes(NaiveBayes.Config(vocab_size=4, classifier=Classifier(labels=LABELS)))
    with torch.no_grad():
        model.idf.fill_(1.0)
        model.weight[1:] = torch.eye(3)

    def peak(number: int) -> tuple[int, list]:
        told, watch = [], Breakdown(LABELS, 1.3)
        tracemalloc.start()
        result = evaluate(
            model,
            objective,
            Endless(number, objective),
            split="dev",
            keep=lambda row: told.append(len(row["stats"])) if len(told) < 3 else None,
            watch=watch,
        )
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert watch.values()["n"] == number == result.rows[0]["n"] and len(told) == 3 and not result.predictions
        return highest, result.rows

    peak(10)
    few, many = peak(600)[0], peak(2400)[0]
    # Eight bytes of each id, and twice that while they are sorted; a row of predictions takes thousands.
    assert many - few < 1800 * 8 * 8
