"""A training run: load, step, log, validate, save; go on exactly where a killed one stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidar.data.packing import PackedData
from tidar.errors import TidarError
from tidar.model import CausalLM
from tidar.train import checkpoint, start
from tidar.train.checkpoint import Progress
from tidar.train.config import TrainConfig
from tidar.train.inputs import draw_blocks
from tidar.train.metrics import Metrics, peak_memory_gib
from tidar.train.optimizer import learning_rate
from tidar.train.step import Stepper
from tidar.train.validate import Validation

__all__ = ["Result", "Trainer", "train"]

Probe = Callable[[CausalLM], dict[str, float]]


@dataclass(frozen=True)
class Result:
    """What a run came to: the final model's folder (None if it stopped early), and its progress."""

    model: Path | None
    step: int
    tokens: int


def train(
    config: TrainConfig, *, resume: bool = False, continue_from: str = "", on_valid: Probe | None = None
) -> Result:
    """Run ``config`` to its end, or until ``max_seconds``.

    Args:
        config: the run.
        resume: go on from the newest whole checkpoint in ``config.out``, to the same weights bit for bit (on a CPU).
        continue_from: go on from the progress recorded in another run's checkpoint or final model folder: its
            weights, its place in data and schedule, and its optimizer, or an empty one warmed up again if the folder
            has none.
        on_valid: called with the model at every validation; what it returns is recorded too.

    Raises:
        TidarError: wrong input, a loss that is not finite, or a checkpoint that cannot be written or read.
    """
    try:
        return Trainer(config, resume=resume, continue_from=continue_from, on_valid=on_valid).run()
    except OSError as error:
        raise TidarError(f"cannot write {config.out}: {error}; free some space and go on with --resume") from error


class Trainer:
    """The parts of a run, made ready; `run` runs it. Arguments as in `train`."""

    def __init__(
        self, config: TrainConfig, *, resume: bool = False, continue_from: str = "", on_valid: Probe | None = None
    ) -> None:
        self.config = config
        self.out = Path(config.out)
        self.on_valid = on_valid
        notes: list[str] = []
        source = start.place(config, resume, continue_from, notes.append)
        self.progress = Progress(0, 0, 0, {}) if source is None else checkpoint.read_progress(source)
        self.model = start.model(config, source)
        folder, held_out = start.data(config, self.model)
        self.data = PackedData(folder, seq_len=config.seq_len, batch_size=config.micro_batch, seed=config.seed)
        self.validation = None if held_out is None else Validation(config, self.model, held_out)
        self.stepper = Stepper(self.model, config)
        if source is not None:
            self.data.load_state_dict(self.progress.data)
            if not checkpoint.load_optimizer(source, self.stepper.optimizer):
                self.progress.since = self.progress.tokens
                notes.append(f"{source} has no optimizer state: it starts empty and the learning rate warms up again")
        if source is None or continue_from:
            start.write_config(self.out, config)
        self.metrics = Metrics(self.out, total=config.tokens, start_step=self.progress.step)
        for note in notes:
            self.metrics.say(note)
        self._pending: list[tuple[int, dict[str, int], float, Tensor]] = []
        self._clock, self._clock_tokens = time.monotonic(), self.progress.tokens
        self._saved = self.progress.step if source is not None and not continue_from else -1

    def run(self) -> Result:
        try:
            return self._run()
        finally:
            self.metrics.close()

    def _run(self) -> Result:
        config, progress = self.config, self.progress
        begun = time.monotonic()
        while progress.tokens < config.tokens:
            self._step()
            last = progress.tokens >= config.tokens
            if last or progress.step % config.log_every == 0:
                self._log()
            if self.validation is not None and (last or _due(progress.step, config.eval_every)):
                self._validate()
            if last or _due(progress.step, config.save_every):
                self._save()
            if not last and config.max_seconds and time.monotonic() - begun > config.max_seconds:
                self._save()
                self.metrics.say(
                    f"stopped after {config.max_seconds:.0f} s at step {progress.step}; go on with --resume"
                )
                return Result(None, progress.step, progress.tokens)
        return Result(self._export(), progress.step, progress.tokens)

    def _step(self) -> None:
        config, progress = self.config, self.progress
        place = self.data.state_dict()
        batches = [self.data.next() for _ in range(config.accumulate)]
        lr = learning_rate(config, progress.tokens, progress.since)
        self._pending.append((progress.step, place, lr, self.stepper(batches, progress.step, lr)))
        progress.step += 1
        progress.tokens += config.batch_tokens
        progress.data = self.data.state_dict()

    def _log(self) -> None:
        """Write the mean of the steps since the last line; the one place where the host waits for the GPU."""
        if not self._pending:
            return
        values = torch.stack([values for *_, values in self._pending]).cpu()
        for (step, place, _, _), row in zip(self._pending, values, strict=True):
            if not bool(row.isfinite().all()):
                self._stop_at(step, place, row)
        mean = values.double().mean(0).tolist()
        now = time.monotonic()
        rate = (self.progress.tokens - self._clock_tokens) / max(1e-9, now - self._clock)
        record: dict[str, Any] = {"step": self.progress.step, "tokens": self.progress.tokens, "loss": mean[0]}
        record["ar"] = mean[1]
        if self.config.objective == "tidar":
            record["draft"] = mean[2]
            if self.config.kl_weight:
                record["kl"] = mean[3]
        record |= {
            "lr": self._pending[-1][2],
            "grad_norm": mean[4],
            "tokens_per_second": rate,
            "peak_memory_gib": peak_memory_gib(self.model.device),
        }
        self._pending.clear()
        self.metrics.train(record)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._clock, self._clock_tokens = time.monotonic(), self.progress.tokens

    def _stop_at(self, step: int, place: dict[str, int], row: Tensor) -> None:
        """Keep the batch that made the loss or its gradient infinite or NaN, and say where."""
        config = self.config
        self.data.load_state_dict(place)
        batches = [self.data.next() for _ in range(config.accumulate)]
        path = self.out / f"bad-batch-{step:08d}.pt"
        kept = {"step": step, "blocks": asdict(draw_blocks(config, step)), "values": row}
        torch.save(kept | {n: torch.cat([getattr(b, n) for b in batches]) for n in ("tokens", "starts", "ends")}, path)
        raise TidarError(
            f"the loss or its gradient is not finite at step {step}; its batch is in {path}: lower lr or raise warmup, "
            "and go on from the last checkpoint"
        )

    def _validate(self) -> None:
        assert self.validation is not None
        self._log()
        record: dict[str, Any] = {"step": self.progress.step, "tokens": self.progress.tokens}
        record |= self.validation.run(self.stepper)
        if self.on_valid is not None:
            record |= self.on_valid(self.model)
        self.metrics.valid(record)
        self._restart_clock()

    def _save(self) -> None:
        self._log()  # nothing that is not finite is ever saved
        if self._saved != self.progress.step:
            checkpoint.save_checkpoint(
                self.out, self.model, self.stepper.optimizer, self.progress, keep_last=self.config.keep_last
            )
            self._saved = self.progress.step
        self._restart_clock()

    def _export(self) -> Path:
        """The final model: weights alone, in bf16 if the run used it, and its progress for who wants to go on."""
        final = self.out / "model"
        checkpoint.save_weights(final, self.model, self.progress, dtype=self.config.dtype)
        return final


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
