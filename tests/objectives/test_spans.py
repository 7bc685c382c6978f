from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform import chance
from isoform.contracts import IGNORE, Document
from isoform.errors import ConfigError, DataError
from isoform.objectives.salient import name_end
from isoform.objectives.spans import SpanCorruption

MASK = 2
LINE = "Ada B. Lovelace. Born in St. Pancras, Ada wrote 24 notes for Charles Babbage of Trinity College in 1843 ."
VIEWS = ["prefix", "window", "whole", "named"]
text = st.text(st.characters(min_codepoint=32, max_codepoint=0x24F), min_size=1, max_size=200).filter(str.strip)


def build(tokenizer, max_tokens=128, **options) -> SpanCorruption:
    return SpanCorruption(SpanCorruption.Config(**options), tokenizer, max_tokens)


def document(text: str) -> Document:
    return Document("d", {"text": text}, {"source": "wiki.txt", "row": 3})


def thirds(sample) -> list[list[int]]:
    """prefix, suffix, masked: what stands between the masks."""
    string = [*sample.tokens.tolist(), int(sample.targets[-1])]
    assert string.count(MASK) == 3 and string[-1] == MASK
    first = string.index(MASK)
    second = string.index(MASK, first + 1)
    return [string[:first], string[first + 1 : second], string[second + 1 : -1]]


@given(
    text=text,
    view=st.sampled_from(VIEWS),
    spans=st.sampled_from(["random", "salient"]),
    max_tokens=st.integers(6, 150),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_the_thirds_reassemble_a_view(letters, text, view, spans, max_tokens, seed) -> None:
    objective = build(letters, max_tokens, view=view, spans=spans)
    encoded = objective.encode(document(text))
    sample = objective.prepare(encoded, chance.generator(seed))
    prefix, suffix, masked = (letters.decode(ids) for ids in thirds(sample))
    assert len(masked) >= 1
    assert len(sample.tokens) == len(sample.targets) == len(prefix + masked + suffix) + 2
    assert len(sample.tokens) <= objective.planned_tokens({k: np.array([len(v)]) for k, v in encoded.fields.items()})[0]
    assert len(sample.tokens) <= max_tokens
    assert (sample.targets[:-1] == sample.tokens[1:]).all()
    name = text[: name_end(text)]
    if view == "named" and (prefix + masked + suffix) not in text:
        assert prefix.startswith(name) and (prefix[len(name) :] + masked + suffix) in text[len(name) :]
    else:
        assert (prefix + masked + suffix) in text
    if view == "prefix":
        assert text.startswith(prefix + masked + suffix) and len(prefix + masked + suffix) <= 96
    if view == "whole" and len(text) + 2 <= max_tokens:
        assert prefix + masked + suffix == text


def test_the_published_rule_keeps_its_bounds_and_its_mean(letters) -> None:
    objective = build(letters)
    draws = [objective.draw(140, [0], chance.generator("draw", i)) for i in range(4000)]
    lengths = np.array([draw.end for draw in draws])
    masked = np.array([draw.stop - draw.start for draw in draws])
    assert lengths.min() == 4 and lengths.max() == 96
    assert abs(lengths.mean() - 50) < 1.5
    assert masked.min() == 1 and (masked <= lengths // 2).all() and (masked == lengths // 2).any()
    assert 0.23 < (masked / lengths).mean() < 0.28
    assert {draw.first for draw in draws} == {0}
    assert any(draw.start == 0 for draw in draws) and any(draw.stop == draw.end for draw in draws)


def test_the_window_view_sees_every_character(letters) -> None:
    objective = build(letters, view="window")
    seen = np.zeros(200)
    masked = np.zeros(200)
    for i in range(1500):
        draw = objective.draw(200, [0], chance.generator("draw", i))
        seen[draw.first : draw.end] = masked[draw.start : draw.stop] = 1
    assert seen.all() and masked.mean() > 0.97


def test_draws_follow_from_the_key_alone(letters) -> None:
    objective = build(letters)
    encoded = objective.encode(document(LINE))
    np.random.seed(0)  # noqa: NPY002 - shows that the global stream plays no part
    first = objective.prepare(encoded, chance.generator(0, "prepare", 5, "d"))
    np.random.seed(1)  # noqa: NPY002
    again = objective.prepare(encoded, chance.generator(0, "prepare", 5, "d"))
    other = objective.prepare(encoded, chance.generator(0, "prepare", 6, "d"))
    assert first.tokens.tolist() == again.tokens.tolist() != other.tokens.tolist()


@pytest.mark.parametrize("view", VIEWS)
def test_salient_spans_are_whole_names_and_numbers(letters, view) -> None:
    objective = build(letters, view=view, spans="salient")
    encoded = objective.encode(document(LINE))
    masked = {letters.decode(thirds(objective.prepare(encoded, chance.generator(i)))[2]) for i in range(300)}
    body = {"St. Pancras", "24", "Charles Babbage", "Ada"}
    late = {"Trinity College", "1843"}
    name = {"Ada B. Lovelace"}
    if view == "prefix":
        assert masked == body | name | {"Trinity College"}
    elif view == "named":
        assert masked == body | late
    else:
        assert masked == body | late | name


def test_salient_spans_in_tokens_of_several_characters(chunks) -> None:
    objective = build(chunks, view="named", spans="salient")
    encoded = objective.encode(document(LINE))
    assert chunks.decode(encoded.fields["text"].tolist()) == LINE
    masked = {chunks.decode(thirds(objective.prepare(encoded, chance.generator(i)))[2]) for i in range(200)}
    assert masked == {"St. Pancras", "24", "Charles Babbage", "Ada", "Trinity College", "1843"}


def test_bare_views_are_the_name_and_the_span(letters) -> None:
    encoded = build(letters, view="named", spans="salient").encode(document(LINE))
    always = build(letters, view="named", spans="salient", bare_fraction=1.0)
    for i in range(50):
        prefix, suffix, _ = (letters.decode(ids) for ids in thirds(always.prepare(encoded, chance.generator(i))))
        assert (prefix, suffix) == ("Ada B. Lovelace. ", "")


def test_loss_on_the_masked_span_alone_or_on_some_of_the_rest(letters) -> None:
    encoded = build(letters).encode(document(LINE))
    num_rest = num_some = 0
    for i in range(200):
        every, masked, some = (
            build(letters, loss_on=loss_on).prepare(encoded, chance.generator(i)) for loss_on in ("all", "masked", 0.25)
        )
        num_masked = len(thirds(every)[2]) + 1
        assert every.tokens.tolist() == masked.tokens.tolist() == some.tokens.tolist()
        assert (every.targets != IGNORE).all()
        for sample in (masked, some):
            assert (sample.targets[-num_masked:] == every.targets[-num_masked:]).all()
        assert (masked.targets[:-num_masked] == IGNORE).all()
        num_some += (some.targets[:-num_masked] != IGNORE).sum()
        num_rest += len(every.targets) - num_masked
    assert 0.23 < num_some / num_rest < 0.27


def test_what_makes_no_sense_is_refused(letters) -> None:
    with pytest.raises(ConfigError, match=r"max_tokens: 5"):
        build(letters, 5)
    with pytest.raises(ConfigError, match=r"bare_fraction.*view: named"):
        build(letters, bare_fraction=0.5)
    with pytest.raises(DataError, match=r"wiki\.txt:3"):
        build(letters).encode(document("  "))
