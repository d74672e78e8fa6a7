"""A training run: load, step, log, validate, save; go on exactly where a killed one stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidar.data.packing import PackedBatch, PackedData
from tidar.data.streaming import StreamedData
from tidar.errors import TidarError
from tidar.model import CausalLM
from tidar.train import checkpoint, parallel, shards, start
from tidar.train.checkpoint import Progress
from tidar.train.config import TrainConfig
from tidar.train.feed import Feed
from tidar.train.inputs import draw_blocks
from tidar.train.metrics import Metrics, Silence, peak_memory_gib
from tidar.train.optimizer import learning_rate
from tidar.train.step import Stepper
from tidar.train.stop import Stop
from tidar.train.validate import Validation
from tidar.train.world import ALONE, World, join, lost

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
    world = join(config.device)
    try:
        result = Trainer(config, resume=resume, continue_from=continue_from, on_valid=on_valid, world=world).run()
    except OSError as error:
        raise TidarError(f"cannot write {config.out}: {error}; free some space and go on with --resume") from error
    except torch.OutOfMemoryError as error:
        raise TidarError(_out_of_memory(config, world)) from error
    except RuntimeError as error:
        if world.size == 1 or not lost(error):
            raise
        raise TidarError(
            f"rank {world.rank} has lost another rank, which was killed or says why it stopped; go on with --resume"
        ) from error
    world.leave()
    return result


class Trainer:
    """A run made ready; `run` runs it. Arguments as in `train`; ``world`` are the ranks that share it."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool = False,
        continue_from: str = "",
        on_valid: Probe | None = None,
        world: World = ALONE,
    ) -> None:
        self.config = config
        self.world = world
        self.out = Path(config.out)
        self.on_valid = on_valid
        notes: list[str] = []
        start.agreed(config, resume, continue_from, world)
        again = resume or world.first(lambda: start.same_job(self.out))
        source = world.first(lambda: start.place(config, again, continue_from, notes.append))
        self.progress = (
            Progress(0, 0, 0, {}) if source is None else world.each(lambda: checkpoint.read_progress(source))
        )
        self.model = world.each(lambda: start.model(config, source, world))
        prepared = world.first(lambda: start.data(config, self.model))
        self.data, self.validation = world.each(lambda: self._opened(*prepared))
        start.same_data(self.data, world)
        parallel.apply(self.model, config, world)
        self.stepper = Stepper(self.model, config, world)
        if source is not None and not shards.load_optimizer(source, self.model, self.stepper.optimizer, world):
            self.progress.since = self.progress.tokens
            notes.append(f"{source} has no optimizer state: it starts empty and the learning rate warms up again")
        if world.main and (source is None or continue_from):
            start.write_config(self.out, config)
        if world.main:
            start.note_job(self.out)
            self.metrics = Metrics(self.out, total=config.tokens, start_step=self.progress.step)
        else:
            self.metrics = Silence()
        for note in notes:
            self.metrics.say(note)
        self._saver = shards.Saver(self.out, world, keep_last=config.keep_last)
        self._pending: list[tuple[int, dict[str, Any], float, Tensor]] = []
        self.feed = Feed(self.data, config.accumulate, world)
        self._restart_clock()
        self._saved = self.progress.step if source is not None and not continue_from else -1

    def _opened(
        self, folder: Path | None, held_out: Path | None
    ) -> tuple[PackedData | StreamedData, Validation | None]:
        """The training data at their place, and the hold-out's sample."""
        self._folder = folder
        place, world = self.progress.data, self.world
        data = start.open_data(self.config, self.model, folder, place, world.rank, world.size)
        self.progress.data = data.state_dict()
        return data, None if held_out is None else Validation(self.config, self.model, held_out)

    def run(self) -> Result:
        try:
            result = self._run()
            self._saver.wait()
            return result
        finally:
            self.data.close()
            self._saver.abandon()
            self.metrics.close()

    def _run(self) -> Result:
        config, progress = self.config, self.progress
        begun = progress.step
        with Stop(config.max_seconds, config.stop_at) as stop:
            self.feed.until(lambda: stop.reason > 0)
            while progress.tokens < config.tokens:
                batches = self.feed.take()
                wish = stop.reason if progress.step > begun or batches is None else 0
                reason = self.feed.reason(wish)
                if batches is None or reason:
                    rest = ""
                    if progress.step > begun:
                        self._save()
                        rest = f"; step {progress.step} is saved, go on with --resume"
                    self._saver.wait()
                    self.feed.complain(rest)
                    self.metrics.say(f"stopped {stop.said(reason)} at step {progress.step}; go on with --resume")
                    return Result(None, progress.step, progress.tokens)
                self._step(batches)
                last = progress.tokens >= config.tokens
                if last or progress.step % config.log_every == 0:
                    self._log()
                if self.validation is not None and (last or _due(progress.step, config.eval_every)):
                    self._validate()
                if last or _due(progress.step, config.save_every):
                    self._save()
            return Result(self._export(), progress.step, progress.tokens)

    def _step(self, batches: list[PackedBatch]) -> None:
        config, progress = self.config, self.progress
        lr = learning_rate(config, progress.tokens, progress.since)
        self._pending.append((progress.step, progress.data, lr, self.stepper(batches, progress.step, lr)))
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
            if self.config.kl_at(0) is not None:
                record["kl"] = mean[3]
        record |= {
            "lr": self._pending[-1][2],
            "grad_norm": mean[4],
            "tokens_per_second": rate,
            # The host runs ahead of a GPU, which may still be busy meanwhile: its own idle time is less.
            "data_wait": self.world.most(self.feed.waited / max(1e-9, now - self._clock)),
            "peak_memory_gib": self.world.most(peak_memory_gib(self.model.device)),
        }
        self._pending.clear()
        self.metrics.train(record)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._clock, self._clock_tokens = time.monotonic(), self.progress.tokens
        self.feed.waited = 0.0

    def _stop_at(self, step: int, place: dict[str, Any], row: Tensor) -> None:
        """Keep the batch that made the loss or its gradient infinite or NaN, all ranks' of it, and say where."""
        place = self._gathered(place)
        ranks = (~row[5:].isfinite()).nonzero().flatten().tolist()
        path = self.out / f"bad-batch-{step:08d}.pt"
        kept = {"step": step, "blocks": asdict(draw_blocks(self.config, step)), "values": row[:5], "ranks": ranks}

        def stop() -> None:
            data = start.open_data(self.config, self.model, self._folder, place)
            batches = [data.next() for _ in range(self.config.accumulate)]
            data.close()
            parts = [name for name, part in batches[0]._asdict().items() if part is not None]
            kept.update({name: torch.cat([getattr(batch, name) for batch in batches]) for name in parts})
            torch.save(kept, path)
            where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
            raise TidarError(
                f"the loss or its gradient is not finite at step {step}{where}; its batch is in {path}: lower lr or "
                "raise warmup, and go on from the last checkpoint"
            )

        self.world.first(stop)

    def _gathered(self, place: dict[str, Any]) -> dict[str, Any]:
        """The place in the data that all ranks' together are."""
        self._saver.wait()  # one at a time may talk to other ranks
        return {name: value for part in self.world.gather(place) for name, value in part.items()}

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
            optimizer, progress = self.stepper.optimizer, self._whole_progress()
            if self.world.size > 1:
                self._saver.save(self.model, optimizer, progress)
            else:
                keep = self.config.keep_last
                checkpoint.save_checkpoint(self.out, self.model, optimizer, progress, keep_last=keep)
            self._saved = self.progress.step
        self._restart_clock()

    def _whole_progress(self) -> Progress:
        return replace(self.progress, data=self._gathered(self.progress.data))

    def _export(self) -> Path:
        """The final model: weights alone, in bf16 if the run used it, and its progress for who wants to go on."""
        final = self.out / "model"
        weights = parallel.whole_weights(self.model, self.world) if self.world.size > 1 else None
        progress = self._whole_progress()

        def write() -> None:
            checkpoint.save_weights(final, self.model, progress, dtype=self.config.dtype, weights=weights)

        self.world.first(write)
        return final


def _out_of_memory(config: TrainConfig, world: World) -> str:
    remedies = [f"lower micro_batch (now {config.micro_batch}), which changes no result"]
    if not config.activation_checkpointing:
        remedies.append("set activation_checkpointing")
    if config.objective == "tidar":
        remedies.append(f"lower mask_slice (now {config.mask_slice})" if config.mask_slice else "set mask_slice")
    remedies.append("use more GPUs")
    return f"rank {world.rank} is out of GPU memory: {', or '.join(remedies)}; then go on with --resume"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
