"""Conversations in the forms in which they are passed around, read into one: messages of a role and a content.

    messages        [{"role": "user", "content": ..}, {"role": "assistant", ..}]    a list, or its JSON text
    conversations   [{"from": "human", "value": ..}, {"from": "gpt", ..}]           the same of ShareGPT
    instruction, input, output                                                      one turn, as in Alpaca
    question, answer                                                                one turn

Of a preference two answers to one conversation: `chosen` and `rejected` are texts or messages after a `prompt` in any
of these forms, or conversations that begin alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isoform.errors import DataError
from isoform.registry import nearest

Message = Mapping[str, str]
Messages = list[dict[str, str]]

# What the forms call the one who speaks, and what templates call it.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# Who may speak after whom; None: at the beginning.
AFTER: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
KEYS = (("role", "content"), ("from", "value"))


@dataclass(frozen=True, slots=True)
class Rivals:
    """Two conversations that begin alike: their first `num_shared` messages are the prompt."""

    chosen: Messages
    rejected: Messages
    num_shared: int


def conversation_of(fields: Mapping[str, str]) -> Messages:
    """The messages of a document. Raises: DataError, one line without the place, where they are no conversation."""
    for field in ("messages", "conversations", "prompt"):
        if field in fields:
            return checked(_messages(fields[field], field))
    for asked, added, answered in (("instruction", "input", "output"), ("question", "", "answer")):
        if asked in fields:
            parts = [text for text in (fields[asked], fields.get(added, "")) if text.strip()]
            turns = [("user", "\n\n".join(parts))]
            turns += [("assistant", fields[answered])] if answered in fields else []
            return checked([{"role": role, "content": text} for role, text in turns])
    raise DataError(f"fields {', '.join(fields) or 'none'} given, a conversation is expected, such as `messages`")


def rivals_of(fields: Mapping[str, str]) -> Rivals:
    """The two conversations of a preference. Raises: DataError, one line without the place."""
    said = {side: _answers(fields[side], side) for side in ("chosen", "rejected")}
    asked = {name: text for name, text in fields.items() if name not in ("chosen", "rejected", "output", "answer")}
    if all(messages[0]["role"] == "assistant" for messages in said.values()):
        if not asked:
            raise DataError("`chosen` and `rejected` are answers alone; name what they answer, such as `prompt`")
        prompt = conversation_of(asked)
        said = {side: [*prompt, *messages] for side, messages in said.items()}
    for side, messages in said.items():
        if checked(messages)[-1]["role"] != "assistant":
            raise DataError(f"`{side}` ends with a message of {messages[-1]['role']}; an answer is expected")
    chosen, rejected = said.values()
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1  # what both say first is part of their answers
    if not shared:
        raise DataError("`chosen` and `rejected` answer different messages; both must begin with the same ones")
    return Rivals(chosen, rejected, shared)


def spoken(text: str) -> str:
    """What stands in the JSON text of messages, who speaks before what is said; any other text as it is."""
    found = _listed(text, strict=False)
    if not found:
        return text
    pairs = [(item.get("role", item.get("from")), item.get("content", item.get("value"))) for item in found]
    return "".join(f"{role}\n{said}\n" for role, said in pairs)


def checked(messages: Messages) -> Messages:
    """The messages, if they are a conversation. Raises: DataError that names the first message which cannot stand."""
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in AFTER[before]:
            after = "at the beginning" if before is None else f"after one of {before}"
            raise DataError(
                f"message {number} is of the role {role}, which cannot stand {after}; "
                f"{' or '.join(AFTER[before])} is expected"
            )
        if not message["content"].strip() and role in ("user", "assistant"):
            what = "an empty answer" if role == "assistant" else "empty"
            raise DataError(f"message {number} ({role}) is {what}; give it a text or remove the row")
        before = role
    return messages


def _messages(text: str, field: str) -> Messages:
    """A list of messages from its JSON text; any other text is what a person says."""
    value = _listed(text, strict=field != "prompt")
    if value is None:
        return [{"role": "user", "content": text}]
    if not value:
        raise DataError(f"`{field}` is an empty list; a conversation has at least one message")
    return [_message(item, f"message {number}") for number, item in enumerate(value, start=1)]


def _answers(text: str, field: str) -> Messages:
    """The messages of one side of a preference; any other text is an answer."""
    value = _listed(text, strict=False)
    if value is None:
        return [{"role": "assistant", "content": text}]
    if not value:
        raise DataError(f"`{field}` is an empty list; an answer is expected")
    return [_message(item, f"{field}: message {number}") for number, item in enumerate(value, start=1)]


def _listed(text: str, *, strict: bool) -> list[Any] | None:
    """The list of objects that a text spells, or None; unless `strict`, None too where they are no messages."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    listed = value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) for item in listed):
        return None
    messages = all(any(set(keys) <= item.keys() for keys in KEYS) for item in listed)
    return listed if strict or messages else None


def _message(item: Mapping[str, Any], where: str) -> dict[str, str]:
    for role_key, text_key in KEYS:
        if role_key in item and text_key in item:
            role, text = str(item[role_key]), _text(item[text_key], where)
            if role not in ROLES:
                known = "user, assistant, system, tool, or human, gpt, system"
                raise DataError(f"{where}: the role {role!r} is not known{nearest(role, ROLES)}; known: {known}")
            return {"role": ROLES[role], "content": text}
    keys = ", ".join(map(repr, item)) or "none"
    raise DataError(f"{where} has the keys {keys}; `role` and `content`, or `from` and `value`, are expected")


def _text(value: Any, where: str) -> str:
    """A message's text, or those of its parts."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {'nothing' if value is None else type(value).__name__} is said, a text is expected")
    return value
