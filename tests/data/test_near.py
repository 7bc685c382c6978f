"""Planted copies with a tenth of the words changed are found; templates and strangers are not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.chance import generator
from isoform.data.near import Finder, near_pairs, sketch, sketch_block

# A vocabulary in which a few words make up most of a text, as in a language.
WORDS = [f"w{number}" for number in range(5000)]
SHARES = 1 / np.arange(3, len(WORDS) + 3)
SHARES /= SHARES.sum()


def texts(rng: np.random.Generator, number: int, shortest: int, longest: int) -> list[list[str]]:
    sizes = rng.integers(shortest, longest + 1, number)
    return [[WORDS[index] for index in rng.choice(len(WORDS), size, p=SHARES)] for size in sizes]


def changed(rng: np.random.Generator, words: list[str], share: float = 0.1) -> list[str]:
    copy = list(words)
    for place in rng.choice(len(copy), round(share * len(copy)), replace=False):
        copy[place] = f"x{rng.integers(10**6)}"
    return copy


def joined(rows: list[list[str]]) -> list[str]:
    return [" ".join(words) for words in rows]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), sizes=st.sampled_from([(12, 30), (50, 300), (1500, 3000), (12, 2000)]))
def test_planted_copies_are_found_among_strangers(seed: int, sizes: tuple[int, int]) -> None:
    rng = generator(seed, "near")
    number = 120 if sizes[1] < 1000 else 40
    rows = texts(rng, number, *sizes)
    planted = rng.choice(number, number // 4, replace=False)
    copies = [changed(rng, rows[index]) for index in planted]
    true = {(int(index), number + copy) for copy, index in enumerate(planted)}
    within = {(pair.first, pair.second) for pair in near_pairs(sketch(joined(rows + copies)), 0.8)}
    assert len(true & within) >= 0.95 * len(true)
    assert len(within - true) <= 0.02 * len(true)
    finder = Finder(sketch(joined(copies)), 0.8)
    for start in range(0, number, 17):
        finder.see(joined(rows[start : start + 17]))
    across = {(pair.first, number + pair.second) for pair in finder.pairs()}
    assert len(true & across) >= 0.95 * len(true)
    assert len(across - true) <= 0.02 * len(true)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.2])
def test_similarity_is_the_share_of_unchanged_words(share: float) -> None:
    rng = generator("similarity")
    rows = texts(rng, 30, 400, 3000)
    copies = [changed(rng, words, share) for words in rows]
    found = [pair.similarity for pair in near_pairs(sketch(joined(rows + copies)), 0.5)]
    assert len(found) == 30
    assert np.mean(found) == pytest.approx(1 - share, abs=0.02)
    assert max(abs(value - (1 - share)) for value in found) < 0.08


def test_case_punctuation_and_line_breaks_are_no_difference() -> None:
    first = "It was the best of times, it was the worst of times; it was the age of wisdom."
    second = "it was THE best of times it was\nthe worst of times -- it was the age of 'wisdom'"
    assert near_pairs(sketch([first, second.replace(" --", ",")]), 0.99)[0].similarity == 1


def test_questions_of_one_template_are_no_copies() -> None:
    rng = generator("names")
    names = ["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(300)]
    questions = [f"In which country of the world is the large city of {name}?" for name in names]
    assert near_pairs(sketch(questions), 0.8) == []
    finder = Finder(sketch(questions[:50]), 0.8)
    finder.see(questions[50:])
    assert finder.pairs() == []
    short = [f"Where was {first} {last} born?" for first in names[:8] for last in names[8:16]]
    assert near_pairs(sketch(short), 0.8) == []


def test_what_many_documents_have_is_evidence_of_nothing() -> None:
    rng = generator("formulas")
    notice = " ".join(texts(rng, 1, 60, 60)[0])
    tails = [[f"t{number}x{place}" for place in range(20)] for number in range(30)]
    tails[1][:8] = tails[0][:8]
    documents = [f"{notice} {' '.join(tail)}" for tail in tails]
    assert near_pairs(sketch(documents), 0.8) == []
    assert len(near_pairs(sketch(documents[:2]), 0.8)) == 1


def test_scripts_that_do_not_part_words() -> None:
    text = "春はあけぼの。やうやう白くなりゆく山ぎは、すこしあかりて、紫だちたる雲のほそくたなびきたる。"
    other = "夏は夜。月のころはさらなり、やみもなほ、蛍の多く飛びちがひたる。"
    pairs = near_pairs(sketch([text, text.replace("白く", "赤く"), other]), 0.8)
    assert [(pair.first, pair.second) for pair in pairs] == [(0, 1)]


def test_few_or_no_words() -> None:
    assert near_pairs(sketch([]), 0.8) == []
    assert near_pairs(sketch(["", "a b", "a b", "one two three"]), 0.8) == []
    finder = Finder(sketch(["", "a"]), 0.8)
    finder.see(["a b c d e f g"])
    assert finder.pairs() == []
    assert Finder(sketch([]), 0.8).pairs() == []


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.lists(st.sampled_from(WORDS[:6]), max_size=12), min_size=1, max_size=6))
def test_a_sketch_of_a_short_text_is_its_set_of_shingles(rows: list[list[str]]) -> None:
    block = sketch_block(joined(rows))
    for number, words in enumerate(rows):
        shingles = {tuple(words[start : start + 3]) for start in range(len(words) - 2)}
        assert block.sizes[number] == len(shingles) == len(block.of(number))
        assert (np.diff(block.of(number)) > 0).all()
