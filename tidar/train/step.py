"""One optimizer step: micro-batches in, new weights out, and never a wait for the GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tidar.data.packing import PackedBatch
from tidar.mask import Kind
from tidar.model import CausalLM
from tidar.train.config import TrainConfig
from tidar.train.inputs import draw_blocks, make_inputs, preceding
from tidar.train.loss import chunk_loss, count, train_loss
from tidar.train.optimizer import make_optimizer
from tidar.train.rollout import Sampling, roll_out
from tidar.train.sliced import Slices
from tidar.train.world import ALONE, World

__all__ = ["Stepper"]


class Stepper:
    """The model, its optimizer and how the configuration says to step them.

    Args:
        model: weights in fp32, on the device; trained in place.
        config: the run.
        world: the ranks that share the step; ``model`` must be made ready for them (`tidar.train.parallel`).
    """

    def __init__(self, model: CausalLM, config: TrainConfig, world: World = ALONE) -> None:
        self.model = model
        self.config = config
        self.world = world
        self.mask_id = model.mask_id if config.objective == "tidar" else 0
        # FlexAttention has no backward on a CPU, which gets dense masks.
        self.masks: Kind = "block" if model.device.type == "cuda" else "dense"
        drafts = config.objective == "tidar" and model.transition is not None
        self.bend = model.drafted if drafts else None
        self.optimizer = make_optimizer(config, model)
        self.parameters = [weight for weight in model.parameters() if weight.requires_grad]
        # Where the clean half has nothing to learn, it runs apart, without a backward.
        self.apart = config.mask_slice > 0 or model.adapters is not None
        self._slices = Slices(model, config, kind=self.masks, autocast=self.autocast) if self.apart else None
        self._chunk: Callable[..., tuple[Tensor, Tensor]] = chunk_loss
        model.hf.eval()  # dropout stays off: nothing here is trained long enough to need it, and exactness forbids it
        if model.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            if config.compile:
                if world.size == 1:
                    model.compile()
                self._chunk = torch.compile(chunk_loss)

    def autocast(self) -> torch.autocast:
        """The context of a forward: bf16 products over fp32 weights, or nothing."""
        # No cache of cast weights: the head runs, forward and backward, once a chunk.
        on = self.config.dtype == "bf16"
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=on, cache_enabled=False)

    def __call__(self, batches: Sequence[PackedBatch], step: int, lr: float) -> Tensor:
        """Step ``step`` (counted from 0) on the micro-batches in ``batches``: of R ranks, rank r has those numbered
        r, r + R, r + 2R … of the step.

        Returns:
            (5,) fp32 on the device: loss, mean AR cross-entropy, mean draft cross-entropy, mean KL (nats), and the
            gradient's norm before clipping. Several ranks append the share (R,) of the loss that each had.
        """
        config, model = self.config, self.model
        blocks = draw_blocks(config, step) if config.objective == "tidar" else None
        inputs = []
        indices = range(self.world.rank, self.world.rank + len(batches) * self.world.size, self.world.size)
        for index, batch in zip(indices, batches, strict=True):
            noise = _key(config.seed, "noise", step, index) if config.masking == "random" else None
            inputs.append(
                make_inputs(
                    batch, blocks, mask_id=self.mask_id, device=model.device, noise=noise, decay=config.offset_decay
                )
            )
        counts = count([micro.targets for micro in inputs], self.world)
        share = config.kl_at(step * config.batch_tokens)
        loss = partial(
            train_loss,
            model.head,
            counts=counts,
            bend=self.bend,
            vocab=model.vocab_size,
            alpha=config.alpha,
            kl_weight=0.0 if share is None else torch.full((), share, device=model.device),
            autocast=self.autocast,
            chunk=self._chunk,
        )
        losses = torch.zeros(4, device=model.device)
        for index, batch, micro in zip(indices, batches, inputs, strict=True):
            targets = micro.targets
            if blocks is not None and config.draft_text == "model":
                key = _key(config.seed, "rollout", step, index)
                sampling = Sampling(config.rollout_sampled, config.rollout_temperature, key)
                own = roll_out(model, batch, blocks, kind=self.masks, autocast=self.autocast, sampling=sampling)
                before = preceding(micro, own.tokens)
                targets = replace(targets, drafted=own.tokens, teacher=own.hidden, before=before)
            if self._slices is not None:
                losses += self._slices(micro, targets, loss)
                continue
            with self.autocast():
                hidden = model.hidden(micro.tokens, micro.layout, kind=self.masks)
            losses += loss(hidden, targets)
        losses = self._over_ranks(losses)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.cat([losses[:4], norm.float()[None], losses[4:]])

    def _over_ranks(self, losses: Tensor) -> Tensor:
        """(4,) of this rank to (4 + R,): sums over all ranks, and each rank's share of the loss."""
        if self.world.size == 1:
            return losses
        shares = torch.zeros(self.world.size, device=losses.device)
        shares[self.world.rank] = losses[0]
        return self.world.sum(torch.cat([losses, shares]))


def _key(seed: int, use: str, step: int, index: int) -> int:
    """The seed of one micro-batch's draws for one use."""
    return int.from_bytes(hashlib.sha256(f"{seed} {use} {step} {index}".encode()).digest()[:7], "little")
