"""What the recipes of studies say of their arms holds: sizes that are called equal, and vocabularies that suffice."""

from __future__ import annotations

from typing import Any

import torch

from isoform.config import RunConfig, study_config
from isoform.objectives.t5_spans import input_and_target_lengths, noise_counts
from isoform.reading import read_config
from isoform.registry import lookup
from isoform.studies.layout import Layout
from isoform.training.fresh import Numbers, fresh_model

VOCABULARY = Numbers(256, {})


def laid_out(recipe: str) -> Layout:
    return Layout(study_config(read_config(recipe)), [0], "fp32", "sources")


def first_stage(layout: Layout, arm: str) -> RunConfig:
    return layout.config(arm, layout.study.arms[arm].stages[0], 0, {})


def parameters(config: RunConfig) -> dict[str, int]:
    """Sizes of the arm's model, on no device."""
    options: dict[str, Any] = dict(config.model)
    family = lookup("model", options.pop("family"))
    with torch.device("meta"):
        model = fresh_model(config, family, options, VOCABULARY, None)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def test_t5_has_as_many_parameters_as_the_decoders_of_birthplaces() -> None:
    layout = laid_out("birthplaces")
    t5, gpt = (sum(parameters(first_stage(layout, arm)).values()) for arm in ("t5", "pretrained"))
    assert abs(t5 / gpt - 1) < 0.05


def test_experts_are_as_many_active_parameters_as_the_llama_beside_them() -> None:
    layout = laid_out("architectures")
    sizes = {}
    for arm in ("llama", "experts"):
        config = first_stage(layout, arm)
        blocks = {name: size for name, size in parameters(config).items() if name.startswith("blocks")}
        inner = sum(size for name, size in blocks.items() if name.split(".")[-2] in ("up", "gate", "down"))
        share = (
            config.model["feedforward"]["active"] / config.model["feedforward"]["experts"] if arm == "experts" else 1
        )
        sizes[arm] = sum(blocks.values()) - (1 - share) * inner
    assert abs(sizes["experts"] / sizes["llama"] - 1) < 0.01
    assert sum(parameters(first_stage(layout, "experts")).values()) > 2 * sum(
        parameters(first_stage(layout, "llama")).values()
    )


def test_t5_has_a_sentinel_for_every_span_of_a_window() -> None:
    config = first_stage(laid_out("birthplaces"), "t5")
    shape = config.objective["noise_fraction"], config.objective["mean_span_tokens"]
    window = input_and_target_lengths(config.text.max_tokens, *shape).window
    assert config.text.tokenizer["sentinels"] >= noise_counts(window, *shape)[1]
    assert {"pad", "eos"} <= set(config.text.tokenizer["special"])
    assert config.text.tokenizer["kind"] == "char"


def test_objectives_are_compared_at_one_size_and_as_many_tokens() -> None:
    layout = laid_out("objectives")
    configs = {arm: first_stage(layout, arm) for arm in layout.study.arms}
    sizes = {
        arm: sum(size for name, size in parameters(config).items() if name.startswith("blocks"))
        for arm, config in configs.items()
    }
    assert len(set(sizes.values())) == 1
    trained = [configs[arm] for arm in ("causal", "spans", "masked")]
    assert len({config.objective["kind"] for config in trained}) == 3
    assert all(config.train == trained[0].train and config.text == trained[0].text for config in trained)
    # Every arm learns the task alike.
    last = [layout.config(arm, "classify", 0, {}) for arm in layout.study.arms]
    assert all((run.train, run.objective, run.data) == (last[0].train, last[0].objective, last[0].data) for run in last)
