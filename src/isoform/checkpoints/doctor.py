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

from isoform import machine, storage
from isoform.checkpoints import folders, manifest, sources
from isoform.errors import IsoformError

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
            sources.resolve_model(path)
        except IsoformError as error:
            return [Finding("error", str(error))]
    findings = _leftovers(folder) + _pickles(folder)
    if (folder / "config.json").is_file():
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
    facts = machine.describe()
    flags = ", ".join(facts["cpu_flags"]) or "none of those that matter"
    findings = [
        Finding("ok", f"Python {facts['python']} at {sys.executable}; torch {facts['torch']} on {facts['platform']}"),
        Finding("ok", f"{facts['cpu']}: {facts['cores']} cores, {facts['threads']} threads; {flags}"),
        Finding("ok", f"device {machine.choose_device()}, {machine.choose_precision('auto', machine.choose_device())}"),
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
    return [
        Finding("warning", f"{path}: a pickle, which can run code when it is opened", "never read here; delete it")
        for path in sources.pickles(folder)
    ]


def _model(folder: Path) -> list[Finding]:
    """A model folder: hashes, unlisted files, and whether it loads, tokenizer included."""
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
    else:
        findings.append(Finding("info", f"{folder}: no {manifest.NAME}; damage to its weights cannot be seen"))
    try:
        loaded = folders.load_model(folder)
    except IsoformError as error:
        return [*findings, Finding("error", str(error))]
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    findings.append(Finding("ok", f"{folder}: loads as {loaded.family}, {parameters} parameters"))
    if loaded.tokenizer is None:
        findings.append(Finding("warning", str(loaded.info["tokenizer"]), "copy the model's tokenizer.json there"))
    return findings + _labels(folder, loaded.info["hf_config"])


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
