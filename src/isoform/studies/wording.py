"""Words and numbers for people: the one place where a figure gets its unit and a verdict its sentence.

The page, its markdown form and the terminal all speak through this file, so that they cannot disagree.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

MISSING = "–"
SPACE = "\N{NO-BREAK SPACE}"

# level or verdict -> (sign, word): never told by colour alone
LEVELS = {"refuse": ("✗", "refuse"), "warn": ("!", "warn"), "inform": ("i", "inform"), "pass": ("✓", "pass")}
VERDICTS = {
    "better": ("▲", "better"),
    "worse": ("▼", "worse"),
    "equivalent": ("=", "equivalent"),
    "cannot-tell": ("?", "cannot tell"),
}

_FRACTIONS = {
    *("accuracy", "match", "em", "f1", "precision", "recall", "auc", "fraction", "rate", "rouge", "correct", "ended")
}
_SPELLED = {"bleu": "BLEU", "chrf": "chrF", "f1": "F1", "mae": "MAE", "mcc": "MCC", "mse": "MSE", "rmse": "RMSE"}
_ERRORS = {"error", "mse", "mae", "rmse"}
_DECIMALS = {"fraction": 1, "nats": 3, "bits": 3, "perplexity": 2, "number": 3}
_SUFFIX = {"fraction": f"{SPACE}%", "nats": f"{SPACE}nats", "bits": f"{SPACE}bits", "perplexity": "", "number": ""}
_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


# --------------------------------------------------------------------------------------------------------------- text


def clean(value: Any) -> str:
    """Text that any screen can show: control and direction marks become visible, lone surrogates are replaced."""
    if value is None:
        return ""
    return "".join(map(_visible, str(value)))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or 0x20 <= code < 0x7F:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if character in _BIDI or unicodedata.category(character) in {"Cc", "Cs", "Cn"}:
        return "\N{REPLACEMENT CHARACTER}"
    return character


def shorten(text: str, num_characters: int) -> str:
    """The beginning of a long text, saying how much is left out."""
    if len(text) <= num_characters:
        return text
    return f"{text[:num_characters].rstrip()} … ({len(text) - num_characters:,} more characters)"


def metric_words(metric: str) -> str:
    """A metric as its field writes it: macro F1, bits per byte, chrF."""
    return {"ended": "answers ended"}.get(metric, " ".join(_SPELLED.get(word, word) for word in metric.split("_")))


def capitalised(text: str) -> str:
    """The beginning of a line, where a name keeps the letters that it has: Loss on dev, chrF on dev."""
    plain = text.partition(" ")[0].islower()
    return text[:1].upper() + text[1:] if plain else text


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


# ------------------------------------------------------------------------------------------------------------ numbers


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def unit_of(metric: str) -> str:
    """The unit of a metric by its name: fraction, nats, bits, perplexity, or a plain number."""
    words = set(metric.lower().replace("-", "_").split("_"))
    if "perplexity" in words:
        return "perplexity"
    if "bits" in words:
        return "bits"
    if words & {"loss", "nats", "entropy"}:
        return "nats"
    return "fraction" if words & _FRACTIONS else "number"


def lower_is_better(metric: str) -> bool:
    words = set(metric.lower().replace("-", "_").split("_"))
    return unit_of(metric) in {"nats", "bits", "perplexity"} or bool(words & _ERRORS)


def value_text(value: Any, metric: str) -> str:
    """A metric's value with its unit: `26.2 %`, `0.551 nats`, `14.20`."""
    return f"{bare_value(value, metric)}{_SUFFIX[unit_of(metric)]}" if is_number(value) else MISSING


def bare_value(value: Any, metric: str, decimals: int | None = None) -> str:
    """The number alone, where the unit stands in the heading."""
    unit = unit_of(metric)
    return (
        _fixed(_scaled(value, unit), _DECIMALS[unit] if decimals is None else decimals) if is_number(value) else MISSING
    )


def value_interval_text(low: Any, high: Any, metric: str) -> str:
    """`33.0 to 43.5`, or nothing where there is no interval."""
    return f"{bare_value(low, metric)} to {bare_value(high, metric)}" if is_number(low) and is_number(high) else ""


