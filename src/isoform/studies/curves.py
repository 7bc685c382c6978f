"""Learning curves of a study: per stage and arm, the mean over seeds, with a band from the lowest to the highest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from isoform.studies import charts
from isoform.studies.records import Records, Results
from isoform.studies.wording import (
    SPACE,
    bare_value,
    capitalised,
    count_text,
    is_number,
    listed,
    lower_is_better,
    metric_words,
    unit_of,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    Column = npt.NDArray[np.float64]

NUM_BINS = 90
LOG_FROM_RATIO = 4.0  # a loss that falls by more than this is drawn on a logarithmic axis
MAX_EVALUATIONS = 3


@dataclass(frozen=True)
class Chart:
    title: str
    figure: Markup
    note: str


@dataclass(frozen=True)
class StageCurves:
    """The charts of one stage; `legend` pairs a swatch with the arms that the line stands for."""

    stage: str
    note: str
    legend: list[tuple[Markup, str]]
    charts: list[Chart]


@dataclass(frozen=True)
class _Trained:
    """What one arm did in one stage: its seeds' folders, read."""

    name: str
    colour: int | None
    columns: list[dict[str, Column]]
    evaluations: list[dict[tuple[str, str], dict[str, Column]]]


def arm_colours(results: Results) -> dict[str, int | None]:
    """A colour for each arm, the same on the whole page: arms in questions first, grey when the colours are used up."""
    asked = [name for question in results.get("questions") or () for name in question.get("pair") or ()]
    every = [str(arm.get("name") or "") for arm in results.get("arms") or ()]
    order = [name for name in dict.fromkeys([*asked, *every]) if name in every]
    coloured = set(order[: charts.NUM_COLOURS])
    shown = [name for name in every if name in coloured]
    return {name: shown.index(name) if name in coloured else None for name in every}


def stage_curves(records: Records) -> list[StageCurves]:
    """The charts of every stage that left something to draw, in the order in which arms run them."""
    results = records.results
    colours = arm_colours(results)
    found = []
    for stage in _stages_in_order(results):
        # An arm that is fitted in one go leaves nothing to draw.
        trained = [line for line in _read_stage(records, stage, colours) if any(line.columns) or any(line.evaluations)]
        drawn = [
            chart
            for chart in (_loss(trained), *_evaluations(trained, results), *_routing(trained), _rate(trained))
            if chart is not None
        ]
        if drawn:
            legend = [(charts.swatch(line.colour), line.name) for line in trained if line.colour is not None]
            rest = sum(line.colour is None for line in trained)
            legend += [(charts.swatch(None), f"the other {rest} arms")] if rest else []
            found.append(StageCurves(stage, _band_words(trained), legend, drawn))
    return found


def _stages_in_order(results: Results) -> list[str]:
    """Every stage's name, earlier stages first: by the latest place that it takes in an arm."""
    places: dict[str, int] = {}
    for arm in results.get("arms") or ():
        for place, name in enumerate(arm.get("stages") or ()):
            places[str(name)] = max(place, places.get(str(name), 0))
    return sorted(places, key=lambda name: places[name])


def _read_stage(records: Records, stage: str, colours: Mapping[str, int | None]) -> list[_Trained]:
    """One entry for all arms that share the stage's folders, so that a shared pretraining is one line."""
    sharing: dict[tuple[str, ...], list[str]] = {}
    for arm in records.results.get("arms") or ():
        folders = tuple(
            str(done["folder"])
            for run in arm.get("runs") or ()
            for done in run.get("stages") or ()
            if done.get("name") == stage and done.get("folder")
        )
        if folders:
            sharing.setdefault(folders, []).append(str(arm.get("name") or ""))
    trained = []
    for folders, names in sharing.items():
        columns = [records.training_columns(name) for name in folders]
        evaluations = [records.evaluation_curves(name) for name in folders]
        colour = next((colours[name] for name in names if colours[name] is not None), None)
        trained.append(_Trained(listed(names), colour, columns, evaluations))
    return trained


