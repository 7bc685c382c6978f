"""Where a classifier errs: confusion matrix, reliability, slices, its most confident mistakes, all while it is scored.

What is kept does not grow with the examples. The temperature that makes probabilities honest is fitted on the selection
split and judged on others.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from isoform.contracts import Floats
from isoform.evaluation.classification import BINS
from isoform.evaluation.metrics import wilson

Row = dict[str, Any]

# Examples that are added up together.
CHUNK = 512
MAX_MISTAKES = 100
MAX_CHARACTERS = 2000
# Temperatures that are tried, eight to each doubling, from 1/32 to 32.
LOG_TEMPERATURES = np.arange(-40, 41) / 8 * math.log(2)
TINY = 1e-300
NORMAL_95 = 1.959963984540054


class Temperature:
    """The scalar T that makes softmax(z / T) most likely, from one pass over probabilities p = softmax(z).

        loss(T) = - sum over examples of log (p_y^(1/T) / sum over labels of p^(1/T))

    The sums are kept for a row of temperatures; the least lies on the parabola through the three lowest, in log T.
    Source: Guo et al. 2017, section 4.2. Differs: found by search over T, not by gradient.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._gather = _Gather(labels, self._add)
        self.num_examples = 0
        self._nats = np.zeros(len(LOG_TEMPERATURES))

    def add(self, row: Mapping[str, Any], stats: Mapping[str, float]) -> None:
        self._gather.add(row, stats)

    def _add(self, rows: Sequence[Mapping[str, Any]], gold: Any, shares: Floats) -> None:
        self.num_examples += len(gold)
        for at, log_temperature in enumerate(LOG_TEMPERATURES):
            self._nats[at] += _nats(scaled(shares, math.exp(log_temperature)), gold).sum()

    def value(self) -> float | None:
        """T, or None where there was no example."""
        self._gather.flush()
        if not self.num_examples:
            return None
        at = int(np.argmin(self._nats))
        if at in (0, len(self._nats) - 1):
            return math.exp(LOG_TEMPERATURES[at])
        before, least, after = self._nats[at - 1 : at + 2]
        curvature = before - 2 * least + after
        shift = (before - after) / (2 * curvature) if curvature > 0 else 0.0
        return math.exp(LOG_TEMPERATURES[at] + shift * (LOG_TEMPERATURES[1] - LOG_TEMPERATURES[0]))


class Breakdown:
    """One split of a classifier that gives each text one label; `values` is what breakdown.json holds of it.

    temperature: as fitted on another split; None: nothing is said of scaled probabilities.
    """

    def __init__(self, labels: Sequence[str], temperature: float | None = None) -> None:
        self.labels = list(labels)
        self.temperature = temperature
        self._gather = _Gather(labels, self._add)
        self._confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
        # rows: gold, columns: said
        self._plain, self._scaled = _Reliability(), _Reliability()
        self._lengths: dict[int, list[int]] = {}
        # words of a text -> [examples, right ones]
        self._mistakes: list[tuple[float, int, Row]] = []
        # a heap, the least confident first
        self._num_mistakes = 0

    def add(self, row: Mapping[str, Any], stats: Mapping[str, float]) -> None:
        self._gather.add(row, stats)

    def _add(self, rows: Sequence[Mapping[str, Any]], gold: Any, shares: Floats) -> None:
        said = shares.argmax(axis=1)
        np.add.at(self._confusion, (gold, said), 1)
        self._plain.add(shares, gold)
        if self.temperature is not None:
            self._scaled.add(scaled(shares, self.temperature), gold)
        for row, meant, chosen, share in zip(rows, gold.tolist(), said.tolist(), shares, strict=True):
            counts = self._lengths.setdefault(len(str(row["input"] or "").split()), [0, 0])
            counts[0] += 1
            counts[1] += meant == chosen
            if meant != chosen:
                self._keep_mistake(row, meant, chosen, share)

    def _keep_mistake(self, row: Mapping[str, Any], meant: int, chosen: int, shares: Floats) -> None:
        # Of equally sure mistakes the earlier one stays.
        order = (float(shares[chosen]), -self._num_mistakes)
        self._num_mistakes += 1
        if len(self._mistakes) == MAX_MISTAKES and order <= self._mistakes[0][:2]:
            return
        mistake = {
            "id": row["id"],
            "input": str(row["input"] or "")[:MAX_CHARACTERS],
            "gold": self.labels[meant],
            "prediction": self.labels[chosen],
            "probability": float(shares[chosen]),
            "probability_of_gold": float(shares[meant]),
        }
        push = heapq.heappushpop if len(self._mistakes) == MAX_MISTAKES else heapq.heappush
        push(self._mistakes, (*order, mistake))

    def values(self) -> Row:
        """{labels, n, confusion, reliability, scaled, temperature, slices, mistakes}, the surest mistake first."""
        self._gather.flush()
        return {
            "labels": self.labels,
            "n": int(self._confusion.sum()),
            "confusion": self._confusion.tolist(),
            "reliability": self._plain.values(),
            "temperature": self.temperature,
            "scaled": None if self.temperature is None else self._scaled.values(),
            "slices": [*self._by_length(), *self._by_label()],
            "mistakes": [mistake for *_, mistake in sorted(self._mistakes, key=lambda kept: kept[:2], reverse=True)],
        }

    def _by_label(self) -> list[Row]:
        counts = zip(self.labels, self._confusion, range(len(self.labels)), strict=True)
        return [_slice("label", name, int(row.sum()), int(row[at])) for name, row, at in counts if row.sum()]

    def _by_length(self) -> list[Row]:
        """Four parts of like size, by the words of a text; equal lengths stay together."""
        lengths = sorted(self._lengths)
        up_to = np.cumsum([self._lengths[length][0] for length in lengths])
        found, start = [], 0
        for quarter in range(1, 5):
            end = int(np.searchsorted(up_to, quarter * up_to[-1] / 4 - 1e-9)) + 1 if lengths else 0
            part = lengths[start:end]
            if part:
                examples, right = np.sum([self._lengths[length] for length in part], axis=0).tolist()
                name = f"{part[0]} to {part[-1]} words" if part[0] < part[-1] else f"{part[0]} words"
                found.append(_slice("length", name, examples, right))
            start = max(start, end)
        return found


