"""The cluster's launch files run as they are, Slurm's own commands aside."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
from train_data import records, write_text

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def launched(name: str, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    venv = str(Path(sys.executable).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VENV": venv, "GPUS": "2", "DEVICE": "cpu", **settings}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = ["bash", str(ROOT / "launch" / name), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def recipe(tmp_path: Path, converted: Callable[[str], Path]) -> Path:
    write_text(tmp_path / "text", documents=80)
    return ranks.write_recipe(tmp_path / "recipe.toml", converted("llama"), tmp_path / "text", save_every=0)


def test_slurm_requeues_what_ran_out_of_time_and_goes_on(tmp_path: Path, recipe: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in (
        ("srun", 'shift; exec "$@"'),  # its one option, then what to run
        ("scontrol", f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {tmp_path}/asked; fi'),
    ):
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    out = tmp_path / "run"
    slurm = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_ID": "7",
        "PORT": port,
        "RECIPE": str(recipe),
        "OUT": str(out),
    }
    # Twenty seconds until it is to stop, and far more to do.
    long = ("--tokens", str(144 * 100_000))
    first = launched("train.slurm", *long, SLURM_JOB_END_TIME=str(int(time.time()) + 920), **slurm)
    assert first.returncode == 0, first.stderr
    assert (
        "stopped at the time it was to stop at" in first.stderr
        and (out / "latest").exists()
        and not (out / "model").exists()
    )
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    done = records(out)[-1]["step"]

    far = str(int(time.time()) + 10_000)
    again = launched("train.slurm", *long, SLURM_JOB_END_TIME=str(int(time.time()) + 920), **slurm)
    assert again.returncode == 0, again.stderr
    assert records(out)[-1]["step"] > done, "it went on"
    assert (tmp_path / "asked").read_text() == "requeue 7\n" * 2

    slurm["OUT"] = str(tmp_path / "short")
    short = launched("train.slurm", SLURM_JOB_END_TIME=far, **slurm)
    assert short.returncode == 0, short.stderr
    assert (tmp_path / "short" / "model").exists()
    assert (tmp_path / "asked").read_text() == "requeue 7\n" * 2, "what is done is not queued again"

    late = launched("train.slurm", SLURM_JOB_END_TIME=str(int(time.time()) + 900), **slurm)
    assert late.returncode == 1 and "over within MARGIN=900 seconds" in late.stderr
    wrong = launched("train.slurm", "--lr", "-1", SLURM_JOB_END_TIME=far, **slurm)
    assert wrong.returncode != 0 and (tmp_path / "asked").read_text() == "requeue 7\n" * 2


def test_torchrun_trains_and_goes_on(tmp_path: Path, recipe: Path) -> None:
    out = tmp_path / "run"
    settings = {"RECIPE": str(recipe), "OUT": str(out), "RESTARTS": "0"}
    stopped = launched("torchrun.sh", "--tokens", str(144 * 100_000), "--max-seconds", "1", **settings)
    assert stopped.returncode == 0, stopped.stderr
    done = records(out)[-1]["step"]
    again = launched("torchrun.sh", "--tokens", str(144 * 100_000), "--max-seconds", "1", **settings)
    assert again.returncode == 0 and records(out)[-1]["step"] > done, again.stderr
    missing = launched("torchrun.sh", RECIPE=str(recipe), OUT="")
    assert missing.returncode == 1 and "name a folder that all machines see" in missing.stderr
    alone = launched("torchrun.sh", NODES="2", **settings)
    assert alone.returncode == 1 and "name the first machine" in alone.stderr
