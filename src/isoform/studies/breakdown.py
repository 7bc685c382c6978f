"""Where classifiers err, as finished words and figures: confusion, reliability, slices, the surest mistakes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from isoform.studies import charts, wording
from isoform.studies.answers import MAX_CHARACTERS
from isoform.studies.records import Records
from isoform.studies.wording import clean, is_number, shorten

Row = dict[str, Any]

# A larger table of labels is not read; its most frequent confusions are told.
MAX_TABLE_LABELS = 12
MAX_CONFUSIONS = 20
# Pairs of labels by which mistakes can be picked; the style sheet knows as many.
MAX_PICKS = 12
# Mistakes of each arm of a study; a run's are all shown.
MAX_MISTAKES_IN_STUDY = 30
MAX_SLICES = 40
SHADES = 8
ACCURACY = "accuracy"


def breakdowns(records: Records) -> list[Row]:
    """A part for each arm and split: of a study each arm's first seed on the compared split, of a run every split."""
    compare = records.results.get("compare") or {}
    found: list[Row] = []
    for arm in records.results.get("arms") or ():
        run = next((run for run in arm.get("runs") or () if run.get("final")), None)
        if run is None:
            continue
        about = records.breakdown(str(run["final"]))
        splits = {name: part for name, part in (about.get("splits") or {}).items() if _is_whole(part)}
        wanted = [compare["split"]] if compare.get("split") in splits else list(splits)
        for split in wanted if not compare else wanted[-1:]:
            part = splits[split]
            if records.is_study:
                part = {**part, "mistakes": part["mistakes"][:MAX_MISTAKES_IN_STUDY]}
            found.append(_part(len(found), str(arm.get("name") or ""), run.get("seed"), split, about, part))
    return found


def _is_whole(part: Any) -> bool:
    """Whether all is there that `evaluation.breakdown` writes of a split."""
    if not isinstance(part, dict) or not {"labels", "confusion", "slices", "mistakes"} <= part.keys():
        return False
    return isinstance(part["confusion"], list) and len(part["confusion"]) == len(part["labels"])


def _part(number: int, arm: str, seed: Any, split: str, about: Mapping[str, Any], part: Mapping[str, Any]) -> Row:
    return {
        "id": f"part{number}",
        "arm": arm,
        "seed": seed,
        "split": split,
        "n": wording.count_text(part.get("n")),
        "confusion": _confusion(part),
        "confusions": _confusions(part),
        "reliability": _reliability(arm, split, about, part),
        "slices": _slices(part),
        **_mistakes(part),
    }


# ----------------------------------------------------------------------------------------------------------- confusion


def _confusion(part: Mapping[str, Any]) -> Row | None:
    """The table of labels, each row shaded by its shares; None where there are too many of them."""
    labels, counts = part["labels"], part["confusion"]
    if len(labels) > MAX_TABLE_LABELS:
        return None
    rows = []
    for at, (label, row) in enumerate(zip(labels, counts, strict=True)):
        total = sum(row)
        cells = [
            {
                "count": wording.count_text(count),
                "share": _percent(count / total) if total else "",
                "shade": round(SHADES * count / total) if total else 0,
                "right": at == column,
            }
            for column, count in enumerate(row)
        ]
        rows.append({"label": clean(label), "cells": cells, "total": wording.count_text(total)})
    return {"labels": [clean(label) for label in labels], "rows": rows}


def _confusions(part: Mapping[str, Any]) -> list[Row]:
    """The most frequent confusions, where the table is too large to be shown."""
    labels, counts = part["labels"], part["confusion"]
    if len(labels) <= MAX_TABLE_LABELS:
        return []
    cells = [
        (count, labels[gold], labels[said], sum(row))
        for gold, row in enumerate(counts)
        for said, count in enumerate(row)
        if gold != said and count
    ]
    return [
        {"gold": clean(gold), "said": clean(said), "count": wording.count_text(count), "share": _percent(count / total)}
        for count, gold, said, total in sorted(cells, key=lambda cell: -cell[0])[:MAX_CONFUSIONS]
    ]


# --------------------------------------------------------------------------------------------------------- reliability


