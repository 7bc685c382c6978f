"""Whether a model on disk gives here what transformers makes of the same folder.

Random tokens in sequences of unlike length are read once by each: here end to end, there padded. Hidden states, and
logits where the model has a head, are compared at real tokens.

    error = |ours - theirs| / |theirs|        over all compared numbers, in float32
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from isoform.contracts import Batch, Sequences

if TYPE_CHECKING:
    from isoform.checkpoints.folders import LoadedModel

LENGTHS = (7, 1, 12)
# Largest error between two correct float32 programs of usual depth.
TOLERANCE = 1e-4
MAX_PARAMETERS = 500_000_000
# Model types of transformers whose texts end where the rectangle ends.
PAD_LEFT = ("xlnet",)


@dataclass(frozen=True, slots=True)
class Parity:
    """The class of transformers that read the folder, what was compared, and the largest relative error."""

    theirs: str
    compared: tuple[str, ...]
    error: float

    @property
    def agrees(self) -> bool:
        return self.error < TOLERANCE


def why_not(loaded: LoadedModel, folder: Path) -> str | None:
    """Why a folder is not compared, or None."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return "transformers is not installed; pip install 'isoform[hf]'"
    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    if size > MAX_PARAMETERS:
        return f"{size / 1e9:.1f} billion parameters would be in memory twice"
    if str(loaded.info["hf_config"].get("model_type")).startswith("isoform-"):
        return "the model has no form in transformers"
    if "base" in loaded.info and importlib.util.find_spec("peft") is None:
        return "peft is not installed, which reads adapters"
    return None


def compare(loaded: LoadedModel, folder: Path) -> Parity:
    """Reads the folder with transformers too and compares; `why_not` must have found nothing against it.

    Of an adapter: the base with transformers, the adapter with peft.
    """
    theirs = _theirs(Path(loaded.info.get("base", folder)), loaded.info["hf_config"])
    if "base" in loaded.info:
        theirs = _adapted(theirs, folder)
    model = loaded.model.to(torch.float32).eval()
    batch = probe_batch(model, int(theirs.config.pad_token_id or 0))
    ids, mask = _padded(batch, left=theirs.config.model_type in PAD_LEFT)
    if theirs.config.pad_token_id is None:  # a classifier on the last token looks for it
        theirs.config.pad_token_id = 0
    ids = torch.where(mask.bool(), ids, theirs.config.pad_token_id)
    real = mask.bool()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if batch.source is not None:
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    with torch.no_grad():
        output = theirs(**inputs, output_hidden_states=True)
        hidden = model(batch).hidden
        scores = output.get("logits", output.get("prediction_logits"))
        pairs = {}
        if scores is None:
            pairs["hidden states"] = (hidden, output["last_hidden_state"][real])
        elif getattr(model, "classifier", None) is not None:
            pairs["logits"] = (model.classifier(hidden, batch), scores[real] if scores.ndim == 3 else scores)
        elif scores.shape[-1] == model.config.vocab_size and scores.ndim == 3:
            pairs["logits"] = (model.logits(hidden), scores[real])
        else:
            pairs["hidden states"] = (hidden, output.hidden_states[-1][real])
    return Parity(type(theirs).__name__, tuple(pairs), max(relative_error(*pair) for pair in pairs.values()))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, Euclidean norms over all numbers."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def _theirs(folder: Path, hf_config: dict[str, Any]) -> Any:
    import transformers

    named = next(iter(hf_config.get("architectures") or ["AutoModel"]))
    cls = getattr(transformers, str(named), transformers.AutoModel)
    # A .gguf file is read by transformers' own loader.
    place, file = (folder, {}) if folder.is_dir() else (folder.parent, {"gguf_file": folder.name})
    with _quiet():
        return cls.from_pretrained(
            place, **file, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
        ).eval()


def _adapted(base: Any, folder: Path) -> Any:
    import peft

    with _quiet():
        return peft.PeftModel.from_pretrained(base, folder).eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings, logs or bars of transformers in between."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # The bar of its GGUF loader knows no switch.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def probe_batch(model: Any, padding: int = 0) -> Batch:
    """Random tokens for a model, on its device, in sequences of unlike length; none is the padding."""
    longest = model.max_positions or max(LENGTHS)
    batch = _batch([min(length, longest) for length in LENGTHS], int(model.config.vocab_size), padding)
    batch = batch.to(next(model.parameters()).device)
    if "encoder-decoder" in model.capabilities:
        batch.source = batch
    return batch


def _batch(lengths: list[int], vocab_size: int, padding: int) -> Batch:
    """Random tokens, none of them the padding."""
    total = sum(lengths)
    tokens = torch.randint(0, vocab_size, (total,), generator=torch.Generator().manual_seed(0))
    return Batch(
        tokens=torch.where(tokens == padding, (padding + 1) % vocab_size, tokens),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        sequences=Sequences(lengths),
        sample_keys=torch.arange(len(lengths)),
    )


def _padded(batch: Batch, *, left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask `(b, t)`, padded on the right or on the left."""
    lengths = list(batch.sequences.lengths)
    side = "left" if left else "right"
    rows = list(torch.split(batch.tokens, lengths))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    place = torch.arange(max(lengths))
    return ids, ((place.flip(0) if left else place) < torch.tensor(lengths)[:, None]).long()
