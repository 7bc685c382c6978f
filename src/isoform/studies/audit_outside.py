"""What the manifests of finished runs tell of a comparison that no study planned. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from isoform.storage import read_json
from isoform.studies.audit_curves import diverged
from isoform.studies.audit_options import BOOKKEEPING, acts_without_weights
from isoform.studies.audit_rows import (
    DEAD,
    DIVERGED,
    ONE_SEED,
    OTHER_DATA,
    SELECTION,
    TERMS,
    TEST,
    UNKNOWN,
    Pair,
    Row,
    or_pass,
    row,
)
from isoform.studies.audit_terms import ROUNDING, SECONDS_NOISE, Terms, relative_difference, told_apart
from isoform.studies.layout import flat
from isoform.yaml12 import parse_yaml


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder: what it was asked, and what it says of itself."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        value: dict[str, Any] = read_json(self.folder / "manifest.json")
        return value

    @cached_property
    def config(self) -> dict[str, Any]:
        path = self.folder / "config.yaml"
        return flat(parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}) if path.is_file() else {}

    @cached_property
    def stages(self) -> list[dict[str, Any]]:
        """This run, behind the stages that it started from where it belongs to a study that says so."""
        study = self.folder.resolve().parent.parent
        if self.folder.resolve().parent.name == "stages" and (study / "results.json").is_file():
            final = f"stages/{self.folder.resolve().name}"
            for arm in read_json(study / "results.json").get("arms", ()):
                for run in arm.get("runs", ()):
                    if run.get("final") == final:
                        return [{**stage, "folder": str(study / stage["folder"])} for stage in run["stages"]]
        manifest = self.manifest
        known = {key: manifest.get(key) for key in ("steps", "tokens")}
        seconds = (manifest.get("seconds") or {}).get("total")
        return [{"name": "training", "folder": str(self.folder), "seconds": seconds, **known}]

    @property
    def diverged(self) -> bool:
        return (self.folder / "metrics.jsonl").is_file() and diverged(self.folder)

    def fingerprint(self, split: str) -> str | None:
        """Of a split's documents."""
        found = (self.manifest.get("data") or {}).get("splits", {}).get("fingerprints", {}).get(split)
        return None if found is None else str(found)


@dataclass(frozen=True, eq=False)
class Result:
    """What is compared under a name: its run folders, one a seed; none where only predictions are there."""

    name: str
    runs: list[Run]

    def terms(self) -> Terms:
        """Means over seeds of what is known."""
        found: Terms = {}
        for name, value in {"updates": "steps", "target_tokens": "tokens", "seconds": "seconds"}.items():
            numbers = [stage.get(value) for run in self.runs for stage in run.stages]
            kept = [float(number) for number in numbers if number is not None]
            if numbers and len(kept) == len(numbers):
                found[name] = sum(kept) / len(self.runs)
        sizes = [(run.manifest.get("model") or {}).get("total") for run in self.runs]
        if sizes and None not in sizes:
            found["parameters"] = sum(float(size or 0) for size in sizes) / len(sizes)
        return found


def read_result(name: str, path: Path) -> Result:
    """The runs in a folder, or in its `seed-0`, `seed-1`, ..."""
    if not path.is_dir():
        return Result(name, [])
    folders = sorted(folder for folder in path.glob("seed-*") if folder.is_dir()) or [path]
    return Result(name, [Run(folder) for folder in folders if (folder / "manifest.json").is_file()])


def audit_results(results: Sequence[Result], split: str | None, num_seeds: int) -> list[Row]:
    """Every check that finished runs allow, each result beside the first."""
    first, *others = results
    rows = [
        row(
            UNKNOWN, "inform", f"{result.name}: no manifest.json beside its predictions, so its training is not audited"
        )
        for result in results
        if not result.runs
    ]
    beside = [(first, other) for other in others if first.runs and other.runs]
    checks: list[tuple[str, Callable[[Result, Result], list[Row]], str]] = [
        (DEAD, _equal_weights, "the final weights differ"),
        (TERMS, _terms, "both were given the same parameters, updates, target tokens and time"),
    ]
    if split is not None:
        checks += [
            (
                SELECTION,
                lambda one, two: _selected(one, two, split),
                "nothing was selected on the documents that are compared",
            ),
            (OTHER_DATA, lambda one, two: _other_data(one, two, split), f"{split} is the same data in all"),
        ]
    for check, look, looked_at in checks if beside else ():
        rows += or_pass(check, [found for pair in beside for found in look(*pair)], looked_at)
    runs = [(result, run) for result in results for run in result.runs]
    if runs:
        rows += or_pass(TEST, _test_scored(runs), "no run scored the test split more than once")
        rows += or_pass(DIVERGED, _diverged(runs), "every loss fell and none jumped")
    if num_seeds == 1:
        text = "one seed: the verdict speaks of these models, not of the methods that made them"
        return [*rows, row(ONE_SEED, "inform", text)]
    return [*rows, row(ONE_SEED, "pass", f"{num_seeds} seeds")]


