"""Dead options: what two arms differ in, and whether each of these differences does anything.

Each differing option is set back to the other arm's value, by itself; where nothing then changes, it is dead.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from isoform.config import EITHER, RunConfig, run_config
from isoform.errors import ConfigError, DataError, IsoformWarning
from isoform.studies.audit_rows import DEAD, Level, Pair, Row, pairs, row, stepped, trained
from isoform.studies.layout import Layout, begins_from_arm, flat

if TYPE_CHECKING:
    from isoform.studies.audit_probe import Probes

Values = dict[str, Any]
Path = tuple[str, ...]
Place = tuple[str, Path]
# a stage, and a field of its config

# What never claims to change a result: differing in these alone is comparing the same thing twice.
BOOKKEEPING = {
    "name",
    "track",
    "data.root",
    "data.shard_tokens",
    "objective.store",
    "train.micro_batch_tokens",
    "train.compile",
    "train.recompute",
    "train.checkpoint_every_steps",
    "train.checkpoint_every_seconds",
    "train.keep_checkpoints",
    "train.log_every_steps",
    "train.step_minutes",
    "evaluate.splits",
    "evaluate.metrics",
    "evaluate.batch_tokens",
    "evaluate.confidence",
    "evaluate.max_predictions",
    "evaluate.train_examples",
}
# What acts after or between updates, where no probe step sees it, is taken at its word: how checkpoints are selected,
# and the rest of `evaluate`.
SELECTING = {"train.select.metric", "train.select.split", "train.select.max_examples", "train.patience"}
LOOKING = {"train.evaluate_every_steps", "train.evaluate_every_epochs"}
# Documents that are scored and never trained on.
SCORED = ("data.dev", "data.test")
# Keys that say which component a section is; the section's other options belong to it.
KINDS = ("kind", "family", "from")
MISSING = object()


@dataclass(frozen=True)
class Change:
    """One option in which an arm differs from another: its name, and where it stands."""

    name: str
    places: tuple[Place, ...]


def dead_options(layout: Layout, probes: Probes) -> list[Row]:
    """Options that do nothing, and arms that are the same, whether a question compares them or not.

    Every pair is looked at for being the same thing twice. Options are tried in the pairs of questions, and in every
    other arm beside the first: there a dead one is a refusal where no question names the arm, else a warning.
    """
    known, probed = trained(layout), stepped(layout)
    asked = pairs(layout)
    named = {arm for pair in asked for arm in pair}
    rows = []
    for pair in itertools.combinations(known, 2):
        if not set(pair) <= set(probed):
            if _twins(layout, probes, pair):
                rows.append(row(DEAD, "refuse", _told_twice(pair, "do not differ in any option"), pair))
        elif pair in asked or pair[::-1] in asked:
            rows += _pair_rows(layout, probes, pair if pair in asked else pair[::-1])
        elif pair[0] == known[0]:
            rows += _pair_rows(layout, probes, pair, "warn" if set(pair) <= named else "refuse")
        elif _twins(layout, probes, pair):
            rows.append(row(DEAD, "refuse", _told_twice(pair, "do not differ in any option that does something"), pair))
    return rows


def _twins(layout: Layout, probes: Probes, pair: Pair) -> bool:
    """Whether two arms resolve to the same stages, bookkeeping aside."""
    first, second = ({stage: probe.run for stage, probe in probes.chain(arm).items()} for arm in pair)
    if list(first) != list(second) or layout.study.arms[pair[0]].tune != layout.study.arms[pair[1]].tune:
        return False
    return all(_meant(first[stage].resolved) == _meant(second[stage].resolved) for stage in first)


def _meant(resolved: Values) -> Values:
    return {name: value for name, value in flat(resolved).items() if name not in BOOKKEEPING}


def _told_twice(pair: Pair, how: str) -> str:
    return f"arms {pair[0]} and {pair[1]} {how}: the same thing would be compared twice; change or remove one of them"


def _pair_rows(layout: Layout, probes: Probes, pair: Pair, level: Level = "refuse") -> list[Row]:
    first, second = pair
    arms = layout.study.arms
    theirs, ours = (probes.configs(arm) for arm in pair)
    found = list(changes(ours, theirs))
    real = [
        change
        for change in found
        if _claim(change, ours, theirs) != "nothing" and not _only_spelling(change, ours, theirs, probes)
    ]
    if not real and list(ours) == list(theirs) and arms[first].tune == arms[second].tune:
        unimportant = ", ".join(change.name for change in found)
        how = f"differ only in {unimportant}, which changes no result" if found else "do not differ in any option"
        return [row(DEAD, "refuse", _told_twice(pair, how), pair)]
    tested = [change for change in real if _claim(change, ours, theirs) == "probe"]
    return [
        row(DEAD, level, _told(change, ours, theirs, pair), pair)
        for change in tested
        if _dead(change, ours, theirs, probes)
    ]


def _told(change: Change, ours: dict[str, RunConfig], theirs: dict[str, RunConfig], pair: Pair) -> str:
    stage, path = change.places[0]
    there = theirs.get(stage)
    given = [
        "its default" if value is MISSING else repr(value)
        for value in (MISSING if there is None else _get(_plain(there), path), _get(_plain(ours[stage]), path))
    ]
    return (
        f"{change.name} does nothing: {given[0]} in arm {pair[0]} and {given[1]} in arm {pair[1]} give the same model, "
        "data, rates and first updates; remove it, or change what makes it act"
    )


# -------------------------------------------------------------------------------------------------- what differs, where


def changes(ours: dict[str, RunConfig], theirs: dict[str, RunConfig]) -> Iterator[Change]:
    """What an arm's stages ask for that the other's same stages do not, option by option.

    An option that differs in all shared stages is one change; it is set back in our further stages too.
    """
    shared = [stage for stage in ours if stage in theirs]
    places: dict[Path, list[str]] = {}
    for stage in shared:
        for path in _differing(_plain(ours[stage]), _plain(theirs[stage])):
            places.setdefault(path, []).append(stage)
    for paths, stages in _together(places):
        name = ", ".join(".".join(path) for path in paths)
        if stages == shared:
            yield Change(name, tuple((stage, path) for stage in ours for path in paths))
        else:
            yield from (Change(f"{stage}.{name}", tuple((stage, path) for path in paths)) for stage in stages)


def _together(places: dict[Path, list[str]]) -> Iterator[tuple[tuple[Path, ...], list[str]]]:
    """Each option with its stages; two that exclude each other, and differ in the same stages, as one."""
    exclusive = [tuple(("train", name) for name in names) for names in EITHER]
    pairs = [pair for pair in exclusive if all(path in places for path in pair) and places[pair[0]] == places[pair[1]]]
    for path, stages in places.items():
        pair = next((pair for pair in pairs if path in pair), (path,))
        if path == pair[0]:
            yield pair, stages


def _plain(config: RunConfig) -> Values:
    values = config.model_dump(mode="json")
    del values["name"]
    return values


def _differing(ours: Any, theirs: Any, path: Path = ()) -> Iterator[Path]:
    """Paths of differing options; a section of another kind is one, and what it sets beside that further ones."""
    if theirs is MISSING and isinstance(ours, dict) and any(key in ours for key in KINDS):
        theirs = {}
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        if ours != theirs:
            yield path
        return
    kinds = [key for key in KINDS if ours.get(key) != theirs.get(key)]
    if kinds:
        yield path
    inner = ours if kinds else {**ours, **theirs}
    for key in inner:
        if key not in KINDS:
            yield from _differing(ours.get(key, MISSING), theirs.get(key, MISSING), (*path, key))


def _get(values: Any, path: Path) -> Any:
    for key in path:
        values = values.get(key, MISSING) if isinstance(values, dict) else MISSING
    return values


def _put(values: Values, path: Path, value: Any) -> None:
    """Sets the option, or leaves it out where the value is missing."""
    for key in path[:-1]:
        values = values.setdefault(key, {})
    if value is MISSING:
        values.pop(path[-1], None)
    else:
        values[path[-1]] = copy.deepcopy(value)


# -------------------------------------------------------------------------------------------------- does it do anything


def _claim(
    change: Change, ours: dict[str, RunConfig], theirs: dict[str, RunConfig]
) -> Literal["nothing", "word", "probe"]:
    """Whether the option claims to change nothing, is taken at its word, or has to show it."""
    stage, path = change.places[0]
    field = ".".join(path)
    selects = any(configs[stage].train.select.metric != "last" for configs in (ours, theirs) if stage in configs)
    if field in BOOKKEEPING or (field in LOOKING and not selects):
        return "nothing"
    if field.startswith("evaluate.") or (field in SELECTING | LOOKING and selects):
        return "word"
    return "word" if field in {"model", "model.from"} and _trained_first(stage, ours, theirs) else "probe"


def _trained_first(stage: str, *chains: dict[str, RunConfig]) -> bool:
    """Whether a stage starts from what another arm will have learned, in whose place a probe has an untrained model."""
    return any(begins_from_arm(configs[stage]) for configs in chains if stage in configs)


def _set_back(change: Change, ours: dict[str, RunConfig], theirs: dict[str, RunConfig]) -> dict[str, RunConfig]:
    """Our stages with the option as the other arm has it. Raises: ConfigError where it cannot stand by itself."""
    changed = {stage: _plain(ours[stage]) for stage, _ in change.places}
    # A stage that the other arm has not takes the value of one that it has.
    other = next(_plain(theirs[stage]) for stage in theirs if stage in ours)
    for stage, path in change.places:
        _put(changed[stage], path, _get(_plain(theirs[stage]) if stage in theirs else other, path))
    return ours | {stage: run_config({**values, "name": ours[stage].name}) for stage, values in changed.items()}


def _only_spelling(change: Change, ours: dict[str, RunConfig], theirs: dict[str, RunConfig], probes: Probes) -> bool:
    """Whether the option is the default spelled out, so that both configs resolve to the same."""
    # A stage that starts from another does not read its own model section: nothing there is spelled out.
    read = [stage for stage, path in change.places if path[0] != "model" or _parent(ours, stage) is None]
    if _claim(change, ours, theirs) != "probe" or not read:
        return False
    try:
        back = _set_back(change, ours, theirs)
        with _only_tried():
            resolved = [
                [probes.of(configs[stage], _parent(configs, stage)).run.resolved for stage in read]
                for configs in (ours, back)
            ]
    except (ConfigError, DataError):
        return False
    return resolved[0] == resolved[1]


@contextmanager
def _only_tried() -> Iterator[None]:
    """Without warnings of configs that nobody asked for and that are never trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IsoformWarning)
        yield


