"""A run on two ranks, on CPUs by gloo: whole models (DDP) and sharded ones (FSDP2), beside the run of one process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import FSDPModule

from isoform.checkpoints.forms import weights_file
from isoform.config import run_config
from isoform.errors import ConfigError
from isoform.layers import choice, kernels
from isoform.layers.compiled import blocks
from isoform.storage import read_json, read_jsonl, remove, write_json
from isoform.training import run as run_module
from isoform.training import sharding
from isoform.training.loop import Loop
from isoform.training.prepare import prepare
from isoform.training.run import train

# Accelerate shards on GPUs alone; here its state is told that these ranks are such.
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_ranks
getattr(test_ranks, sys.argv[2])(Path("."))
"""


def sharded(monkeypatch) -> None:
    """Runs are sharded from here on."""
    plain = run_module._accelerator

    def make(precision="fp32"):
        accelerator = plain(precision)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        sharding.check(accelerator)
        return accelerator

    monkeypatch.setattr(run_module, "_accelerator", make)


def on_each_rank(folder: Path) -> None:
    """Trains with whole models, with sharded ones, and once more with sharded ones from the step in the middle."""
    config = run_config(yaml.safe_load((folder / "config.yaml").read_text()))
    train(config, folder / "ddp", quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        sharded(patch)
        train(config, folder / "fsdp", quiet=True)
        if PartialState().is_main_process:
            back_to_step(shutil.copytree(folder / "fsdp", folder / "resumed"), 2)
        PartialState().wait_for_everyone()
        train(config, folder / "resumed", resume=True, quiet=True)
        PartialState().wait_for_everyone()
        train(config, folder / "resumed", quiet=True)  # it is complete: no rank waits for another


def at_odds(folder: Path) -> None:
    """Trains with whole models, where each rank by itself would take another precision and other kernels."""
    rank, prepared, chosen = int(os.environ["RANK"]), [], folder / "chosen"
    first = rank == 0

    def fast_bf16(shape):
        """True for the second rank, whose turn it is before there is a manifest to read the answer from."""
        if not first:
            chosen.touch()
        for _ in range(1000):
            if not chosen.exists():
                time.sleep(0.01)
        return not first

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "fast_bf16", fast_bf16)
        native = (choice.PLAIN, None, "first") if first else (choice.available(), 2.0, "second")
        patch.setattr(choice, "_native", lambda *_: native)
        patch.setattr(run_module, "prepare", lambda *a, **k: prepared.append(prepare(*a, **k)) or prepared[0])
        train(run_config(yaml.safe_load((folder / "config.yaml").read_text())), folder / "ddp", quiet=True)
    (run,) = prepared
    found = {"precision": run.precision, "kernels": run.kernels, "switched_on": kernels.switched_on()}
    write_json(folder / f"rank-{rank}.json", found)


