"""From packed documents to what one forward needs: input ids, layout, and what each row is to predict."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tidar import layout
from tidar.data.packing import PackedBatch
from tidar.layout import Layout
from tidar.train.config import TrainConfig
from tidar.train.loss import Targets

__all__ = ["Blocks", "Inputs", "draw_blocks", "make_inputs", "moved", "preceding"]


@dataclass(frozen=True)
class Blocks:
    """How a batch is cut: block length k, and by how many tokens a document's first block is short."""

    k: int
    phase: int


@dataclass(frozen=True, eq=False)
class Inputs:
    """One micro-batch on the device: ids (B, L), their layout, and the labels of its rows."""

    tokens: Tensor
    layout: Layout
    targets: Targets

    @property
    def offset(self) -> Tensor:
        """(B, S) int64, place of each mask in its block."""
        size = self.layout.clean
        return self.layout.slots[:, size:] - self.layout.block[:, size:, 0]


def draw_blocks(config: TrainConfig, step: int) -> Blocks:
    """Block length and phase of an optimizer step; seed and step alone decide, so a resumed run draws the same."""
    draw = random.Random(f"{config.seed} blocks {step}")
    k = draw.choice(config.block_sizes)
    return Blocks(k, draw.randrange(k) if config.random_phase else 0)


def make_inputs(
    batch: PackedBatch,
    blocks: Blocks | None,
    *,
    mask_id: int,
    device: torch.device,
    noise: int | None = None,
    decay: float = 1.0,
) -> Inputs:
    """Lay out one micro-batch.

    Args:
        batch: rows of packed documents, on the CPU.
        blocks: the draft's blocks; None lays out the clean half alone (AR training).
        mask_id: id of the mask token.
        device: where to.
        noise: seed of random masking (the paper's ablation): each block has its own t ~ U(0, 1], each of its
            positions is a mask with probability t and counts 1/t, the others hold their clean token and count 0.
            None masks everything (the paper's method).
        decay: weight of a mask's loss is decay^(its offset in the block), scaled to a mean of 1 over a whole block.
    """
    tokens, starts, ends = (moved(part, device) for part in batch[:3])
    rows, size = tokens.shape
    follows = torch.arange(size, device=device) > starts
    learned = None if batch.learned is None else moved(batch.learned, device).float()
    has_ar = follows.float() if learned is None else follows * learned
    targets = Targets(labels=tokens, has_ar=has_ar, draft=None, learned=learned)
    if blocks is None:
        return Inputs(tokens, layout.packed(starts), targets)
    # Filled on the device: a copied scalar would make the host wait, a Python int would recompile the attention.
    k, phase = (torch.full((), n, dtype=torch.int64, device=device) for n in (blocks.k, blocks.phase))
    plan = layout.training(starts, ends, k, phase)
    ids, weight = plan.tokens(tokens, mask_id), torch.ones_like(has_ar)
    first = plan.block[:, size:, 0] - size  # of each mask's block
    if learned is not None:
        # No decoder begins a block within what it is given.
        weight = learned = learned * learned.gather(1, first)
        targets = replace(targets, learned=learned)
    if noise is not None:
        generator = torch.Generator(device).manual_seed(noise)
        share = 1 - torch.rand(rows, size, device=device, generator=generator)
        share = share.gather(1, first)  # one t a block: that of its first slot
        masked = torch.rand(rows, size, device=device, generator=generator) < share
        ids = torch.cat([tokens, torch.where(masked, mask_id, tokens)], 1)
        weight = weight * masked / share
    inputs = Inputs(ids, plan, replace(targets, draft=weight))
    if decay < 1:
        mean = sum(decay**offset for offset in range(blocks.k)) / blocks.k
        weight = weight * decay**inputs.offset / mean
    # A document's first token has none before it; the mask token stands for that.
    unknown = torch.full_like(tokens, mask_id)
    before = torch.where(follows, pad(tokens[:, :-1], (1, 0)), unknown)
    return replace(inputs, targets=replace(inputs.targets, draft=weight, before=before))


def preceding(inputs: Inputs, drafted: Tensor) -> Tensor:
    """(B, S), the token before each mask's when ``drafted`` (B, S) stands in its block and the text before that."""
    assert inputs.targets.before is not None
    return torch.where(inputs.offset == 0, inputs.targets.before, pad(drafted[:, :-1], (1, 0)))


def moved(part: Tensor, device: torch.device) -> Tensor:
    """``part`` of the CPU on the device; the host does not wait."""
    if device.type != "cuda":
        return part.to(device)
    return part.pin_memory().to(device, non_blocking=True)