def acts_without_weights(name: str) -> bool:
    """Whether an option, after its stage's name where it has one, may change scores or the choice of a checkpoint.

    Two arms that differ in it may end with the same weights.
    """
    plain = name if name.split(".")[0] in RunConfig.model_fields else name.partition(".")[2]
    if plain in SELECTING | LOOKING or plain in SCORED:
        return True
    return plain.startswith("evaluate.") and plain not in BOOKKEEPING


def _parent(configs: dict[str, RunConfig], stage: str) -> RunConfig | None:
    """The config that a stage's model comes from, None for the first."""
    first = next(iter(configs))
    return None if stage == first else configs[first]


def _dead(change: Change, ours: dict[str, RunConfig], theirs: dict[str, RunConfig], probes: Probes) -> bool:
    """Whether every stage that the option stands in does the same with the other arm's value.

    So many updates and so many epochs may be the same here, where the other arm's batch makes them another thing.
    """
    of_two = len({path for _, path in change.places}) > 1 and all(stage in theirs for stage, _ in change.places)
    return _same(change, ours, theirs, probes) and (not of_two or _same(change, theirs, ours, probes))


def _same(change: Change, ours: dict[str, RunConfig], theirs: dict[str, RunConfig], probes: Probes) -> bool:
    from isoform.studies.audit_probe import same_run

    try:
        back = _set_back(change, ours, theirs)
        with _only_tried():
            return all(
                same_run(probes.of(ours[stage], _parent(ours, stage)), probes.of(back[stage], _parent(ours, stage)))
                for stage, _ in change.places
            )
    except (ConfigError, DataError):
        # The other arm's value cannot stand among our options: the option does something.
        return False
