"""A study laid out before anything runs: which arm needs which stage at which seed, in which folder, shared or not.

A stage's result is kept under a hash of its config, its data, the sources that affect numbers, the precision, the
kernels and the stage that it starts from. Two arms that ask for the same stage share it, once per seed. Where a config
asks for a model it may name an arm that stands above it, `arm:NAME`: what that arm has made of the same seed (a
teacher).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isoform.config import ArmConfig, RunConfig, StudyConfig, run_config
from isoform.data.splits import load_splits
from isoform.errors import ConfigError
from isoform.reading import merge
from isoform.registry import component, nearest
from isoform.storage import fingerprint

# The one stage of an arm whose list is empty: its model is scored as it is, on the data of the study's last stage.
AS_IS = "as-is"

# Before the name of an arm whose last model is meant, in a run's `model` or `objective`.
ARM = "arm:"

# Fields of a run that change neither its weights nor its scores, so that they do not belong to its identity.
UNIDENTIFYING = ("name", "about", "track")


@dataclass(frozen=True)
class StageRun:
    """One stage of one arm at one seed."""

    arm: str
    stage: str
    seed: int
    config: RunConfig
    key: str
    folder: Path
    # relative to the study's folder
    parent: StageRun | None = None
    others: Mapping[str, StageRun] = field(default_factory=dict)
    # arm named in the config -> the run whose model is meant

    @property
    def trains(self) -> bool:
        return self.stage != AS_IS

    @property
    def needs(self) -> list[StageRun]:
        """The runs whose models this one reads."""
        return [*([] if self.parent is None else [self.parent]), *self.others.values()]

    def lineage(self) -> Iterator[StageRun]:
        """Every run that must have ended before this one can begin, and this one, in order."""
        for run in self.needs:
            yield from run.lineage()
        yield self

    def placed(self, folder: Path) -> RunConfig:
        """The config with the models of other arms where they are, in a study's folder."""
        return with_arms(self.config, lambda arm: str((folder / self.others[arm].folder / "final").resolve()))


@dataclass
class Layout:
    """Every run of a study."""

    study: StudyConfig
    seeds: list[int]
    precision: str
    sources: str
    # fingerprint of the code
    kernels: str = "plain"
    # plain | compiled | tiles
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)
    # arm -> tuned fields and their values
    _data: dict[str, str] = field(default_factory=dict)

    def arms(self) -> Iterator[tuple[str, ArmConfig]]:
        yield from self.study.arms.items()

    def chain(self, arm: str, seed: int, settings: dict[str, Any] | None = None) -> list[StageRun]:
        """The stages of an arm at a seed, each starting from the one before; `settings` are tuned fields to try."""
        runs: list[StageRun] = []
        changes = self.chosen.get(arm, {}) if settings is None else {**self.study.trials, **settings}
        stages = self.study.arms[arm].stages or [AS_IS]
        for stage in stages:
            config = self.config(arm, stage, seed, changes)
            # A stage that no trial changes is the arm's own, carried out once for all of them.
            if settings is not None and (stage == stages[-1] or config != self.config(arm, stage, seed, {})):
                config = _unscored(config)
            parent = runs[-1] if runs else None
            others = {name: self._last(name, arm, seed) for name in arms_of(config)}
            key = self._key(config, parent, others, trains=stage != AS_IS)
            folder = Path("stages") / f"{stage}-seed{seed}-{key[:10]}"
            runs.append(StageRun(arm, stage, seed, config, key, folder, parent, others))
        return runs

    def _last(self, name: str, arm: str, seed: int) -> StageRun:
        """The last run of the arm `name`, whose model the arm `arm` asks for. Raises: ConfigError."""
        above = list(itertools.takewhile(lambda other: other != arm, self.study.arms))
        if name not in above:
            known = ", ".join(above) or "no arm"
            raise ConfigError(f"arms.{arm}: {ARM}{name} is no arm above it{nearest(name, above)}; above it: {known}")
        if self.study.arms[name].results is not None:
            raise ConfigError(f"arms.{arm}: {ARM}{name} has results from elsewhere and no model here; name another arm")
        return self.chain(name, seed)[-1]

    def trials(self, arm: str) -> list[tuple[dict[str, Any], list[StageRun]]]:
        """Each setting of an arm's `tune`, and its stages at the first seed."""
        tune = self.study.arms[arm].tune
        if not tune:
            return []
        settings = [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]
        return [(setting, self.chain(arm, self.seeds[0], setting)) for setting in settings]

    def all(self) -> Iterator[StageRun]:
        """Every distinct stage run, in the order in which it is carried out: seed by seed, arm by arm."""
        seen: set[str] = set()
        for seed, (arm, _) in itertools.product(self.seeds, self.arms()):
            for run in self.chain(arm, seed):
                for needed in run.lineage():
                    if needed.key not in seen:
                        seen.add(needed.key)
                        yield needed

    def config(self, arm: str, stage: str, seed: int, settings: dict[str, Any]) -> RunConfig:
        """base, then the stage, then what the arm changes everywhere, then what it changes in this stage."""
        named = list(self.study.stages)[-1] if stage == AS_IS else stage
        values = merge(self.study.base, self.study.stages[named])
        changes = self.study.arms[arm].changes
        values = merge(values, {key: item for key, item in changes.items() if key in RunConfig.model_fields})
        values = merge(values, changes.get(stage, {}))
        for path, value in settings.items():
            values = merge(values, _nested(self._target(path, stage), value))
        return run_config({**values, "name": f"{arm}-{stage}-seed{seed}", "seed": seed})

    def _target(self, path: str, stage: str) -> list[str]:
        """`train.learning_rate` belongs to every stage, `finetune.train.learning_rate` to one."""
        parts = path.split(".")
        if parts[0] in self.study.stages:
            return parts[1:] if parts[0] == stage else []
        if parts[0] not in RunConfig.model_fields:
            raise ConfigError(f"tune, trials: {path!r} names neither a section of a run nor a stage")
        return parts

    def _key(self, config: RunConfig, parent: StageRun | None, others: Mapping[str, StageRun], *, trains: bool) -> str:
        values = {name: item for name, item in config.model_dump(mode="json").items() if name not in UNIDENTIFYING}
        values["data"] = {name: item for name, item in values["data"].items() if name != "root"}
        if parent is not None:
            # A stage that starts from another takes over its model and tokenizer.
            values = {name: item for name, item in values.items() if name != "model"}
            values["text"] = {"max_tokens": values["text"]["max_tokens"]}
        origin = parent.key if parent else None
        asked = {name: run.key for name, run in others.items()}
        return fingerprint(
            [values, self._data_key(config), self.sources, self.precision, self.kernels, origin, asked, trains]
        )

    def _data_key(self, config: RunConfig) -> str:
        cls, options = component("objective", config.objective, "objective")
        objective = cls(options, None, config.text.max_tokens)
        key = fingerprint([config.data.model_dump(mode="json"), objective.alternatives])
        if key not in self._data:
            self._data[key] = load_splits(config.data, objective.alternatives).fingerprint
        return self._data[key]