def launch(folder: Path, script: str) -> None:
    """A function of this file on two ranks, as `torchrun` and `accelerate launch` start it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command, ranks = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), script], []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
            "ISOFORM_CACHE": str(folder / "cache"),
        }  # fmt: skip
        ranks.append(subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        messages = [rank.communicate(timeout=100)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(messages)


def causal(make):
    """Muon and AdamW, a checkpoint and an evaluation in the middle."""
    changes = {"max_steps": 4, "evaluate_every_steps": 2, "checkpoint_every_steps": 2, "optimizer": {"kind": "muon"}}
    return make({"train": changes})


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns(make, tmp_path):
    """Sums are rounded in another order, nothing else; Muon sees whole matrices, and a resume changes nothing."""
    config = causal(make)
    one = train(config, tmp_path / "one", quiet=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    launch(tmp_path, "on_each_rank")
    for kind, expected in (("ddp", "MULTI_CPU"), ("fsdp", "FSDP"), ("resumed", "FSDP")):
        manifest = read_json(tmp_path / kind / "manifest.json")
        assert manifest["processes"] == 2 and manifest["distribution"] == expected
        assert manifest["unused_parameters"] == []
        assert_alike(one.folder, tmp_path / kind)
    whole, resumed = weights(tmp_path / "fsdp"), weights(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_ranks_follow_the_first_and_learn_what_one_process_learns(make, tmp_path, monkeypatch):
    """Precision and kernels of the first rank are both ranks'; of weights, sums are rounded in another order."""
    config = make({"train": {"max_steps": 4, "precision": "auto", "optimizer": {"kind": "muon"}}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    launch(tmp_path, "at_odds")
    manifest = read_json(tmp_path / "ddp" / "manifest.json")
    assert manifest["processes"] == 2 and manifest["distribution"] == "MULTI_CPU" and manifest["precision"] == "fp32"
    ranks = [read_json(tmp_path / f"rank-{rank}.json") for rank in range(2)]
    assert ranks[0] == ranks[1] == {"precision": "fp32", "kernels": manifest["kernels"], "switched_on": False}
    monkeypatch.setenv("ISOFORM_NATIVE", "0")
    one = train(config, tmp_path / "one", precision="fp32", quiet=True)
    assert_alike(one.folder, tmp_path / "ddp")


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


ADAPTER = {"adapter": {"kind": "lora", "rank": 2, "targets": ["query", "up"]}}


@pytest.mark.parametrize("changes", [{}, ADAPTER], ids=["whole", "adapter"])
def test_a_sharded_run_is_evaluated_saved_and_resumed_like_any_other(make, tmp_path, monkeypatch, one_rank, changes):
    config = run_config({**causal(make).model_dump(mode="json"), **changes})
    one = train(config, tmp_path / "one", quiet=True)
    plain = run_module._accelerator
    sharded(monkeypatch)
    loops, feed = [], Loop._feed
    monkeypatch.setattr(Loop, "_feed", lambda loop: loops.append(loop) or feed(loop))
    train(config, tmp_path / "fsdp", quiet=True)
    module = loops[0].module
    assert len(blocks(module)) == 2 and all(isinstance(part, FSDPModule) for part in (module, *blocks(module)))
    assert_alike(one.folder, tmp_path / "fsdp")
    back_to_step(shutil.copytree(tmp_path / "fsdp", tmp_path / "resumed"), 2)
    train(config, tmp_path / "resumed", resume=True, quiet=True)
    whole, resumed = weights(tmp_path / "fsdp"), weights(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    back_to_step(shutil.copytree(tmp_path / "fsdp", tmp_path / "alone"), 2)
    monkeypatch.setattr(run_module, "_accelerator", plain)
    train(config, tmp_path / "alone", resume=True, quiet=True)
    assert_alike(tmp_path / "fsdp", tmp_path / "alone")


def assert_alike(one: Path, other: Path) -> None:
    first, second = (read_jsonl(folder / "metrics.jsonl") for folder in (one, other))
    assert [row["tokens"] for row in first] == [row["tokens"] for row in second]
    for a, b in zip(first, second, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["lr"] == b["lr"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    scores = [{row["metric"]: row["value"] for row in read_json(folder / "eval.json")} for folder in (one, other)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    final, found = weights(one), weights(other)
    assert found.keys() == final.keys()
    assert max(float((found[name] - final[name]).abs().max()) for name in final) < 1e-3


def weights(folder):
    return load_file(weights_file(folder / "final"))


def back_to_step(folder, step: int) -> None:
    """The run's folder as it was when it was killed after `step`."""
    for name in ("final", "last"):
        remove(folder / name)
    for path in (folder / "checkpoints").iterdir():
        if path.name > f"step-{step:06d}":
            remove(path)
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), "complete": False})


@pytest.mark.parametrize(
    ("kind", "message"),
    [(DistributedType.FSDP, "add --fsdp_version 2"), (DistributedType.DEEPSPEED, "use --use_fsdp --fsdp_version 2")],
)
def test_other_ways_to_shard_are_refused_in_one_line(kind, message):
    class Launched:
        distributed_type = kind
        is_fsdp2 = False

    with pytest.raises(ConfigError, match=message):
        sharding.check(Launched())
