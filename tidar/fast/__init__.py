"""Decoding on a GPU alone: a step is one CUDA graph, and the host launches steps ahead."""

from __future__ import annotations

import importlib.util

import torch

from tidar.fast.lean import refusal
from tidar.model import CausalLM

__all__ = ["obstacle"]


def obstacle(core: CausalLM) -> str | None:
    """Why this model cannot decode by captured steps here, or None if it can."""
    if core.device.type != "cuda":
        return f"the model is on {core.device.type}, the kernels need an NVIDIA GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is missing, install it"
    if core.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels have no {core.dtype}"
    return refusal(core)
