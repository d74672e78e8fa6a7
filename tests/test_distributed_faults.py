"""What may go wrong on several ranks: each is said in one line, by the one that knows, and all ranks end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from train_data import records, same_weights, write_text

from tidar.train import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_text(folder / "text", documents=80)
    return folder


@pytest.fixture(scope="module")
def recipe(root: Path, converted: Callable[[str], Path]) -> Path:
    return ranks.write_recipe(root / "recipe.toml", converted("llama"), root / "text", tokens=12 * 144)


def refused(recipe: Path, out: Path, *words: str, fault: str = "") -> str:
    """The one error of a run that ends before long."""
    begun = time.monotonic()
    lines = ranks.run(recipe, out, *words, ok=False, fault=fault)
    assert time.monotonic() - begun < 120
    assert not any("tidar/" in line for line in lines if line.lstrip().startswith("File ")), (
        lines
    )  # no traceback of ours
    found = ranks.errors(lines)
    assert len(found) == 1, lines
    return found[0]


def test_ranks_with_different_recipes(recipe: Path, tmp_path: Path) -> None:
    said = refused(recipe, tmp_path / "run", fault="argument:1:0")
    assert said == (
        "rank 1 has another recipe than rank 0: lr is 0.02 there and 0.01 here; start every rank with the same command "
        "and the same files"
    )
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_of_the_data(root: Path, converted: Callable[[str], Path], tmp_path: Path) -> None:
    plan = ranks.write_recipe(tmp_path / "recipe.toml", converted("llama"), tmp_path / "nowhere")
    assert "nowhere" in refused(plan, tmp_path / "run")


def test_micro_batches_that_cannot_be_shared(recipe: Path, tmp_path: Path) -> None:
    said = refused(recipe, tmp_path / "run", "--batch-tokens", "72")
    assert said.startswith("2 ranks cannot share the 3 micro-batches of a step: choose micro_batch (now 1)")


@pytest.mark.parametrize("fault", ["", "late:0:0", "late:1:0"])
def test_a_recipe_that_is_not_there(tmp_path: Path, fault: str) -> None:
    """It is said once, though a rank that does not say it comes to its end earlier."""
    assert "cannot read" in refused(tmp_path / "none.toml", tmp_path / "run", fault=fault)


def test_a_broken_checkpoint(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ranks.run(recipe, out)
    (out / "model").rename(tmp_path / "wanted")
    newest = checkpoint.checkpoints(out)[0]
    part = sorted((newest / "optimizer").glob("*.distcp"))[1]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(bytes(data))
    lines = ranks.run(recipe, out, "--resume")
    said = [line for line in lines if line.startswith("checkpoint ")]
    assert said == [f"checkpoint {newest} is broken (optimizer/{part.name} has changed); trying the one before it"], (
        lines
    )
    assert same_weights(out / "model", tmp_path / "wanted")


def test_a_loss_that_is_not_finite(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = refused(recipe, out, fault="nan:1:7")
    assert said.startswith("the loss or its gradient is not finite at step 7 on rank 1; its batch is in ")
    kept = torch.load(out / "bad-batch-00000007.pt", weights_only=True)
    assert kept["ranks"] == [1]
    assert kept["tokens"].shape == (6, 24), "the whole batch, as one process would have had it"
    assert [p.name for p in checkpoint.checkpoints(out)] == ["step-00000005"]


def test_out_of_memory(recipe: Path, tmp_path: Path) -> None:
    lines = ranks.run(recipe, tmp_path / "run", ok=False, fault="memory:1:7")
    assert ranks.errors(lines)[0].startswith("rank 1 is out of GPU memory: lower micro_batch (now 1)")
    # Rank 0 may come to say that it has lost it before torchrun ends it.
    assert all("has lost another rank" in line for line in ranks.errors(lines)[1:])


def test_a_full_disk_of_one_rank(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = refused(recipe, out, fault="disk:1:7")
    assert "cannot save checkpoint step-00000010" in said
    assert said.endswith(f"the last whole one is {out}/checkpoints/step-00000005; continue with --resume")
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000005"]
    ranks.run(recipe, out, "--resume")
    assert len([r for r in records(out) if "loss" in r]) == 12


def test_a_used_folder_is_refused_on_a_restart_too(recipe: Path, tmp_path: Path) -> None:
    """Torchrun starts the ranks again after any error; only what they began themselves do they go on with."""
    out = tmp_path / "run"
    ranks.run(recipe, out, "--tokens", "720", ranks=1)
    lines = ranks.run(recipe, out, "--tokens", "720", restarts=1, ok=False)
    assert ranks.errors(lines) == [f"{out} holds a run already: continue it with --resume, or choose another --out"] * 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_without_torchrun_nobody_waits_for_a_dead_rank(recipe: Path, tmp_path: Path, how: signal.Signals) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in place.items()}, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tidar", "train", str(recipe), "--out", str(tmp_path / "run")]
        command += ["--tokens", str(2000 * 144), "--save-every", "0"]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    deadline, metrics = time.monotonic() + 120, tmp_path / "run" / "metrics.jsonl"
    while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        time.sleep(0.02)
    processes[1].send_signal(how)
    text = processes[0].communicate(timeout=60)[1]
    processes[1].communicate(timeout=60)
    if how == signal.SIGKILL:
        assert [p.returncode for p in processes] == [2, -signal.SIGKILL]
        assert ranks.errors(text.splitlines()) == [
            "rank 0 has lost another rank, which was killed or says why it stopped; go on with --resume"
        ]
    else:
        assert [p.returncode for p in processes] == [0, 0]
        assert "stopped by SIGTERM at step" in text
        assert len(checkpoint.checkpoints(tmp_path / "run")) == 1
