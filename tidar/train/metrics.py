"""Where a run's numbers go: a line of JSON each, TensorBoard if it is installed, and the terminal."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["Metrics", "Silence", "peak_memory_gib"]

FILE = "metrics.jsonl"


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: the tensors' on a GPU, the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


class Metrics:
    """Records of one run, appended to ``out/metrics.jsonl``.

    Args:
        out: the run's folder.
        total: clean tokens of the run, for the progress bar.
        start_step: records of later steps, left by a run that was killed after its last checkpoint, are dropped.
    """

    def __init__(self, out: Path, *, total: int, start_step: int) -> None:
        path = out / FILE
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= start_step]
            part = path.with_suffix(".part")
            part.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            os.replace(part, path)
        self._file = path.open("a", encoding="utf-8")
        self._events = _events(out)
        self._total = total
        self._bar = _bar(total) if sys.stderr.isatty() else None
        self._begun = time.monotonic()

    def train(self, record: Mapping[str, Any]) -> None:
        """One line about training; ``record`` has at least step, tokens, tokens_per_second, data_wait and
        peak_memory_gib."""
        self._write(record)
        shown = " · ".join(f"{k} {record[k]:.4f}" for k in ("loss", "ar", "draft", "kl") if k in record)
        shown += f" · {record['peak_memory_gib']:.1f} GiB · {record['data_wait']:.1%} waiting for data"
        if self._bar is not None:
            self._bar[0].update(self._bar[1], completed=record["tokens"], shown=shown, rate=record["tokens_per_second"])
        else:
            left = (self._total - record["tokens"]) / max(1.0, record["tokens_per_second"])
            speed = f"{record['tokens_per_second'] / 1e3:.1f} k tokens/s · {left:.0f} s left"
            self.say(
                f"step {record['step']} · {record['tokens'] / 1e6:.2f} M tokens · {shown} · lr {record['lr']:.2e} · "
                f"norm {record['grad_norm']:.2f} · {speed}"
            )

    def valid(self, record: Mapping[str, Any]) -> None:
        """One line about validation."""
        self._write(record)
        shown = " · ".join(f"{key} {value:.4f}" for key, value in record.items() if isinstance(value, float))
        self.say(f"validation at step {record['step']} · {shown}")

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self._bar is not None:
            self._bar[0].console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(dict(record)) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    self._events.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._bar is not None:
            self._bar[0].stop()
        if self._events is not None:
            self._events.close()


class Silence(Metrics):
    """The metrics of a rank that another one speaks for."""

    def __init__(self) -> None:
        pass

    def train(self, record: Mapping[str, Any]) -> None:
        pass

    def valid(self, record: Mapping[str, Any]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # half a line, cut by a kill


def _events(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))


def _bar(total: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    progress = Progress(
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[shown]} · {task.fields[rate]:,.0f} tokens/s ·"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    progress.start()
    return progress, progress.add_task("train", total=total, shown="", rate=0.0)
