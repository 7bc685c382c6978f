"""Where a report's figures come from: audit, settings, data, cost, and how to run it again; as finished words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isoform.studies import wording
from isoform.studies.records import Records, Results
from isoform.studies.tables import total_of
from isoform.studies.wording import LEVELS, MISSING, clean, plain_text, shorten

MAX_CONFIG_CHARACTERS = 20_000
Row = dict[str, Any]


def audit(results: Results) -> list[Row]:
    order = list(LEVELS)
    rows = []
    for row in results.get("audit") or ():
        level = row.get("level") if row.get("level") in LEVELS else "inform"
        pair = " and ".join(map(str, row.get("pair") or ()))
        sign, word = LEVELS[level]
        rows.append(
            {
                "level": level,
                "sign": sign,
                "word": word,
                "check": row.get("check"),
                "message": row.get("message"),
                "pair": pair,
            }
        )
    return sorted(rows, key=lambda row: order.index(row["level"]))


def differences(results: Results) -> list[Row]:
    """What each arm changes from the first; for a lone arm there is nothing to tell."""
    arms = results.get("arms") or []
    if len(arms) < 2:
        return []
    return [
        {
            "name": arm.get("name"),
            "stages": " → ".join(map(str, arm.get("stages") or ())) or "as it is",
            "settings": [
                (key, shorten(plain_text(value), 200)) for key, value in (arm.get("differences") or {}).items()
            ],
            "first": index == 0,
        }
        for index, arm in enumerate(arms)
    ]


def config(records: Records) -> list[Row]:
    """The resolved config of every stage of the first arm: what the differences differ from."""
    arm: Mapping[str, Any] = next(iter(records.results.get("arms") or ()), {})
    run: Mapping[str, Any] = next(iter(arm.get("runs") or ()), {})
    found = [(stage.get("name"), records.config_text(str(stage.get("folder")))) for stage in run.get("stages") or ()]
    return [{"stage": name, "text": shorten(text, MAX_CONFIG_CHARACTERS)} for name, text in found if text]


def passport(data: Mapping[str, Any]) -> Row | None:
    """Split sizes as a table, overlaps and anything else as lines."""
    splits = {name: value for name, value in data.items() if isinstance(value, dict) and name != "overlap"}
    columns = list(dict.fromkeys(key for value in splits.values() for key in value))
    rows = [
        {"name": name, "cells": [_brief(value.get(key, MISSING)) for key in columns]} for name, value in splits.items()
    ]
    others = {name: value for name, value in data.items() if name not in splits}
    lines = [(_words(key), _brief(value)) for key, value in _flat(others)]
    return {"columns": [_words(key) for key in columns], "rows": rows, "lines": lines} if rows or lines else None


def cost(results: Results) -> list[tuple[str, str]]:
    stages = {
        str(stage.get("folder")): stage
        for arm in results.get("arms") or ()
        for run in arm.get("runs") or ()
        for stage in run.get("stages") or ()
    }
    rows = [
        ("whole time", wording.duration_text(results.get("seconds"))),
        ("training alone", wording.duration_text(total_of(stage.get("seconds") for stage in stages.values()))),
        ("tokens trained on", wording.count_text(total_of(stage.get("tokens") for stage in stages.values()))),
        ("stages trained", str(len(stages)) if len(stages) > 1 else MISSING),
        ("precision", plain_text(results["precision"]) if results.get("precision") else MISSING),
    ]
    rows += [
        (f"machine: {_words(key)}" if key else "machine", _brief(value))
        for key, value in _flat(results.get("machine") or {})
    ]
    return [(name, value) for name, value in rows if value not in (MISSING, "")]


def again(results: Results) -> Row:
    code = results.get("code") or {}
    packages = code.get("packages") or {}
    rows = [
        ("isoform", plain_text(code["version"]) if code.get("version") else ""),
        ("seeds", ", ".join(map(plain_text, results.get("seeds") or ()))),
        ("started", clean(results.get("started"))),
        ("finished", clean(results.get("finished"))),
        (
            "packages",
            ", ".join(f"{name} {version}" for name, version in packages.items()) if isinstance(packages, dict) else "",
        ),
    ]
    return {"command": results.get("command"), "rows": [(name, value) for name, value in rows if value]}


def _words(key: Any) -> str:
    return str(key).replace("_", " ")


def _brief(value: Any) -> str:
    return shorten(plain_text(value), 160)


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as (`a, b`, value) pairs."""
    if not isinstance(value, dict):
        return [(path, value)]
    return [pair for key, inner in value.items() for pair in _flat(inner, f"{path}, {key}" if path else str(key))]
