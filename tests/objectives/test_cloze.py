from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform import chance
from isoform.contracts import IGNORE, Document
from isoform.objectives.cloze import Cloze

MASK = 2
LINE = "Ada B. Lovelace. Ada Lovelace (born 10 December 1815 in St. Pancras, London) wrote notes for Charles Babbage ."
WORDS = {word.strip("(),.").lower() for word in LINE.split()}


def build(tokenizer, max_tokens=128, **options) -> Cloze:
    return Cloze(Cloze.Config(**options), tokenizer, max_tokens)


def document(text: str) -> Document:
    return Document("d", {"text": text}, {"source": "wiki.txt", "row": 3})


def turns(objective, text, seed) -> list[tuple[str, str]]:
    """(cue, span) of every question of a view; spans and the masks that end them, and nothing else, are asked."""
    sample = objective.prepare(objective.encode(document(text)), chance.generator(seed))
    string = [*sample.tokens.tolist(), int(sample.targets[-1])]
    assert (sample.targets[:-1] == IGNORE).sum() + (sample.targets[:-1] == sample.tokens[1:]).sum() == len(string) - 2
    pieces: list[list[int]] = [[]]
    asked: list[set[bool]] = [set()]
    for token, target in zip(string, [IGNORE, *sample.targets.tolist()], strict=True):
        asked[-1].add(target != IGNORE)
        if token == MASK:
            pieces.append([])
            asked.append(set())
        else:
            pieces[-1].append(token)
    assert pieces.pop() == [] and asked.pop() == set()
    assert asked == [{False}, {True}] * (len(pieces) // 2)
    texts = [objective.tokenizer.decode(piece) for piece in pieces]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize("kind", ["letters", "chunks"])
def test_every_question_asks_a_span_from_the_name_and_words_before_it(kind, request) -> None:
    objective = build(request.getfixturevalue(kind), num_spans=3, max_asks=3)
    seen = set()
    for seed in range(120):
        asked = turns(objective, LINE, seed)
        assert 1 <= len(asked) <= 3 and len({span for _, span in asked}) == len(asked)
        assert "Ada B. Lovelace" in asked[0][0]
        for cue, span in asked:
            rest = cue.replace("Ada B. Lovelace", "").rstrip(".?,").split()
            assert len(rest) <= 3 and {word.lower() for word in rest} <= WORDS
            seen.add(span)
    assert seen == {"St. Pancras", "London", "Charles Babbage"}


def test_the_first_spans_alone_and_numbers_if_wanted(letters) -> None:
    def spans(**options) -> set[str]:
        objective = build(letters, **options)
        return {span for seed in range(60) for _, span in turns(objective, LINE, seed)}

    assert spans() == {"St. Pancras", "London"}
    assert spans(num_spans=1) == {"St. Pancras"}
    assert spans(num_spans=1, numbers=True) == {"10 December 1815"}


def test_fractions_are_what_they_say(letters) -> None:
    objective = build(letters)
    views = [turns(objective, LINE, seed) for seed in range(600)]
    assert abs(np.mean([len(view) == 2 for view in views]) - 0.7 / 2) < 0.07
    assert abs(np.mean([view[0][0][-1] in ".?," for view in views]) - 0.3) < 0.07
    bare = build(letters, num_spans=1, bare_fraction=1.0, ending_fraction=0.0)
    assert {cue for seed in range(50) for cue, _ in turns(bare, LINE, seed)[:1]} == {"Ada B. Lovelace"}
    plain = build(
        letters,
        num_spans=1,
        drop_fraction=0.0,
        shuffle_fraction=0.0,
        bare_fraction=0.0,
        capital_fraction=0.0,
        max_asks=1,
    )
    cues = {
        cue.rstrip(".?,").replace("Ada B. Lovelace", "*") for seed in range(100) for cue, _ in turns(plain, LINE, seed)
    }
    assert cues == {"*", "* in", "in *", "* born in", "born * in", "born in *"}


def test_a_document_without_name_or_span_is_asked_for_its_rest(letters) -> None:
    objective = build(letters)
    for text, shown in (("nothing to see here", "nothing "), ("Ada. nothing to see", "Ada. "), ("Paris", "P")):
        sample = objective.prepare(objective.encode(document(text)), chance.generator(0))
        assert letters.decode(sample.tokens.tolist()) == text
        asked = sample.targets[sample.targets != IGNORE].tolist()
        assert asked[-1] == MASK and shown + letters.decode(asked) == text


@given(
    text=st.text(st.characters(min_codepoint=32, max_codepoint=0x24F), min_size=2, max_size=80), seed=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_any_text_makes_a_sample_that_fits(letters, text, seed) -> None:
    objective = build(letters, max_tokens=24)
    if text.strip():
        sample = objective.prepare(objective.encode(document(text)), chance.generator(seed))
        assert 1 <= len(sample.tokens) == len(sample.targets) <= 24
