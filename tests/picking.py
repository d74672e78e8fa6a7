"""Steps that draft ahead for what a test wants, where the decoder would pick the likeliest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from tidar.decode.plan import Shape
from tidar.decode.tidar import TidarDecoder, _Picked

Wish: TypeAlias = Callable[[int, int], Tensor]
"""Rows and drafts K to how likely (rows, K) each outcome shall seem, up to a factor."""


def chances_of(likely: Tensor) -> Tensor:
    """Chances (B, K - 1) of drafts of which exactly 1 … K stand as often as ``likely`` (B, K) says."""
    here_or_later = likely.double().flip(1).cumsum(1).flip(1)
    return (here_or_later[:, 1:] / here_or_later[:, :-1]).square().float()


def chances_for(levels: Sequence[Sequence[int]], drafts: int) -> Tensor:
    """Chances (B, K - 1) by which each row drafts for its own ``levels``."""
    return torch.cat([chances_of(subset(*own)(1, drafts)) for own in levels])


def subset(*wanted: int) -> Wish:
    """These outcomes come first, in any order."""

    draw = torch.Generator().manual_seed(0)

    def wish(rows: int, drafts: int) -> Tensor:
        first = torch.tensor([2.0 * (level in wanted) for level in range(1, drafts + 1)])
        return first + torch.rand(rows, drafts, generator=draw) + 1e-3

    return wish


def anything(seed: int = 0) -> Wish:
    """Each row and step another order, and all orders as often."""
    draw = torch.Generator().manual_seed(seed)
    return lambda rows, drafts: torch.rand(rows, drafts, generator=draw) + 1e-3


def steer(decoder: TidarDecoder, wish: Wish, shape: Shape) -> None:
    """Give a decoder's drafts the chances by which its next step will pick what was wished for."""
    rows = len(decoder._drafts)
    decoder._chances = chances_of(wish(rows, shape.drafts)).to(decoder._drafts.device)


@contextmanager
def steered(wish: Wish) -> Iterator[set[tuple[int, ...]]]:
    """All plain decoders; yields what their rows drafted for."""
    real, picked = TidarDecoder._pick, set[tuple[int, ...]]()

    def pick(self: TidarDecoder, shape: Shape) -> _Picked:
        steer(self, wish, shape)
        found = real(self, shape)
        picked.update(tuple(row) for row in found.levels.tolist())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TidarDecoder, "_pick", pick)
        yield picked
