"""What a user chooses, as frozen keyword-only dataclasses; the docstring under each field is its ``--help`` text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tidar.errors import TidarError

__all__ = ["Architecture", "SamplingParams"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. The same values and seed give the same tokens whatever the decoding method."""

    max_new_tokens: int = 128
    """Stop after this many new tokens."""
    temperature: float = 0.0
    """Divides the logits; 0 is greedy decoding."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities reach this, in (0, 1]."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens already in the text by this; 1 is off."""
    seed: int = 0
    """Key of the sampling noise, 0 … 2^63-1."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    ignore_eos: bool = False
    """Go on past the end-of-text token."""

    def __post_init__(self) -> None:
        # A string is a sequence of its letters, each of which would end the text.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.max_new_tokens < 1:
            raise TidarError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise TidarError(f"temperature must be a finite number of at least 0 (0 is greedy), not {self.temperature}")
        if self.top_k < 0:
            raise TidarError(f"top_k must be at least 0 (0 keeps all tokens), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise TidarError(f"top_p must lie in (0, 1] (1 keeps all tokens), not {self.top_p}")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise TidarError(f"repetition_penalty must be above 0 (1 is off), not {self.repetition_penalty}")
        if not 0 <= self.seed < 2**63:
            raise TidarError(f"seed must lie between 0 and 2^63-1, not {self.seed}")
        if any(not s for s in self.stop):
            raise TidarError("a stop string must not be empty")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shape of a fresh Qwen3 model (RMSNorm, RoPE, grouped-query attention with q/k norms, SwiGLU, tied embeddings)."""

    hidden_size: int = 384
    """Width of the residual stream."""
    layers: int = 9
    """Number of decoder layers."""
    heads: int = 6
    """Query heads."""
    kv_heads: int = 2
    """Key and value heads; divides `heads`."""
    head_dim: int = 64
    """Width of one head."""
    intermediate_size: int = 1024
    """Width of the MLP."""
    max_positions: int = 4096
    """Longest text the model is meant for, in tokens."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
