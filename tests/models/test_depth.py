"""A model of some layers of another is that of transformers with the same layers taken out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModel

from isoform.checkpoints.folders import load_model
from isoform.checkpoints.forms import save_model
from isoform.contracts import Batch, Sequences
from isoform.errors import ConfigError
from isoform.models import heads
from isoform.models.depth import keep_layers
from isoform.registry import lookup

FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama", "t5"]
# Where transformers keeps its layers.
PLACES = {"bert": "encoder.layer", "gpt2": "h", "llama": "layers", "distilbert": "transformer.layer"}


def drawn(family: str, **changes) -> nn.Module:
    """A tiny model of four layers, no two of which are alike."""
    model = lookup("model", family).tiny(**{"num_layers": 4, **changes})
    for number, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(number))
    return model


def batch_of(family: str) -> Batch:
    def stream(lengths) -> Batch:
        tokens = torch.randint(2, 60, (sum(lengths),), generator=torch.Generator().manual_seed(0))
        positions = torch.cat([torch.arange(length) for length in lengths])
        return Batch(tokens, positions, Sequences(lengths), torch.arange(len(lengths)))

    batch = stream((7, 3))
    batch.source = stream((5, 9)) if family == "t5" else None
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_are_the_whole_model(family: str) -> None:
    model, batch = drawn(family), batch_of(family)
    kept = keep_layers(model, range(4))
    assert all(torch.equal(tensor, kept.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(kept(batch).hidden, model(batch).hidden)
    assert kept.embedding.weight.data_ptr() != model.embedding.weight.data_ptr()


@pytest.mark.parametrize("family", PLACES)
def test_some_layers_are_those_of_transformers(family: str, tmp_path) -> None:
    model, batch = drawn(family), batch_of(family)
    save_model(tmp_path / "whole", model, None)
    theirs = AutoModel.from_pretrained(tmp_path / "whole").eval()
    holder, _, name = PLACES[family].rpartition(".")
    layers = theirs.get_submodule(PLACES[family])
    setattr(theirs.get_submodule(holder), name, nn.ModuleList([layers[1], layers[3]]))
    theirs.config.num_hidden_layers, theirs.config.use_cache = 2, False
    kept = keep_layers(model, [1, 3])
    assert kept.config.num_layers == 2
    with torch.no_grad():
        expected = theirs(input_ids=batch.tokens[None, :7]).last_hidden_state[0]
        torch.testing.assert_close(kept(batch).hidden[:7], expected, rtol=1e-4, atol=1e-5)
    save_model(tmp_path / "kept", kept, None)
    assert torch.equal(load_model(tmp_path / "kept").model(batch).hidden, kept(batch).hidden)


def test_both_stacks_keep_them(tmp_path) -> None:
    model = drawn("t5", num_decoder_layers=5)
    kept = keep_layers(model, [0, 3])
    assert [len(stack.blocks) for stack in (kept.encoder, kept.decoder)] == [2, 2]
    for stack in ("encoder", "decoder"):
        ours, whole = (part.get_submodule(f"{stack}.blocks") for part in (kept, model))
        for new, old in ((0, 0), (1, 3)):
            for name, tensor in ours[new].state_dict().items():
                assert torch.equal(tensor, whole[old].state_dict()[name])


def test_a_classifier_stays() -> None:
    model = heads.attach(drawn("bert"), heads.Classifier(labels=("a", "b")), seed=0)
    kept = keep_layers(model, [0, 2])
    assert kept.config.classifier.labels == ("a", "b")
    assert torch.equal(kept.classifier.scores.weight, model.classifier.scores.weight)


@pytest.mark.parametrize(
    ("layers", "every"), [([0, 3], 1), ([0, 1, 3], 2), ([0, 1, 2], 3), ([0], 3), ([1, 2], None), ([0, 3, 4], None)]
)
def test_modernbert_keeps_its_kinds_of_layer(layers: list[int], every: int | None) -> None:
    model = drawn("modernbert", num_layers=5)
    if every is None:
        with pytest.raises(ConfigError, match=r"model.layers: .* begins with layer 0"):
            keep_layers(model, layers)
        return
    kept = keep_layers(model, layers)
    assert kept.config.global_every == every
    assert [block.is_global for block in kept.blocks] == [model.blocks[layer].is_global for layer in layers]


@pytest.mark.parametrize("layers", [[], [0, 4], [-1, 0], [2, 1], [1, 1]])
def test_layers_that_are_not_there_are_told(layers: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"model.layers: .* rising numbers .* each from 0 to 3"):
        keep_layers(drawn("bert"), layers)