def _reliability(arm: str, split: str, about: Mapping[str, Any], part: Mapping[str, Any]) -> Row | None:
    plain, scaled = part.get("reliability") or {}, part.get("scaled") or {}
    if not plain.get("bins"):
        return None
    temperature, fitted_on = about.get("temperature"), about.get("fitted_on")
    error = wording.value_text(plain.get("error"), ACCURACY)
    words = [f"Expected calibration error {error}, loss {wording.value_text(plain.get('nats'), 'loss')}."]
    if scaled.get("bins"):
        after = wording.value_text(scaled.get("error"), ACCURACY)
        words.append(
            f"With the scores divided by the temperature {temperature:.3g}, fitted on {fitted_on}: {after}, "
            f"loss {wording.value_text(scaled.get('nats'), 'loss')}."
        )
    elif is_number(temperature):
        words.append(
            f"The temperature {temperature:.3g} was fitted on these very examples, so that it is judged elsewhere."
        )
    else:
        words.append("No temperature: there is no split to fit it on (train.select.split).")
    label = f"Reliability of {arm} on {split}: calibration error {error}"
    figure = charts.reliability(_points(plain), _points(scaled), label)
    return {"figure": figure, "words": words, "scaled": bool(scaled.get("bins"))}


def _points(reliability: Mapping[str, Any]) -> list[tuple[float, float, int]]:
    return [(bin["confidence"], bin["accuracy"], bin["n"]) for bin in reliability.get("bins") or ()]


# -------------------------------------------------------------------------------------------------------------- slices


def _slices(part: Mapping[str, Any]) -> Row | None:
    """Accuracy of each part of the split with its interval, all on one axis."""
    rows = (part.get("slices") or [])[:MAX_SLICES]
    if not rows:
        return None
    domain = charts.span([row[key] for row in rows for key in ("low", "high")], pad_fraction=0.03)
    domain = (max(0.0, domain[0]), min(1.0, domain[1])) if domain[0] < 1.0 and domain[1] > 0.0 else domain
    return {
        "axis": charts.axis_row(domain, lambda tick: f"{100 * tick:.4g}", "axis in %"),
        "hidden": len(part["slices"]) - len(rows),
        "rows": [
            {
                "kind": row["kind"],
                "name": clean(row["name"]),
                "n": wording.count_text(row["n"]),
                "accuracy": wording.bare_value(row["accuracy"], ACCURACY),
                "interval": wording.value_interval_text(row["low"], row["high"], ACCURACY),
                "figure": charts.strip_row(
                    [], row["accuracy"], row["low"], row["high"], domain, f"accuracy of {clean(row['name'])}"
                ),
            }
            for row in rows
        ],
    }


# ------------------------------------------------------------------------------------------------------------ mistakes


def _mistakes(part: Mapping[str, Any]) -> Row:
    """The surest mistakes, and the pairs of labels by which they can be picked."""
    mistakes = part.get("mistakes") or []
    every = sum(map(sum, part["confusion"])) - sum(row[at] for at, row in enumerate(part["confusion"]))
    count = wording.plural(every, "mistake")
    pairs = [pair for pair, _ in Counter((row["gold"], row["prediction"]) for row in mistakes).most_common()]
    place = {pair: number for number, pair in enumerate(pairs[:MAX_PICKS])}
    counts = Counter(place.get((row["gold"], row["prediction"])) for row in mistakes)
    return {
        "num_mistakes": wording.count_text(every),
        "told": f"{count}, the surest first" if every == len(mistakes) else f"The surest {len(mistakes)} of {count}",
        "picks": [
            {"number": number, "gold": clean(gold), "said": clean(said), "count": counts[number]}
            for (gold, said), number in place.items()
        ]
        if len(pairs) > 1
        else [],
        "mistakes": [
            {
                "pick": place.get((row["gold"], row["prediction"])),
                "input": shorten(clean(row["input"]), MAX_CHARACTERS),
                "gold": clean(row["gold"]),
                "said": clean(row["prediction"]),
                "probability": wording.bare_value(row["probability"], ACCURACY),
                "probability_of_gold": wording.bare_value(row["probability_of_gold"], ACCURACY),
            }
            for row in mistakes
        ],
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f}{wording.SPACE}%"
