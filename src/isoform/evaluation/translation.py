"""BLEU and chrF of generated answers, with the counts of sacrebleu, each a function of sums over examples.

Both are corpus scores: counts are added up over examples before they are divided, so an example has counts and no score
of its own. One reference an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from isoform.errors import ConfigError
from isoform.evaluation.metrics import ratio
from isoform.registry import register

MAX_WORDS = 4
MAX_CHARACTERS = 6


@register("metric", "bleu")
class Bleu:
    """100 x brevity x (product over n = 1 .. 4 of matching n-grams / said n-grams)^(1/4).

    brevity = min(1, exp(1 - expected words / said words)). Text is parted into words as sacrebleu's `13a` parts it; a
    precision of 0 counts as half, a quarter ... of one match (its smoothing `exp`).
    Units: points, 0 to 100. Source: Papineni et al. 2002; Post 2018. Differs: nothing from sacrebleu's default.
    """

    name: ClassVar[str] = "bleu"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = (
        *(f"bleu_matches_{n}" for n in range(1, MAX_WORDS + 1)),
        *(f"bleu_ngrams_{n}" for n in range(1, MAX_WORDS + 1)),
        "bleu_words",
        "bleu_expected_words",
    )
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "points"

    @cached_property
    def _scorer(self) -> Any:
        return _sacrebleu("bleu").BLEU(effective_order=True)

    def judge(self, said: str, gold: str) -> dict[str, float]:
        """The counts of one example."""
        score = self._scorer.sentence_score(said, [gold])
        return dict(
            zip(self.columns, map(float, [*score.counts, *score.totals, score.sys_len, score.ref_len]), strict=True)
        )

    def value(self, sums: Mapping[str, Any]) -> Any:
        matches, said = (
            np.stack([np.asarray(sums[f"bleu_{kind}_{n}"], dtype=np.float64) for n in range(1, MAX_WORDS + 1)])
            for kind in ("matches", "ngrams")
        )
        zeros = np.cumsum(matches <= 0, axis=0)
        smoothed = np.where(matches > 0, matches, 0.5**zeros)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(smoothed) - np.log(said)
            shortness = 1 - np.asarray(sums["bleu_expected_words"]) / np.asarray(sums["bleu_words"], dtype=np.float64)
            score = 100 * np.exp(np.minimum(shortness, 0) + logs.mean(axis=0))
        # Nothing matches, or an n-gram of some length was never said: no score to speak of.
        result = np.where((matches[0] > 0) & (said > 0).all(axis=0), score, 0.0)
        return result if result.ndim else float(result)


@register("metric", "chrf")
class Chrf:
    """100 x F2 of mean precision P and recall R over character n-grams of n = 1 .. 6, white space left out.

    F2 = 5 P R / (4 P + R), which weighs recall twice; an n of which one side has no n-gram is left out of the means.
    Units: points, 0 to 100. Source: Popovic 2015; sacrebleu's `CHRF`. Differs: nothing.
    """

    name: ClassVar[str] = "chrf"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = tuple(
        f"chrf_{kind}_{n}" for n in range(1, MAX_CHARACTERS + 1) for kind in ("said", "expected", "matches")
    )
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "points"

    @cached_property
    def _scorer(self) -> Any:
        return _sacrebleu("chrf").CHRF()

    def judge(self, said: str, gold: str) -> dict[str, float]:
        """The counts of one example."""
        counts = self._scorer._extract_corpus_statistics([said], [[gold]])[0]
        return dict(zip(self.columns, map(float, counts), strict=True))

    def value(self, sums: Mapping[str, Any]) -> Any:
        said, expected, matches = (
            np.stack([np.asarray(sums[f"chrf_{kind}_{n}"], dtype=np.float64) for n in range(1, MAX_CHARACTERS + 1)])
            for kind in ("said", "expected", "matches")
        )
        counted = (said > 0) & (expected > 0)
        num_orders = counted.sum(axis=0)
        precision = ratio(np.where(counted, matches / np.maximum(said, 1), 0.0).sum(axis=0), num_orders)
        recall = ratio(np.where(counted, matches / np.maximum(expected, 1), 0.0).sum(axis=0), num_orders)
        result = np.nan_to_num(100 * np.asarray(ratio(5 * precision * recall, 4 * precision + recall)))
        return result if result.ndim else float(result)


def _sacrebleu(module: str) -> Any:
    """A module of sacrebleu's metrics. Raises: ConfigError that says how to install it."""
    try:
        import importlib

        return importlib.import_module(f"sacrebleu.metrics.{module}")
    except ImportError:
        raise ConfigError(
            "evaluate.metrics: bleu and chrf are counted by sacrebleu, which is not installed; "
            "pip install 'isoform[translation]'"
        ) from None
