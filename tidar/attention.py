"""The attention function that Hugging Face models call, registered under the name ``tidar``.

A model's own code stays untouched: any extra keyword given to ``model(...)`` reaches the attention function of every
layer, so ``tidar=masks`` (see `tidar.mask.render`) is the channel for the layout. Without it the function is ordinary
causal attention, and ``generate()`` is the ordinary autoregressive model. ``tidar_keys`` is the channel for keys and
values of another forward, with their gradients, which no cache of transformers carries.

Legend: B rows, Hq query heads, Hk key/value heads, G = Hq/Hk, L queries, S key slots, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from tidar.mask import Masks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["NAME", "Keys", "Prefix", "Written", "tidar_attention"]

NAME = "tidar"


class Written:
    """Takes down the keys and values (B, Hk, S, D) that a forward makes in a layer, attached to its graph."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def seen(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.key is None:  # not those of activations that are computed a second time
            self.key, self.value = key, value
        return key, value


class Prefix:
    """Keys and values (B, Hk, S, D) of another forward, in slots 0 … S-1 before the forward's own."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key = key
        self.value = value

    def seen(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)


Keys = Written | Prefix


def tidar_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tidar: Masks | None = None,
    tidar_keys: Keys | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over the key slots that the layout shows each query.

    Args:
        module: the layer; not read.
        query: (B, Hq, L, D), rotary embedding applied.
        key: (B, Hk, S, D), as the cache returned it; heads are not expanded.
        value: (B, Hk, S, D).
        attention_mask: used only without ``tidar``: (B, 1, L, S) bool, or None for causal.
        scaling: factor on the scores; 1/sqrt(D) by default.
        dropout: must be 0: a dropped key would break exactness.
        sliding_window: the layer's window, which picks its mask.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        s_aux: (Hq,) attention sinks, one extra logit a head (GPT-OSS).
        tidar: masks by window, dense or `BlockMask`; None for an entry where everything is seen.
        tidar_keys: where this layer's keys are to be written, or what stands before them.

    Returns:
        (B, L, Hq, D), and None for the attention weights.
    """
    if dropout:
        raise ValueError("attention dropout is not supported: set attention_dropout to 0 in config.json")
    if tidar_keys is not None:
        key, value = tidar_keys.seen(key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if tidar is None:
        mask, causal = attention_mask, attention_mask is None and query.shape[2] > 1
    else:
        mask, causal = tidar[sliding_window], False
    if mask is not None and not isinstance(mask, Tensor):
        return _flex(query, key, value, mask, scale, softcap, s_aux), None
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - query.shape[2])[None, None]
    if softcap is not None or s_aux is not None:
        return _reference(query, key, value, mask, scale, softcap, s_aux), None
    return _sdpa(query, key, value, mask, scale), None


def _grouped(query: Tensor, mask: Tensor | None, heads: int) -> tuple[Tensor, Tensor | None]:
    """Fold the G query heads of a key head into the query axis, so that keys need not be repeated."""
    rows, query_heads, length, width = query.shape
    group = query_heads // heads
    if group == 1:
        return query, mask
    folded = query.reshape(rows, heads, group * length, width)
    return folded, None if mask is None else mask.repeat(1, 1, group, 1)


def _unfold(out: Tensor, query_heads: int) -> Tensor:
    rows, _, folded, width = out.shape
    length = folded * out.shape[1] // query_heads
    return out.reshape(rows, query_heads, length, width).transpose(1, 2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    folded, tiled = _grouped(query, mask, key.shape[1])
    out = nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=tiled, scale=scale)
    return _unfold(out, query.shape[1])


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Every step written out; the only dense path that knows soft-capping and sinks."""
    folded, tiled = _grouped(query, mask, key.shape[1])
    scores = (folded @ key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if tiled is not None:
        # Not -inf: a padding query that sees nothing would be NaN, and spread through its value.
        scores = scores.masked_fill(~tiled, torch.finfo(scores.dtype).min)
    # fp32 at least, as the models' own code
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if s_aux is None:
        weights = wide.softmax(-1)
    else:
        group, length = query.shape[1] // key.shape[1], query.shape[2]
        sink = s_aux.to(wide).view(1, key.shape[1], group, 1, 1).expand(wide.shape[0], -1, -1, length, 1)
        weights = torch.cat([wide, sink.reshape(*wide.shape[:3], 1)], -1).softmax(-1)[..., :-1]
    return _unfold(weights.to(value.dtype) @ value, query.shape[1])


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    # Autocast leaves the outputs of q/k norms in fp32; the kernel wants one dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    # Inside a compiled model the call is fused with it; alone on a GPU it must be compiled to be a kernel at all.
    alone = query.is_cuda and not torch.compiler.is_compiling()
    run: Any = _compiled_flex() if alone else flex_attention

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap  # type: ignore[operator]

    options: dict[str, Any] = {
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
        "score_mod": None if softcap is None else capped,
    }
    if s_aux is None:
        out: Tensor = run(query, key, value, **options)
    else:
        out, aux = run(query, key, value, return_aux=AuxRequest(lse=True), **options)
        # A sink adds exp(sink) to the softmax's denominator.
        out = out * torch.sigmoid(aux.lse - s_aux.view(1, -1, 1).to(aux.lse))[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(NAME, tidar_attention)
# Without a registered mask function transformers drops a 2-D padding mask silently.
AttentionMaskInterface.register(NAME, sdpa_mask)
