"""Metrics of conversations: whether answers come to an end, and which of two answers a model prefers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from isoform.evaluation.metrics import ratio
from isoform.registry import register


@register("metric", "ended")
class Ended:
    """Share of generated answers that end by themselves before `evaluate.max_new_tokens` ends them."""

    name: ClassVar[str] = "ended"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("ended", "examples")
    mean_column: ClassVar[str | None] = "ended"
    unit: ClassVar[str] = "fraction"

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["ended"], sums["examples"])


@register("metric", "preference_accuracy")
class PreferenceAccuracy:
    """Share of pairs whose better answer has gained more over the reference than the worse one; a tie is half a hit."""

    name: ClassVar[str] = "preference_accuracy"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("preferred", "examples")
    mean_column: ClassVar[str | None] = "preferred"
    unit: ClassVar[str] = "fraction"

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["preferred"], sums["examples"])


@register("metric", "reward_margin")
class RewardMargin:
    """Mean reward of the better answer minus that of the worse. Units: nats times beta."""

    name: ClassVar[str] = "reward_margin"
    higher_is_better: ClassVar[bool] = True
    columns: ClassVar[tuple[str, ...]] = ("margin", "examples")
    mean_column: ClassVar[str | None] = "margin"
    unit: ClassVar[str] = "number"

    def value(self, sums: Mapping[str, Any]) -> Any:
        return ratio(sums["margin"], sums["examples"])
