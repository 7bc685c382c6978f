"""What finished runs give away: parts that took no part, equal weights, best values at an edge."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from isoform.config import Question
from isoform.errors import DataError
from isoform.storage import read_json
from isoform.studies.audit_options import acts_without_weights
from isoform.studies.audit_rows import (
    ARTEFACT,
    DAMAGED,
    DEAD,
    EDGE,
    ONE_SEED,
    TEST,
    UNUSED,
    WINDOWS,
    Pair,
    Row,
    names,
    pairs,
    row,
    trained,
)
from isoform.studies.audit_runs import Finished, by_stage, chains, finals, seeds_of
from isoform.studies.layout import Layout, config_differences, flat
from isoform.studies.statistics import Comparison, selection_artefact

CompareSelection = Callable[[Pair, Question, str], Comparison]
SELECTIONS = ("last", "best-loss", "best-metric")
MAX_NAMES = 5
# The study chooses it once, for every run.
READ_BY_THE_STUDY = {"train.precision"}


def unused_parts(layout: Layout, folder: Path) -> list[Row]:
    """Parameters without a gradient, stage by stage, and config fields that no stage of an arm has read."""
    rows = []
    for where, runs in by_stage(layout, folder):
        unused = Counter(name for finished in runs for name in finished.manifest.get("unused_parameters", ()))
        always = [name for name, count in unused.items() if count == len(runs)]
        if always:
            text = f"{where}: {_some(always)} never received a gradient; remove the part, or freeze it on purpose"
            rows.append(row(UNUSED, "warn", text))
    for arm, runs in chains(layout, folder).items():
        if never := _never_read(runs):
            rows.append(row(UNUSED, "warn", f"{names([arm])}: {_some(never)} was set and never read; remove it"))
    return rows


def _never_read(runs: list[Finished]) -> list[str]:
    """Config fields that some stage did not read, and no other stage with the same value read either."""
    configs = [flat(finished.run.config.model_dump(mode="json")) for finished in runs]
    unread = [finished.manifest.get("config_unread", ()) for finished in runs]
    values = {name: config.get(name) for config, fields in zip(configs, unread, strict=True) for name in fields}
    stages = list(zip(configs, unread, strict=True))
    return sorted(
        name
        for name, value in values.items()
        if name not in READ_BY_THE_STUDY
        and all(name in fields or config.get(name) != value for config, fields in stages)
    )


def _some(items: list[str]) -> str:
    more = f" and {len(items) - MAX_NAMES} more" if len(items) > MAX_NAMES else ""
    return ", ".join(items[:MAX_NAMES]) + more


def equal_weights(layout: Layout, folder: Path) -> list[Row]:
    """Pairs whose final weights are the same bits, asked about or not.

    Arms that answer, are scored or select in another way have a right to them.
    """
    rows = []
    asked = pairs(layout)
    for found in itertools.combinations(trained(layout), 2):
        pair = found if found in asked or found[::-1] not in asked else found[::-1]
        hashes = [[f.manifest.get("final_sha256") for f in finals(layout, folder, arm)] for arm in pair]
        same = [seed for seed, one, two in zip(layout.seeds, *hashes, strict=True) if one == two and one is not None]
        differences = config_differences(layout, pair[1], pair[0])
        if not same or any(acts_without_weights(name) for name in differences):
            continue
        text = f"arms {pair[0]} and {pair[1]} ended with bit-equal weights at {len(same)} of {len(layout.seeds)} seeds"
        text += f": {', '.join(differences) or 'nothing'} made no difference; remove one of the arms"
        rows.append(row(DEAD, "refuse", text, pair))
    return rows


def test_scored(layout: Layout, folder: Path) -> list[Row]:
    """Looks at the test split, over all runs in the study's folder, beyond one for each run of the study."""
    wanted = {finished.folder for runs in chains(layout, folder).values() for finished in runs}
    looks = {path.parent: int(read_json(path).get("test_scored", 0)) for path in folder.glob("stages/*/manifest.json")}
    more = sum(looks.values()) - sum(1 for path in wanted if looks.get(path))
    if more <= 0:
        return []
    trials = sum(count for path, count in looks.items() if path not in wanted)
    text = f"the test split was scored {more} times more than once a run ({trials} of them by trials or abandoned runs)"
    return [row(TEST, "warn", f"{text}; take test out of evaluate.splits until the end")]