def differences(first: Result, second: Result) -> dict[str, Any]:
    """Fields of the second's config that the first has otherwise: those of their first seeds' last stages."""
    if not (first.runs and second.runs):
        return {}
    ours, theirs = second.runs[0].config, first.runs[0].config
    return {
        name: ours.get(name)
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and name not in BOOKKEEPING and name != "about"
    }


def _pair(first: Result, second: Result) -> Pair:
    return first.name, second.name


def _equal_weights(first: Result, second: Result) -> list[Row]:
    """The same bits; results that answer, are scored or select in another way have a right to them."""
    hashes = [[run.manifest.get("final_sha256") for run in result.runs] for result in (first, second)]
    same = sum(one == two and one is not None for one, two in zip(*hashes, strict=False))
    changed = differences(first, second)
    if not same or any(acts_without_weights(name) for name in changed):
        return []
    where = f" at {same} of {min(map(len, hashes))} seeds" if min(map(len, hashes)) > 1 else ""
    why = f"{', '.join(changed)} made no difference" if changed else "it is the same training twice"
    text = f"{first.name} and {second.name} ended with bit-equal weights{where}: {why}"
    return [row(DEAD, "refuse", text, _pair(first, second))]


def _selected(first: Result, second: Result, split: str) -> list[Row]:
    """A checkpoint or stopping time that was chosen on the documents that judge it."""
    rows = []
    for result in (first, second):
        for run in result.runs:
            on = str(run.config.get("train.select.split"))
            chosen = run.config.get("train.select.metric", "last") != "last"
            if chosen and (on == split or run.fingerprint(split) == run.fingerprint(on) is not None):
                text = (
                    f"{result.name}: its checkpoint was selected on {on}, which holds the documents of {split}, on "
                    "which it is compared; train again with another train.select.split (data.holdout carves one)"
                )
                rows.append(row(SELECTION, "refuse", text, _pair(first, second)))
                break
    return rows


def _other_data(first: Result, second: Result, split: str) -> list[Row]:
    known = [{run.fingerprint(split) for run in result.runs} - {None} for result in (first, second)]
    if not all(known) or known[0] == known[1]:
        return []
    told = " and ".join(
        f"{', '.join(map(str, sorted(map(str, prints))))} in {result.name}"
        for prints, result in zip(known, (first, second), strict=True)
    )
    text = f"{split} was read from other data: fingerprints {told}; score both on the same files"
    return [row(OTHER_DATA, "warn", text, _pair(first, second))]


def _terms(first: Result, second: Result) -> list[Row]:
    terms, pair = (first.terms(), second.terms()), _pair(first, second)
    told = [
        told_apart(name, (terms[0][name], terms[1][name]), pair)
        for name in ("parameters", "updates", "target_tokens", "seconds")
        if name in terms[0]
        and name in terms[1]
        and relative_difference(terms[0][name], terms[1][name]) > (SECONDS_NOISE if name == "seconds" else ROUNDING)
    ]
    return [row(TERMS, "inform", f"made: {'; '.join(told)}", pair)] if told else []


def _test_scored(runs: Sequence[tuple[Result, Run]]) -> list[Row]:
    rows = []
    for _, run in runs:
        scored = int(run.manifest.get("test_scored", 0))
        if scored > 1:
            text = (
                f"{run.folder}: the test split was scored {scored} times; what was chosen after the first is optimistic"
            )
            rows.append(row(TEST, "warn", text))
    return rows


def _diverged(runs: Sequence[tuple[Result, Run]]) -> list[Row]:
    text = "its loss rose, jumped or was not finite; look at metrics.jsonl"
    return [row(DIVERGED, "warn", f"{run.folder}: {text}") for _, run in runs if run.diverged]
