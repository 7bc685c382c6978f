"""Everything that is measured, by its name: works against others, and facts about ours alone."""

from __future__ import annotations

from benchmarks import costs, decoding, family_works, gpt, pretraining, reaching, reviews
from benchmarks.pairs import Fact, Work

_WORKS = (
    *gpt.WORKS,
    *reviews.WORKS,
    *decoding.WORKS,
    *reaching.WORKS,
    *pretraining.WORKS,
    *family_works.WORKS,
)
WORKS: dict[str, Work] = {work.name: work for work in _WORKS}
FACTS: dict[str, Fact] = {fact.name: fact for fact in (*reaching.FACTS, *costs.FACTS)}
ALL: dict[str, Work | Fact] = {**WORKS, **FACTS}
