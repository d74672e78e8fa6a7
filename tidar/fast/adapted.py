"""The adapters of masks (`tidar.adapters`) in a lean model: two small products beside each of the base's.

Pairs of one input are one: their A's lie above each other, their B's in a block diagonal, scaled. They add to the rows
of masks in place; clean rows, and steps without masks, are computed as without adapters.

Legend: N query rows of B texts, M masks of each, D width of an input, F features, r rank of what is joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

    def flat(self, x: Tensor) -> Tensor:
        """The same as (B·M, ·), copied for several texts."""
        return self.of(x).flatten(0, 1)

    def rest(self, x: Tensor) -> Tensor:
        """The other rows, (B, ·, ·)."""
        return x.view(-1, self.queries, x.shape[1])[:, : self.clean]


NOWHERE = Masks(0, 0)


@dataclass(frozen=True, eq=False)
class Pair:
    """Joined pairs of one input: ``down`` (r, D) and ``up`` (r, F)."""

    down: Tensor
    up: Tensor

    def add(self, out: Tensor, x: Tensor, masks: Masks) -> None:
        """Add to the masks' rows of ``out`` (N, F) what the pairs make of theirs of ``x``, (B·M, D)."""
        rows = masks.of(out)
        inner = torch.mm(x, self.down.T).view(len(rows), -1, len(self.down))
        rows.baddbmm_(inner, self.up.expand(len(rows), -1, -1))


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
    down = torch.cat([pair.lora_A.weight for _, pair in pairs])
    rank = adapters.spec.rank
    up = down.new_zeros(len(down), sum(part.out_features for part in parts))
    row = column = 0
    for part in parts:
        pair = adapters.beside(part)
        if pair is not None:
            up[row : row + rank, column : column + part.out_features] = pair.lora_B.weight.T * pair.scale
            row += rank
        column += part.out_features
    return Pair(down, up)
