from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.objectives.salient import name_end, salient_spans, tokens_at


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("he went to New York City in 1,204 BC", ["New York City", "1,204", "BC"]),
        ("Born in St. Louis, John F. Kennedy-Smith sang.", ["St. Louis", "John F. Kennedy-Smith"]),
        ("He left. She came. Then Ann O'Neil sang.", ["Then Ann O'Neil"]),
        ("Élan vital, by Ölaf Šimon", ["Ölaf Šimon"]),
        ("in Paris. London calls", ["Paris"]),
        ("nothing here", []),
        ("", []),
    ],
)
def test_runs_of_capitals_and_numbers(text, expected) -> None:
    assert [text[a:b] for a, b in salient_spans(text)] == expected


def test_the_leading_name() -> None:
    assert name_end("Ada. Born") == 5
    assert name_end("no name here.") == 0


@given(text=st.text("ab AB.1", min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_places_in_tokens_cut_the_text_where_they_stand(letters, chunks, text) -> None:
    places = [name_end(text), *(place for span in salient_spans(text) for place in span)]
    for tokenizer in (letters, chunks):
        ids, marks = tokens_at(tokenizer, text, places)
        assert tokenizer.decode(ids.tolist()) == text
        for place, mark in zip(places, marks.tolist(), strict=True):
            before = tokenizer.decode(ids[:mark].tolist())
            assert text[:place].rstrip(" ") == before.rstrip(" ") and len(text[:place]) - len(before) in (0, 1)
