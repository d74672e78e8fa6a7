"""AdamW and its learning rate: linear warm-up, then a cosine over the run's clean tokens."""

from __future__ import annotations

import math

import torch
from torch import nn

from tidar.train.config import TrainConfig

__all__ = ["learning_rate", "make_optimizer"]


def learning_rate(config: TrainConfig, tokens: int, since: int = 0) -> float:
    """Learning rate of the step that follows after ``tokens`` clean tokens.

    The warm-up starts at ``since``: 0, or where the run went on with an empty optimizer.
    """
    rise = config.warmup * config.tokens
    warm = 1.0 if rise == 0 else min(1.0, (tokens - since + config.batch_tokens) / rise)
    progress = min(1.0, max(0.0, tokens - rise) / max(1.0, config.tokens - rise))
    return warm * (config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """AdamW over all weights; only matrices that are not embeddings decay."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for weight in model.parameters():
        (decayed if weight.ndim >= 2 and id(weight) not in tables else others).append(weight)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=on_gpu)
