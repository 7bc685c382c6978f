"""Models for other programs: written, read again by the other program in a fresh process, compared, or refused.

    hf     a Hugging Face folder                         read by transformers
    peft   an adapter alone, its base elsewhere          read by peft on what transformers makes of the base
    onnx   model.onnx with the config and tokenizer      read by onnxruntime
    gguf   model.gguf, one file with everything in it    read by transformers' GGUF loader

An adapter is merged into its base for the others; what they read is compared with base and adapter. The same ids go
through both: sequences of unlike length, padded there, end to end here. Compared are logits (hidden states where there
is no head) at real tokens, the ids of texts, special ids, and what else the format carries. An export that does not
agree leaves nothing behind. What was found stands in export.json beside it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from isoform import storage
from isoform.checkpoints import adapters, folders, forms, gguf_writer, manifest, onnx, parity, reload, sources
from isoform.checkpoints.folders import LoadedModel
from isoform.contracts import Batch, Sequences
from isoform.errors import CheckpointError, ConfigError
from isoform.layers import ragged

FORMATS = {
    "hf": ("transformers",),
    "peft": ("peft", "transformers"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "gguf": ("gguf", "transformers"),
}
RECORD = "export.json"
# Beside weights, what a model folder may hold that belongs to the model.
COMPANIONS = (".json", ".jinja", ".txt", ".md", ".model")
WEIGHTS = ".safetensors"
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  It's 12:30, and naïve café-goers pay 1,234.5 €;\n\tthey'll THINK twice! 你好 🙂",
    "a",
)
LONGEST_TOKENS = 64
PROCESS_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written and how it compares.

    error: |ours - theirs| / |theirs| over all numbers; largest_difference: of two numbers. compared: what else is
    equal. notes: what whoever loads it must know.
    """

    path: str
    format: str
    model: str
    reader: str
    output: str
    num_tokens: int
    error: float
    largest_difference: float
    compared: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """A format's files as they wait to be read again. settings: what a loader must be told; notes: see `Exported`."""

    settings: dict[str, Any]
    notes: tuple[str, ...]


def export_model(path: str | Path, to: str, out: Path | None = None, *, base: str | Path | None = None) -> Exported:
    """Writes the model in another program's format, and proves that this program makes the same of it.

    out: a new folder, or one of an earlier export, which is replaced. base: of an adapter whose folder does not say.
    Raises: ConfigError, CheckpointError with the reason or the largest difference.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to: {to!r} given, {', '.join(FORMATS)} is expected")
    missing = [name for name in FORMATS[to] if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"--to {to}: {' and '.join(missing)} not installed; pip install 'isoform[export]'")
    target = _target(path, to) if out is None else out
    if target.exists() and not (target / RECORD).is_file():
        raise ConfigError(f"--out: {target} is there and is no earlier export; name another folder, or remove it")
    loaded = folders.load_model(path, base=base)
    if "fits" in loaded.model.capabilities:
        raise CheckpointError(f"{path}: {loaded.family}, a bag of words, has no form in another program")
    if to == "peft" and "base" not in loaded.info:
        raise CheckpointError(f"{path}: no adapter, but a whole model; --to hf writes that")
    with storage.staged_folder(target) as staged:
        written = _write(staged, loaded, to)
        found = _verify(staged, loaded, to, written)
        result = Exported(str(target), to, str(path), **found, notes=(*written.notes, *_reading(loaded)))
        storage.write_json(staged / RECORD, asdict(result))
        manifest.write(staged)
    return result


def _target(path: str | Path, to: str) -> Path:
    """Within a run, or else under the model's name in the folder where one is."""
    place = sources.resolve_model(path)
    if place.name == "final":
        return place.parent / "export" / to
    name = place.stem if place.is_file() else place.name
    return Path("export") / f"{name}-{to}"


# ------------------------------------------------------------------------------------------------------------ writing


