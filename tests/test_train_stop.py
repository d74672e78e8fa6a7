"""A run that is asked to end by SIGTERM."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from train_data import config, same_weights, write_text

from tidar.train.step import Stepper
from tidar.train.stop import Stop
from tidar.train.trainer import train


def test_sigterm_ends_a_run_resumably(
    tmp_path: Path,
    converted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_text(tmp_path / "text")
    plan = config(tmp_path, converted("llama"))
    train(plan)
    (tmp_path / "run").rename(tmp_path / "whole")
    before, real = signal.getsignal(signal.SIGTERM), Stepper.__call__

    def call(self: Stepper, batches: Any, step: int, lr: float) -> Tensor:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batches, step, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__call__", call)
        result = train(plan)
    assert (result.model, result.step) == (None, 6), "the step is finished"
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped by SIGTERM at step 6; go on with --resume" in capsys.readouterr().err
    assert (tmp_path / "run" / "latest").resolve().name == "step-00000006"
    train(plan, resume=True)
    assert same_weights(tmp_path / "run" / "model", tmp_path / "whole" / "model")


def test_reasons() -> None:
    with Stop(0, stop_at=time.time() - 1) as stop:
        assert (stop.reason, stop.said(1)) == (1, "at the time it was to stop at")
    with Stop(0, stop_at=time.time() + 100) as stop:
        assert stop.reason == 0
    with Stop(1e-9, stop_at=time.time() + 100) as stop:
        assert (stop.reason, stop.said(1)) == (1, "after 0 s")
    with Stop(0) as stop:
        assert stop.reason == 0
    with Stop(1e-9) as stop:
        assert (stop.reason, stop.said(stop.reason)) == (1, "after 0 s")
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.reason, stop.said(stop.reason)) == (2, "by SIGTERM")
