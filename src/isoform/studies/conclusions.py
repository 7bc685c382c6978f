"""What a finished study says: scores of every arm and seed, comparisons, verdicts, and the audit of the results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isoform.config import StudyConfig
from isoform.errors import AuditError
from isoform.registry import lookup
from isoform.storage import iterate_jsonl, read_json
from isoform.studies import audit
from isoform.studies.layout import Layout, StageRun, config_differences
from isoform.studies.outside import read_results
from isoform.studies.scores import Scores, load_scores
from isoform.studies.statistics import Comparison, compare, decide, interval_over_seeds


def conclude(
    layout: Layout,
    folder: Path,
    planned: list[dict[str, Any]],
    tuning: dict[str, list[dict[str, Any]]],
    record: dict[str, Any],
    whole: StudyConfig,
) -> dict[str, Any]:
    """Everything that the report shows, as plain values.

    whole: the study with the arms that were left out, whose questions are to be answered too.
    """
    config = layout.study
    arms = [_arm(layout, folder, name, tuning.get(name, [])) for name, _ in layout.arms()]
    comparisons = [_compare(layout, folder, question.pair, question) for question in config.questions]
    unasked = len(whole.questions) - len(config.questions)
    unasked_margins = _num_margins(whole) - _num_margins(config)
    decided = decide(comparisons, config.compare.confidence, unasked=unasked, unasked_margins=unasked_margins)
    questions = [
        {
            **decision.as_dict(),
            "pair": list(question.pair),
            "metric": question.metric or config.compare.metric,
            "split": question.split or config.compare.split,
            "margin": question.margin,
            "published": question.published,
        }
        for question, decision in zip(config.questions, decided, strict=True)
    ]
    results = {
        "name": config.name,
        "question": config.question,
        "published": config.published,
        "seeds": layout.seeds,
        "compare": config.compare.model_dump(mode="json"),
        "arms": arms,
        "questions": questions,
        "num_questions": len(whole.questions),
        "data": _data(layout, folder),
        "command": record["command"],
        "code": {"version": record["code"]["isoform"], "packages": record["packages"]},
        "machine": record["machine"],
        "precision": record["precision"],
        "seconds": record["seconds"],
        "jobs": record.get("jobs"),
        "started": record["started"],
        "finished": record["finished"],
    }
    results["audit"] = [*planned, *audit.after(layout, folder, results, lambda *args: _compare(layout, folder, *args))]
    return results


def _num_margins(config: StudyConfig) -> int:
    return sum(question.margin is not None for question in config.questions)


def _arm(layout: Layout, folder: Path, name: str, tuning: list[dict[str, Any]]) -> dict[str, Any]:
    config = layout.study
    reference = next(iter(config.arms))
    outside = config.arms[name].results
    runs = [] if outside else [_run(layout, folder, name, seed) for seed in layout.seeds]
    manifest = read_json(folder / runs[0]["final"] / "manifest.json") if runs else {}
    return {
        "name": name,
        "stages": config.arms[name].stages,
        "differences": {} if name == reference or outside else config_differences(layout, name, reference),
        "parameters": manifest.get("model", {}),
        "runs": runs,
        "summary": _summary(layout, folder, name),
        "tuning": tuning or manifest.get("trials", []),
    }


def _run(layout: Layout, folder: Path, arm: str, seed: int) -> dict[str, Any]:
    chain = layout.chain(arm, seed)
    last = folder / chain[-1].folder
    stages = []
    for run in chain:
        manifest = read_json(folder / run.folder / "manifest.json")
        losses = [row["loss"] for row in iterate_jsonl(folder / run.folder / "metrics.jsonl")]
        users = [other for other, _ in layout.arms() if run.key in {r.key for r in layout.chain(other, seed)}]
        stages.append(
            {
                "name": run.stage,
                "folder": str(run.folder),
                "seconds": manifest["seconds"]["total"],
                "steps": manifest["steps"],
                "tokens": manifest["tokens"],
                "final_loss": losses[-1] if losses else None,
                "shared": len(users) > 1,
            }
        )
    selections = read_json(last / "selections.json")
    wanted = (layout.study.compare.metric, layout.study.compare.split)
    return {
        "seed": seed,
        "stages": stages,
        "final": str(chain[-1].folder),
        "metrics": read_json(last / "eval.json"),
        "selections": {
            name: next((r["value"] for r in chosen["rows"] if (r["metric"], r["split"]) == wanted), None)
            for name, chosen in selections["selections"].items()
        },
        "diverged": audit.diverged(folder / chain[-1].folder),
    }


def _summary(layout: Layout, folder: Path, arm: str) -> list[dict[str, Any]]:
    """Mean over seeds with its interval, for every metric and split that was scored."""
    compared = (layout.study.compare.metric, layout.study.compare.split)
    pairs = [compared]
    if layout.study.arms[arm].results is None:
        rows = read_json(folder / layout.chain(arm, layout.seeds[0])[-1].folder / "eval.json")
        measured = list(dict.fromkeys((row["metric"], row["split"]) for row in rows))
        # An arm that no question is about, with an objective of its own, may have only metrics of its own.
        pairs = sorted(measured, key=lambda pair: pair != compared)
    summary = []
    for metric, split in pairs:
        scores = _scores(layout, folder, arm, metric, split)
        mean, low, high, deviation = interval_over_seeds(
            scores, lookup("metric", metric), confidence=layout.study.compare.confidence
        )
        values = [_value(scores, metric, index) for index in range(len(scores.seeds))]
        row = {"metric": metric, "split": split, "mean": mean, "low": low, "high": high, "sd": deviation}
        summary.append({**row, "values": values})
    return summary


def _value(scores: Scores, metric: str, index: int) -> float:
    sums = {name: column[index].sum() for name, column in scores.columns.items()}
    return float(lookup("metric", metric)().value(sums))


def _scores(
    layout: Layout,
    folder: Path,
    arm: str,
    metric: str,
    split: str,
    selection: str | None = None,
    without: frozenset[int] = frozenset(),
) -> Scores:
    """The per-example statistics of an arm at every seed but those in `without`.

    selection: another way to choose the checkpoint.
    """
    outside = layout.study.arms[arm].results
    cls = lookup("metric", metric, "compare.metric")
    if outside is not None:
        return read_results(Path(layout.study.base.get("data", {}).get("root") or ".") / outside, split, cls)
    paths = {}
    for seed in layout.seeds:
        if seed in without:
            continue
        last = folder / layout.chain(arm, seed)[-1].folder
        final = read_json(last / "selections.json")
        same = selection is None or selection == final["final"] or selection not in final["selections"]
        chosen = last if same else last / str(selection)
        if not same and not (chosen / "predictions.jsonl").exists():
            # Chosen at the same step as one that was scored before it.
            step = final["selections"][selection]["step"]
            twins = [name for name, item in final["selections"].items() if item["step"] == step]
            chosen = (
                last
                if final["final"] in twins
                else last / next(name for name in twins if (last / name / "predictions.jsonl").exists())
            )
        paths[seed] = chosen / "predictions.jsonl"
    return load_scores(paths, split, cls)


def _compare(
    layout: Layout, folder: Path, pair: tuple[str, str], question: Any, selection: str | None = None
) -> Comparison:
    """Second minus first, paired by seed and example."""
    settings = layout.study.compare
    metric, split = question.metric or settings.metric, question.split or settings.split
    without = _excluded(layout, folder, pair) if settings.exclude_diverged else frozenset()
    first, second = (_scores(layout, folder, arm, metric, split, selection, without) for arm in pair)
    return compare(first, second, lookup("metric", metric), confidence=settings.confidence, margin=question.margin)


def _excluded(layout: Layout, folder: Path, pair: tuple[str, str]) -> frozenset[int]:
    """Seeds at which an arm of the pair diverged: left out of both, since the arms are compared seed by seed."""
    diverged = {
        seed
        for arm in pair
        if layout.study.arms[arm].results is None
        for seed in layout.seeds
        if audit.diverged(folder / layout.chain(arm, seed)[-1].folder)
    }
    if len(diverged) == len(layout.seeds):
        raise AuditError(f"{pair[0]}, {pair[1]}: every seed diverged in one of the two; nothing is left to compare")
    return frozenset(diverged)


def _data(layout: Layout, folder: Path) -> dict[str, Any]:
    """What each stage was trained and scored on, from the first run of each stage."""
    seen: dict[str, Any] = {}
    for run in _runs_with_manifest(layout, folder):
        seen.setdefault(run.stage, read_json(folder / run.folder / "manifest.json").get("data", {}))
    return seen


def _runs_with_manifest(layout: Layout, folder: Path) -> Iterator[StageRun]:
    return (run for run in layout.all() if (folder / run.folder / "manifest.json").exists())