def best_at_an_edge(layout: Layout, folder: Path, results: dict[str, Any]) -> list[Row]:
    """A tuned value at the end of its grid, and a best checkpoint at the last step."""
    rows = []
    for arm in results["arms"]:
        for where, field, values in _grids(arm, layout.study.arms[arm["name"]].tune):
            chosen = next((trial["setting"][field] for trial in arm["tuning"] if trial.get("chosen")), None)
            if edge := _edge(chosen, values):
                text = f"arm {arm['name']}: the best {field} is {chosen}, the {edge} of its grid; widen {where}"
                rows.append(row(EDGE, "warn", text))
    for where, runs in by_stage(layout, folder):
        late = [finished for finished in runs if _best_was_last(finished)]
        if len(late) * 2 > len(runs):
            text = f"{where}: the best checkpoint is the last step at {len(late)} of {len(runs)} seeds, so training may"
            rows.append(row(EDGE, "warn", f"{text} have ended too early; raise train.max_epochs or train.max_steps"))
    return rows


def _grids(arm: dict[str, Any], tune: dict[str, list[Any]]) -> list[tuple[str, str, list[Any]]]:
    """(where it is set, field, values that were tried): of the arm's `tune`, or of its model where that has lists."""
    if tune or not arm["tuning"]:
        return [(f"tune.{field}", field, values) for field, values in tune.items()]
    return [
        (field, field, [trial["setting"][field] for trial in arm["tuning"]]) for field in arm["tuning"][0]["setting"]
    ]


def _edge(chosen: Any, values: Iterable[Any]) -> str | None:
    """`lowest` or `highest` value of a numeric grid; zero is the end of many things by nature."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if chosen not in numbers or len(set(numbers)) < 2 or chosen == 0:
        return None
    return "lowest value" if chosen == min(numbers) else "highest value" if chosen == max(numbers) else None


def _best_was_last(finished: Finished) -> bool:
    """Whether a metric chose the checkpoint, among several, and chose the last."""
    selections = read_json(finished.folder / "selections.json")
    looks = sum(event.get("event") == "evaluation" for event in finished.events)
    final = selections["final"]
    return final != "last" and looks > 1 and int(selections["selections"][final]["step"]) == finished.steps


def selection_artefacts(layout: Layout, results: dict[str, Any], compare_selection: CompareSelection) -> list[Row]:
    """Questions whose verdict hangs on which checkpoint was kept."""
    kept = {
        arm["name"]: set.intersection(*(set(run["selections"]) for run in arm["runs"]))
        for arm in results["arms"]
        if arm["runs"]
    }
    rows = []
    for question in layout.study.questions:
        ways = set.union(set(), *(kept.get(arm, set()) for arm in question.pair))
        try:
            verdicts = {way: compare_selection(question.pair, question, way) for way in SELECTIONS if way in ways}
        except DataError:
            # Some checkpoint was not scored in this metric: there is nothing to compare.
            continue
        if told := selection_artefact(verdicts):
            rows.append(row(ARTEFACT, "warn", told, question.pair))
    return rows


def damaged(layout: Layout, folder: Path) -> list[Row]:
    """Checkpoints that a resume found damaged, so that it went back to an older one."""
    rows = []
    for where, runs in by_stage(layout, folder):
        hit = [f for f in runs if any(event.get("event") == "checkpoint-damaged" for event in f.events)]
        if hit:
            text = f"{where}: {seeds_of(hit)} resumed past a damaged checkpoint; look at the disk (events.jsonl)"
            rows.append(row(DAMAGED, "warn", text))
    return rows


def windows_of_few(results: dict[str, Any]) -> list[Row]:
    """Questions whose examples are windows of so few documents that the interval does not know how documents differ."""
    return [
        row(WINDOWS, "warn", note, (question["pair"][0], question["pair"][1]))
        for question in results.get("questions", ())
        for note in question.get("notes", ())
    ]


def one_seed(layout: Layout) -> list[Row]:
    if len(layout.seeds) > 1:
        return []
    return [
        row(ONE_SEED, "inform", "one seed: a verdict speaks of these two models, not of the methods; raise `seeds`")
    ]
