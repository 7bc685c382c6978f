"""Scores a run's model on its splits: metrics, rows of predictions, and of a classifier where it errs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from isoform.errors import ConfigError
from isoform.evaluation.breakdown import Breakdown, Temperature
from isoform.evaluation.evaluate import Evaluation, Thinned, Watch, evaluate
from isoform.evaluation.predictions import writing
from isoform.storage import write_json
from isoform.training.loop import BEST_LOSS, BEST_METRIC
from isoform.training.prepare import Prepared
from isoform.training.step import autocast


def score(
    run: Prepared,
    model: Any,
    split: str,
    *,
    keep: Callable[[dict[str, Any]], None] | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """The metrics of one split with fixed draws, in the run's precision; keep: where rows of predictions go, if any."""
    settings = run.config.evaluate
    on_the_way = settings.train_examples if split == "train" else run.config.train.select.max_examples
    most = on_the_way if keep is None else settings.max_examples
    return evaluate(
        model,
        run.objectives.get(split, run.objective),
        Thinned(run.datasets[split], most),
        split=split,
        metrics=settings.metrics,
        batch_tokens=settings.batch_tokens,
        max_new_tokens=settings.max_new_tokens,
        beams=settings.beams,
        confidence=settings.confidence,
        device=run.device,
        autocast=lambda: autocast(run.precision, run.device),
        keep_predictions=0 if keep is None else settings.max_predictions,
        keep=keep,
        watch=watch,
    )


def score_all(
    run: Prepared, model: Any, splits: list[str], target: Path, manifest: dict[str, Any]
) -> list[dict[str, Any]]:
    """Every split's rows of eval.json; predictions.jsonl is written into `target`, and of a classifier breakdown.json.

    Looking at the test split is entered in the manifest. Raises: ConfigError for a split that is not there.
    """
    rows: list[dict[str, Any]] = []
    for split in splits:
        if split not in run.datasets:
            raise ConfigError(f"evaluate.splits: no split {split!r}; there are {', '.join(run.datasets)}")
    if not splits:
        return []
    is_final = target.name not in {"last", BEST_LOSS, BEST_METRIC}
    # The labels of which each text has one, where that is what the objective tells.
    labels = getattr(run.objective, "choices", ()) if is_final else ()
    temperature = _temperature(run, model, labels) if labels else None
    parts: dict[str, Any] = {}
    with writing(target / "predictions.jsonl") as keep:
        for split in splits:
            fitted_here = split == run.config.train.select.split
            watch = Breakdown(labels, None if fitted_here else temperature) if labels else None
            rows += score(run, model, split, keep=keep, watch=watch).rows
            if watch is not None:
                parts[split] = watch.values()
    if parts:
        fitted_on = None if temperature is None else run.config.train.select.split
        about = {"temperature": temperature, "fitted_on": fitted_on, "splits": parts}
        write_json(target / "breakdown.json", about)
    if "test" in splits and is_final:
        manifest["test_scored"] = int(manifest.get("test_scored", 0)) + 1
    return rows


def _temperature(run: Prepared, model: Any, labels: tuple[str, ...]) -> float | None:
    """The temperature fitted on the selection split; None where there is none. It is never fitted on test."""
    split = run.config.train.select.split
    if split not in run.datasets or split in ("train", "test"):
        return None
    watch = Temperature(labels)
    score(run, model, split, watch=watch)
    return watch.value()
