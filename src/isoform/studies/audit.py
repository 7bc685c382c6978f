"""The audit: what would make a comparison worth nothing, looked for before training and after it.

Each check is a row of the table in `docs/audit.md`: it refuses, warns, informs, or passes and says what it looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isoform.config import StudyConfig
from isoform.errors import DataError
from isoform.studies import audit_curves, audit_data, audit_results, audit_terms
from isoform.studies.audit_curves import diverged
from isoform.studies.audit_options import dead_options
from isoform.studies.audit_rows import (
    ANSWERS,
    ARTEFACT,
    DAMAGED,
    DEAD,
    DIVERGED,
    EDGE,
    FUTURE,
    LEFT_OUT,
    ONE_SEED,
    OVERLAP,
    SCHEDULE,
    SELECTION,
    TERMS,
    TEST,
    UNUSED,
    WINDOWS,
    Row,
    fitted,
    names,
    or_pass,
    row,
    stepped,
    trained,
)
from isoform.studies.layout import Layout

__all__ = ["after", "before", "diverged"]


def before(layout: Layout) -> list[Row]:
    """Everything that can be known before training.

    Raises: ConfigError, DataError for a stage that could not be trained.
    """
    from isoform.studies.audit_probe import Probes

    try:
        with Probes(layout) as probes:
            return [
                *or_pass(DEAD, dead_options(layout, probes), "every option in which the arms differ does something"),
                *_not_probed(layout),
                *or_pass(FUTURE, _future(layout, probes), "earlier states do not change with later tokens"),
                *or_pass(OVERLAP, audit_data.overlaps(layout, probes), "no document stands in two splits"),
                *or_pass(ANSWERS, audit_data.answers_seen(layout, probes), "no earlier stage's text holds the answers"),
                *or_pass(
                    SELECTION,
                    audit_data.selected_on_compared(layout, probes),
                    "nothing is selected on the documents that are compared",
                ),
                *or_pass(
                    TERMS, audit_terms.planned_terms(layout, probes), "the plan gives both arms of a pair the same"
                ),
                *or_pass(SCHEDULE, audit_curves.schedules(layout, probes), "every learning rate warms up and falls"),
            ]
    except DataError as error:
        if not str(error).startswith("data.overlap"):
            raise
        return [row(OVERLAP, "refuse", str(error))]


def left_out(whole: StudyConfig, config: StudyConfig) -> list[Row]:
    """What of a study is not carried out now, and so not told."""
    missing = [name for name in whole.arms if name not in config.arms]
    if not missing:
        return []
    text = (
        f"{len(missing)} of the study's {len(whole.arms)} arms are left out by --arms: {', '.join(missing)}; "
        f"{len(config.questions)} of its {len(whole.questions)} questions are answered, p-values are adjusted over all"
    )
    return [row(LEFT_OUT, "inform", text)]


def _not_probed(layout: Layout) -> list[Row]:
    """What the checks of this table do not say of classical models."""
    arms = [arm for arm in trained(layout) if fitted(layout, arm)]
    text = (
        f"{names(arms)}: fitted in one go, so that there are no rates, updates or losses to look at, and options are "
        "not tried one by one; data, selection and terms are checked as for all"
    )
    return [row(DEAD, "inform", text)] if arms else []


def _future(layout: Layout, probes: Any) -> list[Row]:
    from isoform.studies.audit_probe import sees_future

    seeing: dict[int, tuple[str, list[str]]] = {}
    for arm in stepped(layout):
        stage, probe = next(iter(probes.chain(arm).items()))
        if probe.run.model.capabilities & {"causal", "encoder-decoder"}:
            seeing.setdefault(id(probe), (stage, []))[1].append(arm)
    known = {id(probe): probe for arm in stepped(layout) for probe in probes.chain(arm).values()}
    return [
        row(
            FUTURE,
            "refuse",
            f"{names(arms)}: the model of stage {stage} reads later tokens when it answers for earlier ones; "
            "its attention must be causal (model)",
        )
        for key, (stage, arms) in seeing.items()
        if sees_future(known[key])
    ]


def after(
    layout: Layout,
    folder: Path,
    results: dict[str, Any],
    compare_selection: audit_results.CompareSelection,
) -> list[Row]:
    """Everything that only finished runs can tell. `compare_selection`: a question's answer by another checkpoint."""
    return [
        *or_pass(
            UNUSED, audit_results.unused_parts(layout, folder), "every parameter was trained, every option was read"
        ),
        *audit_results.equal_weights(layout, folder),
        *or_pass(TEST, audit_results.test_scored(layout, folder), "no run scored the test split more than once"),
        *audit_terms.made_terms(layout, folder),
        *or_pass(EDGE, audit_results.best_at_an_edge(layout, folder, results), "no best value lies at an edge"),
        *or_pass(
            ARTEFACT,
            audit_results.selection_artefacts(layout, results, compare_selection),
            "no verdict depends on which checkpoint was kept",
        ),
        *or_pass(DIVERGED, audit_curves.losses_that_rose(layout, folder), "every loss fell and none jumped"),
        *or_pass(DAMAGED, audit_results.damaged(layout, folder), "no checkpoint was damaged"),
        *or_pass(WINDOWS, audit_results.windows_of_few(results), "no example is a window of few documents"),
        *or_pass(ONE_SEED, audit_results.one_seed(layout), f"{len(layout.seeds)} seeds"),
    ]