def _write(staged: Path, loaded: LoadedModel, to: str) -> Written:
    if to == "peft":
        return _write_adapter(staged, loaded)
    if "base" in loaded.info:
        written = _write_whole(staged, _merged(loaded), to)
        return replace(written, notes=(*written.notes, f"merged with its base {loaded.info['base']}, in float32"))
    return _write_whole(staged, loaded, to)


def _reading(loaded: LoadedModel) -> tuple[str, ...]:
    """What other programs, which cut long texts at their end, must be told of a classifier that read them otherwise."""
    classifier = getattr(loaded.config, "classifier", None)
    if classifier is None or classifier.keep == "start":
        return ()
    part = "their end" if classifier.keep == "end" else "a quarter from their start and the rest from their end"
    return (f"texts longer than {classifier.max_tokens} tokens were read as {part}: cut them so yourself",)


def _write_adapter(staged: Path, loaded: LoadedModel) -> Written:
    form = forms.disk_form(loaded.model, loaded.tokenizer)
    if form.native_because is not None:
        raise CheckpointError(
            f"{loaded.info['path']}: no PEFT form: its base has none in transformers: {form.native_because}"
        )
    base = loaded.info["base"]
    if not Path(base).is_dir():
        raise CheckpointError(f"{loaded.info['path']}: no PEFT form: its base {base} is no Hugging Face folder")
    forms.write_files(staged, loaded.model, loaded.tokenizer, form)
    return Written(_last_token(loaded), (f"the base stands in {base} (base_model_name_or_path); take it along",))


def _merged(loaded: LoadedModel) -> LoadedModel:
    """The adapted model as a whole one. Raises: CheckpointError where merging changes its outputs."""
    info = {name: value for name, value in loaded.info.items() if name != "base"}
    return replace(loaded, model=adapters.merge(loaded.model).model, info={**info, "merged": True})


def _write_whole(staged: Path, loaded: LoadedModel, to: str) -> Written:
    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    storage.require_free(staged, 4 * size + 10_000_000)
    if to == "gguf":
        settings = gguf_writer.write_model(staged / reload.GGUF_FILE, loaded)
        told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        note = f"transformers' GGUF loader does not read these from the file, tell it: {told}"
        return Written(settings, (note,) if settings else ())
    if to == "hf":
        _, reason = loaded.model.hf_form(loaded.config)
        if reason is not None:
            raise CheckpointError(f"{loaded.info['path']}: no Hugging Face form: {reason}; isoform.load reads it")
        _companions(staged, loaded, weights=True)
        padding = _last_token(loaded)
        return Written(padding, ("transformers needs a pad_token_id for more than one text at once",) * len(padding))
    if "two-stream" in loaded.model.capabilities:
        raise CheckpointError(
            f"{loaded.info['path']}: no ONNX form: {loaded.family} has no dense form; --to hf has one"
        )
    _companions(staged, loaded, weights=False)
    onnx.write_onnx(staged, loaded.model)
    names = ", ".join(onnx.input_names(loaded.model))
    cached = bool(loaded.model.capabilities & {"cache", "encoder-decoder"})
    return Written({}, (f"inputs {names}; weights are float32" + ("; no cache" if cached else ""),))


def _last_token(loaded: LoadedModel) -> dict[str, Any]:
    """The padding that classifiers of decoders in transformers find the last token by, where config.json has none."""
    alone = onnx.output_of(loaded.model) == "class scores" and loaded.info["hf_config"].get("pad_token_id") is None
    return {"pad_token_id": 0} if alone else {}


