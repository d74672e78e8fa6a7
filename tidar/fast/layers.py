"""A transformers layer's weights as few products want them: query, key and value as one, gate and up as another.

The fused weights take the place of the model's own, which become views of them: nothing is held twice.

Legend: D width of the hidden state, A heads (queries, keys, values), H head width, F of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.quantised import Quantised, Weight, joined
from tidar.quantised import QuantisedLinear

__all__ = ["Layer", "fused", "layer_of", "weight_of"]

Linear = Any  # nn.Linear or QuantisedLinear


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights of one layer; None for what a family does not have."""

    norm: Tensor
    qkv: Weight  # (A·H, D)
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Weight  # (D, Hq·H)
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Weight  # (2·F, D)
    gate_up_bias: Tensor | None
    down: Weight  # (D, F)
    down_bias: Tensor | None
    window: int | None


def layer_of(layer: Any, window: int | None) -> Layer:
    """Of a Hugging Face layer, whose projections become views; ``window`` is its attention's."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = fused([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up, gate_up_bias = fused([mlp.gate_proj, mlp.up_proj])
    return Layer(
        norm=layer.input_layernorm.weight.detach(),
        qkv=qkv,
        qkv_bias=qkv_bias,
        q_norm=attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None,
        out=weight_of(attention.o_proj),
        out_bias=_bias(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=weight_of(mlp.down_proj),
        down_bias=_bias(mlp.down_proj),
        window=window,
    )


def weight_of(part: Linear) -> Weight:
    """Of a linear layer, quantised ones as they are."""
    return part.weight if isinstance(part, QuantisedLinear) else part.weight.detach()


def _replace(part: Linear, weight: Weight) -> None:
    if isinstance(weight, Quantised):
        part.weight = weight
    else:
        part.weight.data = weight


def _bias(part: Linear) -> Tensor | None:
    return None if part.bias is None else part.bias.detach()


@torch.no_grad()
def fused(parts: list[Linear]) -> tuple[Weight, Tensor | None]:
    """Weight and bias of several projections of the same input as one; the parts become views of it."""
    weight = joined([weight_of(part) for part in parts])
    biases = [part.bias.detach() for part in parts if part.bias is not None]
    bias = torch.cat(biases) if len(biases) == len(parts) else None
    if bias is None and biases:
        raise TidarError("some projections have a bias and some have none: no fast path, use the general one")
    first = 0
    for part in parts:
        end = first + part.out_features
        _replace(part, weight[first:end])
        if bias is not None:
            part.bias.data = bias[first:end]
        first = end
    return weight, bias