def some_arms(study: StudyConfig, names: Sequence[str] | None) -> StudyConfig:
    """The study of these arms, and of those whose models they ask for, in its order, with the questions about them.

    names: None: all of it.

    Raises: ConfigError for a name that is no arm, or no name.
    """
    if names is None:
        return study
    layout = Layout(study, [study.seed], "", "")
    wanted: set[str] = set()

    def take(name: str) -> None:
        wanted.add(name)
        if study.arms[name].results is None:
            for stage in study.arms[name].stages or [AS_IS]:
                for other in arms_of(layout.config(name, stage, study.seed, {})):
                    if other in study.arms and other not in wanted:
                        take(other)

    for name in names:
        if name not in study.arms:
            known = ", ".join(study.arms)
            raise ConfigError(f"--arms: {name!r} is no arm of the study{nearest(name, study.arms)}; its arms: {known}")
        take(name)
    if not wanted:
        raise ConfigError(f"--arms: no arm is named; the study has {', '.join(study.arms)}")
    kept = {
        "arms": {name: arm for name, arm in study.arms.items() if name in wanted},
        "questions": [question for question in study.questions if set(question.pair) <= wanted],
        "published": [row for row in study.published if row.get("arm") in {None, *wanted}],
    }
    return study.model_copy(update=kept)


def begins_from_arm(config: RunConfig) -> bool:
    """Whether its model is what another arm will have made."""
    return str(config.model.get("from", "")).startswith(ARM)


def arms_of(config: RunConfig) -> list[str]:
    """The arms whose models a config asks for."""
    found: list[str] = []

    def note(arm: str) -> str:
        found.append(arm)
        return arm

    with_arms(config, note)
    return list(dict.fromkeys(found))


def with_arms(config: RunConfig, place: Callable[[str], str]) -> RunConfig:
    """The config with every `arm:NAME` in its `model` and `objective` replaced by `place(NAME)`."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [replaced(item) for item in value]
        return place(value.removeprefix(ARM)) if isinstance(value, str) and value.startswith(ARM) else value

    changed = {"model": replaced(config.model), "objective": replaced(config.objective)}
    return (
        config
        if changed == {"model": config.model, "objective": config.objective}
        else config.model_copy(update=changed)
    )


def _unscored(config: RunConfig) -> RunConfig:
    """The run as a trial: it is judged by what it scored on the way, on the selection split, and by nothing after."""
    return config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"splits": []})})


def _nested(path: list[str], value: Any) -> dict[str, Any]:
    """`["train", "learning_rate"], 1e-4` -> `{"train": {"learning_rate": 1e-4}}`; an empty path -> nothing."""
    if not path:
        return {}
    result: Any = value
    for part in reversed(path):
        result = {part: result}
    return result  # type: ignore[no-any-return]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as `a.b.c: value`."""
    rows: dict[str, Any] = {}
    for key, item in values.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict) and item:
            rows |= flat(item, f"{name}.")
        else:
            rows[name] = item
    return rows


def config_differences(layout: Layout, arm: str, reference: str) -> dict[str, Any]:
    """What an arm's stages ask for that the reference arm's do not: `stage.field` -> value (field alone if in all)."""
    seed = layout.seeds[0]
    ours = {run.stage: flat(run.config.model_dump(mode="json")) for run in layout.chain(arm, seed)}
    theirs = {run.stage: flat(run.config.model_dump(mode="json")) for run in layout.chain(reference, seed)}
    rows: dict[str, Any] = {}
    if list(ours) != list(theirs):
        rows["stages"] = list(ours)
    # A stage that the reference leaves out is compared with what the reference would make of it.
    theirs |= {
        stage: flat(layout.config(reference, stage, seed, layout.chosen.get(reference, {})).model_dump(mode="json"))
        for stage in ours
        if stage not in theirs
    }
    for stage in ours:
        for name in sorted(ours[stage].keys() | theirs[stage].keys()):
            if name != "name" and ours[stage].get(name) != theirs[stage].get(name):
                rows[f"{stage}.{name}"] = ours[stage].get(name)
    everywhere = {
        name.split(".", 1)[1]
        for name in rows
        if "." in name and all(rows.get(f"{stage}.{name.split('.', 1)[1]}", rows) == rows[name] for stage in ours)
    }
    for name in everywhere:
        values = [rows.pop(f"{stage}.{name}") for stage in ours]
        rows[name] = values[0]
    return rows
