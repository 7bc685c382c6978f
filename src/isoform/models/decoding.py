"""A decoder as generation reads it: the same parts, its weights packed once, its blocks run in one call where they fit.

What the kernel does not know (experts, a prefix, a long prompt, a window that has moved on) the model itself does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isoform.contracts import Batch, Output
from isoform.layers import decoding, kernels
from isoform.layers.cache import KVCache
from isoform.layers.decoding import Weights
from isoform.layers.quantized import in_int8
from isoform.models.decoder import Decoder

# More new tokens at once are read by the model itself, whose attention is made for long texts.
MOST_TOKENS = 512


class FastDecoder:
    """Behaves as the model that it was made of, for as long as nobody changes its weights.

    Those are kept as they were, but for what they share with the model: matrices of float32, the embedding.
    """

    def __init__(self, model: Decoder, blocks: decoding.Blocks, head: decoding.Packed) -> None:
        self.model, self.blocks, self.head = model, blocks, head
        self.config, self.capabilities, self.max_positions = model.config, model.capabilities, model.max_positions
        self.new_cache = model.new_cache

    def __call__(self, batch: Batch, *, cache: KVCache | None = None, all_layers: bool = False) -> Output:
        if cache is None or all_layers or batch.sequences.prefixes or batch.num_tokens > MOST_TOKENS:
            read: Output = self.model(batch, cache=cache, all_layers=all_layers)
            return read
        self.model.check_length(batch.sequences, cache)
        with torch.autocast("cpu", enabled=False):
            embedded = self.model.position.embed(self.model.embedding(batch.tokens), batch.positions)
            hidden = self.blocks.run(embedded, batch.positions, batch.sequences.lengths, cache)
        cache.advance(batch.sequences)
        return Output(hidden=hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(m, d)` -> float32 `(m, v)`."""
        return self.head(hidden)


@torch.no_grad()
def prepared(model: Any, kind: Weights, *, narrow_cache: bool) -> Any:
    """The model as generation reads it, for as long as its weights stay what they are.

    narrow_cache: keys and values of new tokens are kept in bfloat16. Where the kernel does not know the model's parts,
    or there is none, it is the model itself, with linear layers in int8 if that is asked for.
    """
    if isinstance(model, FastDecoder):
        return model
    if isinstance(model, Decoder) and not decoding.unfit(list(model.blocks), model.position, model.final_norm):
        head = model.embedding if model.head is None else model.head
        library = kernels.serves(model.embedding.weight, head.weight)
        if library is not None:
            dtype = torch.bfloat16 if narrow_cache else torch.float32
            blocks = decoding.Blocks(library, list(model.blocks), model.position, model.final_norm, kind, dtype)
            return FastDecoder(model, blocks, decoding.Packed(library, head.weight, None, kind))
    return in_int8(model) if kind == "int8" else model