def _companions(staged: Path, loaded: LoadedModel, *, weights: bool) -> None:
    """Config with its label names, tokenizer, chat template, generation config and the like; and weights on request."""
    place = Path(str(loaded.info["path"]))
    if place.is_file() or "merged" in loaded.info:
        form = forms.disk_form(loaded.model, loaded.tokenizer)
        forms.write_files(staged, loaded.model, loaded.tokenizer, form)
        if "generation" in loaded.info:
            storage.write_json(staged / "generation_config.json", loaded.info["generation"])
        if not weights:
            for path in staged.glob(f"*{WEIGHTS}*"):
                storage.remove(path)
        return
    for path in sorted(place.iterdir()):
        belongs = path.suffix in COMPANIONS or path.name.startswith(("LICENSE", "NOTICE"))
        stored = path.suffix == WEIGHTS or path.name.endswith(f"{WEIGHTS}.index.json")
        if path.is_file() and path.name not in (manifest.NAME, RECORD) and (weights if stored else belongs):
            storage.write_blocks(staged / path.name, _pieces(path))


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            yield block


# ---------------------------------------------------------------------------------------------------------- comparing


def _verify(staged: Path, loaded: LoadedModel, to: str, written: Written) -> dict[str, Any]:
    """What of `Exported` is found. Raises: CheckpointError where the other program makes something else of it."""
    rows = _rows(loaded)
    output = onnx.output_of(loaded.model)
    calls = [_call(loaded, part) for part in (rows, rows[:1])]
    if to != "onnx":  # there kinds of segment are all the first where none is given
        calls = [{name: ids for name, ids in call.items() if name != "token_type_ids"} for call in calls]
    texts = [] if loaded.tokenizer is None else list(TEXTS)
    request = {"format": to, "place": str(staged), "settings": written.settings, "calls": calls, "output": output}
    arrays, reply = _ask({**request, "texts": texts}, to)
    pairs = [
        (_ours(loaded.model, part, output), _real(array, part, left=_pads_left(loaded)))
        for part, array in zip((rows, rows[:1]), arrays, strict=True)
    ]
    ours, theirs = (torch.cat(side) for side in zip(*pairs, strict=True))
    error, largest = parity.relative_error(ours, theirs), float((ours - theirs).abs().max())
    if not error < parity.TOLERANCE:
        raise CheckpointError(
            f"--to {to}: not exported: {output} of {reply['reader']} differ by up to {largest:.2e} (relative error "
            f"{error:.1e}, below {parity.TOLERANCE:.0e} is expected); please report the model's config"
        )
    found = {
        "reader": reply["reader"],
        "output": output,
        "num_tokens": len(ours) if output != "class scores" else sum(map(len, rows + rows[:1])),
    }
    return {**found, "error": error, "largest_difference": largest, "compared": _carried(loaded, to, reply)}


def _carried(loaded: LoadedModel, to: str, reply: dict[str, Any]) -> tuple[str, ...]:
    """What the format carries beside the numbers, all of it equal. Raises: CheckpointError naming what is not."""
    expected: dict[str, tuple[Any, Any]] = {}
    tokenizer = loaded.tokenizer
    if tokenizer is not None:
        expected["ids of texts"] = [tokenizer.encode(text).tolist() for text in TEXTS], reply["ids"]
        if "special" in reply:
            roles = ("bos", "eos", "unk", "pad") if to == "gguf" else tuple(reply["special"])
            ids = {role: index for role, index in tokenizer.special_ids.items() if role in roles}
            expected["special ids"] = ids, {role: reply["special"][role] for role in ids}
        if tokenizer.chat_template is not None and "chat_template" in reply:
            expected["chat template"] = tokenizer.chat_template, reply["chat_template"]
    labels = loaded.info["hf_config"].get("id2label")
    if labels and to in ("hf", "peft"):
        expected["label names"] = labels, {str(index): name for index, name in reply["id2label"].items()}
    given = loaded.info.get("generation")
    if given and to == "hf" and reply.get("generation"):
        kept = {name: reply["generation"].get(name) for name in given if name != "transformers_version"}
        expected["generation config"] = {name: given[name] for name in kept}, kept
    for name, (ours, theirs) in expected.items():
        if ours != theirs:
            raise CheckpointError(
                f"--to {to}: not exported: the {name} of {reply['reader']} are not ours: {str(theirs)[:120]} there, "
                f"{str(ours)[:120]} here"
            )
    return tuple(expected)


