"""What cannot be trained is refused before weights or texts are read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from isoform.checkpoints import folders
from isoform.checkpoints.forms import save_model
from isoform.errors import CheckpointError, ConfigError
from isoform.models.bert import Bert
from isoform.models.gpt2 import GPT2
from isoform.training import prepare as room
from isoform.training.prepare import prepare

NOWHERE = {"root": None, "path": "/nowhere/at/all.txt"}


@pytest.mark.parametrize("chosen", [None, "fp32"])
def test_an_objective_that_a_folder_s_model_cannot_do(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    monkeypatch.setattr(room, "load_model", lambda *given, **options: pytest.fail("weights are read"))
    save_model(tmp_path / "bert", Bert.tiny(), None)
    save_model(tmp_path / "gpt2", GPT2.tiny(), None)
    for folder, kind, family in (("bert", "causal", "bert is bidirectional"), ("gpt2", "masked", "gpt2 is cache")):
        config = make({"data": NOWHERE, "objective": {"kind": kind}, "text": {"tokenizer": {"kind": "from-model"}}})
        config = config.model_copy(update={"model": {"from": str(tmp_path / folder)}})
        with pytest.raises(ConfigError, match=rf"objective.kind: {kind} needs a model that is .*; {family}"):
            prepare(config, precision=chosen, kernels={} if chosen is None else {"native": False})


def test_a_folder_of_pickles_is_refused_as_one(make: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "m", GPT2.tiny(), None)
    for name in ("isoform.json", "manifest.json"):
        (tmp_path / "m" / name).unlink()
    shutil.move(tmp_path / "m" / "model.safetensors", tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: "):
        folders.identified(tmp_path / "m")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt2", {"feedforward": {"kind": "moe"}}, "experts have no biases; set model.bias to false"),
        (
            "llama",
            {"feedforward": {"kind": "moe"}, "feedforward_bias": True},
            "experts have no biases; set model.feedforward_bias to false",
        ),
        ("bert", {"feedforward": {"kind": "moe"}}, "experts have no biases; this family's .* gpt2 with bias: false"),
        ("xlnet", {"feedforward": {"kind": "moe"}}, "experts have no biases; this family's .* choose a kind such as"),
        ("gpt2", {"num_heads": 3}, "model.num_heads: 3 given, a divisor of model.width 16"),
        ("bert", {"num_heads": 3}, "model.num_heads: 3 given, a divisor of model.width 16"),
    ],
)
def test_parts_that_do_not_go_together(make: Any, family: str, options: dict[str, Any], message: str) -> None:
    kind = {"bert": "masked", "xlnet": "permutation"}.get(family, "causal")
    model = {"family": family, "num_layers": 1, "num_heads": 2, "width": 16, **options}
    config = make({"data": NOWHERE, "objective": {"kind": kind}}).model_copy(update={"model": model})
    with pytest.raises(ConfigError, match=message):
        prepare(config, precision="fp32", kernels={"native": False})
