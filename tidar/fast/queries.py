"""The queries of a step, as the kernels want them.

Legend: B rows, P proposals, A alternates, L queries.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tidar.kernels.reference_step import Picking
from tidar.kernels.workspace import Workspace

__all__ = ["StepLayout"]


@dataclass(frozen=True, eq=False)
class StepLayout:
    """`tidar.layout.step` and `tidar.layout.prefill` as the kernels want them, for B rows on one device.

    Attributes:
        causal: queries before alternates and masks.
        queries: L.
        levels: (A + P,) or (B, A + P) int64.
        counts: (B,) int32, causal queries that are written to the cache.
        lengths, table: of the rows.
        workspace: of the attention; None for the plain twins.
        picking: where to pick the levels; None if they stand.
        alternates: A.
        pairs: that they begin with.
    """

    causal: int
    queries: int
    levels: Tensor
    counts: Tensor
    lengths: Tensor
    table: Tensor
    workspace: Workspace | None
    picking: Picking | None = None
    alternates: int = 0
    pairs: int = 0

    @property
    def clean(self) -> int:
        """Queries before the masks."""
        return self.causal + self.alternates
