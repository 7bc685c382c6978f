"""A report's tables of figures, as finished words: published ones, differences, arms, metrics, checkpoints, tuning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from isoform.studies import charts, wording
from isoform.studies.records import Results
from isoform.studies.wording import VERDICTS, is_number, plain_text

Row = dict[str, Any]


def published(results: Results) -> list[Row]:
    rows = []
    for claim in results.get("published") or ():
        metric = str(claim.get("metric") or "")
        ours = summary_of(results, claim.get("arm"), metric, claim.get("split"))
        rows.append(
            {
                "arm": claim.get("arm"),
                "what": metric_on(claim),
                "published": wording.value_text(claim.get("value"), metric),
                "ours": wording.value_text(ours.get("mean"), metric),
                "interval": wording.value_interval_text(ours.get("low"), ours.get("high"), metric),
                "source": claim.get("source"),
                "note": claim.get("note"),
            }
        )
    return rows


def forests(results: Results) -> list[Row]:
    """One forest plot for each metric and split that is asked about, since only those share an axis."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for question in results.get("questions") or ():
        if is_number(question.get("difference")):
            groups.setdefault((str(question.get("metric") or ""), str(question.get("split") or "")), []).append(
                question
            )
    return [_forest(metric, split, questions) for (metric, split), questions in groups.items()]


def _forest(metric: str, split: str, questions: Sequence[Mapping[str, Any]]) -> Row:
    values = [
        question[key] for question in questions for key in ("difference", "low", "high") if is_number(question.get(key))
    ]
    margins = [
        side * question["margin"] for question in questions if is_number(question.get("margin")) for side in (-1, 1)
    ]
    domain = charts.span(values, (0.0, *margins))
    unit = wording.unit_words(metric)
    return {
        "title": metric_on({"metric": metric, "split": split}),
        "unit": unit,
        "lower_is_better": wording.lower_is_better(metric),
        "margin": any(margins),
        "axis": charts.axis_row(
            domain, lambda tick: _tick(tick, metric, signed=True), f"axis in {unit or 'the metric’s unit'}"
        ),
        "rows": [_forest_row(question, metric, domain) for question in questions],
    }


def _forest_row(question: Mapping[str, Any], metric: str, domain: tuple[float, float]) -> Row:
    first, second = wording.pair_of(question)
    decimals = wording.difference_decimals(question)
    low, high = (question.get(end) if is_number(question.get(end)) else None for end in ("low", "high"))
    kind = wording.verdict_kind(question)
    difference = wording.signed_text(question["difference"], metric, decimals)
    interval = wording.difference_interval_text(low, high, metric, decimals)
    sign, word = VERDICTS[kind]
    label = f"{second} minus {first}: {difference} {wording.unit_words(metric)} ({interval or 'no interval'}), {word}"
    margin = question.get("margin") if is_number(question.get("margin")) else None
    return {
        "first": first,
        "second": second,
        "figure": charts.interval_row(question["difference"], low, high, domain, kind, label, margin),
        "difference": difference,
        "interval": interval,
        "p": wording.p_bare(question.get("p")),
        "p_adjusted": wording.p_bare(question.get("p_adjusted")),
        "kind": kind,
        "sign": sign,
        "word": word,
    }


def summary_of(results: Results, arm_name: Any, metric: str, split: Any) -> Mapping[str, Any]:
    for arm in results.get("arms") or ():
        if arm.get("name") == arm_name:
            for row in arm.get("summary") or ():
                if row.get("metric") == metric and row.get("split") == split:
                    return dict(row)
    return {}


def _primary(results: Results) -> tuple[str, Any] | None:
    """The compared metric and split; where nothing is compared, the first one that was measured."""
    compare = results.get("compare") or {}
    if compare.get("metric"):
        return str(compare["metric"]), compare.get("split")
    rows = [row for arm in results.get("arms") or () for row in arm.get("summary") or ()]
    return (str(rows[0].get("metric")), rows[0].get("split")) if rows else None


def arms(results: Results) -> Row | None:
    """The table of arms by the compared metric, each seed's value as a ring; a lone run has its metrics instead."""
    primary, rows = _primary(results), results.get("arms") or []
    lone = not results.get("compare") and len(rows) == 1 and len(rows[0].get("runs") or ()) <= 1
    if primary is None or not rows or lone:
        return None
    metric, split = primary
    claims = [
        row for row in results.get("published") or () if _is_about(row, metric, split) and is_number(row.get("value"))
    ]
    summaries = [summary_of(results, arm.get("name"), metric, split) for arm in rows]
    shown = [claim["value"] for claim in claims]
    for row in summaries:
        shown += [row.get("mean"), row.get("low"), row.get("high"), *(row.get("values") or ())]
    domain = charts.span(_finite(shown))
    return {
        "title": metric_on({"metric": metric, "split": split}),
        "unit": {"fraction": "%", "nats": "nats", "bits": "bits"}.get(wording.unit_of(metric), ""),
        "confidence": wording.percent_text(wording.confidence_of(results)),
        "published": bool(claims),
        "axis": charts.axis_row(domain, lambda tick: _tick(tick, metric), "axis"),
        "rows": [
            _arm_row(
                arm, summary, metric, domain, [row["value"] for row in claims if row.get("arm") == arm.get("name")]
            )
            for arm, summary in zip(rows, summaries, strict=True)
        ],
    }


