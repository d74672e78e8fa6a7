"""Llama-shaped models with few, large operations, beside the general path through transformers' modules.

Query, key and value projections are one product, gate and up another; everything else is what a graph or a compiler can
fuse. The fused weights take the place of the model's own, which become views of them: nothing is held twice, and the
general path gives the same result as before.

Legend: B rows, L queries, D width of the hidden state, Hq query heads, Hk key heads, H head width, F of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, silu

from tidar.errors import TidarError
from tidar.model import CausalLM

__all__ = ["FAMILIES", "Attend", "LeanModel"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Pre-norm, RMS norms, rotary positions, gated SiLU, no other scaling."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, queries (B, L, Hq, H), keys and values (B, L, Hk, H) to outputs (B, L, Hq, H); caches are the caller's."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """Weights of one layer; None for what a family does not have."""

    norm: Tensor
    qkv: Tensor  # ((Hq + 2·Hk)·H, D)
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor  # (D, Hq·H)
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor  # (2·F, D)
    gate_up_bias: Tensor | None
    down: Tensor  # (D, F)
    down_bias: Tensor | None


class LeanModel:
    """A model of one of `FAMILIES`, ready for decoding.

    Args:
        core: the model; its projections become views of the fused ones.

    Attributes:
        scale: factor on attention scores.
        windows: the sliding window of each layer, or None.

    Raises:
        TidarError: another family, or a variant with something this path does not do.
    """

    def __init__(self, core: CausalLM) -> None:
        hf: Any = core.hf
        config = hf.config
        if config.model_type not in FAMILIES:
            raise TidarError(f"model family '{config.model_type}' has no fast path: use the general one")
        if config.hidden_act != "silu":
            raise TidarError(f"activation '{config.hidden_act}' has no fast path: use the general one")
        body = hf.base_model
        attentions = [layer.self_attn for layer in body.layers]
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim: int = attentions[0].head_dim
        self.scale: float = attentions[0].scaling
        # Mistral's layers ask their config, the others know their own.
        common = config.sliding_window if config.model_type == "mistral" else None
        self.windows: tuple[int | None, ...] = tuple(getattr(a, "sliding_window", common) for a in attentions)
        self._eps: float = config.rms_norm_eps
        self._table: Tensor = body.embed_tokens.weight
        self._last: Tensor = body.norm.weight
        self._rotary = body.rotary_emb
        self._layers = [_layer(layer) for layer in body.layers]

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Last hidden states (B, L, D) of ``tokens`` (B, L) at ``positions`` (B, L)."""
        rows, queries = tokens.shape
        x = embedding(tokens, self._table)
        cos, sin = (part[:, :, None] for part in self._rotary(x, positions))
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        for number, layer in enumerate(self._layers):
            heads = linear(self._norm(x, layer.norm), layer.qkv, layer.qkv_bias)
            q, k, v = torch.split(heads.view(rows, queries, -1, self.head_dim), sizes, 2)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
            mixed = attend(number, _turned(q, cos, sin), _turned(k, cos, sin), v)
            x = x + linear(mixed.reshape(rows, queries, -1), layer.out, layer.out_bias)
            gate, up = linear(self._norm(x, layer.mlp_norm), layer.gate_up, layer.gate_up_bias).chunk(2, -1)
            x = x + linear(silu(gate) * up, layer.down, layer.down_bias)
        return self._norm(x, self._last)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        # fp32 inside whatever the dtype, as the models' own.
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self._eps)).to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _fused([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up, gate_up_bias = _fused([mlp.gate_proj, mlp.up_proj])
    return _Layer(
        norm=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
    )


@torch.no_grad()
def _fused(parts: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of several projections of the same input as one; the parts become views of it."""
    weight = torch.cat([part.weight.detach() for part in parts])
    biases = [part.bias.detach() for part in parts if part.bias is not None]
    bias = torch.cat(biases) if len(biases) == len(parts) else None
    if bias is None and biases:
        raise TidarError("some projections have a bias and some have none: no fast path, use the general one")
    first = 0
    for part in parts:
        end = first + part.out_features
        part.weight.data = weight[first:end]
        if bias is not None:
            part.bias.data = bias[first:end]
        first = end
    return weight, bias
