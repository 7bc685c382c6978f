"""Measures how often the statistics of comparisons are right; writes `docs/calibration.csv` and `docs/calibration.md`.

    python benchmarks/calibration.py                       10,000 studies a cell: half an hour of processor time
    python benchmarks/calibration.py --studies 500         a quick look, written to the folder given by --out
    python benchmarks/calibration.py --examples 5000       only these cells again; the CSV's other rows stay
    python benchmarks/calibration.py --render              the page again from the CSV
    python benchmarks/calibration.py --runs STUDY_FOLDER   A/A pairs from a real study's predictions, printed

Simulated studies come from `isoform.studies.simulate`; `calibration_cells.py` beside this file judges them.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from calibration_cells import (
    F1,
    IN_USE,
    METHODS,
    NUM_EXAMPLES,
    NUM_SEEDS,
    Cell,
    Perplexity,
    Ratio,
    Tally,
    real_pairs,
    run_grid,
    run_margin,
    run_one_seed,
    run_ratio,
)

from isoform.storage import write_text
from isoform.studies.simulate import SPREADS, Setting

DOCS = Path(__file__).parent.parent / "docs"
KEYS = list(METHODS)
FIELDS = ["part", "metric", "seeds", "examples", "outcome", "spread", "shared", "arms", "studies", "width"]
MEASURED = [*(f"m{index}" for index in range(len(METHODS))), "bootstrap", "false", "power"]
MOST_FALSE, LEAST_COVERAGE, MOST_COVERAGE = 0.06, 0.93, 0.97
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ measuring


def describe(setting: Setting) -> Row:
    spread = next(name for name, value in SPREADS.items() if value == setting.spread)
    arms = "effect" if setting.shift else "equal" if setting.taste else "same"
    outcome = "nats" if setting.rate is None else f"{setting.rate:g}"
    return {"outcome": outcome, "spread": spread, "shared": int(setting.shared), "arms": arms}


def grid_rows(grid: dict[Cell, Tally]) -> Iterable[Row]:
    for (num_seeds, num_examples, setting), tally in grid.items():
        coverage = {f"m{index}": tally.coverage(name) for index, name in enumerate(KEYS)}
        sizes = {"seeds": num_seeds, "examples": num_examples, "studies": tally.studies, "width": tally.relative_width}
        yield {"part": "means", "metric": "mean", **sizes, **describe(setting), **coverage}


def other_rows(num_studies: int, pool: Executor) -> Iterable[Row]:
    """Ratios, one seed, margins and power."""
    kinds = ((0.0, False), (0.2, True))
    few = max(num_studies // 40, 1)
    ratios = [
        (kind, num_seeds, num_examples, Setting(rate, spread, False, *arms), num_studies // 2, few)
        for kind, rate in ((Ratio, None), (Perplexity, None), (F1, 0.9))
        for num_seeds, num_examples in itertools.product(NUM_SEEDS, (200, 1000))
        for spread, arms in itertools.product((0.0, 0.1), kinds)
    ]
    for task, (coverage, width, bootstrap) in zip(ratios, pool.map(run_ratio, ratios), strict=True):
        row = {"part": "ratios", "metric": task[0].name, "seeds": task[1], "examples": task[2], "studies": task[4]}
        yield {**row, **describe(task[3]), "width": width, f"m{KEYS.index(IN_USE)}": coverage, "bootstrap": bootstrap}
    singles = [
        (num_examples, Setting(rate, 0.0, False, *arms), num_studies // 2)
        for num_examples, rate, arms in itertools.product((200, 1000), (0.05, 0.3, 0.9), kinds)
    ]
    for single, (false, coverage) in zip(singles, pool.map(run_one_seed, singles), strict=True):
        row = {"part": "one seed", "metric": "accuracy", "seeds": 1, "examples": single[0], "studies": single[2]}
        yield {**row, **describe(single[1]), "false": false, f"m{KEYS.index(IN_USE)}": coverage}
    margins = [
        (num_seeds, 1000, Setting(0.3, spread, False, 0.2, True), num_studies)
        for num_seeds, spread in itertools.product(NUM_SEEDS, (0.0, 0.1, 0.3))
    ]
    for margin, (false, power, _) in zip(margins, pool.map(run_margin, margins), strict=True):
        row = {"part": "margin", "metric": "accuracy", "seeds": margin[0], "examples": margin[1], "studies": margin[3]}
        yield {**row, **describe(margin[2]), "false": false, "power": power}


def as_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*FIELDS, *MEASURED], restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda row: (row["part"], row["metric"], row["seeds"], row["examples"])):
        writer.writerow({key: as_cell(value) for key, value in row.items()})
    return text.getvalue()


def as_cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4f}" if value == value else ""
    return value


def kept_rows(folder: Path, measured: Sequence[int]) -> list[Row]:
    """The rows of the CSV that were not measured again."""
    path = folder / "calibration.csv"
    rows = read_csv(path) if path.exists() else []
    return [row for row in rows if row["part"] != "means" or row["examples"] not in measured]


def read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    for row in rows:
        for key in ("seeds", "examples", "shared", "studies"):
            row[key] = int(row[key])
        for key in ("width", *MEASURED):
            row[key] = float(row[key] or "nan")
        row["coverage"] = row[f"m{KEYS.index(IN_USE)}"]
    return rows


# ------------------------------------------------------------------------------------------------------------ the page


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(value) for value in line)} |" for line in lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def span(values: Sequence[float], factor: float = 100, decimals: int = 1) -> str:
    return f"{factor * min(values):.{decimals}f} – {factor * max(values):.{decimals}f}"


def chosen(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def sizes(rows: list[Row]) -> list[int]:
    """The numbers of examples that were measured."""
    return sorted({row["examples"] for row in rows})


def false_verdicts(rows: list[Row]) -> list[float]:
    return [1 - row["coverage"] for row in rows]


def by_size(rows: list[Row], arms: str, numbers: Any, **form: Any) -> str:
    """Seeds x examples down, seed spread across; the range over outcomes, shared first stage or not."""
    lines = []
    for num_seeds, num_examples in itertools.product(NUM_SEEDS, sizes(rows)):
        cells = [chosen(rows, seeds=num_seeds, examples=num_examples, arms=arms, spread=spread) for spread in SPREADS]
        lines.append([num_seeds, f"{num_examples:,}", *(span(numbers(cell), **form) for cell in cells)])
    return table(["seeds", "examples", *(f"spread {spread}" for spread in SPREADS)], lines)


def summary(rows: list[Row]) -> str:
    lines = []
    for num_seeds in NUM_SEEDS:
        here = chosen(rows, seeds=num_seeds)
        lines.append(
            [
                num_seeds,
                span(false_verdicts(chosen(here, arms="same"))),
                span(false_verdicts(chosen(here, arms="equal"))),
                span([row["coverage"] for row in chosen(here, arms="effect")]),
                f"{np.median([row['width'] for row in here]):.2f}",
            ]
        )
    head = ["seeds", "false verdicts, same method", "false verdicts, equally good", "coverage, real effect", "width"]
    return table(head, lines)


def outside(rows: list[Row]) -> list[str]:
    """The cells that miss a bound, in words, worst first."""
    found = []
    for row in rows:
        name = f"{row['seeds']} seeds, {row['examples']:,} examples, outcome {row['outcome']}, spread {row['spread']}, "
        name += f"{'shared first stage' if row['shared'] else 'nothing shared'}, arms {row['arms']}"
        least = 1 - MOST_FALSE if row["arms"] != "effect" else LEAST_COVERAGE
        if row["coverage"] < least:
            found.append(
                (least - row["coverage"], f"{name}: coverage {percent(row['coverage'])} %, below {percent(least)}")
            )
        if row["coverage"] > MOST_COVERAGE and row["seeds"] >= 5:
            found.append((row["coverage"] - MOST_COVERAGE, f"{name}: coverage {percent(row['coverage'])} %, above 97"))
    return [text for _, text in sorted(found, reverse=True)]


def tried(rows: list[Row]) -> str:
    lines = []
    for index, name in enumerate(KEYS):
        line = [name]
        for num_seeds in NUM_SEEDS:
            here = chosen(rows, seeds=num_seeds)
            false = max(1 - row[f"m{index}"] for row in here if row["arms"] != "effect")
            line.append(f"{percent(false)}; {span([row[f'm{index}'] for row in here])}")
        lines.append(line)
    return table(["half the width of the interval", *(f"{num_seeds} seeds" for num_seeds in NUM_SEEDS)], lines)


def ratio_table(rows: list[Row]) -> str:
    lines = []
    for metric, num_seeds in itertools.product((Ratio.name, Perplexity.name, F1.name), NUM_SEEDS):
        here = chosen(rows, part="ratios", metric=metric, seeds=num_seeds)
        same, effect = chosen(here, arms="same"), chosen(here, arms="effect")
        effects = [row["coverage"] for row in effect]
        lines.append(
            [metric, num_seeds, span(false_verdicts(same)), span(effects), span([r["bootstrap"] for r in here])]
        )
    head = ["metric", "seeds", "false verdicts", "coverage, real effect", "coverage of the studentised bootstrap"]
    return table(head, lines)


def one_seed_table(rows: list[Row]) -> str:
    here = chosen(rows, part="one seed")
    lines = []
    for num_examples, outcome in itertools.product((200, 1000), ("0.05", "0.3", "0.9")):
        cell = chosen(here, examples=num_examples, outcome=outcome)
        same, effect = chosen(cell, arms="same")[0], chosen(cell, arms="effect")[0]
        lines.append(
            [f"{num_examples:,}", outcome, *map(percent, (same["false"], same["coverage"], effect["coverage"]))]
        )
    return table(["examples", "rate", "false verdicts", "coverage, same", "coverage, real effect"], lines)


def margin_table(rows: list[Row]) -> str:
    lines = [
        [row["seeds"], row["spread"], percent(row["false"]), percent(row["power"])]
        for row in chosen(rows, part="margin")
    ]
    return table(["seeds", "spread", "false `equivalent`, truth at the margin", "found, of the promised 80 %"], lines)


def page(rows: list[Row]) -> str:
    means = chosen(rows, part="means")
    misses = outside(means)
    held = f"Of {len(means):,} cells, {len(means) - len(misses):,} keep every bound."
    template = Path(__file__).with_name("calibration_page.md").read_text(encoding="utf-8")
    return template.format(
        studies=f"{min(row['studies'] for row in means):,}",
        sizes=", ".join(f"{size:,}" for size in sizes(means)),
        summary=summary(means),
        held=held if misses else f"All {len(means):,} cells keep every bound.",
        outside="\n".join(f"- {text}" for text in misses[:20]) or "- none",
        false=by_size(means, "same", false_verdicts),
        equal=by_size(means, "equal", false_verdicts),
        effect=by_size(means, "effect", lambda cell: [row["coverage"] for row in cell]),
        width=by_size(means, "effect", lambda cell: [row["width"] for row in cell], factor=1, decimals=2),
        tried=tried(means),
        ratios=ratio_table(rows) if chosen(rows, part="ratios") else "Not measured.",
        one_seed=one_seed_table(rows) if chosen(rows, part="one seed") else "Not measured.",
        margins=margin_table(rows),
        two_seeds=span([row["width"] for row in chosen(means, seeds=2)], factor=1).replace("–", "to"),
    )


def print_real_pairs(folder: Path, num_pairs: int) -> None:
    for pairs in real_pairs(folder, num_pairs):
        if pairs.false is None:
            print(f"{pairs.arm}: {pairs.num_seeds} seeds; 4 are needed")
        else:
            side = pairs.num_seeds // 2
            told = f"{pairs.num_pairs} A/A pairs of {side} seeds and half of {pairs.num_examples} examples"
            print(f"{pairs.arm}: {told}: {percent(pairs.false)} % false verdicts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--studies", type=int, default=10_000, help="simulated studies a cell, or real A/A pairs an arm"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the CSV and the page")
    parser.add_argument("--examples", type=int, nargs="+", help="only the cells of these numbers of examples")
    parser.add_argument("--render", action="store_true", help="write the page from the CSV that is there")
    parser.add_argument("--runs", type=Path, help="a study folder: A/A pairs from its stored predictions")
    options = parser.parse_args()
    if options.runs:
        print_real_pairs(options.runs, options.studies)
        return
    if not options.render:
        began = time.monotonic()
        with ProcessPoolExecutor(options.workers) as pool:
            rows = list(grid_rows(run_grid(options.studies, options.examples or NUM_EXAMPLES, pool)))
            rows += kept_rows(options.out, options.examples) if options.examples else other_rows(options.studies, pool)
        write_text(options.out / "calibration.csv", as_csv(rows))
        print(f"measured in {(time.monotonic() - began) / 60:.0f} minutes")
    write_text(options.out / "calibration.md", page(read_csv(options.out / "calibration.csv")))
    print(options.out / "calibration.md")


if __name__ == "__main__":
    main()
