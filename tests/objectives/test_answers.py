from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoform.contracts import Document
from isoform.errors import ConfigError, DataError
from isoform.objectives.answers import Answers

word = st.text(st.characters(min_codepoint=33, max_codepoint=0x24F), min_size=1, max_size=12).filter(str.strip)
MASK = 2


def build(tokenizer, max_tokens=64, **options) -> Answers:
    return Answers(Answers.Config(**options), tokenizer, max_tokens)


def document(**fields) -> Document:
    return Document("d", fields, {"source": "qa.tsv", "row": 12})


@given(question=word, answer=word)
@settings(max_examples=40, deadline=None)
def test_answer_and_end_alone_are_asked(letters, asked, question, answer) -> None:
    objective = build(letters)
    encoded = objective.encode(document(question=question, answer=answer))
    sample = objective.prepare(encoded, np.random.default_rng(0))
    q, a = letters.encode(question).tolist(), letters.encode(answer).tolist()
    assert sample.tokens.tolist() == [*q, MASK, *a]
    assert asked(sample) == list(enumerate([*a, MASK], start=len(q)))
    assert objective.planned_tokens({k: np.array([len(v)]) for k, v in encoded.fields.items()})[0] == len(sample.tokens)
    prompt = objective.prompt(encoded)
    assert prompt.tokens.tolist() == [*q, MASK]
    assert (prompt.stop, prompt.gold, prompt.text) == ((MASK,), answer, question)


def test_the_question_gets_no_gradient_as_a_target(letters, token_model, collate) -> None:
    objective = build(letters)
    model = token_model(letters.vocab_size)
    sample = objective.prepare(objective.encode(document(question="abc", answer="xy")), np.random.default_rng(0))
    batch = collate([sample])
    objective.loss(model, batch, model(batch))["loss"].total.backward()
    read = set(model.embedding.grad.abs().sum(1).nonzero().flatten().tolist())
    assert read == {MASK, *letters.encode("xy").tolist()}
    assert torch.isfinite(model.head.grad).all()


@given(num_question=st.integers(1, 40), num_answer=st.integers(1, 15))
@settings(max_examples=40, deadline=None)
def test_long_questions_lose_their_beginning(letters, num_question, num_answer) -> None:
    objective = build(letters, 16)
    question, answer = "".join(chr(40 + i) for i in range(num_question)), "z" * num_answer
    encoded = objective.encode(document(question=question, answer=answer))
    sample = objective.prepare(encoded, np.random.default_rng(0))
    planned = objective.planned_tokens({k: np.array([len(v)]) for k, v in encoded.fields.items()})[0]
    assert len(sample.tokens) == planned <= 16
    assert question.endswith(letters.decode(sample.tokens.tolist()).removesuffix(answer))
    assert len(objective.prompt(encoded).tokens) <= 16


def test_refusals_name_the_row(letters) -> None:
    with pytest.raises(DataError, match=r"qa\.tsv:12.*'answer' is empty"):
        build(letters).encode(document(question="x", answer=""))
    with pytest.raises(DataError, match=r"qa\.tsv:12.*answer has 16 tokens, at most 15"):
        build(letters, 16).encode(document(question="x", answer="y" * 16))
    with pytest.raises(ConfigError, match=r"objective\.separator.*no special token 'sep'"):
        objective = build(letters, separator="sep")
        objective.prepare(objective.encode(document(question="x", answer="y")), np.random.default_rng(0))


def test_an_unlabelled_question_can_be_asked_but_not_trained(letters) -> None:
    objective = build(letters)
    encoded = objective.encode(document(question="x"))
    assert objective.prompt(encoded).gold is None
    with pytest.raises(DataError, match=r"qa\.tsv:12.*no field 'answer'"):
        objective.prepare(encoded, np.random.default_rng(0))


def test_roles_are_options(letters) -> None:
    objective = build(letters, separator="bos", end="eos")
    encoded = objective.encode(document(question="q", answer="a"))
    sample = objective.prepare(encoded, np.random.default_rng(0))
    assert sample.tokens[1] == 3 and sample.targets[-1] == 4
    assert objective.prompt(encoded).stop == (4,)


def test_text_outside_the_alphabet_is_kept_as_unknown(letters) -> None:
    objective = build(letters)
    encoded = objective.encode(document(question="где?", answer="Zürich 東京"))
    assert len(encoded.fields["answer"]) == 9 and encoded.fields["answer"].tolist()[-2:] == [0, 0]
    assert objective.prompt(encoded).gold == "Zürich 東京"
