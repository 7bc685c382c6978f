"""What is wrong with this machine, a model folder or a run folder, and what to do about it.

Nothing is changed: every finding says what a person may do.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch.nn import ModuleList

from isoform import machine, storage
from isoform.checkpoints import folders, manifest, parity, sources
from isoform.checkpoints.folders import LoadedModel
from isoform.errors import IsoformError
from isoform.layers import choice
from isoform.layers.moe import MixtureOfExperts
from isoform.models.lora import active_adapter, adapter_state
from isoform.text.tokenizers import TextTokenizer

Level = Literal["ok", "info", "warning", "error"]
LOW_DISK_BYTES = 2_000_000_000
LOW_MEMORY_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `advice` is empty where nothing needs doing."""

    level: Level
    what: str
    advice: str = ""


def examine(path: str | Path | None = None) -> list[Finding]:
    """Findings about the machine, or about a model folder, a run folder or a single file where a path is given."""
    if path is None:
        return _machine()
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = sources.resolve_model(path)
        except IsoformError as error:
            return [Finding("error", str(error))]
    if folder.is_file():
        return _model(folder)
    findings = _leftovers(folder) + _pickles(folder)
    if any((folder / name).is_file() for name in sources.CONFIGS):
        findings += _model(folder)
    elif _is_run(folder):
        findings += _run(folder)
    else:
        findings.append(
            Finding("error", f"{folder}: neither a model folder nor a run folder", "name one that holds config.json")
        )
    return findings


# -------------------------------------------------------------------------------------------------------- the machine


def _machine() -> list[Finding]:
    facts, device = machine.describe(), machine.choose_device()
    precision = choice.choose_precision("auto", device)
    chosen = choice.choose(precision, device)
    flags = ", ".join(facts["cpu_flags"]) or "none of those that matter"
    findings = [
        Finding("ok", f"Python {facts['python']} at {sys.executable}; torch {facts['torch']} on {facts['platform']}"),
        Finding("ok", f"{facts['cpu']}: {facts['cores']} cores, of which torch uses {facts['threads']}; {flags}"),
        Finding("ok", f"device {device}, {precision}"),
        Finding("ok", f"kernels: {choice.KINDS[chosen['native']]}: {chosen['why']}; {chosen['threads']} threads"),
    ]
    if facts["threads"] > facts["cores"]:
        findings.append(
            Finding(
                "warning",
                f"torch uses {facts['threads']} threads on {facts['cores']} cores",
                f"set OMP_NUM_THREADS={facts['cores']}",
            )
        )
    memory = facts["memory_bytes"]
    findings.append(
        Finding("ok", f"{memory / 1e9:.1f} GB of memory")
        if memory >= LOW_MEMORY_BYTES
        else Finding("warning", f"only {memory / 1e9:.1f} GB of memory", "keep models and micro-batches small")
    )
    free = storage.free_bytes(Path.cwd())
    findings.append(
        Finding("ok", f"{free / 1e9:.1f} GB free in {Path.cwd()}")
        if free >= LOW_DISK_BYTES
        else Finding("warning", f"only {free / 1e9:.2f} GB free in {Path.cwd()}", "free some space or use --out")
    )
    return findings + _packages()


def _packages() -> list[Finding]:
    """What isoform requires and is absent, then what each extra would add."""
    findings: list[Finding] = []
    absent: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("isoform") or []:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == [\"']([\w-]+)[\"']", requirement)
        if not _installed(name):
            absent.setdefault(extra[1] if extra else "", []).append(name)
    for extra_name, names in sorted(absent.items()):
        if not extra_name:
            findings.append(Finding("error", f"required and not installed: {', '.join(names)}", "pip install isoform"))
        elif extra_name not in ("dev", "notebooks"):
            advice = f"if you need it: pip install 'isoform[{extra_name}]'"
            findings.append(Finding("info", f"optional and not installed: {', '.join(names)}", advice))
    return findings


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# -------------------------------------------------------------------------------------------------- folders and files


def _leftovers(folder: Path) -> list[Finding]:
    return [
        Finding("warning", f"{path}: left by a process that was killed", "it goes with the next --resume, or delete it")
        for path in storage.leftovers(folder)
    ]


