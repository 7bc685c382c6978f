"""The smaller screens: metric rows, answers, plans, recipes, findings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from rich.console import Console

from isoform.studies import wording
from isoform.studies.terminal import print_line, print_table

_LEVELS = {"ok": ("✓", "green"), "info": ("·", ""), "warning": ("!", "yellow"), "error": ("✗", "bold red")}
# Bars of a small curve, from nothing to full.
_BARS = " ▁▂▃▄▅▆▇█"
CURVE_WIDTH = 60


class Answered(Protocol):
    @property
    def input(self) -> Any: ...

    @property
    def answer(self) -> str: ...

    @property
    def num_unknown(self) -> int: ...


def print_rows(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Rows of eval.json."""
    columns = {"value": "value", "low": "low", "high": "high"}
    if any("value_int8" in row for row in rows):
        columns |= {"value_int8": "in int8", "change": "change"}
    heads = ["metric", "split", *columns.values(), "n"]
    cells = [
        [
            str(row["metric"]),
            str(row["split"]),
            *(wording.value_text(row.get(key), str(row["metric"])) for key in columns),
            wording.count_text(row.get("n")),
        ]
        for row in rows
    ]
    print_table(console, heads, cells, num_text_columns=2)


def print_answers(answers: Iterable[Answered], console: Console) -> int:
    """Inputs and answers as they come; returns how many input tokens were unknown."""
    unknown = 0
    for answer in answers:
        unknown += answer.num_unknown
        console.print(f"{answer.input}\t{answer.answer}", markup=False, highlight=False, soft_wrap=True)
    return unknown


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """What each stage takes, the rate's curve, the total, and what to know before."""
    print_line(console, "", str(plan["name"]), "bold")
    heads = ["stage", "runs", "parameters", "steps", "tokens", "FLOPs", "per step", "training", "scoring", "each"]
    cells = []
    for stage in plan["stages"]:
        model = stage["model"]
        flops = stage["tokens"] * (model["flops_forward_per_token"] + model["flops_backward_per_token"])
        seconds = [stage.get(key) for key in ("seconds_training", "seconds_evaluating", "seconds_total")]
        cells.append(
            [
                str(stage["name"]),
                str(stage["runs"]),
                f"{model['total']:,}"
                + (f" ({model['active']:,} active)" if model["active"] < model["total"] else "")
                + (f" ({model['trainable']:,} trained)" if model["trainable"] < model["total"] else ""),
                f"{stage['steps']:,}",
                f"{stage['tokens']:,}",
                f"{flops:.2g}",
                f"{1000 * stage['seconds_per_step']:.0f} ms" if "seconds_per_step" in stage else wording.MISSING,
                *(wording.duration_text(value) for value in seconds),
            ]
        )
    print_table(console, heads, cells, num_text_columns=1)
    for stage in plan["stages"]:
        rates = [rate for _, rate in stage["learning_rates"]]
        print_line(console, "", f"rate  {_curve(rates)}  {stage['name']}, peak {max(rates):.3g}")
    sizes = (plan["disk_bytes"], plan["free_disk_bytes"], plan["memory_bytes"])
    disk, free, memory = (f"{size / 1e9:.2f} GB" for size in sizes)
    peak = max(stage["peak_memory_bytes"] for stage in plan["stages"]) / 1e9
    stage = plan["stages"][0]
    print_line(
        console,
        "",
        f"{stage['precision']} on {stage['device']}; memory {peak:.2f} of {memory}; disk {disk} of {free} free",
    )
    for name, trials in plan["tuning_trials"].items():
        print_line(console, "", f"tuning: {trials} settings of {name} with the first seed")
    together = f"all runs together, {plan['jobs']} at a time" if plan["jobs"] > 1 else "all runs together"
    if plan["seconds_total"] is not None:
        print_line(console, "", f"{together}: about {wording.duration_text(plan['seconds_total'])}", "bold")
    for stage in plan["stages"]:
        for warning in stage["warnings"]:
            print_line(console, "!", f"{stage['name']}: {warning}", "yellow")
    for row in plan["audit"]:
        if row["level"] in {"refuse", "warn"}:
            print_line(console, "✗" if row["level"] == "refuse" else "!", f"{row['check']}: {row['message']}", "yellow")
    if plan.get("attempt"):
        print_line(console, "✓", "tried: one step, evaluation, save and reload went through", "green")


def print_bench(values: dict[str, Any], console: Console) -> None:
    """The ceilings, what a step reaches of them, where its time goes, and with which kernels."""
    step, ceilings, kernels = values["step"], values["ceilings"], values["kernels"]
    facts = values["machine"]
    print_line(console, "", str(values["name"]), "bold")
    print_line(
        console, "", f"{facts['cpu']}; {kernels['threads']} threads; {values['precision']} on {values['device']}"
    )
    print_line(console, "", f"kernels: {kernels['what']}: {kernels['why']}")
    rows = [
        [f"matrix products, fp32, {ceilings['rows']:,} rows", f"{ceilings['fp32_gflops']:,.0f} GFLOP/s"],
        [f"matrix products, bf16, {ceilings['rows']:,} rows", f"{ceilings['bf16_gflops']:,.0f} GFLOP/s"],
        ["memory, read and written", f"{ceilings['bandwidth_gb_per_second']:,.1f} GB/s"],
        [f"training, {step['tokens']:,.0f} tokens a step", f"{step['gflops']:,.0f} GFLOP/s"],
        [f"of the ceiling in {values['precision']}", f"{100 * step['fraction_of_ceiling']:.0f} %"],
        ["tokens", f"{step['tokens_per_second']:,.0f} a second"],
        ["a step", f"{1000 * step['seconds']:,.0f} ms"],
        ["peak memory", f"{values['peak_memory_bytes'] / 1e9:.2f} GB"],
    ]
    print_table(console, ["this machine and this model", "measured"], rows, num_text_columns=1)
    shares = [[group, f"{100 * share:.1f} %"] for group, share in values["shares"].items()]
    print_table(console, ["where a step's time goes", "share"], shares, num_text_columns=1)


def print_recipes(rows: Sequence[dict[str, str]], console: Console) -> None:
    print_table(console, ["recipe", "kind", "about"], [[row["name"], row["kind"], row["about"]] for row in rows], 3)


def print_export(values: dict[str, Any], console: Console) -> None:
    """Where it is, what was compared, what whoever loads it must know."""
    also = f", and equal {', '.join(values['compared'])}" if values["compared"] else ""
    agreement = (
        f"read again by {values['reader']} in a fresh process: {values['output']} of {values['num_tokens']} tokens, "
        f"relative error {values['error']:.1e}, largest difference {values['largest_difference']:.1e}{also}"
    )
    print_line(console, "✓", agreement, "green")
    for note in values["notes"]:
        print_line(console, "·", note)
    print_line(console, "", str(values["path"]))


def print_findings(rows: Sequence[dict[str, str]], console: Console) -> None:
    for row in rows:
        sign, style = _LEVELS[row["level"]]
        advice = f": {row['advice']}" if row["advice"] else ""
        print_line(console, sign, f"{row['what']}{advice}", style)


def _curve(values: Sequence[float]) -> str:
    """A curve of block characters, `CURVE_WIDTH` wide at most."""
    places = range(CURVE_WIDTH) if len(values) > CURVE_WIDTH else range(len(values))
    chosen = [values[place * len(values) // len(places)] for place in places]
    top = max(max(chosen), 1e-300)
    return "".join(_BARS[round((len(_BARS) - 1) * value / top)] for value in chosen)
