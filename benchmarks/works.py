"""Every work that is measured, by its name."""

from __future__ import annotations

from benchmarks import decoding, gpt, reviews
from benchmarks.pairs import Work

WORKS: dict[str, Work] = {work.name: work for work in (*gpt.WORKS, *reviews.WORKS, *decoding.WORKS)}
