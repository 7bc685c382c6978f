"""Tokens per second of each family against transformers' own model of the same size: one whole update, side by side.

    python benchmarks/families.py                                  every family, equal and mixed lengths: half an hour
    python benchmarks/families.py --families gpt2,bert --rounds 10
    python benchmarks/families.py --precision bf16 --out docs/families.md
    python benchmarks/families.py --width 32 --layers 1 --tokens 256 --length 32 --rounds 2     a quick look

Both models hold the same weights and read the same tokens in one process: ours end to end, theirs padded to the longest
of the batch. An update is forward, loss, backward and a step of torch's fused AdamW; updates alternate, ours first in
every second round, so that whatever else the machine does meets both. Only tokens of texts are counted, no padding.

    ratio = (tokens per second, ours) / (tokens per second, theirs), the median over rounds; above 1 ours is faster
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers

from isoform import machine
from isoform.checkpoints.forms import save_model
from isoform.contracts import IGNORE, Batch, Encoded, Sample
from isoform.data.batches import collate
from isoform.objectives.crossentropy import TokenObjective
from isoform.objectives.permutation import Permutation
from isoform.objectives.routing import with_routing
from isoform.registry import build_options, lookup
from isoform.storage import write_text
from isoform.training.feed import FRIENDLY_TOKENS
from isoform.training.step import LossModule, accumulate, autocast

# What a family is asked: the next token, 15 % of the tokens, as many in a random order, or a target of half the
# source's length.
MASKED_FRACTION = 0.15
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"dropout": 0.0}),
    "gpt-neox": ("gpt2", {"dropout": 0.0, "position": {"kind": "rope"}}),
    "llama": ("llama", {}),
    "llama grouped": ("llama", {"num_kv_heads": 2}),
    "mixtral": ("llama", {"feedforward": {"kind": "moe", "experts": 8, "active": 2, "z_weight": 0.0}}),
    "bert": ("bert", {"dropout": 0.0}),
    "roberta": ("roberta", {"dropout": 0.0, "padding_id": 0}),
    "distilbert": ("distilbert", {"dropout": 0.0}),
    "modernbert": ("modernbert", {}),
    "xlnet": ("xlnet", {"dropout": 0.0}),
    "t5": ("t5", {"dropout": 0.0}),
    "t5 v1.1": ("t5", {"dropout": 0.0, "feedforward": {"kind": "geglu-tanh"}, "tied": False}),
}
LENGTHS = ("equal", "mixed")
# Losses of the two before they are timed may differ by so much, relative.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class Measured:
    """Seconds of each update of the two, and the tokens of each."""

    family: str
    lengths: str
    parameters: int
    tokens: list[int]
    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    def rate(self, seconds: list[float]) -> float:
        """Tokens per second, the median over updates."""
        return statistics.median(tokens / each for tokens, each in zip(self.tokens, seconds, strict=True))


# ------------------------------------------------------------------------------------------------------- the two models


def build(family: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """Our model, and transformers' with the same weights."""
    name, changes = FAMILIES[family]
    cls = lookup("model", name)
    sizes = {"num_layers": options.layers, "num_heads": options.heads, "width": options.width}
    known = {"max_positions": options.length, "vocab_size": options.vocab}
    values = {name: value for name, value in {**sizes, **known}.items() if name in cls.Config.model_fields}
    model = cls(build_options(cls, {**values, **changes}, family), seed=0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), model, None)
        form, _ = model.hf_form(model.config)
        config = transformers.AutoConfig.from_pretrained(folder)
        config.pad_token_id = config.decoder_start_token_id = 0
        config.output_router_logits = family == "mixtral"  # its loss of balance, which ours has too
        theirs = getattr(transformers, form["architectures"][0]).from_pretrained(folder, config=config)
    return model.train(), theirs.train()