def _pickles(folder: Path) -> list[Finding]:
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        return []  # loading refuses a model that is nothing else
    return [
        Finding("warning", f"{path}: a pickle, which can run code when it is opened", "never read here; delete it")
        for path in sources.pickles(folder)
    ]


def _model(folder: Path) -> list[Finding]:
    """A model folder or file: hashes, unlisted files, whether it loads, what it is, and whether transformers agrees."""
    findings: list[Finding] = []
    if (folder / manifest.NAME).is_file():
        try:
            value = manifest.verify(folder)
            findings.append(Finding("ok", f"{folder}: {len(value['files'])} files, each with the hash of its manifest"))
            findings += [
                Finding("info", f"{path}: not in {manifest.NAME}", "put there by hand? it is not read")
                for path in manifest.unlisted(folder)
            ]
        except IsoformError as error:
            return [Finding("error", str(error), "restore the folder from a copy")]
    elif folder.is_dir():
        findings.append(Finding("info", f"{folder}: no {manifest.NAME}; damage to its weights cannot be seen"))
    try:
        loaded = folders.load_model(folder)
    except IsoformError as error:
        return [*findings, Finding("error", str(error))]
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    idle = sum(layer.idle_parameters for layer in loaded.model.modules() if isinstance(layer, MixtureOfExperts))
    active = f", {parameters - idle} of them active for each token" if idle else ""
    findings.append(Finding("ok", f"{folder}: loads as {loaded.family}, {parameters} parameters{active}"))
    findings += _adapter(loaded)
    findings += _parts(loaded)
    if loaded.tokenizer is None:
        findings.append(Finding("warning", str(loaded.info["tokenizer"]), "copy the model's tokenizer.json there"))
    else:
        findings += _vocabulary(loaded.tokenizer, loaded)
    return findings + _labels(folder, loaded.info["hf_config"]) + _parity(loaded, folder)


def _adapter(loaded: LoadedModel) -> list[Finding]:
    """What an adapter trained, and on which base."""
    adapter = active_adapter(loaded.model)
    if adapter is None:
        return []
    trained = sum(tensor.numel() for tensor in adapter_state(loaded.model).values())
    options, base = adapter.options, loaded.info["base"]
    stabilized = " (rank-stabilised)" if options.rank_stabilized else ""
    what = f"an adapter of rank {options.rank}, alpha {options.alpha:g}{stabilized}, on {base}: {trained} trained"
    return [Finding("ok", f"{what} parameters, {len(adapter.whole)} tensors of the base among them")]


def _parts(loaded: LoadedModel) -> list[Finding]:
    """What the model is made of: its class in transformers, its config, the parameters of each part."""
    hf_config = loaded.info["hf_config"]
    named = ", ".join(hf_config.get("architectures") or ["no architecture named"])
    sizes = {
        name: sum(parameter.numel() for parameter in part.parameters()) for name, part in loaded.model.named_children()
    }
    blocks = [name for name, part in loaded.model.named_children() if isinstance(part, ModuleList)]
    said = [
        f"{name} {len(loaded.model.get_submodule(name))} x {size // len(loaded.model.get_submodule(name))}"
        if name in blocks
        else f"{name} {size}"
        for name, size in sizes.items()
        if size
    ]
    options = {name: value for name, value in loaded.config.model_dump(mode="json").items() if value is not None}
    packed = [f"{count} tensors {kind}" for kind, count in loaded.info.get("packed", {}).items()]
    return [
        *([Finding("ok", "packed: " + ", ".join(packed))] if packed else []),
        Finding("ok", f"{hf_config.get('model_type')}, {named}; can be {', '.join(sorted(loaded.model.capabilities))}"),
        Finding("ok", "config: " + ", ".join(f"{name} {_plain(value)}" for name, value in options.items())),
        Finding("ok", "parameters of its parts: " + ", ".join(said)),
    ]


def _plain(value: Any) -> str:
    """A component by its kind, with those of its options that are not off."""
    if not isinstance(value, dict) or "kind" not in value:
        return json.dumps(value)
    rest = [f"{name} {item}" for name, item in value.items() if name != "kind" and item is not None]
    return str(value["kind"]) + (f" ({', '.join(rest)})" if rest else "")


