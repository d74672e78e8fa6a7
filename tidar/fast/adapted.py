"""The adapters of masks (`tidar.adapters`) in a lean model: two small products beside each of the base's.

Pairs of one input are one: their A's lie above each other, their B's in a block diagonal, scaled. They add to the rows
of masks in place (`LeanModel`); clean rows, and steps without masks, are computed as without adapters.

Legend: N query rows of B texts, M masks of each, D width of an input, F features, r rank of what is joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidar.adapters import LowRank, MaskAdapters

__all__ = ["NONE", "NOWHERE", "Adapted", "Masks", "Pair"]


class Masks(NamedTuple):
    """Which rows are masks: of each text's ``queries`` all behind the first ``clean``."""

    queries: int
    clean: int

    def of(self, x: Tensor) -> Tensor:
        """(B, M, ·) view of x (N, ·)."""
        return x.view(-1, self.queries, x.shape[1])[:, self.clean :]

    def rest(self, x: Tensor) -> Tensor:
        """The other rows, (B, ·, ·)."""
        return x.view(-1, self.queries, x.shape[1])[:, : self.clean]

    def rows(self, x: Tensor) -> Tensor:
        """(B·M,) int32, the masks' rows of x (N, ·); the same tensor every time, as captured graphs want it."""
        return _rows(len(x) // self.queries, self, x.device)


@cache
def _rows(texts: int, masks: Masks, device: torch.device) -> Tensor:
    within = torch.arange(masks.clean, masks.queries)
    return (torch.arange(texts)[:, None] * masks.queries + within).flatten().to(device, torch.int32)


NOWHERE = Masks(0, 0)


@dataclass(frozen=True, eq=False)
class Pair:
    """Joined pairs of one input: ``down`` (r, D) and ``up`` (F, r), r filled up to a multiple of 16 by zeros."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, eq=False)
class Adapted:
    """Of one layer; None where it has no pair."""

    qkv: Pair | None
    out: Pair | None
    gate_up: Pair | None
    down: Pair | None

    @classmethod
    def of(cls, adapters: MaskAdapters | None, layer: Any) -> Adapted:
        """Those of a Hugging Face layer."""
        if adapters is None:
            return NONE
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            qkv=_joined(adapters, [attention.q_proj, attention.k_proj, attention.v_proj]),
            out=_joined(adapters, [attention.o_proj]),
            gate_up=_joined(adapters, [mlp.gate_proj, mlp.up_proj]),
            down=_joined(adapters, [mlp.down_proj]),
        )


NONE = Adapted(None, None, None, None)


@torch.no_grad()
def _joined(adapters: MaskAdapters, parts: Sequence[Any]) -> Pair | None:
    pairs: list[tuple[Any, LowRank]] = [(p, pair) for p in parts if (pair := adapters.beside(p)) is not None]
    if not pairs:
        return None
    rank = adapters.spec.rank
    first = pairs[0][1].lora_A.weight
    r = -(-rank * len(pairs) // 16) * 16
    down = first.new_zeros(r, first.shape[1])
    up = first.new_zeros(sum(part.out_features for part in parts), r)
    at = feature = 0
    for part in parts:
        pair = adapters.beside(part)
        if pair is not None:
            down[at : at + rank] = pair.lora_A.weight
            up[feature : feature + part.out_features, at : at + rank] = pair.lora_B.weight * pair.scale
            at += rank
        feature += part.out_features
    return Pair(down, up)
