"""A study's finished runs as the audit reads them: manifests, losses, events. Nothing here needs torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from isoform.storage import iterate_jsonl, read_json
from isoform.studies.audit_rows import names, trained
from isoform.studies.layout import Layout, StageRun


@dataclass(frozen=True, eq=False)
class Finished:
    """One finished stage run; `folder` is its own."""

    run: StageRun
    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        value: dict[str, Any] = read_json(self.folder / "manifest.json")
        return value

    @cached_property
    def losses(self) -> list[float | None]:
        return logged_losses(self.folder)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        return list(iterate_jsonl(self.folder / "events.jsonl"))

    @property
    def seconds(self) -> float:
        return float(self.manifest["seconds"]["total"])

    @property
    def steps(self) -> int:
        return int(self.manifest["steps"])

    @property
    def num_steps(self) -> int:
        return int(self.manifest["num_steps"])

    @property
    def tokens(self) -> int:
        return int(self.manifest["tokens"])


def logged_losses(folder: Path) -> list[float | None]:
    """The loss of every logged step; None where it was not a finite number."""
    return [row.get("loss") for row in iterate_jsonl(folder / "metrics.jsonl")]


def chains(layout: Layout, folder: Path) -> dict[str, list[Finished]]:
    """Arm -> all its stage runs, seed by seed; a stage that arms share is in each of them."""
    return {
        arm: [Finished(run, folder / run.folder) for seed in layout.seeds for run in layout.chain(arm, seed)]
        for arm in trained(layout)
    }


def finals(layout: Layout, folder: Path, arm: str) -> list[Finished]:
    """The last stage of an arm, seed by seed."""
    last = [layout.chain(arm, seed)[-1] for seed in layout.seeds]
    return [Finished(run, folder / run.folder) for run in last]


def by_stage(layout: Layout, folder: Path) -> Iterator[tuple[str, list[Finished]]]:
    """(words for it, its runs) for every stage of the study: runs of all seeds that the same arms share."""
    arms: dict[str, list[str]] = defaultdict(list)
    runs: dict[str, Finished] = {}
    for arm, chain in chains(layout, folder).items():
        for finished in chain:
            runs.setdefault(finished.run.key, finished)
            arms[finished.run.key].append(arm)
    groups: dict[tuple[str, tuple[str, ...]], list[Finished]] = defaultdict(list)
    for key, finished in runs.items():
        groups[finished.run.stage, tuple(arms[key])].append(finished)
    for (stage, sharing), members in groups.items():
        yield f"stage {stage} of {names(sharing)}", members


def seeds_of(runs: Iterable[Finished]) -> str:
    """`seed 0`, `seeds 0, 2`."""
    seeds = sorted({finished.run.seed for finished in runs})
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