def samples(family: str, lengths: str, options: argparse.Namespace, number: int) -> list[Sample]:
    """Random texts of about `--tokens` tokens together, the same for both models."""
    draw = np.random.default_rng(number)
    asked = FAMILIES[family][0]
    made: list[Sample] = []
    left = options.tokens
    while left > 0:
        length = options.length if lengths == "equal" else int(draw.integers(options.length // 8, options.length + 1))
        # 0 is the padding there.
        ids = draw.integers(1, options.vocab, length + 1, dtype=np.int32)
        if asked in ("gpt2", "llama"):
            # As there, the last token is read and asked nothing.
            sample = Sample(str(len(made)), ids[:length], np.append(ids[1:length], IGNORE).astype(np.int32))
        elif asked == "t5":
            target = ids[: max(1, length // 2)]
            read = np.concatenate([[0], target[:-1]]).astype(np.int32)
            sample = Sample(str(len(made)), read, target, source=Sample(str(len(made)), ids[:length]))
        elif asked == "xlnet":
            sample = permuted(str(len(made)), ids[:length], draw)
        else:
            targets = np.where(draw.random(length) < MASKED_FRACTION, ids[:length], IGNORE).astype(np.int32)
            sample = Sample(str(len(made)), ids[:length], targets)
        made.append(sample)
        left -= sample.num_tokens
    return made


def permuted(name: str, ids: Any, draw: np.random.Generator) -> Sample:
    """Some tokens to be guessed in a random order."""
    plain: Any = SimpleNamespace(special_ids={})
    objective: Any = Permutation(Permutation.Config(fraction=MASKED_FRACTION), plain, len(ids))
    sample: Sample = objective.prepare(Encoded(name, {"text": ids}, 0), draw)
    return sample


def padded(family: str, chosen: list[Sample]) -> dict[str, torch.Tensor]:
    """What transformers' model is called with; its own loss is that of the labels."""

    def rectangle(rows: list[Any], value: int) -> torch.Tensor:
        tensors = [torch.from_numpy(np.asarray(row, dtype=np.int64)) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    reads = [sample.source if sample.source is not None else sample for sample in chosen]
    ids = rectangle([sample.tokens for sample in reads], 0)
    mask = rectangle([np.ones(len(sample.tokens)) for sample in reads], 0)
    if FAMILIES[family][0] in ("gpt2", "llama"):  # there targets are shifted inside
        labels = rectangle([sample.tokens for sample in chosen], IGNORE)
    else:
        labels = rectangle([sample.targets for sample in chosen], IGNORE)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {**inputs, **order(chosen)} if FAMILIES[family][0] == "xlnet" else inputs


def order(chosen: list[Sample]) -> dict[str, torch.Tensor]:
    """Who is hidden from whom `(b, t, t)`, which places are guessed `(b, p, t)`, and their labels `(b, p)`."""
    ranks = [torch.from_numpy(np.asarray(sample.ranks, dtype=np.int64)) for sample in chosen]
    places = [(row > 0).nonzero().squeeze(1) for row in ranks]
    most, rectangle = max(map(len, places)), torch.nn.utils.rnn.pad_sequence(ranks, batch_first=True)
    hidden = rectangle[:, None, :] >= rectangle.clamp(min=1)[:, :, None]
    mapping = torch.zeros(len(chosen), most, rectangle.shape[1])
    labels = torch.full((len(chosen), most), IGNORE)
    for row, (sample, some) in enumerate(zip(chosen, places, strict=True)):
        mapping[row, torch.arange(len(some)), some] = 1.0
        labels[row, : len(some)] = torch.from_numpy(np.asarray(sample.tokens, dtype=np.int64))[some]
    return {"perm_mask": hidden.float(), "target_mapping": mapping, "labels": labels}


# ------------------------------------------------------------------------------------------------------------ measuring


Update = Callable[[int], tuple[float, float]]


def our_update(model: Any, batches: list[Batch], precision: str) -> Update:
    """Number of the batch -> (seconds, loss) of one update, as the training loop makes it."""
    device = torch.device("cpu")
    asked: Any = Permutation if "two-stream" in model.capabilities else TokenObjective
    objective: Any = with_routing(asked(Permutation.Config(), None, 64), model)
    module, optimizer = LossModule(model, objective), torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def update(number: int) -> tuple[float, float]:
        batch = batches[number]
        began = time.perf_counter()
        counts = objective.counts(batch)
        totals = accumulate(module, [batch], counts, precision=precision, device=device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began, totals["loss"] / counts["loss"]

    return update


def their_update(model: Any, batches: list[dict[str, torch.Tensor]], precision: str) -> Update:
    """The same with transformers' model and its own loss."""
    device = torch.device("cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def update(number: int) -> tuple[float, float]:
        began = time.perf_counter()
        with autocast(precision, device):
            output = model(**batches[number])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        extra = model.config.router_aux_loss_coef * output.aux_loss if "aux_loss" in output else 0.0
        return seconds, float((output.loss - extra).detach())

    return update


def measure(family: str, lengths: str, options: argparse.Namespace) -> Measured:
    """Updates of the two in turn, after some that warm both up. Raises: AssertionError where their losses differ."""
    model, theirs = build(family, options)
    chosen = [samples(family, lengths, options, number) for number in range(options.warm + options.rounds)]
    friendly = min(FRIENDLY_TOKENS, options.length)
    updates = (
        our_update(model, [collate(some, filler_to=friendly) for some in chosen], options.precision),
        their_update(theirs, [padded(family, some) for some in chosen], options.precision),
    )
    seconds: tuple[list[float], list[float]] = [], []
    for number in range(len(chosen)):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        losses = [0.0, 0.0]
        for which in order:
            taken, losses[which] = updates[which](number)
            if number >= options.warm:
                seconds[which].append(taken)
        if number == 0:
            gap = abs(losses[0] / losses[1] - 1)
            assert gap < TOLERANCE[options.precision], f"{family}: losses {losses} of the same weights and tokens"
    tokens = [sum(sample.num_tokens for sample in some) for some in chosen[options.warm :]]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Measured(family, lengths, parameters, tokens, *seconds)


# ------------------------------------------------------------------------------------------------------------- the page


def page(rows: list[Measured], options: argparse.Namespace) -> str:
    """A table of ratios, and what they were measured with."""
    facts = machine.describe()
    head = [
        f"{facts['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {options.precision}; {options.layers} layers of width {options.width}, about "
        f"{options.tokens} tokens an update, texts of up to {options.length}, {options.rounds} rounds.",
        "",
        "| family | lengths | parameters | tokens/s, ours | tokens/s, transformers | ratio | middle half of rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(line, rows)]) + "\n"


def line(row: Measured) -> str:
    low, middle, high = quartiles(row.ratios)
    rates = f"{row.rate(row.ours):,.0f} | {row.rate(row.theirs):,.0f}"
    size = f"{row.parameters / 1e6:.1f} M"
    return f"| {row.family} | {row.lengths} | {size} | {rates} | {middle:.2f} | {low:.2f} to {high:.2f} |"


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(low), float(middle), float(high)


def measured(options: argparse.Namespace) -> Iterator[Measured]:
    for family in options.families.split(","):
        for lengths in LENGTHS:
            row = measure(family, lengths, options)
            print(line(row), flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="names, separated by commas")
    parser.add_argument("--precision", choices=sorted(TOLERANCE), default="fp32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=8192, help="size of the vocabulary")
    parser.add_argument("--tokens", type=int, default=4096, help="of an update, about")
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest text")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm", type=int, default=3, help="rounds before those that are timed")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    text = page(list(measured(options)), options)
    if options.out is not None:
        write_text(options.out, text)


if __name__ == "__main__":
    main()
