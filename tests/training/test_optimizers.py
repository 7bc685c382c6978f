"""Which parameter goes to which optimiser, and what decays."""

from __future__ import annotations

import torch

from isoform import machine
from isoform.models.gpt2 import GPT2
from isoform.registry import component


def build(model, kind, precision="fp32", **options):
    cls, checked = component("optimizer", {"kind": kind, **options}, "train.optimizer")
    return cls(checked).build(dict(model.named_parameters()), 0.01, precision)


def owners(model, optimizers):
    """parameter name -> (optimiser's class, its group)"""
    found = {}
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if any(other is parameter for other in group["params"]):
                    assert name not in found, f"{name} is updated twice"
                    found[name] = (type(optimizer), group)
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = GPT2.tiny(tied=False)
    found = owners(model, build(model, "muon", adamw_learning_rate=0.003))
    muon = {name for name, (cls, _) in found.items() if issubclass(cls, torch.optim.Muon)}
    assert muon == {name for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")}
    assert {group["peak_rate"] for cls, group in found.values() if cls is torch.optim.AdamW} == {0.003}
    assert {group["peak_rate"] for cls, group in found.values() if issubclass(cls, torch.optim.Muon)} == {0.01}


def test_only_matrices_decay_and_tables_only_on_demand():
    model = GPT2.tiny(tied=False)
    for tables in (False, True):
        found = owners(model, build(model, "adamw", weight_decay=0.1, decay_embeddings=tables))
        for name, parameter in model.named_parameters():
            table = "embedding" in name or name.startswith(("head.", "position."))
            expected = 0.1 if parameter.ndim == 2 and (tables or not table) else 0.0
            assert found[name][1]["weight_decay"] == expected, name


def test_muon_computes_in_the_run_s_precision_and_measures_nothing(monkeypatch):
    def measured(*_):
        raise AssertionError("a measurement that no manifest records")

    monkeypatch.setattr(machine, "remembered", measured)
    for precision, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp16", torch.float32)):
        muon, _ = build(GPT2.tiny(), "muon", precision)
        assert muon.dtype == expected