def _arm_row(
    arm: Mapping[str, Any],
    summary: Mapping[str, Any],
    metric: str,
    domain: tuple[float, float],
    published: Sequence[float],
) -> Row:
    runs = arm.get("runs") or []
    low, high, mean = (summary.get(key) if is_number(summary.get(key)) else None for key in ("low", "high", "mean"))
    values = _finite(summary.get("values"))
    seeds = ", ".join(wording.bare_value(value, metric) for value in values)
    parameters = arm.get("parameters") or {}
    return {
        "name": arm.get("name"),
        "mean": wording.bare_value(mean, metric),
        "interval": wording.value_interval_text(low, high, metric),
        "figure": charts.strip_row(values, mean, low, high, domain, f"seeds: {seeds or 'none'}", published),
        "seeds": seeds,
        "parameters": wording.count_text(parameters.get("total")),
        "trainable": _trainable(parameters),
        "tokens": wording.count_text(mean_of(_stage_sum(run, "tokens") for run in runs)),
        "steps": wording.count_text(mean_of(_stage_sum(run, "steps") for run in runs)),
        "time": wording.duration_text(mean_of(_stage_sum(run, "seconds") for run in runs)),
        "diverged": _diverged(runs),
    }


def _diverged(runs: Sequence[Mapping[str, Any]]) -> str:
    seeds = [str(run.get("seed")) for run in runs if run.get("diverged")]
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {wording.listed(seeds)} diverged" if seeds else ""


def _trainable(parameters: Mapping[str, Any]) -> str:
    """Said only where not every parameter is trained."""
    total, trainable = parameters.get("total"), parameters.get("trainable")
    return wording.count_text(trainable) if is_number(total) and is_number(trainable) and trainable < total else ""


def metrics(results: Results) -> Row | None:
    """Every other metric: a row an arm and split's metric a column; for a lone run, its metrics as rows."""
    arms, primary = results.get("arms") or [], _primary(results)
    keys = list(
        dict.fromkeys(
            (str(row.get("metric") or ""), row.get("split")) for arm in arms for row in arm.get("summary") or ()
        )
    )
    if not results.get("compare") and len(arms) == 1:
        return {"columns": [], "rows": [_metric_row(row) for row in arms[0].get("summary") or ()]} if keys else None
    keys = [key for key in keys if key != primary]
    if not keys:
        return None
    columns = [metric_on({"metric": metric, "split": split}) for metric, split in keys]
    rows = []
    for arm in arms:
        found = [(summary_of(results, arm.get("name"), metric, split), metric) for metric, split in keys]
        cells = [
            (
                wording.value_text(row.get("mean"), metric),
                wording.value_interval_text(row.get("low"), row.get("high"), metric),
            )
            for row, metric in found
        ]
        rows.append({"name": arm.get("name"), "cells": cells})
    return {"columns": columns, "rows": rows}


def _metric_row(row: Mapping[str, Any]) -> Row:
    metric = str(row.get("metric") or "")
    return {
        "name": wording.metric_words(metric),
        "split": row.get("split"),
        "value": wording.value_text(row.get("value"), metric),
        "interval": wording.value_interval_text(row.get("low"), row.get("high"), metric),
        "n": wording.count_text(row.get("n")),
    }


def selections(results: Results) -> list[Row]:
    """Last, best-loss and best-metric checkpoint of each arm, mean over seeds."""
    primary = _primary(results)
    rows = []
    for arm in results.get("arms") or ():
        picks = [run.get("selections") or {} for run in arm.get("runs") or ()]
        means = {rule: mean_of(pick.get(rule) for pick in picks) for rule in ("last", "best-loss", "best-metric")}
        if primary and any(value is not None for value in means.values()):
            cells = {rule: wording.value_text(value, primary[0]) for rule, value in means.items()}
            rows.append({"name": arm.get("name"), "cells": cells})
    return rows


def tuning(results: Results) -> list[Row]:
    return [
        {
            "name": arm.get("name"),
            "setting": ", ".join(f"{key} = {plain_text(value)}" for key, value in (trial.get("setting") or {}).items()),
            "value": plain_text(trial.get("value")),
            "chosen": bool(trial.get("chosen")),
        }
        for arm in results.get("arms") or ()
        for trial in arm.get("tuning") or ()
    ]


def metric_on(row: Mapping[str, Any]) -> str:
    metric = wording.metric_words(str(row.get("metric") or ""))
    return f"{metric} on {row['split']}" if row.get("split") else metric


def _is_about(claim: Mapping[str, Any], metric: str, split: Any) -> bool:
    return claim.get("metric") == metric and claim.get("split") == split


def _tick(value: float, metric: str, signed: bool = False) -> str:
    shown = 100 * value if wording.unit_of(metric) == "fraction" else value
    text = f"{abs(shown):.6g}"
    return ("−" if shown < 0 else "+" if signed and shown > 0 else "") + text if float(text) else "0"


def _finite(values: Any) -> list[float]:
    return [float(value) for value in values or () if is_number(value)]


def mean_of(values: Iterable[Any]) -> float | None:
    kept = [value for value in values if is_number(value)]
    return sum(kept) / len(kept) if kept else None


def total_of(values: Iterable[Any]) -> float | None:
    kept = [value for value in values if is_number(value)]
    return sum(kept) if kept else None


def _stage_sum(run: Mapping[str, Any], key: str) -> float | None:
    return total_of(stage.get(key) for stage in run.get("stages") or ())
