"""The forms in which conversations are passed around, and what is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from isoform.errors import DataError
from isoform.text.conversations import conversation_of, rivals_of, spoken

USER, HELLO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def test_every_form_is_the_same_conversation() -> None:
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, HELLO]
    forms: list[dict[str, str]] = [
        {"messages": json.dumps([USER, HELLO])},
        {"messages": json.dumps(parts)},
        {"messages": json.dumps(shared)},
        {"conversations": json.dumps(shared), "question": "other"},
        {"instruction": "hi", "output": "hello"},
        {"instruction": "hi", "input": " ", "output": "hello"},
        {"question": "hi", "answer": "hello"},
    ]
    for fields in forms:
        assert conversation_of(fields) == [USER, HELLO], fields
    assert conversation_of({"messages": "hi"}) == [USER]
    assert conversation_of({"messages": "[hi"})[0]["content"] == "[hi"
    both = conversation_of({"instruction": "Count.", "input": "a b", "output": "2"})
    assert both[0]["content"] == "Count.\n\na b"


def test_what_is_said_is_told_from_how_it_is_written() -> None:
    for keys in (("role", "content"), ("from", "value")):
        text = json.dumps(
            [dict(zip(keys, pair, strict=True)) for pair in (("user", "hi\nyou"), ("assistant", "hello"))]
        )
        assert spoken(text) == "user\nhi\nyou\nassistant\nhello\n"
    for text in ("plain", "[1, 2]", '{"name": "x"}', "[", "[]"):
        assert spoken(text) == text


def test_an_answer_may_be_json() -> None:
    pair = rivals_of({"prompt": "[1]", "chosen": '{"name": "x"}', "rejected": '[{"name": "y"}]'})
    assert [message["content"] for message in pair.chosen] == ["[1]", '{"name": "x"}']
    assert pair.rejected[1]["content"] == '[{"name": "y"}]'


def test_a_system_message_and_tools_have_their_places() -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        USER,
        HELLO,
        {"role": "observation", "content": ""},
        HELLO,
    ]
    roles = [message["role"] for message in conversation_of({"messages": json.dumps(messages)})]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]


SYSTEM = {"role": "system", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([HELLO], "message 1 is of the role assistant, which cannot stand at the beginning; system or user"),
        ([USER, USER], "message 2 is of the role user, which cannot stand after one of user; assistant is expected"),
        ([USER, HELLO, HELLO], "message 3 is of the role assistant"),
        ([USER, SYSTEM], "message 2 is of the role system"),
        ([{**USER, "role": "usr"}], "message 1: the role 'usr' is not known .did you mean 'user'"),
        ([USER, {**HELLO, "content": " \n"}], r"message 2 \(assistant\) is an empty answer"),
        ([{**USER, "content": ""}], r"message 1 \(user\) is empty"),
        ([USER, {"role": "assistant", "content": None}], "message 2: nothing is said, a text is expected"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: list is said"),
        ([{"who": "me", "what": "hi"}], "message 1 has the keys 'who', 'what'; `role` and `content`"),
        ([], "`messages` is an empty list"),
    ],
)
def test_what_is_no_conversation_is_one_line(messages: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        conversation_of({"messages": json.dumps(messages)})
    assert "\n" not in str(caught.value)


def test_every_form_of_a_preference() -> None:
    bye = {"role": "assistant", "content": "bye"}
    gpt = [{"from": "gpt", "value": text} for text in ("hello", "bye")]
    forms: list[dict[str, str]] = [
        {"prompt": "hi", "chosen": "hello", "rejected": "bye"},
        {"instruction": "hi", "input": "", "output": "no", "chosen": "hello", "rejected": "bye"},
        {"question": "hi", "answer": "no", "chosen": "hello", "rejected": "bye"},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([HELLO]), "rejected": json.dumps([bye])},
        {"conversations": json.dumps([USER]), "chosen": json.dumps(gpt[0]), "rejected": json.dumps(gpt[1])},
        {"chosen": json.dumps([USER, HELLO]), "rejected": json.dumps([USER, bye])},
        {"prompt": "something", "chosen": json.dumps([USER, HELLO]), "rejected": json.dumps([USER, bye])},
    ]
    for fields in forms:
        pair = rivals_of(fields)
        assert (pair.chosen, pair.rejected, pair.num_shared) == ([USER, HELLO], [USER, bye], 1), fields
    longer = rivals_of(
        {"chosen": json.dumps([USER, HELLO, USER, HELLO]), "rejected": json.dumps([USER, HELLO, USER, bye])}
    )
    assert longer.num_shared == 3
    assert rivals_of({"prompt": "hi", "chosen": "hello", "rejected": "hello"}).num_shared == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "are answers alone; name what they answer"),
        (
            {"chosen": json.dumps([USER, HELLO]), "rejected": json.dumps([SYSTEM, USER, HELLO])},
            "answer different messages",
        ),
        (
            {"chosen": json.dumps([USER, HELLO]), "rejected": json.dumps([USER])},
            "`rejected` ends with a message of user",
        ),
        ({"chosen": json.dumps([USER, HELLO]), "rejected": "b"}, "message 1 is of the role assistant"),
        ({"prompt": "x", "chosen": "a", "rejected": " "}, "is an empty answer"),
        ({"prompt": "x", "chosen": "a", "rejected": "[]"}, "`rejected` is an empty list"),
    ],
)
def test_what_is_no_preference_is_one_line(fields: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rivals_of(fields)
