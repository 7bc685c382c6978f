"""Where a report's figures come from: audit, settings, data, cost, and how to run it again; as finished words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isoform.studies import wording
from isoform.studies.records import Records, Results
from isoform.studies.tables import total_of
from isoform.studies.wording import LEVELS, MISSING, clean, is_number, plain_text, shorten

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
                (key, shorten(plain_text(value), 200))
                for key, value in (arm.get("differences") or {}).items()
                if key != "stages"  # they have a column of their own
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


def passport(data: Mapping[str, Any]) -> list[Row]:
    """What each stage was trained and scored on: sizes by split, overlaps in words.

    A stage's data is {"datasets": {split: counts}, "splits": {overlap, policy, ...}}; a lone run has no stage's name.
    """
    if "datasets" in data:
        return [_passport_part("", data)]
    if data and all(isinstance(part, dict) and "datasets" in part for part in data.values()):
        return [_passport_part(str(stage), part) for stage, part in data.items()]
    sizes = {name: value for name, value in data.items() if isinstance(value, dict) and name != "overlap"}
    others = {name: value for name, value in data.items() if name not in sizes}
    return [_passport_part("", {"datasets": sizes, "splits": others})] if data else []


def _passport_part(stage: str, part: Mapping[str, Any]) -> Row:
    sizes = {name: counts for name, counts in (part.get("datasets") or {}).items() if isinstance(counts, dict)}
    every = list(dict.fromkeys(key for counts in sizes.values() for key in counts))
    columns = [key for key in every if any(counts.get(key) for counts in sizes.values())]
    rows = [
        {"name": name, "cells": [_cell(counts.get(key, MISSING)) for key in columns]} for name, counts in sizes.items()
    ]
    lines = [("zero in every split", ", ".join(_words(key) for key in every if key not in columns))]
    splits = part.get("splits") or {}
    overlaps = splits.get("overlap") or ()
    if isinstance(overlaps, list | tuple):
        lines += [_overlap(row) for row in overlaps if isinstance(row, dict)]
    else:
        lines += [(f"overlap, {_words(key)}", _brief(value)) for key, value in _flat(overlaps)]
    told = {"overlap", "documents", "fingerprints", "sources"}
    lines += [(_words(key), _brief(value)) for key, value in splits.items() if key not in told]
    lines = [(name, value) for name, value in lines if value]
    columns = [_words(key) for key in columns]
    return {"stage": stage, "columns": columns, "rows": rows, "sources": _sources(splits), "lines": lines}


def _sources(splits: Mapping[str, Any]) -> list[Row]:
    """Which files each split was read from, with the fingerprints of their contents."""
    found = splits.get("sources")
    if not isinstance(found, dict):
        return []
    return [
        {"split": split, "source": clean(source), "fingerprint": clean(str(value).rpartition(" ")[2])}
        for split, files in found.items()
        for source, value in (files.items() if isinstance(files, dict) else [(plain_text(files), "")])
    ]


def _overlap(row: Mapping[str, Any]) -> tuple[str, str]:
    """How many documents two splits share, with the first of them."""
    counts = f"{plain_text(row.get('exact') or 0)} exact, {plain_text(row.get('near') or 0)} near"
    example: Mapping[str, Any] = next(iter(row.get("examples") or ()), {})
    shown = f", such as “{shorten(clean(example.get('text')), 80)}”" if example.get("text") else ""
    return f"overlap of {' and '.join(map(str, row.get('splits') or ()))}", f"{counts}{shown}"


def cost(results: Results) -> list[tuple[str, str]]:
    stages = {
        str(stage.get("folder")): stage
        for arm in results.get("arms") or ()
        for run in arm.get("runs") or ()
        for stage in run.get("stages") or ()
    }
    seconds = total_of(stage.get("seconds") for stage in stages.values())
    rows = [
        ("whole time", wording.duration_text(results.get("seconds"))),
        ("all stages together", _together(seconds, results.get("jobs")) if len(stages) > 1 else MISSING),
        ("target tokens", wording.count_text(total_of(stage.get("tokens") for stage in stages.values()))),
        ("stages trained", str(len(stages)) if len(stages) > 1 else MISSING),
        ("precision", plain_text(results["precision"]) if results.get("precision") else MISSING),
    ]
    machine = results.get("machine") or {}
    if not isinstance(machine, dict):
        machine = {"": machine}
    rows += [_part(key, value) for key, value in _flat(machine)]
    return [(name, value) for name, value in rows if value not in (MISSING, "")]


def _together(seconds: float | None, jobs: Any) -> str:
    """The stages' own times added up; where several ran at a time, that is more than the clock showed."""
    at_a_time = f", {jobs} at a time" if is_number(jobs) and jobs > 1 and seconds is not None else ""
    return f"{wording.duration_text(seconds)}{at_a_time}"


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
            ", ".join(f"{name} {version}" for name, version in packages.items() if version)
            if isinstance(packages, dict)
            else "",
        ),
    ]
    return {"command": results.get("command"), "rows": [(name, value) for name, value in rows if value]}


def _words(key: Any) -> str:
    return str(key).replace("_", " ")


def _part(key: str, value: Any) -> tuple[str, str]:
    """One fact about the machine; lists, such as a processor's flags, are for the manifest."""
    if key == "memory_bytes" and is_number(value):
        return "machine: memory", f"{value / 1e9:.1f} GB"
    return f"machine: {_words(key)}" if key else "machine", "" if value is None or isinstance(value, list) else _brief(
        value
    )


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _brief(value)


def _brief(value: Any) -> str:
    return shorten(plain_text(value), 160)


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as (`a, b`, value) pairs."""
    if not isinstance(value, dict):
        return [(path, value)]
    return [pair for key, inner in value.items() for pair in _flat(inner, f"{path}, {key}" if path else str(key))]
