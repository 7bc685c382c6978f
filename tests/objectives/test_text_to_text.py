from __future__ import annotations

import numpy as np
import pytest

from isoform.contracts import Document
from isoform.errors import ConfigError, DataError
from isoform.objectives.text_to_text import TextToText

PAD, EOS = 1, 4


@pytest.fixture
def objective(letters):
    return TextToText(TextToText.Config(prefix="q: "), letters, 12)


def encoded(objective, **fields):
    return objective.encode(Document("a", fields, {"source": "file.tsv", "row": 3}))


def sample(objective, **fields):
    return objective.prepare(encoded(objective, **fields), np.random.default_rng(0))


def test_the_encoder_reads_the_question_and_the_decoder_says_the_answer(objective, letters) -> None:
    made = sample(objective, question="where?", answer="Ulm")
    assert made.source.tokens.tolist() == [*letters.encode("q: where?"), EOS]
    assert made.tokens.tolist() == [PAD, *letters.encode("Ulm")]
    assert made.targets.tolist() == [*letters.encode("Ulm"), EOS]
    assert made.num_bytes == 3
    assert made.num_tokens == 10 + 4


def test_a_long_question_is_cut_off_on_the_right(objective, letters) -> None:
    made = sample(objective, question="a long question", answer="b")
    assert made.source.tokens.tolist() == [*letters.encode("q: a long q"), EOS]
    assert len(made.source.tokens) == 12


def test_the_plan_is_the_length_of_both_streams(objective) -> None:
    for question, answer in (("where?", "Ulm"), ("a very long question", "twelve char")):
        one = encoded(objective, question=question, answer=answer)
        lengths = {name: np.array([len(ids)]) for name, ids in one.fields.items()}
        assert objective.planned_tokens(lengths).tolist() == [
            sample(objective, question=question, answer=answer).num_tokens
        ]


def test_an_answer_that_does_not_fit_is_named(objective) -> None:
    with pytest.raises(DataError, match=r"file.tsv:3: the answer has 12 tokens, at most 11 fit"):
        encoded(objective, question="a", answer="twelve chars")


def test_without_an_answer_there_is_a_prompt_but_no_sample(objective, letters) -> None:
    one = encoded(objective, question="where?")
    prompt = objective.prompt(one)
    assert prompt.source.tolist() == [*letters.encode("q: where?"), EOS]
    assert (prompt.tokens.tolist(), prompt.stop, prompt.text, prompt.gold) == ([PAD], (EOS,), "where?", None)
    assert objective.prompt(encoded(objective, question="where?", answer=" Ulm ")).gold == " Ulm "
    with pytest.raises(DataError, match=r"file.tsv:3: no field 'answer'"):
        objective.prepare(one, np.random.default_rng(0))


def test_a_tokenizer_without_an_end_is_refused(letters) -> None:
    objective = TextToText(TextToText.Config(end="sep"), letters, 12)
    with pytest.raises(ConfigError, match=r"objective.end: the tokenizer has no special token 'sep'"):
        objective.encoding_key()
