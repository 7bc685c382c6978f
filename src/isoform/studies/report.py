"""The report of a study or a run: one offline page, or markdown, made from what is on disk, without torch.

    results.json, run folders --read--> a page of finished words and figures --template--> HTML or markdown

The templates only lay out. Whatever text a run contributed is cleaned of control characters and escaped on its way in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from isoform import __version__
from isoform.errors import ConfigError
from isoform.storage import write_text
from isoform.studies import provenance, tables, wording
from isoform.studies.answers import read_answers
from isoform.studies.breakdown import breakdowns
from isoform.studies.curves import stage_curves
from isoform.studies.records import Records, Results
from isoform.studies.wording import VERDICTS, clean, is_number

Row = dict[str, Any]


def write_report(folder: Path, to: Literal["html", "md"] = "html") -> Path:
    """Writes `report.html` or `report.md` into the folder, whole or not at all.

    Raises: ConfigError for another form; DataError where there is nothing to report on; DiskError.
    """
    if to not in ("html", "md"):
        raise ConfigError(f"--to {to}: html or md is expected")
    path = Path(folder) / f"report.{to}"
    write_text(path, render_html(folder) if to == "html" else render_markdown(folder))
    return path


def render_html(folder: Path) -> str:
    """The whole page as text. Raises: DataError where the folder is neither a study nor a run."""
    page = build_page(Path(folder))
    return _environment("html").get_template("report.html.j2").render(page=page, style=Markup(_template("report.css")))


def render_markdown(folder: Path) -> str:
    """The same report without its charts."""
    text = _environment("md").get_template("report.md.j2").render(page=build_page(Path(folder)))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def build_page(folder: Path) -> Row:
    """Everything that a report says, section by section, in finished words; the templates leave out what is empty."""
    records = Records(folder)
    results = records.results
    questions = results.get("questions") or []
    audit = provenance.audit(results)
    return {
        "kind": "study" if records.is_study else "run",
        "title": results.get("name") or folder.resolve().name,
        "question": results.get("question"),
        "facts": _facts(results),
        "refusals": [row for row in audit if row["level"] == "refuse"],
        "verdicts": [_verdict(question, results) for question in questions],
        "study_warnings": [row for row in audit if row["level"] == "warn" and not row["pair"]],
        "published": tables.published(results),
        "forests": tables.forests(results),
        "arms": tables.arms(results),
        "metrics": tables.metrics(results),
        "selections": tables.selections(results),
        "tuning": tables.tuning(results),
        "curves": stage_curves(records),
        "answers": read_answers(records),
        "breakdowns": breakdowns(records),
        "audit": audit,
        "differences": provenance.differences(results),
        "config": provenance.config(records),
        "passport": provenance.passport(results.get("data") or {}),
        "cost": provenance.cost(results),
        "again": provenance.again(results),
        "method": _method(results) if questions else [],
        "intervals_by": list(dict.fromkeys(str(row["method"]) for row in questions if row.get("method"))),
        "damage": list(dict.fromkeys(records.damage)),
        "version": __version__,
    }


# ---------------------------------------------------------------------------------------------------------- rendering


@cache
def _environment(form: str) -> Environment:
    """HTML escapes every value; markdown what markdown and HTML would read. Both clean control characters first."""
    return Environment(
        loader=FunctionLoader(_template),
        autoescape=form == "html",
        finalize=_clean_value if form == "html" else escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@cache
def _template(name: str) -> str:
    return (resources.files("isoform.studies") / "templates" / name).read_text(encoding="utf-8")


def _clean_value(value: Any) -> Any:
    return value if isinstance(value, Markup) else clean(value)


def escape_markdown(value: Any) -> str:
    """Text that a markdown reader shows as it is, on one line, also inside a table.

    An underscore within a word, a bracket that follows no link's text and a mark before none mean nothing there.
    """
    one_line = re.sub(r"\s+", " ", clean(value))
    escaped = (
        re.sub(r"([\\`*\[\]|~$]|\{(?=[{%])|(?<=\{)\{|_(?![^\W_])|(?<![^\W_])_)", r"\\\1", one_line)
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
    )
    # What only means something where a line begins.
    escaped = re.sub(r"^(#+|[-+=])(?=\s|$)", r"\\\1", escaped)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", escaped)


# -------------------------------------------------------------------------------------------------------------- words


def _facts(results: Results) -> list[str]:
    """The line under the title: how much was done, and when."""
    facts = []
    if results.get("questions") is not None or len(results.get("arms") or ()) > 1:
        facts.append(wording.plural(len(results.get("arms") or ()), "arm"))
    if seeds := results.get("seeds"):
        facts.append(wording.plural(len(seeds), "seed"))
    compare = results.get("compare") or {}
    if compare.get("metric"):
        facts.append(f"compared by {tables.metric_on(compare)}")
    if is_number(results.get("seconds")):
        facts.append(f"{wording.duration_text(results['seconds'])} of computing")
    if results.get("finished"):
        facts.append(f"finished {str(results['finished'])[:16].replace('T', ' ')}")
    return facts


def _verdict(question: Mapping[str, Any], results: Results) -> Row:
    words = wording.verdict_words(question, results)
    sign, word = VERDICTS[words.kind]
    published = question.get("published")
    return {"kind": words.kind, "sign": sign, "word": word, "words": words, "published": published}


def _method(results: Results) -> list[str]:
    """How to read a verdict, for somebody who meets one for the first time."""
    many = wording.percent_text(wording.confidence_of(results))
    return [
        "All arms are trained with the same seeds and answer the same examples, so every difference is taken, second "
        "arm minus first, between two models of one seed on one example, and then averaged.",
        "The interval shows which differences agree with what was seen: it is the wider the more the seeds disagree "
        f"and the fewer examples there are, and about {many} of such intervals hold the true difference.",
        "“Better” and “worse” mean that what was seen speaks clearly against no difference at all, even after the "
        "correction for asking several questions (Holm); “equivalent” means that the difference lies within a margin "
        "set beforehand; “cannot tell” means neither, which is no evidence that the arms are equal.",
        "A verdict holds for these data, this size of model and these settings; with a single seed it speaks of the "
        "two trained models alone, since another seed might turn out otherwise.",
    ]
