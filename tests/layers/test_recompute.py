"""Recomputed blocks: the same values and gradients by the bit, dropout and routing included, from less memory."""

from __future__ import annotations

import pytest
import torch

from isoform.contracts import Sample
from isoform.data.batches import collate
from isoform.layers.recompute import Recomputable
from isoform.models.bert import Bert
from isoform.models.gpt2 import GPT2
from isoform.models.llama import Llama
from isoform.models.modernbert import ModernBert

MODELS = {
    "gpt2": lambda: GPT2.tiny(dropout=0.2),
    "rope": lambda: Llama.tiny(),
    "experts": lambda: Llama.tiny(feedforward={"kind": "moe", "experts": 4, "active": 2}),
    "bert": lambda: Bert.tiny(dropout=0.2),
    "modernbert": lambda: ModernBert.tiny(),
}


def batch():
    import numpy as np

    samples = [Sample(str(length), np.arange(length, dtype=np.int32) % 50 + 3) for length in (9, 17, 5)]
    made = collate(samples)
    made.dropout_key = 12345
    return made


def passed(model, given):
    """The output, its gradients, and how many numbers the graph kept."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(given)
    total = output.hidden.square().sum()
    if output.router_logits is not None:
        total = total + sum(logits.logsumexp(-1).sum() for logits in output.router_logits)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.hidden.detach(), gradients, sum(kept)


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_are_the_same(name):
    model = MODELS[name]().train()
    plain, plain_gradients, plain_kept = passed(model, batch())
    blocks = [part for part in model.modules() if isinstance(part, Recomputable)]
    assert blocks
    for block in blocks:
        block.recomputed = True
    again, gradients, kept = passed(model, batch())
    assert torch.equal(plain, again) and gradients.keys() == plain_gradients.keys()
    assert all(torch.equal(gradients[key], plain_gradients[key]) for key in gradients)
    assert kept < plain_kept / 2
