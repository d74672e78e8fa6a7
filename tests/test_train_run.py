"""Whole runs: what is trained, what is written, and that a run which stopped goes on to the same weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from train_data import config, records, same_weights, weights, write_text

from tidar.checkpoint import load_model
from tidar.config import Architecture
from tidar.convert import convert
from tidar.errors import TidarError
from tidar.train import checkpoint
from tidar.train.config import TrainConfig
from tidar.train.step import Stepper
from tidar.train.trainer import Trainer, train


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def base(converted: Callable[[str], Path]) -> Path:
    return converted("llama")


@pytest.fixture(scope="module")
def whole(root: Path, base: Path) -> TrainConfig:
    """A run that nothing interrupted."""
    done = config(root, base, out=str(root / "whole"), transition=8, offset_decay=0.9)
    result = train(done)
    assert (result.step, result.tokens) == (12, 12 * 96)
    return done


class Killed(Exception):
    pass


def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run's process end, as far as files go, when ``steps`` steps are done."""
    real = Stepper.__call__

    def call(self: Stepper, batches: Any, step: int, lr: float) -> Tensor:
        if step == steps:
            raise Killed
        return real(self, batches, step, lr)

    monkeypatch.setattr(Stepper, "__call__", call)


def test_a_run_learns_and_leaves_a_usable_model(whole: TrainConfig) -> None:
    out = Path(whole.out)
    lines = [r for r in records(out) if "loss" in r]
    assert [r["step"] for r in lines] == [2, 4, 6, 8, 10, 12]
    assert lines[-1]["ar"] < lines[0]["ar"] - 0.5
    assert lines[-1]["draft"] < lines[0]["draft"] - 0.5
    assert all(r["kl"] > 0 and r["grad_norm"] > 0 and r["tokens_per_second"] > 0 for r in lines)
    assert all(r["peak_memory_gib"] > 0.01 for r in lines)
    valid = [r for r in records(out) if "bits_per_byte" in r]
    assert [r["step"] for r in valid] == [12]
    assert [len(valid[0]["match_3"]), len(valid[0]["match_4"])] == [3, 4]
    assert 1 <= valid[0]["tokens_per_forward_4"] <= 4
    model = load_model(out / "model")
    assert model.spec is not None
    assert model.spec.block_sizes == (3, 4)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    assert (out / "latest").resolve().name == "step-00000012"
    assert same_weights(out / "latest" / "model", out / "model")
    assert list((out / "tensorboard").glob("events.*")), "it is installed here"


