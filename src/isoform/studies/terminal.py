"""A study or a run told in the terminal, in the report's words: coloured on a screen, plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from isoform.studies import provenance, tables, wording
from isoform.studies.records import Records, Results
from isoform.studies.wording import VERDICTS, clean, verdict_sentence, verdict_words

__all__ = ["print_line", "print_run", "print_study", "print_table", "verdict_sentence"]

_STYLES = {
    "better": "green",
    "worse": "red",
    "equivalent": "blue",
    "cannot-tell": "dim",
    "refuse": "bold red",
    "warn": "yellow",
}
# For screens and pipes that know no Unicode.
_ASCII = str.maketrans(
    {"−": "-", "–": "-", "…": "...", "×": "x", "±": "+/-", "→": "->", "✓": "v", "✗": "x", "▲": "+", "▼": "-"}
)


def print_study(results: Results, console: Console) -> None:
    """The question, every verdict in words, the table of arms, what the audit holds against it."""
    print_line(console, "", str(results.get("name") or "study"), "bold")
    if results.get("question"):
        print_line(console, "", str(results["question"]))
    audit = provenance.audit(results)
    for row in audit:
        if row["level"] == "refuse":
            about = f" ({row['pair']})" if row["pair"] else ""
            refusal = f"The audit refuses{about}: {row['message'] or row['check']}"
            print_line(console, row["sign"], refusal, _STYLES["refuse"])
    for question in results.get("questions") or ():
        words = verdict_words(question, results)
        print_line(console, VERDICTS[words.kind][0], words.sentence, _STYLES[words.kind], words.claim)
    _print_arms(results, console)
    for row in audit:
        if row["level"] == "warn":
            print_line(console, row["sign"], f"{row['check']}: {row['message']}", _STYLES["warn"], str(row["check"]))
    passed = sum(row["level"] in {"pass", "inform"} for row in audit)
    if passed:
        checks = wording.plural(len(audit), "check")
        print_line(console, "", f"{passed} of {checks} of the audit found nothing against it.", "dim")


def print_run(folder: Path, console: Console) -> None:
    """A run's metrics with their intervals, how long it was, and what the audit holds against it."""
    records = Records(Path(folder))
    results = records.results
    if records.is_study:
        print_study(results, console)
        return
    arm = results["arms"][0]
    stage = arm["runs"][0]["stages"][0]
    print_line(console, "", str(results["name"]), "bold")
    metrics = tables.metrics(results)
    if metrics is not None:
        heads = ["metric", "split", "value", "interval", "n"]
        rows = [[row["name"], str(row["split"] or ""), *(row[head] for head in heads[2:])] for row in metrics["rows"]]
        print_table(console, heads, rows, num_text_columns=2)
    facts = {
        "steps": wording.count_text(stage["steps"]),
        "target tokens": wording.count_text(stage["tokens"]),
        "final loss": wording.value_text(stage["final_loss"], "loss"),
        "time": wording.duration_text(stage["seconds"]),
    }
    told = [f"{name}: {value}" for name, value in facts.items() if value != wording.MISSING]
    if told:
        print_line(console, "", ", ".join(told), "dim")
    for row in provenance.audit(results):
        if row["level"] in {"refuse", "warn"}:
            print_line(console, row["sign"], f"{row['check']}: {row['message']}", _STYLES[row["level"]])


def _print_arms(results: Results, console: Console) -> None:
    shown = tables.arms(results)
    if shown is None:
        return
    unit = f", {shown['unit']}" if shown["unit"] else ""
    heads = ["arm", f"{shown['title']}{unit}", f"{shown['confidence']} interval", "parameters", "target tokens", "time"]
    columns = ("mean", "interval", "parameters", "tokens", "time")
    rows = [[str(row["name"]), *(row[column] for column in columns)] for row in shown["rows"]]
    print_table(console, heads, rows, num_text_columns=1)
    for row in shown["rows"]:
        if row["diverged"]:
            print_line(console, "!", f"{row['name']}: {row['diverged']}", _STYLES["warn"])


def print_line(console: Console, sign: str, text: str, style: str = "", strong: str = "") -> None:
    """A paragraph behind its sign; only `strong` is styled where it is given. A pipe gets one line."""
    lead = f"{sign} " if sign else ""
    words = Text(_shown(lead + clean(text), console), style="" if strong else style)
    if strong:
        words.stylize(style, 0, len(_shown(lead, console)))
        words.stylize("bold", len(_shown(lead, console)), len(_shown(lead + clean(strong), console)))
    console.print(words, soft_wrap=not console.is_terminal, highlight=False)


def print_table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]], num_text_columns: int) -> None:
    """Columns of numbers to the right; on a screen by rich, in a pipe as aligned plain lines."""
    cells = [[_shown(clean(cell), console) for cell in row] for row in [heads, *rows]]
    if not console.is_terminal:
        _print_plain(console, cells, num_text_columns)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for place, head in enumerate(cells[0]):
        table.add_column(Text(head), justify="left" if place < num_text_columns else "right", overflow="fold")
    for row in cells[1:]:
        table.add_row(*map(Text, row))
    console.print(Padding(table, (1, 0, 1, 0)))


def _print_plain(console: Console, cells: Sequence[Sequence[str]], num_text_columns: int) -> None:
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    for row in cells:
        sides = ["<" if place < num_text_columns else ">" for place in range(len(row))]
        line = "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        console.print(Text(line.rstrip()), soft_wrap=True, highlight=False)


def _shown(text: str, console: Console) -> str:
    """The text in what the console can write; plain spaces, since a terminal breaks its own lines."""
    text = " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split("\n"))
    encoding: Any = console.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII).encode(encoding, "backslashreplace").decode(encoding)
    return text
