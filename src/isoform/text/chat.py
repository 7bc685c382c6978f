"""Conversations as the tokens that a chat model was trained on: its template, rendered in a sandbox.

    messages [{role, content}, ...] --template (Jinja)--> text --special tokens by their ids, the rest encoded--> ids

A template comes with a model and is not trusted: it runs in Jinja's sandbox, where it can neither import, open nor
change anything. What a person writes is only ever text: a message that spells a special token does not become one.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from isoform.errors import DataError
from isoform.text.conversations import Message

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from isoform.contracts import IntArray
    from isoform.text.tokenizers import TextTokenizer

# Stands inside a message's spelling of a special token while the template is rendered; a private character of Unicode.
MARK = "\uf8ff"
MAX_TEMPLATE_CHARACTERS = 200_000
# For models that have no template: ChatML's form, its two tokens being those that begin and end a text, so that no
# vocabulary grows.
TEMPLATE = (
    "{% for message in messages %}{{ (bos_token or '') + message['role'] + '\\n' + message['content'] + eos_token"
    " + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ (bos_token or '') + 'assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as ids `(t,)`, and where the answers stand in it.

    answers: number of a message -> (first, end) of what the model says there, the token that closes the answer being
    the last of it. The ids end with the last answer.
    """

    ids: IntArray
    answers: dict[int, tuple[int, int]]


def chat_tokens(tokenizer: TextTokenizer, messages: Sequence[Message], *, answer: bool = True) -> IntArray:
    """Ids `(t,)` of a conversation, with the words that begin the model's answer where `answer`.

    Raises: DataError where the tokenizer has no template, or the template refuses the messages.
    """
    scribe = _Scribe(tokenizer)
    return scribe.ids(scribe.text(messages, answer=answer))


def conversation(tokenizer: TextTokenizer, messages: Sequence[Message]) -> Conversation:
    """The ids of a conversation up to its last answer, and which of them are the answers'.

    An answer begins where the template, asked to begin one, has stopped, and ends with the last special token that the
    template writes when the answer is there: nothing is told by how tokens look. The text before an answer and the
    answer are encoded apart, so that what is learned follows exactly the tokens of a prompt.

    Differs: transformers encodes them as one text; the ids are the same unless a token would reach across.
    Raises: DataError where there is no template, it refuses the messages, what it writes of the beginning changes with
    what follows, or no special token closes an answer.
    """
    scribe = _Scribe(tokenizer)
    pieces: list[IntArray] = []
    answers: dict[int, tuple[int, int]] = {}
    written, num_tokens = "", 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = scribe.text(messages[:number], answer=True)
        told = scribe.text(messages[: number + 1], answer=False)
        if not (asked.startswith(written) and told.startswith(asked)):
            raise DataError(
                f"the chat template writes the messages before answer {len(answers) + 1} otherwise once more follows, "
                "so that what is the model's cannot be told; give another `objective.template`"
            )
        closing = [found.end() for found in scribe.spelling.finditer(told) if found.start() >= len(asked)]
        if not closing:
            raise DataError(
                "the chat template ends an answer with no special token, so that answers would never end; "
                "give an `objective.template` that writes eos_token there"
            )
        before = scribe.ids(asked[len(written) :])
        written = told[: closing[-1]]
        answer = scribe.ids(written[len(asked) :])
        pieces += [before, answer]
        answers[number] = (num_tokens + len(before), num_tokens + len(before) + len(answer))
        num_tokens += len(before) + len(answer)
    return Conversation(np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32), answers)


def closing_ids(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The id of the special token that closes an answer, none or one. Raises: DataError where there is no template."""
    scribe = _Scribe(tokenizer)
    said = "that is all"
    text = scribe.text([{"role": "user", "content": "?"}, {"role": "assistant", "content": said}], answer=False)
    after = scribe.ids(text[text.rfind(said) + len(said) :]).tolist()
    return tuple(index for index in after if index in scribe.special.values())[:1]


def ends(tokenizer: object) -> dict[str, list[int]]:
    """What a generation_config.json says of the end, where a template closes answers with another token than `eos`."""
    if getattr(tokenizer, "chat_template", None) is None:
        return {}
    speaking: Any = tokenizer
    own = [index for role, index in speaking.special_ids.items() if role == "eos"]
    try:
        closing = closing_ids(speaking)
    except DataError:  # a template that takes no such messages
        return {}
    every = list(dict.fromkeys([*own, *closing]))
    return {} if every == own else {"eos_token_id": every}


class _Scribe:
    """Writes messages down by a tokenizer's template, and reads such text as ids."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template, so the model was hardly trained on conversations; leave --chat "
                "out, or put a chat_template.jinja into the model's folder"
            )
        self.template = tokenizer.chat_template
        self.tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder()
        self.special = {token.content: index for index, token in added.items() if token.special}
        words = sorted(self.special, key=len, reverse=True)
        self.spelling = re.compile("|".join(re.escape(token) for token in words) or r"(?!)")

    def text(self, messages: Sequence[Message], *, answer: bool) -> str:
        plain = [{name: self._as_text(value) for name, value in message.items()} for message in messages]
        return render(self.template, plain, special=self.tokenizer.special, answer=answer)

    def _as_text(self, content: str) -> str:
        return self.spelling.sub(lambda found: found[0][0] + MARK + found[0][1:], content.replace(MARK, ""))

    def ids(self, text: str) -> IntArray:
        pieces: list[IntArray] = []
        place = 0
        for found in self.spelling.finditer(text):
            pieces.append(self.tokenizer.encode(text[place : found.start()].replace(MARK, "")))
            pieces.append(np.array([self.special[found[0]]], dtype=np.int32))
            place = found.end()
        pieces.append(self.tokenizer.encode(text[place:].replace(MARK, "")))
        return np.concatenate(pieces)


def render(template: str, messages: Sequence[Message], *, special: Mapping[str, str], answer: bool) -> str:
    """The conversation as text. special: role (`bos`, `eos`, ...) -> token, known to the template as `bos_token` ...

    Raises: DataError with the template's own reason.
    """
    from jinja2.exceptions import TemplateError

    wrong = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, SyntaxError)
    endless = (RecursionError, MemoryError)
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise DataError(f"the chat template has {len(template)} characters, at most {MAX_TEMPLATE_CHARACTERS} are read")
    names = {f"{role}_token": token for role, token in special.items()}
    try:
        return _compiled(template).render(messages=list(messages), add_generation_prompt=answer, **names)
    except (*wrong, *endless) as error:
        raise DataError(f"the chat template does not take these messages: {' '.join(str(error).split())}") from None


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}` marks what the model says; here it is only rendered."""

        def __init__(self, environment: Environment) -> None:
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        from jinja2.exceptions import TemplateError

        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