def _vocabulary(tokenizer: TextTokenizer, loaded: LoadedModel) -> list[Finding]:
    """Special ids, and whether every id has a row of the embedding and every row an id."""
    ids = tokenizer.special_ids
    rows = int(loaded.config.vocab_size)
    said = ", ".join(f"{role} {index} ({tokenizer.special[role]})" for role, index in ids.items()) or "none"
    findings = [Finding("ok", f"special ids: {said}")]
    if tokenizer.chat_template is not None:
        findings.append(Finding("ok", f"a chat template of {len(tokenizer.chat_template)} characters"))
    if tokenizer.vocab_size == rows:
        findings.append(Finding("ok", f"{rows} tokens in the vocabulary, {rows} rows in the embedding"))
    else:  # a larger vocabulary does not load
        spare = rows - tokenizer.vocab_size
        findings.append(
            Finding(
                "info", f"{tokenizer.vocab_size} tokens in the vocabulary, {rows} rows in the embedding: {spare} spare"
            )
        )
    for role in ("bos", "eos", "pad", "cls", "sep", "mask"):
        given = loaded.info["hf_config"].get(f"{role}_token_id")
        if isinstance(given, int) and role in ids and given != ids[role]:
            what = f"config.json: {role}_token_id is {given}, the tokenizer's is {ids[role]}"
            findings.append(Finding("warning", what, "whoever generates or pads with that id uses another token"))
    return findings


def _parity(loaded: LoadedModel, folder: Path) -> list[Finding]:
    """Whether transformers makes the same of the folder, where it is installed."""
    reason = parity.why_not(loaded, folder)
    if reason is not None:
        return [Finding("info", f"not compared with transformers: {reason}")]
    try:
        found = parity.compare(loaded, folder)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return [Finding("warning", f"transformers does not read {folder}: {first_line[:200]}")]
    what = f"{' and '.join(found.compared)} of {found.theirs} in transformers: relative error {found.error:.1e}"
    return [
        Finding("ok" if found.agrees else "error", what, "" if found.agrees else "please report the folder's config")
    ]


def _labels(folder: Path, hf_config: dict[str, Any]) -> list[Finding]:
    names = hf_config.get("id2label")
    if isinstance(names, dict) and any(re.fullmatch(r"LABEL_\d+", str(name)) for name in names.values()):
        return [
            Finding(
                "warning",
                f"{folder / 'config.json'}: labels are called {', '.join(map(str, list(names.values())[:3]))}",
                "their order was lost when the model was saved; write the true names into id2label",
            )
        ]
    return []


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.yaml", "checkpoints", "final", "metrics.jsonl"))


def _run(folder: Path) -> list[Finding]:
    """A run folder: its logs, every checkpoint's hashes, and its final model."""
    findings = [finding for name in ("metrics.jsonl", "events.jsonl") for finding in _log(folder / name)]
    checkpoints = folder / "checkpoints"
    if checkpoints.is_dir():
        findings += _leftovers(checkpoints)
        whole = 0
        for path in sorted(checkpoints.glob("step-*")):
            try:
                manifest.verify(path)
                whole += 1
                findings.append(Finding("ok", f"{path}: whole"))
            except IsoformError as error:
                findings.append(Finding("error", str(error), "--resume uses the newest whole checkpoint before it"))
        if not whole:
            findings.append(Finding("warning", f"{checkpoints}: no whole checkpoint", "the run cannot be resumed"))
    if (folder / "final").is_dir():
        findings += _model(folder / "final")
    else:
        findings.append(Finding("info", f"{folder}: no final model; the run has not ended", "--resume goes on with it"))
    return findings


def _log(path: Path) -> list[Finding]:
    """Torn or damaged lines of a JSONL file."""
    if not path.is_file():
        return []
    findings = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            findings.append(Finding("warning", f"{path}:{number}: torn by a crash", "left out when read; harmless"))
            continue
        try:
            json.loads(line)
        except ValueError:
            findings.append(Finding("error", f"{path}:{number}: not a line of JSON", "delete the line"))
    return findings
