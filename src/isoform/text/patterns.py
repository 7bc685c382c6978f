"""Regular expressions of foreign tokenizers: one that can run for ever is refused before it runs once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from isoform.errors import DataError

MAX_PATTERN_CHARACTERS = 2_000


def refuse_slow_patterns(value: Any, where: str) -> None:
    """Raises: DataError for a regex with a repeated group that itself repeats or chooses, such as `(a+)+`, `(a|b)*`.

    Such a group can match one text in exponentially many ways. The patterns of GPT-2, LLaMA 3, Qwen and their like
    repeat single characters and classes only.
    """
    for pattern in _patterns(value):
        if len(pattern) > MAX_PATTERN_CHARACTERS or _repeats_a_choice(pattern):
            raise DataError(
                f"{where}: the pattern {pattern[:80]!r} repeats a group that itself repeats or chooses, which can take "
                "for ever; only tokenizers with simple patterns are read"
            )


def _patterns(value: Any) -> Iterator[str]:
    """Every `{"Regex": pattern}` in a JSON value."""
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        for key, item in value.items():
            if key not in {"vocab", "merges", "added_tokens"}:
                yield from _patterns(item)
    elif isinstance(value, list):
        for item in value:
            yield from _patterns(item)


def _repeats_a_choice(pattern: str) -> bool:
    # One entry for each open group: whether a repetition or a choice was seen in it.
    groups = [False]
    index = 0
    while index < len(pattern):
        character = pattern[index]
        if character == "\\":
            index = _after_escape(pattern, index)
        elif character == "[":
            index = _after_class(pattern, index)
        elif character == "(":
            groups.append(False)
            index += 2 if pattern[index + 1 : index + 2] == "?" else 1
        elif character == ")":
            inner = groups.pop() if len(groups) > 1 else False
            index += 1
            if inner and _repeats(pattern, index):
                return True
            groups[-1] = groups[-1] or inner
        else:
            groups[-1] = groups[-1] or character == "|" or _repeats(pattern, index) or character == "?"
            index += 1
    return False


def _repeats(pattern: str, index: int) -> bool:
    """Whether an unbounded, or bounded but large, quantifier stands at `index`."""
    if pattern[index : index + 1] in ("*", "+"):
        return True
    if pattern[index : index + 1] != "{":
        return False
    bounds = pattern[index + 1 : pattern.find("}", index)]
    low, comma, high = bounds.partition(",")
    return low.strip().isdigit() and ((bool(comma) and not high.strip()) or int(high or low) > 3)


def _after_escape(pattern: str, index: int) -> int:
    if pattern[index + 1 : index + 2] in ("p", "P", "x", "u") and pattern[index + 2 : index + 3] == "{":
        return pattern.find("}", index) + 1 or len(pattern)
    return index + 2


def _after_class(pattern: str, index: int) -> int:
    """The place after a character class, nested ones included."""
    depth = 0
    while index < len(pattern):
        if pattern[index] == "\\":
            index += 1
        elif pattern[index] == "[":
            depth += 1
        elif pattern[index] == "]":
            depth -= 1
            if depth == 0:
                return index + 1
        index += 1
    return index