def signed_text(value: Any, metric: str, decimals: int | None = None) -> str:
    """A difference without its unit: `+38.2`, `−2.0`, `0.0`."""
    text = bare_value(value, metric, decimals)
    return f"+{text}" if is_number(value) and value > 0 and any(digit in text for digit in "123456789") else text


def unit_words(metric: str) -> str:
    """What a difference of this metric is counted in: `points`, `nats`, ..."""
    return {"fraction": "points", "nats": "nats", "bits": "bits"}.get(unit_of(metric), "")


def difference_text(value: Any, metric: str, decimals: int | None = None) -> str:
    """A difference with its unit: `+38.2 points`."""
    return f"{signed_text(value, metric, decimals)}{_with_unit(metric)}" if is_number(value) else MISSING


def difference_interval_text(low: Any, high: Any, metric: str, decimals: int | None = None) -> str:
    if not (is_number(low) and is_number(high)):
        return ""
    return f"{signed_text(low, metric, decimals)} to {signed_text(high, metric, decimals)}"


def difference_decimals(question: Mapping[str, Any]) -> int:
    """Enough decimals to tell the interval's two ends apart."""
    metric = str(question.get("metric") or "")
    decimals = _DECIMALS[unit_of(metric)]
    low, high = question.get("low"), question.get("high")
    if is_number(low) and is_number(high) and (width := _scaled(abs(high - low), unit_of(metric))) > 0:
        return min(max(decimals, 1 - math.floor(math.log10(width))), 6)
    return decimals


def p_text(p: Any) -> str:
    """`p = 0.0004`; below one in ten thousand only that is said."""
    return f"p{SPACE}{p_bare(p, equals='= ')}" if is_number(p) else MISSING


def p_bare(p: Any, equals: str = "") -> str:
    if not is_number(p):
        return MISSING
    if p < 0.0001:
        return "< 0.0001"
    return f"{equals}{p:.2f}" if p >= 0.1 else f"{equals}{p:.1g}" if p < 0.001 else f"{equals}{p:.3f}"


def count_text(value: Any) -> str:
    """A large count in three figures: `3.32 M`."""
    if not is_number(value):
        return MISSING
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= factor:
            scaled = value / (1e3 if letter == "k" else factor)
            return f"{scaled:.{max(0, 2 - math.floor(math.log10(abs(scaled))))}f}{SPACE}{letter}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:,.3g}"


