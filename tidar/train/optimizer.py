"""Muon for the matrices, AdamW for the rest, and their learning rate: linear warm-up, then a cosine over the tokens.

Muon (Jordan et al. 2024) steps by the orthogonalised momentum of a matrix. At the sizes and batches here it learns
clearly faster than AdamW for the same tokens (docs/log.md). Its step is scaled to the size of AdamW's (Liu et al. 2025,
"Muon is Scalable for LLM Training"), so one learning rate serves both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tidar.model import CausalLM
from tidar.train.config import TrainConfig
from tidar.train.muon import SharedMuon

__all__ = ["Optimizer", "learning_rate", "make_optimizer"]


def learning_rate(config: TrainConfig, tokens: int, since: int = 0) -> float:
    """Learning rate of the step that follows after ``tokens`` clean tokens.

    The warm-up starts at ``since``: 0, or where the run went on with an empty optimizer.
    """
    rise = config.warmup * config.tokens
    warm = 1.0 if rise == 0 else min(1.0, (tokens - since + config.batch_tokens) / rise)
    progress = min(1.0, max(0.0, tokens - rise) / max(1.0, config.tokens - rise))
    return warm * (config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimizer(torch.optim.Optimizer):
    """Several optimizers stepped as one: each holds its own part of the weights."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        # `param_groups` are the parts' own, so a learning rate set here reaches them.
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def make_optimizer(config: TrainConfig, model: CausalLM) -> Optimizer:
    """The optimizer of ``config`` over all weights that are trained; only matrices that are neither embedding nor head
    decay."""
    ends = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    tables = {id(m.weight) for m in model.hf.modules() if isinstance(m, nn.Embedding) or m in ends}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for weight in model.parameters():
        if weight.requires_grad:
            (matrices if weight.ndim == 2 and id(weight) not in tables else others).append(weight)
    betas, fused = (config.beta1, config.beta2), matrices[0].is_cuda
    main: torch.optim.Optimizer
    if config.optimizer == "muon":
        muon = SharedMuon if isinstance(matrices[0], DTensor) else torch.optim.Muon
        main = muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    else:
        main = torch.optim.AdamW(matrices, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=fused)
    if not others:
        return Optimizer([main])
    return Optimizer([main, torch.optim.AdamW(others, lr=config.lr, betas=betas, weight_decay=0.0, fused=fused)])
