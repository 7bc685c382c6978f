from __future__ import annotations

import numpy as np

from isoform.contracts import IGNORE, Document
from isoform.objectives.prefix import Prefix


def make(letters, **options):
    objective = Prefix(Prefix.Config(**options), letters, 12)
    return objective, objective.encode(Document("a", {"text": "abcdefghijkl"}))


def test_the_rest_is_asked_and_the_prefix_is_seen(letters) -> None:
    objective, encoded = make(letters)
    seen = set()
    for seed in range(200):
        sample = objective.prepare(encoded, np.random.default_rng(seed))
        seen.add(sample.prefix)
        assert len(sample.tokens) == 12
        assert (sample.targets[: sample.prefix - 1] == IGNORE).all()
        assert sample.targets[sample.prefix - 1 :].tolist() == encoded.fields["text"][sample.prefix : 13].tolist()
    assert seen == set(range(1, 13))


def test_a_causal_prefix_is_asked_the_same(letters) -> None:
    objective, encoded = make(letters)
    causal, _ = make(letters, bidirectional=False)
    for seed in range(5):
        first = objective.prepare(encoded, np.random.default_rng(seed))
        second = causal.prepare(encoded, np.random.default_rng(seed))
        assert second.prefix == 0
        assert np.array_equal(first.targets, second.targets)


def test_a_prompt_is_a_prefix(letters) -> None:
    objective, encoded = make(letters)
    prompt = objective.prompt(encoded)
    assert prompt.prefix == len(prompt.tokens) == 13
    assert make(letters, bidirectional=False)[0].prompt(encoded).prefix == 0


def test_one_token_is_asked_nothing(letters) -> None:
    objective, _ = make(letters, bos=False, eos=False)
    encoded = objective.encode(Document("a", {"text": "a"}))
    sample = objective.prepare(encoded, np.random.default_rng(0))
    assert (sample.targets == IGNORE).all()
