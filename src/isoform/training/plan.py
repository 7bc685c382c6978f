"""What a run will take, measured by a few real steps on this machine; nothing is written."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import numpy as np

from isoform.checkpoints.forms import kept_tensors
from isoform.config import RunConfig
from isoform.evaluation.evaluate import Thinned, evaluate
from isoform.models.accounting import accounts
from isoform.training import classical
from isoform.training.loop import planned_rates
from isoform.training.prepare import Prepared, fits, prepare
from isoform.training.step import autocast
from isoform.training.updates import restoring, updates

# The probe: steps that warm the machine up, then steps that are timed until one of the two limits.
WARM_STEPS = 2
MAX_TIMED_STEPS = 30
MAX_SECONDS = 8.0
PROBE_EXAMPLES = 96
# bytes a parameter takes in a checkpoint: weights and two moments, in float32
CHECKPOINT_BYTES = 12
MODEL_BYTES = 4


def plan_config(config: RunConfig, precision: str | None = None) -> dict[str, Any]:
    """`plan_run` of a config, the preparation timed too. Raises: what `prepare` raises."""
    if fits(config):
        return _plan_fit(config, precision)
    prepare(config, precision=precision)  # what is made once and kept, such as token stores, is made here
    began = time.perf_counter()
    run = prepare(config, precision=precision)
    seconds = time.perf_counter() - began
    plan = plan_run(run)
    return {**plan, "seconds_preparing": seconds, "seconds_total": plan["seconds_total"] + seconds}


def _plan_fit(config: RunConfig, precision: str | None) -> dict[str, Any]:
    """The same of a model that is fitted in one go: it is fitted, since nothing less tells how long that takes."""
    began = time.perf_counter()
    run, _ = classical.fit(prepare(config, precision=precision))
    fitted = time.perf_counter() - began
    scored = _seconds_per_evaluation(run)
    sizes = accounts(run.model, 1)
    return {
        "steps": 0,
        "steps_per_epoch": 0,
        "epochs": 1.0,
        "samples": len(run.datasets["train"]),
        "tokens": run.datasets["train"].report["tokens"],
        "mean_batch_tokens": 0.0,
        "model": sizes,
        "precision": run.precision,
        "device": str(run.device),
        "evaluations": 0,
        "disk_bytes": sizes["total"] * MODEL_BYTES,
        "peak_memory_bytes": peak_memory_bytes(),
        "learning_rates": [[0, 0.0]],
        "warnings": [],
        "seconds_per_step": 0.0,
        "seconds_training": fitted,
        "seconds_evaluating": scored,
        "seconds_total": fitted + scored,
    }


def plan_run(run: Prepared, *, probe: bool = True) -> dict[str, Any]:
    """Steps, tokens, parameters, FLOPs, memory, disk, seconds, rates and warnings of a prepared run.

    Units: seconds_total is steps x median seconds of a probed step, plus evaluations; tokens are those of the plan.
    """
    train = run.config.train
    assert run.batch_plan is not None
    plan = run.batch_plan
    epochs = run.num_steps / plan.steps_per_epoch
    tokens = int(plan.lengths.sum() * epochs)
    sizes = accounts(run.model, run.config.text.max_tokens)
    # Folders of an adapted model hold what it trains; its base is there once.
    kept = sum(tensor.numel() for tensor in kept_tensors(run.model).values())
    frozen = sizes["total"] - kept if kept < sizes["total"] else 0
    seconds_step = _seconds_per_step(run) if probe else None
    evaluations = _num_evaluations(run)
    seconds_evaluation = _seconds_per_evaluation(run) if probe else None
    rates = planned_rates(run)
    folders = 3 if evaluations else 2
    result: dict[str, Any] = {
        "steps": run.num_steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "epochs": epochs,
        "samples": len(plan.lengths),
        "tokens": tokens,
        "mean_batch_tokens": tokens / run.num_steps,
        "model": sizes,
        "precision": run.precision,
        "device": str(run.device),
        "evaluations": evaluations,
        "disk_bytes": kept * (MODEL_BYTES * folders + CHECKPOINT_BYTES * train.keep_checkpoints) + MODEL_BYTES * frozen,
        "peak_memory_bytes": peak_memory_bytes(),
        "learning_rates": _thinned(rates),
        "warnings": warnings(run, rates),
    }
    if seconds_step is not None and seconds_evaluation is not None:
        result["seconds_per_step"] = seconds_step
        result["seconds_per_evaluation"] = seconds_evaluation
        result["seconds_training"] = seconds_step * run.num_steps
        result["seconds_evaluating"] = seconds_evaluation
        result["seconds_total"] = seconds_step * run.num_steps + seconds_evaluation
    return result


def warnings(run: Prepared, rates: list[float]) -> list[str]:
    """What a person should know before the run begins."""
    found = []
    peak = int(np.argmax(rates))
    if len(rates) > 1 and rates[-1] >= rates[peak] * (1 - 1e-9):
        found.append("the learning rate never falls; most runs end better with a decay (train.schedule)")
    if peak > len(rates) / 2:
        found.append(f"the warm-up takes {peak + 1} of {len(rates)} steps; shorten train.schedule.warmup_*")
    for name, dataset in run.datasets.items():
        cut = dataset.report.get("documents_truncated", 0)
        if cut:
            found.append(f"{cut} documents of {name} are longer than text.max_tokens and are cut off")
        found += _lost_answers(name, dataset.report)
        unknown = dataset.report.get("unknown_tokens", 0)
        if unknown:
            found.append(f"{unknown} tokens of {name} are unknown to the tokenizer")
    return found


def _lost_answers(name: str, report: dict[str, int]) -> list[str]:
    """What conversations lose by being cut off, where it is answers."""
    lost, left_out = report.get("targets_lost", 0), report.get("documents_unasked", 0)
    found = [f"{lost} of {report['targets']} answer tokens of {name} are cut off (text.max_tokens)"] if lost else []
    if left_out:
        found.append(f"{left_out} documents of {name} lose every answer token and are left out; raise text.max_tokens")
    return found


def _seconds_per_step(run: Prepared) -> float:
    """Median seconds of a real update, its data not included; the weights are put back."""
    seconds: list[float] = []
    began = time.perf_counter()
    with restoring(run):
        for update in updates(run, WARM_STEPS + MAX_TIMED_STEPS):
            seconds.append(update.seconds)
            if time.perf_counter() - began > MAX_SECONDS and len(seconds) > WARM_STEPS:
                break
    timed = seconds[WARM_STEPS:] or seconds
    return float(np.median(timed))


def _num_evaluations(run: Prepared) -> int:
    train = run.config.train
    if run.batch_plan is None or train.select.split not in run.datasets:
        return 0
    if train.evaluate_every_steps is not None:
        every = train.evaluate_every_steps
    elif train.evaluate_every_epochs is not None:
        every = max(1, round(train.evaluate_every_epochs * run.batch_plan.steps_per_epoch))
    else:
        return int(train.select.metric != "last")
    return -(-run.num_steps // every)


def _seconds_per_evaluation(run: Prepared) -> float:
    """Seconds of all evaluations: those on the way, and every split once at the end for each kept checkpoint."""
    select = run.config.train.select
    train_examples = run.config.evaluate.train_examples
    each = {name: _seconds_to_score_one(run, name) for name in run.datasets if name != "train" or train_examples}

    def seconds(name: str, most: int | None) -> float:
        return each[name] * len(Thinned(run.datasets[name], most)) if name in each else 0.0

    looked_at = seconds(select.split, select.max_examples) + seconds("train", train_examples)
    on_the_way = _num_evaluations(run) * looked_at
    at_the_end = sum(seconds(name, run.config.evaluate.max_examples) for name in run.config.evaluate.scored(each))
    return on_the_way + at_the_end * (2 if _num_evaluations(run) > 1 else 1)


def _seconds_to_score_one(run: Prepared, split: str) -> float:
    """Mean seconds of some examples of a split; answers are taken to be as long as the expected ones."""
    dataset = run.datasets[split]
    some = [dataset[index] for index in range(min(PROBE_EXAMPLES, len(dataset)))]
    if not some:
        return 0.0
    lengths = [len(item.fields["answer"]) + 1 for item in some if "answer" in item.fields]
    limit = max(1, round(float(np.mean(lengths)))) if lengths else run.config.evaluate.max_new_tokens
    start = time.perf_counter()
    evaluate(
        run.model,
        run.objectives.get(split, run.objective),
        some,
        split=split,
        metrics=run.config.evaluate.metrics,
        batch_tokens=run.config.evaluate.batch_tokens,
        max_new_tokens=limit,
        device=run.device,
        autocast=lambda: autocast(run.precision, run.device),
        keep_predictions=0,
    )
    return (time.perf_counter() - start) / len(some)


def peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _thinned(rates: list[float], most: int = 200) -> list[list[float]]:
    """(step, rate) pairs, few enough to draw."""
    every = max(1, len(rates) // most)
    places = sorted({*range(0, len(rates), every), len(rates) - 1})
    return [[place, rates[place]] for place in places]
