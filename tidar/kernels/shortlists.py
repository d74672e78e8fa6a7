"""Memory of `tidar.kernels.chain`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.reference_chain import GROUPS, KEPT
from tidar.kernels.reference_step import Runners

__all__ = ["Shortlists"]


@dataclass(frozen=True, eq=False)
class Shortlists:
    """What the kernels leave for one another, for one shape; one launch at a time uses it.

    Attributes:
        tokens: (N, S) int32, the shortlists, of N hidden states.
        scores: (N, S) float32, their logits without the transition.
        noise: (N, S) float32, noise times temperature; written if there is any.
        following: (B, R, S) int64, the successor's slot and token for each token of the list before, and in its lower
            half, as float32, the log of that successor's probability, with its noise on top.
        arrived: (B,) int32, programs that have found their successors: 0 between launches, and only theirs to write.
        choices: (B, R, S, S) float32, what successors were chosen by, for whoever asks for the next best; or None. 4
            MiB a row of 16 drafts.
        came: (B, R) int32, which token of the list before came, beside it.
        listed: (B, R) int32, which of the N lists was a place's, beside it.
    """

    tokens: Tensor
    scores: Tensor
    noise: Tensor
    following: Tensor
    arrived: Tensor
    choices: Tensor | None = None
    came: Tensor | None = None
    listed: Tensor | None = None

    @classmethod
    def for_step(
        cls, rows: int, places: int, *, states: int = 0, ranked: bool = False, device: torch.device | str
    ) -> Shortlists:
        """Memory for R ``places`` in B ``rows``, of so many ``states`` if they are more; ``ranked``, if runners-up are
        asked for.

        Raises:
            TidarError: sizes below 1.
        """
        if min(rows, places) < 1:
            raise TidarError(f"no shortlists for {rows} rows of {places} drafts")
        shape = rows, places, GROUPS * KEPT
        lists = max(states, rows * places), shape[2]
        tokens = torch.zeros(lists, dtype=torch.int32, device=device)
        scores, noise = (torch.zeros(lists, dtype=torch.float32, device=device) for _ in range(2))
        following = torch.zeros(shape, dtype=torch.int64, device=device)
        arrived = torch.zeros(rows, dtype=torch.int32, device=device)
        choices = torch.zeros(*shape, shape[2], dtype=torch.float32, device=device) if ranked else None
        whose = [torch.zeros(rows, places, dtype=torch.int32, device=device) if ranked else None for _ in range(2)]
        return cls(tokens, scores, noise, following, arrived, choices, *whose)

    def forget(self) -> None:
        """All runners-up are token 0, and what follows them too."""
        self.tokens.zero_()
        self.following.zero_()

    @property
    def runners(self) -> Runners:
        """What came next."""
        return Runners(self.tokens, self.following, self.choices, self.came, self.listed)