def duration_text(seconds: Any) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    if not is_number(seconds) or seconds < 0:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f}{SPACE}s" if seconds < 10 else f"{seconds:.0f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min{SPACE}{rest:02d}{SPACE}s"
    return f"{minutes // 60}{SPACE}h{SPACE}{minutes % 60:02d}{SPACE}min"


def percent_text(fraction: float) -> str:
    """A confidence or share: `95 %`, `99.5 %`."""
    return f"{100 * fraction:.4g}{SPACE}%"


def plain_text(value: Any) -> str:
    """Any JSON value on one line: numbers readable, text as it is, the rest as JSON."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _scaled(value: float, unit: str) -> float:
    return 100 * value if unit == "fraction" else value


def _fixed(value: float, decimals: int) -> str:
    if abs(value) >= 1e7:
        return f"{value:.3g}".replace("-", "−")
    text = f"{abs(value):,.{decimals}f}"
    return f"−{text}" if value < 0 and any(digit in text for digit in "123456789") else text


def _with_unit(metric: str) -> str:
    return f" {unit_words(metric)}" if unit_words(metric) else ""


# ----------------------------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdict:
    """A verdict in words: the claim, what it rests on, what stands against it."""

    kind: str
    claim: str
    evidence: str
    cautions: tuple[str, ...]

    @property
    def sentence(self) -> str:
        return " ".join([f"{self.claim}{self.evidence}", *(f"Caution: {text}" for text in self.cautions)])


def verdict_sentence(question: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The verdict on one question of a study, with every warning that touches it, as plain sentences."""
    return verdict_words(question, results).sentence


def verdict_words(question: Mapping[str, Any], results: Mapping[str, Any]) -> Verdict:
    """The verdict's claim, evidence and cautions; `difference` is the pair's second minus its first."""
    first, second = map(clean, pair_of(question))
    metric, split = str(question.get("metric") or ""), clean(question.get("split", ""))
    kind = verdict_kind(question)
    place = clean(f"{metric_words(metric)} on {split}" if split else metric_words(metric))
    claims = {
        "better": f"{second} is better than {first}",
        "worse": f"{second} is worse than {first}",
        "equivalent": f"{first} and {second} are equivalent",
        "cannot-tell": f"We cannot tell {first} and {second} apart",
    }
    if not is_number(question.get("difference")):
        claim = f"{first} and {second} were not compared"
        evidence = f" on {place}: no difference could be computed."
        return Verdict("cannot-tell", claim, evidence, _cautions(question, results))
    amount = difference_text(question["difference"], metric, difference_decimals(question))
    said = f"{amount} of {place}"
    if metric_words(metric).startswith(f"{unit_words(metric)} "):  # the metric names its unit: bits per byte
        said = f"{signed_text(question['difference'], metric, difference_decimals(question))} {place}"
    support = _support(question, results)
    direction = ", lower is better" if lower_is_better(metric) else ""
    evidence = {
        "equivalent": f" on {place}: the difference is {amount} {support}{_margin(question, metric)}.",
        "cannot-tell": f" on {place}: the difference is {amount} {support}.{_outlook(question, metric)}",
    }.get(kind, f": {said}{direction} {support}.")
    if question.get("num_seeds") == 1:
        evidence += " With one seed this speaks of these two models, not of the methods."
    return Verdict(kind, claims[kind], evidence, _cautions(question, results))


def pair_of(question: Mapping[str, Any]) -> tuple[Any, Any]:
    """The two arms; nameless where the pair is missing."""
    first, second = (*(question.get("pair") or ()), "", "")[:2]
    return first, second


def verdict_kind(question: Mapping[str, Any]) -> str:
    kind = str(question.get("verdict"))
    return kind if kind in VERDICTS else "cannot-tell"


def confidence_of(results: Mapping[str, Any]) -> float:
    confidence = (results.get("compare") or {}).get("confidence")
    return float(confidence) if is_number(confidence) else 0.95


def _support(question: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The bracket behind a difference: interval, p, how much was looked at."""
    metric, decimals = str(question.get("metric") or ""), difference_decimals(question)
    inside = []
    if interval := difference_interval_text(question.get("low"), question.get("high"), metric, decimals):
        inside.append(f"{percent_text(confidence_of(results))} interval {interval}")
    num_questions = results.get("num_questions") or len(results.get("questions") or ())
    if is_number(question.get("p_adjusted")) and num_questions > 1:
        inside.append(f"{p_text(question['p_adjusted'])} after Holm over {num_questions} questions")
    elif is_number(question.get("p")):
        inside.append(p_text(question["p"]))
    sizes = [
        plural(question[key], noun)
        for key, noun in (("num_seeds", "seed"), ("num_examples", "example"))
        if is_number(question.get(key))
    ]
    bracket = "; ".join(part for part in (", ".join(inside), " × ".join(sizes)) if part)
    return f"({bracket})" if bracket else "(no interval)"


def _margin(question: Mapping[str, Any], metric: str) -> str:
    if not is_number(question.get("margin")):
        return ""
    return (
        f", within the margin of ±{bare_value(question['margin'], metric)}{_with_unit(metric)} that was set beforehand"
    )


def _outlook(question: Mapping[str, Any], metric: str) -> str:
    """What this study could have seen, and what it would take."""
    text = ""
    if is_number(question.get("smallest_difference")):
        least = f"{bare_value(question['smallest_difference'], metric)}{_with_unit(metric)}"
        text = f" With these seeds the study could have seen {least}"
    needed = question.get("seeds_needed")
    if is_number(needed) and needed > (question.get("num_seeds") or 0):
        about = f"about {plural(math.ceil(needed), 'seed')} would be needed to settle a difference of this size"
        text = f"{text}; {about}" if text else f" A{about[1:]}"
    return f"{text}." if text else ""


def _cautions(question: Mapping[str, Any], results: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes of the question and the audit's warnings about its pair, each once."""
    pair = set(question.get("pair") or ())
    found = [clean(note) for note in question.get("notes") or ()]
    for row in results.get("audit") or ():
        if row.get("level") in {"warn", "refuse"} and row.get("pair") and set(row["pair"]) == pair:
            found.append(clean(row.get("message") or row.get("check")))
    return tuple(dict.fromkeys(_stop(text) for text in found if text))


def _stop(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
