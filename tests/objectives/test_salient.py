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
        ("born 24 December 1931, or May 4, 1970", ["24 December 1931", "May 4", "1970"]),
        ("in 1936 Helsinki and 5 Boeing 747", ["1936", "Helsinki", "5 Boeing 747"]),
        ("nothing here", []),
        ("", []),
    ],
)
def test_runs_of_capitals_and_numbers(text, expected) -> None:
    assert [text[a:b] for a, b in salient_spans(text)] == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Ada. Born", "Ada. "),
        ("Ada B. Lovelace. Born", "Ada B. Lovelace. "),
        ("Asa G. Yancey, Sr.. Born", "Asa G. Yancey, Sr.. "),
        ("Mary (queen). Born", "Mary (queen). "),
        ("no name here.", ""),
        ("A. B", ""),
        ("", ""),
    ],
)
def test_the_leading_name(text, name) -> None:
    assert text[: name_end(text)] == name


@given(text=st.text("ab AB.1", max_size=30))
@settings(max_examples=80, deadline=None)
def test_places_in_tokens_cut_the_text_where_they_stand(letters, chunks, text) -> None:
    places = [name_end(text), *(place for span in salient_spans(text) for place in span)]
    for tokenizer in (letters, chunks):
        ids, marks = tokens_at(tokenizer, text, places)
        assert tokenizer.decode(ids.tolist()) == text
        for place, mark in zip(places, marks.tolist(), strict=True):
            assert tokenizer.decode(ids[:mark].tolist()) == text[:place]
