from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.contracts import Document, Encoded
from isoform.errors import ConfigError, DataError
from isoform.objectives.causal import Causal
from isoform.registry import names

text = st.text(st.characters(min_codepoint=33, max_codepoint=500), min_size=1, max_size=30).filter(str.strip)


def build(tokenizer, max_tokens=16, **options) -> Causal:
    return Causal(Causal.Config(**options), tokenizer, max_tokens)


def document(**fields) -> Document:
    return Document("d", fields, {"source": "a.txt", "row": 7})


def test_it_is_registered() -> None:
    assert {"answers", "causal", "cloze", "mixture", "span-corruption"} <= set(names("objective"))


@given(text=text, bos=st.booleans(), eos=st.booleans())
@settings(max_examples=40, deadline=None)
def test_targets_are_the_tokens_one_later(letters, text, bos, eos) -> None:
    objective = build(letters, 200, bos=bos, eos=eos)
    sample = objective.prepare(objective.encode(document(text=text)), np.random.default_rng(0))
    whole = [3] * bos + letters.encode(text).tolist() + [4] * eos
    if len(whole) > 1:
        assert sample.tokens.tolist() == whole[:-1] and sample.targets.tolist() == whole[1:]
    assert sample.num_bytes == len(text.encode())
    planned = objective.planned_tokens({"text": np.array([len(whole)])})
    assert planned[0] >= len(sample.tokens)


def test_a_window_is_one_longer_than_what_is_read(letters) -> None:
    objective = build(letters, 4)
    window = Encoded("w", {"text": letters.encode("abcdef")[: objective.window_tokens]}, 5)
    sample = objective.prepare(window, np.random.default_rng(0))
    assert len(sample.tokens) == len(sample.targets) == 4
    assert objective.planned_tokens({"text": np.array([1, 2, 5, 900])}).tolist() == [1, 1, 4, 4]


def test_edges_follow_the_tokenizer_unless_said(letters) -> None:
    bare = SimpleNamespace(special_ids={"unk": 0}, encode=letters.encode)
    assert build(bare).encode(document(text="ab")).fields["text"].tolist() == letters.encode("ab").tolist()
    with pytest.raises(ConfigError, match=r"objective\.eos.*no special token 'eos'.*unk"):
        build(bare, eos=True).encode(document(text="ab"))


def test_encoding_key_tells_the_edges_apart(letters) -> None:
    keys = {build(letters, bos=b, eos=e).encoding_key() for b in (True, False) for e in (True, False)}
    assert len(keys) == 4


def test_a_prompt_is_the_text_without_its_end(letters) -> None:
    objective = build(letters)
    prompt = objective.prompt(objective.encode(document(text="ab")))
    assert prompt.tokens.tolist() == [3, *letters.encode("ab").tolist()]
    assert prompt.stop == (4,) and prompt.gold is None and prompt.text == "ab"


def test_no_text_is_an_error_with_its_place(letters) -> None:
    with pytest.raises(DataError, match=r"a\.txt:7.*'text' is empty"):
        build(letters).encode(document(text=" "))
    with pytest.raises(DataError, match=r"a\.txt:7.*no field 'text'.*question"):
        build(letters).encode(document(question="x"))