def _loss(trained: Sequence[_Trained]) -> Chart | None:
    axis = _axis(seed for line in trained for seed in line.columns)
    series, widths = [], []
    for line in trained:
        smoothed = [_binned(seed[axis], seed["loss"]) for seed in line.columns if axis in seed and "loss" in seed]
        widths += [-(-len(seed["loss"]) // NUM_BINS) for seed in line.columns if "loss" in seed]
        series.append(_over_seeds(line, smoothed))
    joined = np.concatenate([line.y[np.isfinite(line.y)] for line in series]) if series else np.empty(0)
    log_y = len(joined) > 0 and joined.min() > 0 and joined.max() / joined.min() > LOG_FROM_RATIO
    words = _axis_words(axis)
    figure = charts.curves(series, "Training loss", words, "nats per target token", _count_tick, _short, log_y)
    if figure is None:
        return None
    note = f"Each point is the mean over {max(widths)} steps" if max(widths) > 1 else "Every step is drawn"
    return Chart("Training loss", figure, f"{note}{'; logarithmic axis' if log_y else ''}.")


def _evaluations(trained: Sequence[_Trained], results: Results) -> list[Chart]:
    """The compared metric first, then the others in the order of the log."""
    compare = results.get("compare") or {}
    keys = dict.fromkeys(key for line in trained for seed in line.evaluations for key in seed)
    ordered = sorted(keys, key=lambda key: (key[0] != compare.get("metric"), lower_is_better(key[0])))
    if any(split == "train" for _, split in ordered):  # the same of both beside each other
        shown = dict.fromkeys([ordered[0][0], "loss"])
        ordered = [key for metric in shown for key in ordered if key[0] == metric]
    found = []
    for metric, split in ordered[: MAX_EVALUATIONS + 1 if ("loss", "train") in ordered else MAX_EVALUATIONS]:
        curves = {
            line.name: [seed[metric, split] for seed in line.evaluations if (metric, split) in seed] for line in trained
        }
        axis = _axis(seed for seeds in curves.values() for seed in seeds)
        series = [_over_seeds(line, [(seed[axis], seed["value"]) for seed in curves[line.name]]) for line in trained]
        unit = {"fraction": "%", "number": ""}.get(unit_of(metric), unit_of(metric))
        title = f"{metric_words(metric)} on {split}"
        figure = charts.curves(series, title, _axis_words(axis), unit, _count_tick, _value_ticks(metric))
        if figure is not None:
            found.append(Chart(capitalised(title), figure, ""))
    return found


def _rate(trained: Sequence[_Trained]) -> Chart | None:
    axis = _axis(seed for line in trained for seed in line.columns)
    series = []
    for line in trained:
        seed = next((seed for seed in line.columns if axis in seed and "lr" in seed), None)
        if seed is not None:
            chosen = np.unique(np.linspace(0, len(seed["lr"]) - 1, NUM_BINS).astype(int))
            series.append(charts.Series(line.name, line.colour, seed[axis][chosen], seed["lr"][chosen]))
    figure = charts.curves(series, "Learning rate", _axis_words(axis), "learning rate", _count_tick, _short)
    return None if figure is None else Chart("Learning rate", figure, "")


def _routing(trained: Sequence[_Trained]) -> list[Chart | None]:
    """Of models that route: how undecided the routers are, and how evenly the experts are used."""
    axis = _axis(seed for line in trained for seed in line.columns)
    entropy, use = [], []
    for line in trained:
        routed = [seed for seed in line.columns if axis in seed and "router_entropy" in seed]
        entropy.append(_over_seeds(line, [_binned(seed[axis], seed["router_entropy"]) for seed in routed]))
        least = _over_seeds(line, [_used(seed, axis, np.min) for seed in routed])
        most = _over_seeds(line, [_used(seed, axis, np.max) for seed in routed])
        use.append(charts.Series(line.name, line.colour, least.x, least.y, least.y, most.y))
    found: list[Chart | None] = []
    for title, series, unit, note in (
        ("Router entropy", entropy, "nats", "Mean over tokens and layers; 0: every router is sure."),
        ("Use of experts", use, "even shares", "Lines: the least used expert of all layers; bands: to the most used."),
    ):
        figure = charts.curves(series, title, _axis_words(axis), unit, _count_tick, _short)
        found.append(None if figure is None else Chart(title, figure, note))
    return found


def _used(seed: Mapping[str, Column], axis: str, extreme: Callable[..., Column]) -> tuple[Column, Column]:
    """The load of the least or most used expert of all layers, binned."""
    loads = [_binned(seed[axis], values) for name, values in seed.items() if name.startswith("expert_load.")]
    return loads[0][0], extreme([load for _, load in loads], axis=0)


def _axis(seeds: Any) -> str:
    """Tokens where every seed counted them, else steps."""
    seeds = list(seeds)
    return (
        "tokens" if seeds and all("tokens" in seed and np.isfinite(seed["tokens"]).all() for seed in seeds) else "step"
    )


def _axis_words(axis: str) -> str:
    return "target tokens" if axis == "tokens" else axis


def _binned(x: Column, y: Column) -> tuple[Column, Column]:
    """Means over consecutive steps: no lag and no memory, unlike a running average."""
    keep = np.isfinite(x) & np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) == 0:
        return x, y
    starts = np.arange(0, len(x), -(-len(x) // NUM_BINS))
    sizes = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _over_seeds(line: _Trained, seeds: Sequence[tuple[Column, Column]]) -> charts.Series:
    """Mean, lowest and highest over seeds on a common grid, as far as the shortest seed reaches."""
    seeds = [(x, y) for x, y in seeds if len(x) > 1]
    if not seeds:
        return charts.Series(line.name, line.colour, np.empty(0), np.empty(0))
    grid = min((x for x, _ in seeds), key=lambda x: float(x[-1]))
    if line.colour is None and len(grid) > NUM_BINS // 2:
        grid = grid[::2]
    values = np.stack([np.interp(grid, x, y) for x, y in seeds])
    if len(seeds) == 1:
        return charts.Series(line.name, line.colour, grid, values[0])
    return charts.Series(line.name, line.colour, grid, values.mean(0), values.min(0), values.max(0))


def _band_words(trained: Sequence[_Trained]) -> str:
    most = max((len(line.columns) for line in trained), default=0)
    return f"Lines: mean over seeds; bands: from the lowest to the highest of {most} seeds." if most > 1 else ""


def _count_tick(value: float) -> str:
    number, *unit = count_text(value).split(SPACE)
    return SPACE.join([number.rstrip("0").rstrip(".") if "." in number else number, *unit])


def _short(value: float) -> str:
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.3g}"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"


def _value_ticks(metric: str) -> Callable[[float], str]:
    if unit_of(metric) == "fraction":
        return lambda value: bare_value(value, metric, 0 if is_number(value) and abs(value * 100 % 1) < 1e-6 else 1)
    return _short
