"""ONNX files: the call that people know, as one graph over padded batches of any size and length.

    causal            input_ids, attention_mask (b, t)                    -> logits (b, t, v)
    bidirectional     the same, token_type_ids where there are segments   -> logits, or last_hidden_state (b, t, d)
    encoder-decoder   input_ids, attention_mask (b, s),
                      decoder_input_ids, decoder_attention_mask (b, t)    -> logits (b, t, v)

With a classifier: logits (b, c), a score for each label, or (b, t, c) where each token has its own. All but the first
are zero at padding, which may stand at either end.
Attention takes its dense form, experts all see every token. There is no cache: a text is continued by reading it again.
Weights are float32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isoform import storage
from isoform.checkpoints import tensors
from isoform.checkpoints.reload import ONNX_FILE
from isoform.contracts import Batch
from isoform.errors import CheckpointError
from isoform.layers.attention import Padded

# A protocol buffer holds at most 2 GiB; larger weights stand in a file of their own.
MOST_BYTES_WITHIN = 1_800_000_000
# Of the example that the graph is made from; neither is kept in it.
EXAMPLE_ROWS, EXAMPLE_TOKENS = 3, 7
Output = Literal["class scores", "tag scores", "hidden states", "logits"]


class Dense(nn.Module):
    """The padded call around a ragged model, without a length in it that the graph could keep.

    Shapes: ids, masks and types `(b, t)`, of the source `(b, s)` -> `(b, t, v)` or `(b, t, d)`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.output = output_of(model)
        self.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        batch = _rectangle(input_ids, attention_mask, token_type_ids)
        if decoder_input_ids is not None and decoder_attention_mask is not None:
            source, batch = batch, _rectangle(decoder_input_ids, decoder_attention_mask, None)
            batch.source = source
        assert isinstance(batch.sequences, Padded), "made above"
        states: Tensor = self.model(batch).hidden
        if self.output == "class scores":
            scores: Tensor = self.model.classifier(states, batch)
            return scores
        if self.output == "tag scores":
            output: Tensor = self.model.classifier(states, batch)
        else:
            output = states if self.output == "hidden states" else self.model.logits(states)
        real = batch.sequences.real
        return output.view(*real.shape, -1).masked_fill(~real[..., None], 0.0)  # (n, v) -> (b, t, v)


def _rectangle(ids: Tensor, mask: Tensor, segments: Tensor | None) -> Batch:
    real = mask.bool()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    keys = torch.empty(0, dtype=torch.int64)  # of dropout, of which there is none
    return Batch(ids.flatten(), positions.flatten(), Padded(real), keys, segments=_flat(segments))


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.flatten()


def output_of(model: Any) -> Output:
    """What a model gives: scores of labels, scores at each place, or hidden states where it has no head."""
    if getattr(model, "classifier", None) is not None:
        return "tag scores" if model.config.classifier.pooling == "none" else "class scores"
    headless = "bidirectional" in model.capabilities and getattr(model, "head", None) is None
    return "hidden states" if headless else "logits"


def input_names(model: Any) -> list[str]:
    """Names of the graph's inputs, in their order."""
    names = ["input_ids", "attention_mask"]
    if "encoder-decoder" in model.capabilities:
        names += ["decoder_input_ids", "decoder_attention_mask"]
    if getattr(model, "segment_embedding", None) is not None and model.config.num_segments > 1:
        names.append("token_type_ids")
    return names


def write_onnx(folder: Path, model: Any) -> None:
    """Writes model.onnx, beside it model.onnx.data where one file cannot hold the weights."""
    model = model.to(torch.float32).eval()
    names = input_names(model)
    # The target's length is another size than the source's.
    lengths = {name: EXAMPLE_TOKENS - 2 * name.startswith("decoder") for name in names}
    example = {name: torch.ones(EXAMPLE_ROWS, length, dtype=torch.int64) for name, length in lengths.items()}
    axes = {name: {0: "batch", 1: "decoder_length" if name.startswith("decoder") else "length"} for name in names}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                Dense(model),
                kwargs=example,
                dynamo=True,
                dynamic_shapes=axes,
                input_names=names,
                output_names=["last_hidden_state" if output_of(model) == "hidden states" else "logits"],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"--to onnx: not exported: torch.onnx does not take the model: {reason[:300]}") from error
    assert program is not None, "the exporter by torch.export returns a program"
    if tensors.num_bytes(model.state_dict()) > MOST_BYTES_WITHIN:
        program.save(folder / ONNX_FILE, external_data=True)
    else:
        storage.write_blocks(folder / ONNX_FILE, [program.model_proto.SerializeToString()])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what the exporter says of itself in between."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