def test_without_tensorboard(
    root: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    done = train(config(root, base, out=str(tmp_path / "run"), tokens=96))
    assert done.step == 1
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert len(records(tmp_path / "run")) == 2
    assert " GiB · " in capsys.readouterr().err, "peak memory is printed"


@pytest.mark.parametrize("steps", [3, 4, 9, 11])
def test_a_killed_run_goes_on_to_the_same_weights(
    root: Path, whole: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, steps: int
) -> None:
    mine = replace(whole, out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        killed_after(steps, patch)
        with pytest.raises(Killed):
            train(mine)
    torch.manual_seed(steps)  # a new process has other random state
    # Before its first checkpoint there is nothing to go on from, and --resume starts at the beginning.
    trainer = Trainer(mine, resume=True)
    assert trainer.progress.step == steps // 4 * 4
    trainer.run()
    assert same_weights(tmp_path / "run" / "model", root / "whole" / "model")

    def numbers(out: Path) -> list[dict[str, Any]]:
        timed = ("tokens_per_second", "data_wait", "peak_memory_gib")
        return [{k: v for k, v in r.items() if k not in timed} for r in records(out)]

    assert numbers(tmp_path / "run") == numbers(root / "whole")  # no line twice, none missing, the same numbers


SCRIPT = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tidar.config import Architecture
from tidar.data.config import DataConfig
from tidar.train.config import TrainConfig
from tidar.train.trainer import train
values = json.loads(sys.argv[1])
values["data"] = DataConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values["data"].items()})
values["arch"] = Architecture(**values["arch"])
train(TrainConfig(**{**values, "block_sizes": tuple(values["block_sizes"])}), resume="resume" in sys.argv)
"""


@pytest.mark.slow
def test_kill_9_again_and_again(root: Path, base: Path, tmp_path: Path) -> None:
    """Real processes, killed at arbitrary moments, saves included, until one comes to the end."""
    plan = config(root, base, tokens=60 * 96, save_every=1, log_every=1, masking="random", out=str(tmp_path / "whole"))

    def start(out: str, *words: str) -> subprocess.Popen[bytes]:
        values = json.dumps(asdict(replace(plan, out=str(tmp_path / out))))
        return subprocess.Popen([sys.executable, "-c", SCRIPT, values, *words], stderr=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    kills, folder = 0, tmp_path / "run" / "checkpoints"
    for attempt in range(200):
        process = start("run", "resume")
        before = len(list(folder.glob("*")))
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list(folder.glob("*"))) == before and time.monotonic() < deadline:
            time.sleep(0.01)  # until it saves
        time.sleep(0.37 * (attempt % 5))
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.wait() == 0
    assert kills >= 3
    assert same_weights(tmp_path / "run" / "model", tmp_path / "whole" / "model")


def test_time_limit_stops_resumably(root: Path, base: Path, whole: TrainConfig, tmp_path: Path) -> None:
    mine = replace(whole, out=str(tmp_path / "run"), max_seconds=1e-6)
    result = train(mine)
    assert (result.model, result.step) == (None, 1)
    assert not (tmp_path / "run" / "model").exists()
    assert train(replace(mine, max_seconds=0.0), resume=True).step == 12
    assert same_weights(tmp_path / "run" / "model", root / "whole" / "model")


def test_weights_alone_go_on_with_another_warm_up(root: Path, base: Path, whole: TrainConfig, tmp_path: Path) -> None:
    half = replace(whole, out=str(tmp_path / "half"), max_seconds=1e-6)
    train(half)
    place = tmp_path / "half" / "checkpoints" / "step-00000001"
    exact = train(replace(whole, out=str(tmp_path / "exact")), continue_from=str(place))
    assert exact.step == 12
    assert same_weights(tmp_path / "exact" / "model", root / "whole" / "model")

    (place / "optimizer.pt").unlink()
    trainer = Trainer(replace(whole, out=str(tmp_path / "warm")), continue_from=str(place))
    assert (trainer.progress.step, trainer.progress.tokens, trainer.progress.since) == (1, 96, 96)
    trainer.run()
    warm = [r["lr"] for r in records(tmp_path / "warm") if "lr" in r]
    cold = [r["lr"] for r in records(root / "whole") if "lr" in r]
    assert warm[0] < cold[0]  # one step of warm-up less
    assert warm[-3:] == cold[-3:]  # the same schedule afterwards
    assert not same_weights(tmp_path / "warm" / "model", root / "whole" / "model")


def test_ar_run_from_nothing_but_text(root: Path, tmp_path: Path) -> None:
    """A fresh model, with a tokenizer of its own."""
    arch = Architecture(hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate_size=32)
    plan = replace(
        config(root, Path(), out=str(tmp_path / "run"), objective="ar", log_every=1, eval_every=4),
        model="",
        arch=arch,
        vocab_size=300,
    )
    seen: list[int] = []

    def probe(model: Any) -> dict[str, float]:
        seen.append(model.vocab_size)
        return {"generated": 1.5}

    result = train(plan, on_valid=probe)
    model = load_model(result.model or "")
    assert model.spec is not None
    assert model.spec.block_sizes == ()  # no draft was trained
    assert len(model.tokenizer) <= 300
    valid = [r for r in records(tmp_path / "run") if "bits_per_byte" in r]
    assert [r["step"] for r in valid] == [4, 8, 12]
    assert all(r["generated"] == 1.5 for r in valid)
    assert seen == [model.vocab_size] * 3
    assert valid[-1]["bits_per_byte"] < valid[0]["bits_per_byte"]
    assert "draft" not in records(tmp_path / "run")[0]


def test_a_loss_that_is_not_finite_stops_the_run(
    base: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = config(root, base, out=str(tmp_path / "run"), save_every=2, log_every=4)
    real, given = Stepper.__call__, {}

    def call(self: Stepper, batches: Any, step: int, lr: float) -> Tensor:
        given[step] = batches
        if step == 4:
            with torch.no_grad():
                self.parameters[0].fill_(math.nan)
        return real(self, batches, step, lr)

    monkeypatch.setattr(Stepper, "__call__", call)
    with pytest.raises(TidarError, match="not finite at step 4"):
        train(plan)
    kept = torch.load(tmp_path / "run" / "bad-batch-00000004.pt", weights_only=True)
    assert torch.equal(kept["tokens"], torch.cat([b.tokens for b in given[4]]))
    assert torch.equal(kept["starts"], torch.cat([b.starts for b in given[4]]))
    assert kept["blocks"]["k"] in (3, 4)
    newest = checkpoint.checkpoints(tmp_path / "run")[0]
    assert newest.name == "step-00000004"
    assert all(bool(v.isfinite().all()) for v in weights(newest / "model").values())


@pytest.mark.parametrize(
    ("changes", "resume", "message"),
    [
        ({}, False, "holds a run already: continue it with --resume"),
        ({"lr": 0.02}, True, "cannot resume: lr was 0.01 and is now 0.02"),
        ({"block_sizes": (4,)}, True, "cannot resume: block_sizes"),
    ],
)
def test_a_used_folder_is_not_mixed_up(whole: TrainConfig, changes: dict[str, Any], resume: bool, message: str) -> None:
    before = sorted(Path(whole.out).rglob("*"))
    with pytest.raises(TidarError, match=message):
        train(replace(whole, **changes), resume=resume)
    assert sorted(Path(whole.out).rglob("*")) == before


def test_what_cannot_be_trained_is_refused(root: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(TidarError, match="no checkpoint|cannot"):
        train(config(root, tmp_path / "nowhere", out=str(tmp_path / "b")))
    with pytest.raises(TidarError, match="progress.json"):
        train(config(root, base, out=str(tmp_path / "c")), continue_from=str(base))
    (tmp_path / "file").write_text("")
    with pytest.raises(TidarError, match="--out|folder"):
        train(config(root, base, out=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize("family", ["llama", "phi3"])  # one table for embedding and head, and two
def test_a_plain_checkpoint_is_converted_as_by_hand(root: Path, tmp_path: Path, family: str) -> None:
    plain = tiny.save_plain(family, tmp_path / "plain")
    convert(plain, tmp_path / "converted")
    by_hand = train(config(root, tmp_path / "converted", out=str(tmp_path / "a"), tokens=192))
    itself = train(config(root, plain, out=str(tmp_path / "b"), tokens=192))
    assert by_hand.model is not None and itself.model is not None
    assert same_weights(by_hand.model, itself.model)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (by_hand.model / name).read_text() == (itself.model / name).read_text()
    torch.manual_seed(5)  # nothing drawn from here is in the model
    again = train(config(root, plain, out=str(tmp_path / "d"), tokens=192))
    assert again.model is not None and same_weights(again.model, itself.model)
    as_ar = train(config(root, plain, out=str(tmp_path / "c"), objective="ar", tokens=96))
    assert as_ar.model is not None and load_model(as_ar.model).spec is None
    with pytest.raises(TidarError, match="has no mask token, and its optimizer would not fit one"):
        train(config(root, plain, out=str(tmp_path / "e")), continue_from=str(as_ar.model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 100}, "multiple of micro_batch x seq_len = 48"),
        ({"block_sizes": ()}, "block_sizes"),
        ({"block_sizes": (0, 4)}, "block_sizes"),
        ({"alpha": -1.0}, "alpha"),
        ({"kl_weight": 1.5}, "kl_weight"),
        ({"min_lr": 1.0}, "min_lr"),
        ({"warmup": 1.0}, "warmup"),
        ({"clip": 0.0}, "clip"),
        ({"tokens": 0}, "tokens"),
        ({"max_seconds": -1.0}, "max_seconds and stop_at must be at least 0"),
        ({"rollout_sampled": 1.5}, "rollout_sampled"),
        ({"rollout_temperature": 0.0}, "rollout_temperature"),
        ({"draft_text": "model", "masking": "random"}, "draft_text model needs masking full"),
    ],
)
def test_settings_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TidarError, match=message):
        config(tmp_path, tmp_path, **changes)


def test_a_folder_that_lost_its_checkpoints_says_so(whole: TrainConfig, tmp_path: Path) -> None:
    shutil.copytree(whole.out, tmp_path / "run", symlinks=True)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "manifest.json").write_text("{")
    with pytest.raises(TidarError, match="every checkpoint"):
        train(replace(whole, out=str(tmp_path / "run")), resume=True)
