"""BLEU and chrF of sums over examples against sacrebleu's own corpus scores."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from isoform.errors import ConfigError
from isoform.evaluation.metrics import Judge, StreamingMetrics, build_metrics

WORDS = ["ein", "Mann", "geht", "im", "Park", ",", "die", "Frau", "läuft", "2.5", "ä"]
texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
ORACLES = {"bleu": BLEU(), "chrf": CHRF()}


def columns(metric: Judge, pairs: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    rows = [metric.judge(said, gold) for said, gold in pairs]
    return {name: np.array([row[name] for row in rows]) for name in metric.columns}


@pytest.mark.parametrize("name", ORACLES)
@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_the_score_is_sacrebleus(name: str, pairs: list[tuple[str, str]]) -> None:
    metric = build_metrics([name])[0]
    sums = {column: values.sum() for column, values in columns(metric, pairs).items()}
    expected = ORACLES[name].corpus_score([said for said, _ in pairs], [[gold for _, gold in pairs]]).score
    assert metric.value(sums) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ORACLES)
def test_many_sums_at_once_and_an_interval(name: str) -> None:
    rng = np.random.default_rng(0)
    golds = [" ".join(rng.choice(WORDS, size=8)) for _ in range(40)]
    pairs = [(" ".join(word for word in gold.split() if rng.random() < 0.8), gold) for gold in golds]
    metric = build_metrics([name])[0]
    stats = columns(metric, pairs)
    without_one = {column: values.sum() - values for column, values in stats.items()}
    each = metric.value(without_one)
    assert each.shape == (40,)
    assert each[3] == pytest.approx(metric.value({column: values[3] for column, values in without_one.items()}))
    stream = StreamingMetrics([metric])
    stream.add(stats)
    (row,) = stream.rows("test")
    assert 0 < row["low"] < row["value"] < row["high"] < 100


def test_without_sacrebleu_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.chrf", None)
    metric = build_metrics(["chrf"])[0]
    assert isinstance(metric, Judge)
    with pytest.raises(ConfigError, match=r"pip install 'isoform\[translation\]'"):
        metric.judge("a", "b")
