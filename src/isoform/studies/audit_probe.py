"""Small experiments on what a stage would train: its model, its data, its first updates.

A stage that starts from another begins here from the first stage's model before any training, with its tokenizer.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isoform import chance
from isoform.checkpoints.forms import save_base, save_model
from isoform.config import RunConfig
from isoform.contracts import Batch, Ints, Sample, Sequences
from isoform.data.batches import collate
from isoform.data.plan import BatchPlan
from isoform.storage import fingerprint
from isoform.studies.layout import Layout, with_arms
from isoform.training.loop import planned_rates
from isoform.training.prepare import Prepared, prepare
from isoform.training.step import LossModule, accumulate, set_rates

PROBE_STEPS = 3
MAX_PROBE_TOKENS = 1024
# Training samples that are compared one by one: the first of the run, and the longest.
COMPARED_SAMPLES = 4096
COMPARED_STEPS = 64
# The last probe step's gradient is a spike, so that clipping has something to do.
SPIKE = 1e4
CPU = torch.device("cpu")
# Rounding of one forward pass beside another; a leak of the future is far above it.
ROUNDING = 1e-5

SampleKey = tuple[Any, ...]


class Probe:
    """One stage as it would be trained at the study's first seed, on the CPU in fp32."""

    def __init__(self, run: Prepared) -> None:
        self.run = run

    @cached_property
    def rates(self) -> list[float]:
        """The planned learning rate of every step."""
        return planned_rates(self.run)

    @property
    def planned_tokens(self) -> float:
        """Training tokens that the plan asks for."""
        plan = self.plan
        return float(plan.lengths.sum()) * self.run.num_steps / plan.steps_per_epoch

    @property
    def plan(self) -> BatchPlan:
        assert self.run.batch_plan is not None, "a probe is prepared for training"
        return self.run.batch_plan

    @cached_property
    def batch(self) -> Batch:
        """A few training sequences: the longest, which see what an option does far away, and the first."""
        longest = np.argsort(-self.plan.lengths, kind="stable")[:2]
        order = list(dict.fromkeys([*longest.tolist(), *self.plan.samples(0)[1][:2].tolist()]))
        samples = [self.sample(index) for index in order]
        room = MAX_PROBE_TOKENS - samples[0].num_tokens
        kept = samples[:1]
        for sample in samples[1:]:
            room -= sample.num_tokens
            if room >= 0:
                kept.append(sample)
        return collate(kept)

    def sample(self, index: int) -> Sample:
        """A training sample as the first epoch sees it."""
        encoded = self.run.datasets["train"][index]
        return self.run.objective.prepare(encoded, chance.generator(self.run.config.seed, "prepare", 0, encoded.id))

    def compared(self) -> Ints:
        """Numbers of the training samples to compare: the run's first ones and the longest, each once."""
        half = COMPARED_SAMPLES // 2
        _, first = self.plan.samples(0)
        steps = min(self.plan.steps_per_epoch, -(-half // max(1, len(first))))
        shown = np.concatenate([self.plan.samples(step)[1] for step in range(steps)])[:half]
        longest = np.argsort(-self.plan.lengths, kind="stable")[:half]
        return np.unique(np.concatenate([shown, longest]))

    def untrained(self, like: Probe | None = None) -> torch.nn.Module:
        """A copy of the model; with `like`, tensors that both have are taken from there."""
        model: torch.nn.Module = copy.deepcopy(self.run.model)
        if like is not None:
            with torch.no_grad():
                for ours, theirs in _shared(model, like.run.model):
                    ours.copy_(theirs)
        return model

    def trained(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model after `PROBE_STEPS` updates on the probe batch at the peak rate."""
        run = self.run
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizers = run.optimizer.build(names, run.config.train.learning_rate, "fp32")
        set_rates(optimizers, max(run.factor(step) for step in range(run.num_steps)))
        module = LossModule(model, run.objective)
        counts = run.objective.counts(self.batch)
        for step in range(PROBE_STEPS):
            batch = copy.copy(self.batch)
            batch.dropout_key = chance.key64(run.config.seed, "dropout", step)
            for name in ("source", "rival"):
                if getattr(batch, name) is not None:
                    setattr(batch, name, dataclasses.replace(getattr(batch, name), dropout_key=batch.dropout_key))
            accumulate(module, [batch], counts, precision="fp32", device=CPU)
            if step == PROBE_STEPS - 1:
                for parameter in names.values():
                    if parameter.grad is not None:
                        parameter.grad.mul_(SPIKE)
            torch.nn.utils.clip_grad_norm_(list(names.values()), run.config.train.clip_norm or math.inf)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return model

    @torch.no_grad()
    def outputs(self, model: Any, batch: Batch) -> Tensor:
        """Hidden states of every token and the scores at some places, without dropout: `(n, d + v)` flattened."""
        hidden = model(batch).hidden
        if getattr(model, "classifier", None) is not None:
            return torch.cat([hidden.flatten(), model.classifier(hidden, batch).flatten()])
        return torch.cat([hidden.flatten(), model.logits(hidden[:: max(1, len(hidden) // 32)]).flatten()])


class Probes:
    """Every stage that was asked for, prepared once; a context manager, because stand-ins are written to a folder."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._known: dict[str, Probe] = {}
        self._configs: dict[str, dict[str, RunConfig]] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="isoform-audit-")

    def __enter__(self) -> Probes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def configs(self, arm: str) -> dict[str, RunConfig]:
        """Stage -> config of an arm, in order, at the study's first seed."""
        if arm not in self._configs:
            chain = self._layout.chain(arm, self._layout.seeds[0])
            self._configs[arm] = {run.stage: run.config for run in chain}
        return self._configs[arm]

    def chain(self, arm: str) -> dict[str, Probe]:
        """Stage -> probe of an arm, in order."""
        configs = self.configs(arm)
        first = next(iter(configs.values()))
        return {stage: self.of(config, None if config is first else first) for stage, config in configs.items()}

    def of(self, config: RunConfig, first: RunConfig | None = None) -> Probe:
        """A stage; `first`: the config of the stage that its arm begins with, where that is another one.

        Raises: ConfigError, DataError.
        """
        start = None if first is None else self._stand_in(first)
        values = {
            name: value for name, value in config.model_dump(mode="json").items() if name not in ("name", "track")
        }
        key = fingerprint([values, str(start)])
        if key not in self._known:
            self._known[key] = Probe(prepare(self.placed(config), start=start, precision="fp32", device=CPU))
        return self._known[key]

    def placed(self, config: RunConfig) -> RunConfig:
        """The config with stand-ins in the place of the models that other arms will leave."""
        return with_arms(config, lambda arm: str(self._stand_in(next(iter(self.configs(arm).values())))))

    def _stand_in(self, first: RunConfig) -> Path:
        """A model folder in the place of the one that the first stage will leave."""
        probe = self.of(first)
        folder = Path(self._folder.name) / f"{id(probe):x}"
        if not folder.exists():
            save_base(folder.with_name(f"{folder.name}-base"), probe.run.model, probe.run.tokenizer)
            save_model(folder, probe.run.model, probe.run.tokenizer)
        return folder


# ------------------------------------------------------------------------------------------------- what can be observed


def same_run(first: Probe, second: Probe) -> bool:
    """Whether two stages would do the same: rates, outputs, data, first updates. Cheapest first."""
    return (
        first.rates == second.rates
        and _same_outputs(first, second)
        and _same_order(first, second)
        and _same_samples(first, second)
        and _same_evaluation(first, second)
        and _same_updates(first, second)
    )


def sees_future(probe: Probe) -> bool:
    """Whether a model's earlier states change with later tokens, beyond those that a prefix may see."""
    batch = copy.copy(probe.batch)
    batch.sequences = Sequences(batch.sequences.lengths)
    model: Any = probe.run.model
    lengths = torch.tensor(batch.sequences.lengths).repeat_interleave(torch.tensor(batch.sequences.lengths))
    with torch.no_grad():
        before = model(batch).hidden
        for cut in (torch.ones_like(lengths), lengths // 2, lengths - 1):
            earlier = batch.positions < cut.clamp(min=1)
            changed = copy.copy(batch)
            changed.tokens = torch.where(earlier, batch.tokens, (batch.tokens + 1) % model.config.vocab_size)
            moved = (model(changed).hidden - before)[earlier].abs().max()
            if float(moved) > ROUNDING * float(before.abs().max()):
                return True
    return False


def _same_order(first: Probe, second: Probe) -> bool:
    """Whether both plans show the same samples in the same steps."""
    ours, theirs = first.run.datasets["train"], second.run.datasets["train"]
    shape = [(p.plan.steps_per_epoch, p.run.num_steps, len(p.run.datasets["train"])) for p in (first, second)]
    if shape[0] != shape[1]:
        return False
    steps = range(min(COMPARED_STEPS, first.run.num_steps))
    if not all(np.array_equal(first.plan.samples(step)[1], second.plan.samples(step)[1]) for step in steps):
        return False
    return _fingerprint(first, "train") == _fingerprint(second, "train") or ours.ids == theirs.ids


def _fingerprint(probe: Probe, split: str) -> str:
    return probe.run.splits.splits[split].fingerprint()


def _same_samples(first: Probe, second: Probe) -> bool:
    """Whether the objective makes the same samples of them."""
    return all(_key(first.sample(int(i))) == _key(second.sample(int(i))) for i in first.compared())


def _key(sample: Sample) -> SampleKey:
    arrays = [sample.tokens, sample.targets, sample.segments, sample.ranks]
    beside = [None if other is None else _key(other) for other in (sample.source, sample.rival)]
    return (*(None if a is None else a.tobytes() for a in arrays), sample.label, sample.weight, sample.prefix, *beside)


def _same_evaluation(first: Probe, second: Probe) -> bool:
    """Whether both are scored on the same documents and asked the same prompts."""
    ours, theirs = first.run.datasets, second.run.datasets
    if ours.keys() != theirs.keys():
        return False
    for split in ours.keys() - {"train"}:
        if len(ours[split]) != len(theirs[split]):
            return False
        if _fingerprint(first, split) != _fingerprint(second, split) and ours[split].ids != theirs[split].ids:
            return False
        shown = range(min(len(ours[split]), COMPARED_SAMPLES // 8))
        if any(_asked(first, split, index) != _asked(second, split, index) for index in shown):
            return False
    return True


def _asked(probe: Probe, split: str, index: int) -> SampleKey:
    encoded = probe.run.datasets[split][index]
    prompt = probe.run.objective.prompt(encoded)
    fields = {name: ids.tobytes() for name, ids in sorted(encoded.fields.items())}
    if prompt is None:
        return (str(fields), None)
    source = None if prompt.source is None else prompt.source.tobytes()
    return (str(fields), prompt.tokens.tobytes(), source, prompt.stop, prompt.max_new_tokens, prompt.prefix)


def _same_outputs(first: Probe, second: Probe) -> bool:
    """Whether untrained models with the same shared tensors answer the same."""
    models: list[Any] = [first.run.model, second.run.model]
    if models[0].config.vocab_size != models[1].config.vocab_size or _drawn_otherwise(*models):
        return False
    return _equal(first.outputs(models[0], first.batch), second.outputs(second.untrained(like=first), first.batch))


def _same_updates(first: Probe, second: Probe) -> bool:
    """Whether these models have the same shared tensors and answers after some updates too."""
    ours, theirs = first.trained(first.untrained()), second.trained(second.untrained(like=first))
    same = all(_equal(*tensors) for tensors in _shared(ours, theirs))
    return same and _equal(first.outputs(ours, first.batch), second.outputs(theirs, first.batch))


def _shared(first: torch.nn.Module, second: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Both models' tensors of equal name and shape."""
    theirs = second.state_dict()
    named = [(tensor, theirs.get(name)) for name, tensor in first.state_dict().items()]
    return [(ours, other) for ours, other in named if other is not None and ours.shape == other.shape]


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


def _drawn_otherwise(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether the initial values are of another size, beyond what other random numbers would explain."""
    for ours, theirs in _shared(first, second):
        if ours.numel() > 1 and ours.is_floating_point():
            a, b = float(ours.std()), float(theirs.std())
            if abs(a - b) > 10 / math.sqrt(2 * ours.numel()) * max(a, b):
                return True
    return False
