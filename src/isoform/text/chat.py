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
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from isoform.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from isoform.contracts import IntArray
    from isoform.text.tokenizers import TextTokenizer

Message = Mapping[str, str]
# Stands inside a message's spelling of a special token while the template is rendered; a private character of Unicode.
MARK = "\uf8ff"
MAX_TEMPLATE_CHARACTERS = 200_000


def chat_tokens(tokenizer: TextTokenizer, messages: Sequence[Message], *, answer: bool = True) -> IntArray:
    """Ids `(t,)` of a conversation, with the words that begin the model's answer where `answer`.

    Raises: DataError where the tokenizer has no template, or the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template, so the model was hardly trained on conversations; leave --chat out, "
            "or put a chat_template.jinja into the model's folder"
        )
    added = tokenizer.backend.get_added_tokens_decoder()
    ids = {token.content: index for index, token in added.items() if token.special}
    spelling = re.compile("|".join(re.escape(token) for token in sorted(ids, key=len, reverse=True)) or r"(?!)")

    def as_text(content: str) -> str:
        return spelling.sub(lambda found: found[0][0] + MARK + found[0][1:], content.replace(MARK, ""))

    plain = [{name: as_text(value) for name, value in message.items()} for message in messages]
    text = render(tokenizer.chat_template, plain, special=tokenizer.special, answer=answer)
    pieces: list[IntArray] = []
    place = 0
    for found in spelling.finditer(text):
        pieces.append(tokenizer.encode(text[place : found.start()].replace(MARK, "")))
        pieces.append(np.array([ids[found[0]]], dtype=np.int32))
        place = found.end()
    pieces.append(tokenizer.encode(text[place:].replace(MARK, "")))
    return np.concatenate(pieces)


def render(template: str, messages: Sequence[Message], *, special: Mapping[str, str], answer: bool) -> str:
    """The conversation as text. special: role (`bos`, `eos`, ...) -> token, known to the template as `bos_token` ...

    Raises: DataError with the template's own reason.
    """
    from jinja2.exceptions import TemplateError

    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise DataError(f"the chat template has {len(template)} characters, at most {MAX_TEMPLATE_CHARACTERS} are read")
    names = {f"{role}_token": token for role, token in special.items()}
    try:
        compiled = _environment().from_string(template)
        return compiled.render(messages=list(messages), add_generation_prompt=answer, **names)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise DataError(f"the chat template does not take these messages: {error}") from None


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