def scaled(shares: Floats, temperature: float) -> Floats:
    """softmax(z / T) from softmax(z): `(b, c)` -> `(b, c)`."""
    logs = np.log(np.maximum(shares, TINY)) / temperature
    powers = np.exp(logs - logs.max(axis=1, keepdims=True))
    result: Floats = powers / powers.sum(axis=1, keepdims=True)
    return result


def _nats(shares: Floats, gold: npt.NDArray[np.int64]) -> Floats:
    """-log of the right label's share: `(b, c)`, `(b,)` -> `(b,)`."""
    result: Floats = -np.log(np.maximum(shares[np.arange(len(gold)), gold], TINY))
    return result


def _slice(kind: str, name: str, examples: int, right: int) -> Row:
    low, high = wilson(right, examples, NORMAL_95)
    return {"kind": kind, "name": name, "n": examples, "accuracy": right / examples, "low": low, "high": high}


class _Reliability:
    """Confidence and accuracy in bins of equal width, `(low, high]`, and what both amount to."""

    def __init__(self) -> None:
        self._counts, self._confidence, self._right = np.zeros(BINS), np.zeros(BINS), np.zeros(BINS)
        self._nats = 0.0

    def add(self, shares: Floats, gold: npt.NDArray[np.int64]) -> None:
        confidence, right = shares.max(axis=1), shares.argmax(axis=1) == gold
        bins = np.clip(np.ceil(confidence * BINS).astype(int), 1, BINS) - 1
        self._counts += np.bincount(bins, minlength=BINS)
        self._confidence += np.bincount(bins, weights=confidence, minlength=BINS)
        self._right += np.bincount(bins, weights=right, minlength=BINS)
        self._nats += float(_nats(shares, gold).sum())

    def values(self) -> Row:
        """{error, nats, bins: [{low, high, n, confidence, accuracy}]}; error: see the metric `calibration_error`."""
        n = float(self._counts.sum())
        bins = [
            {
                "low": at / BINS,
                "high": (at + 1) / BINS,
                "n": int(self._counts[at]),
                "confidence": self._confidence[at] / self._counts[at],
                "accuracy": self._right[at] / self._counts[at],
            }
            for at in np.flatnonzero(self._counts).tolist()
        ]
        gap = float(np.abs(self._confidence - self._right).sum())
        return {"error": gap / n if n else None, "nats": self._nats / n if n else None, "bins": bins}


class _Gather:
    """Collects examples until there are enough to be added up together.

    full: receives rows, the number of each one's gold label `(b,)`, probabilities `(b, c)`.
    """

    def __init__(self, labels: Sequence[str], full: Any) -> None:
        self._num_labels = len(labels)
        self._full = full
        self._rows: list[Row] = []
        self._gold: list[int] = []
        self._shares: list[list[float]] = []

    def add(self, row: Mapping[str, Any], stats: Mapping[str, float]) -> None:
        self._rows.append({"id": row["id"], "input": row["input"]})
        self._gold.append(next(at for at in range(self._num_labels) if stats[f"gold.{at}"] > 0.5))
        self._shares.append([stats[f"probability.{at}"] for at in range(self._num_labels)])
        if len(self._rows) == CHUNK:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._full(self._rows, np.array(self._gold), np.array(self._shares))
            self._rows, self._gold, self._shares = [], [], []
