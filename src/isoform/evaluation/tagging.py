"""Metrics of tagged words and of the entities that tags spell, from additive counts.

Of a sentence: words, correct_tokens (words whose tag is right), gold_entities, predicted_entities, and hit_entities,
those of equal place and kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from isoform.evaluation.metrics import ratio
from isoform.registry import register


class EntityScore:
    """A score over the entities of all sentences together; no number where there is nothing to divide by.

    Source: Tjong Kim Sang & De Meulder 2003, section 2.3; seqeval's default mode, micro average. Differs: nothing.
    """

    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("gold_entities", "predicted_entities", "hit_entities")
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "fraction"


@register("metric", "entity_precision")
class EntityPrecision(EntityScore):
    """Share of the entities said that are right in place and kind: hits / said."""

    name: ClassVar[str] = "entity_precision"

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["hit_entities"], sums["predicted_entities"])

    def weights(self, sums: Mapping[str, Any]) -> dict[str, float]:
        return {"predicted_entities": 1.0}


@register("metric", "entity_recall")
class EntityRecall(EntityScore):
    """Share of the entities that there are that were found: hits / true ones."""

    name: ClassVar[str] = "entity_recall"

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["hit_entities"], sums["gold_entities"])

    def weights(self, sums: Mapping[str, Any]) -> dict[str, float]:
        return {"gold_entities": 1.0}


@register("metric", "entity_f1")
class EntityF1(EntityScore):
    """2 hits / (said + true ones), the harmonic mean of precision and recall."""

    name: ClassVar[str] = "entity_f1"

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(2 * sums["hit_entities"], sums["gold_entities"] + sums["predicted_entities"])

    def weights(self, sums: Mapping[str, Any]) -> dict[str, float]:
        return {"gold_entities": 1.0, "predicted_entities": 1.0}


@register("metric", "tag_accuracy")
class TagAccuracy:
    """Share of words whose tag is right; a word that was cut off is not."""

    name: ClassVar[str] = "tag_accuracy"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("correct_tokens", "words")
    mean_column: ClassVar[str | None] = None
    unit: ClassVar[str] = "fraction"

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["correct_tokens"], sums["words"])

    def weights(self, sums: Mapping[str, Any]) -> dict[str, float]:
        return {"words": 1.0}