def _rows(loaded: LoadedModel) -> list[list[int]]:
    """Ids of unlike length: the texts' own, and any of the vocabulary but the padding, up to the longest sequence."""
    size = int(loaded.config.vocab_size)
    longest = min(loaded.model.max_positions or LONGEST_TOKENS, LONGEST_TOKENS)
    padding = _padding(loaded)
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, size, (length,), generator=draw).tolist() for length in (longest, max(longest // 3, 1))]
    rows = [[(index + 1) % size if index == padding else index for index in row] for row in drawn]
    texts = () if loaded.tokenizer is None else TEXTS
    encoded = [loaded.tokenizer.encode(text)[:longest].tolist() for text in texts] if loaded.tokenizer else []
    return rows + [row for row in encoded if row and padding not in row]


def _padding(loaded: LoadedModel) -> int:
    given = loaded.info["hf_config"].get("pad_token_id")
    return given if type(given) is int else 0


def _pads_left(loaded: LoadedModel) -> bool:
    return loaded.info["hf_config"].get("model_type") in parity.PAD_LEFT


def _real(array: Tensor, rows: Sequence[Sequence[int]], *, left: bool) -> Tensor:
    """What stands at real tokens, `(b, t, ..)` -> `(n, ..)`; scores of whole texts `(b, c)` as they are."""
    if array.ndim == 2:
        return array
    return torch.cat([array[row, -len(ids) :] if left else array[row, : len(ids)] for row, ids in enumerate(rows)])


def _call(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> dict[str, list[list[int]]]:
    """The rows padded to the longest, as ids and mask; an encoder-decoder reads them as its source and its target."""
    longest = max(len(row) for row in rows)
    ids = [[*row, *[_padding(loaded)] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    if _pads_left(loaded):
        ids, mask = (
            [line[len(row) :] + line[: len(row)] for row, line in zip(rows, each, strict=True)] for each in (ids, mask)
        )
    kinds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": [[0] * longest for _ in rows]}
    return {name: kinds[name.removeprefix("decoder_")] for name in onnx.input_names(loaded.model)}


def _ours(model: Any, rows: Sequence[Sequence[int]], output: onnx.Output) -> Tensor:
    """Logits or hidden states `(n, ..)`, or scores of labels `(b, c)`, in float32."""
    sequences = Sequences([len(row) for row in rows])
    batch = Batch(
        tokens=torch.tensor([index for row in rows for index in row]),
        positions=ragged.places(sequences, torch.device("cpu")),
        sequences=sequences,
        sample_keys=torch.arange(len(rows)),
    )
    if "encoder-decoder" in model.capabilities:
        batch.source = batch
    model = model.to(torch.float32).eval()
    with torch.no_grad():
        states: Tensor = model(batch).hidden
        if output in ("class scores", "tag scores"):
            scores: Tensor = model.classifier(states, batch)
            return scores
        return states if output == "hidden states" else model.logits(states)


def _ask(request: dict[str, Any], to: str) -> tuple[list[Tensor], dict[str, Any]]:
    """The reply of `reload` in a fresh process. Raises: CheckpointError with the last line of what it said."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        storage.write_json(folder / "request.json", {**request, "place": str(Path(request["place"]).resolve())})
        command = [sys.executable, "-P", "-m", "isoform.checkpoints.reload", str(folder)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PROCESS_SECONDS)
        except subprocess.TimeoutExpired:
            raise CheckpointError(f"--to {to}: not exported: not read again within {PROCESS_SECONDS} s") from None
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise CheckpointError(f"--to {to}: not exported: what was written is not read again: {said[:300]}")
        arrays = load_file(folder / "reply.safetensors")
        reply: dict[str, Any] = json.loads((folder / "reply.json").read_text(encoding="utf-8"))
    return [arrays[str(number)] for number in range(len(request["calls"]))], reply
