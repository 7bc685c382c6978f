from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.contracts import Document, Encoded
from isoform.errors import ConfigError
from isoform.objectives.t5_spans import T5Spans, input_and_target_lengths, noise_counts, noise_mask, replaced

PAD, EOS = 1, 4
SENTINELS = tuple(range(900, 1000))


class WithSentinels:
    sentinel_ids = SENTINELS

    def __init__(self, letters):
        self.letters = letters
        self.special_ids, self.encode, self.decode = letters.special_ids, letters.encode, letters.decode


def make(letters, max_tokens=64, **options):
    return T5Spans(T5Spans.Config(**options), WithSentinels(letters), max_tokens)


def text_of(num_tokens):
    return Encoded("a", {"text": np.arange(100, 100 + num_tokens, dtype=np.int32)}, num_tokens)


def put_together(source, targets):
    """The text again, from what the encoder reads and the decoder is asked."""
    spans, current = {}, []
    for token in targets[:-1].tolist():
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    whole = [spans.pop(token) if token in SENTINELS else [token] for token in source[:-1].tolist()]
    assert not any(spans.values())
    return [token for piece in whole for token in piece]


def test_the_published_lengths() -> None:
    # Raffel et al.: 512 tokens for the encoder are 568 of text, of which 114 are asked.
    assert input_and_target_lengths(512, 0.15, 3.0) == (568, 512, 114)
    assert input_and_target_lengths(1024, 0.15, 3.0) == (1137, 1024, 229)
    half = input_and_target_lengths(128, 0.5, 3.0)
    assert half.target <= half.source


@given(
    num_tokens=st.integers(2, 700),
    fraction=st.sampled_from([0.05, 0.15, 0.5, 0.9]),
    mean=st.sampled_from([1.0, 3.0, 10.0]),
)
@settings(max_examples=60, deadline=None)
def test_masks_have_the_published_counts(num_tokens, fraction, mean) -> None:
    mask = noise_mask(num_tokens, fraction, mean, np.random.default_rng(num_tokens))
    noise, spans = noise_counts(num_tokens, fraction, mean)
    assert mask.sum() == noise
    assert np.count_nonzero(mask & ~np.concatenate([[False], mask[:-1]])) == spans
    assert not mask[0] and mask[-1]


def test_spans_are_as_long_as_asked_and_everywhere() -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([noise_mask(200, 0.15, 3.0, rng) for _ in range(3000)])
    inner = masks[:, 10:190].mean(axis=0)
    assert abs(inner.mean() - 0.15) < 0.01
    assert inner.min() > 0.1 and inner.max() < 0.2
    lengths = {tuple(np.diff(np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]]))))[::2]) for mask in masks}
    assert len(lengths) > 1500
    assert all(sum(each) == 30 and len(each) == 10 for each in lengths)


@given(num_tokens=st.integers(1, 90), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_both_streams_together_are_the_text(letters, num_tokens, seed) -> None:
    objective = make(letters)
    encoded = text_of(num_tokens)
    made = objective.prepare(encoded, np.random.default_rng(seed))
    shown = encoded.fields["text"][: objective.window_tokens].tolist()
    assert put_together(made.source.tokens, made.targets) == shown
    assert made.tokens.tolist() == [PAD, *made.targets[:-1].tolist()]
    assert made.targets[-1] == made.source.tokens[-1] == EOS
    assert len(made.source.tokens) <= 64
    planned = objective.planned_tokens({"text": np.array([num_tokens])})
    assert made.num_tokens <= int(planned[0]) <= made.num_tokens + 1


def test_sentinels_are_numbered_in_both_streams() -> None:
    mask = np.array([False, True, True, False, True])
    tokens = np.array([10, 11, 12, 13, 14], dtype=np.int32)
    sentinels = np.array([900, 901, 902])
    assert replaced(tokens, mask, sentinels).tolist() == [10, 900, 13, 901]
    assert replaced(tokens, ~mask, sentinels).tolist() == [900, 11, 12, 901, 14]


def test_too_few_sentinels_are_refused(letters) -> None:
    tokenizer = WithSentinels(letters)
    tokenizer.sentinel_ids = SENTINELS[:3]
    objective = T5Spans(T5Spans.Config(), tokenizer, 512)
    with pytest.raises(
        ConfigError, match=r"sentinels: the tokenizer has 3 tokens .* windows of 568 tokens have 28 spans"
    ):
        objective.encoding_key()
    with pytest.raises(ConfigError, match=r"text.max_tokens: 3 given"):
        make(letters, max_tokens=3)


def test_a_prompt_may_name_sentinels(letters) -> None:
    objective = make(letters)
    prompt = objective.prompt(objective.encode(Document("a", {"text": "I <extra_id_0> you <extra_id_999>"})))
    encode = letters.encode
    assert prompt.source.tolist() == [*encode("I "), 900, *encode(" you "), *encode("<extra_id_999>"), EOS]
