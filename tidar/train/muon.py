"""Muon for weights that ranks share by rows. Its step needs a whole matrix, so each matrix belongs to one rank.

That rank keeps the matrix and its momentum whole and steps it with torch's own Muon, to the same bits as one process
would from the same gradient. Gradients come to it, and weights go back, in exchanges of R matrices at a time: one for
each of R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

__all__ = ["SharedMuon"]

MOMENTUM = "momentum_buffer"  # torch's name


class SharedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` over matrices of which each rank holds some rows.

    Args:
        matrices: DTensors as FSDP2 makes them, the same on every rank.
        options: those of `torch.optim.Muon`.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], **options: Any) -> None:
        super().__init__(matrices, {"lr": options["lr"]})
        self._matrices = list(matrices)
        first = matrices[0]
        assert isinstance(first, DTensor)
        self._group = first.device_mesh.get_group()
        self._size, self._rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        self._stepped: set[int] = set()  # numbers of the matrices that ever had a gradient
        self._own: dict[int, nn.Parameter] = {}  # by number
        for number, whole in self._to_owners([_rows(matrix) for matrix in matrices]).items():
            self._own[number] = nn.Parameter(whole)
        # A rank that owns nothing still takes part in the exchanges.
        self._muon = torch.optim.Muon(list(self._own.values()), **options) if self._own else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        present = {number for number, matrix in enumerate(self._matrices) if matrix.grad is not None}
        gradients = [_rows(matrix if matrix.grad is None else matrix.grad) for matrix in self._matrices]
        for number, whole in self._to_owners(gradients).items():
            self._own[number].grad = whole if number in present else None
        self._stepped |= present
        if self._muon is not None:
            self._muon.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            self._muon.step()  # type: ignore[no-untyped-call]
            self._muon.zero_grad()
        for matrix, rows in zip(self._matrices, self._from_owners(self._own), strict=True):
            _rows(matrix).copy_(rows)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Muon`'s, the momentum shared like the matrices. Every rank must call it."""
        momenta = {number: self._momentum(own) for number, own in self._own.items()}
        state = {}
        for number, rows in enumerate(self._from_owners(momenta)):
            if number in self._stepped:
                matrix = self._matrices[number]
                assert isinstance(matrix, DTensor)
                shared = DTensor.from_local(
                    rows, matrix.device_mesh, matrix.placements, shape=matrix.shape, stride=matrix.stride()
                )
                state[number] = {MOMENTUM: shared}
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on any number of ranks. Every rank must call it."""
        found = state_dict["state"]
        self._stepped = set(found)
        momenta = [
            _rows(found[number][MOMENTUM] if number in found else matrix)
            for number, matrix in enumerate(self._matrices)
        ]
        for number, whole in self._to_owners(momenta).items():
            if number in found and self._muon is not None:
                self._muon.state[self._own[number]][MOMENTUM] = whole

    def _momentum(self, own: nn.Parameter) -> Tensor:
        assert self._muon is not None
        found: Tensor = self._muon.state[own].get(MOMENTUM, own)
        return found

    def _to_owners(self, rows: Sequence[Tensor]) -> dict[int, Tensor]:
        """Whole tensors of the matrices this rank owns, from each rank's rows of all."""
        found = {}
        for first in range(0, len(rows), self._size):
            turn, mine = rows[first : first + self._size], first + self._rank
            whole = self._exchange(turn, [part.numel() for part in turn], self._shares(mine))
            if mine < len(rows):
                found[mine] = whole.view(self._matrices[mine].shape)
        return found

    def _from_owners(self, whole: dict[int, Any]) -> list[Tensor]:
        """This rank's rows of all matrices, from their owners' whole ones."""
        found: list[Tensor] = []
        for first in range(0, len(self._matrices), self._size):
            mine = first + self._rank
            shapes = [_rows(matrix).shape for matrix in self._matrices[first : first + self._size]]
            sizes = [shape.numel() for shape in shapes]
            parts = [whole[mine].detach()] if mine in whole else []
            flat = torch.split(self._exchange(parts, self._shares(mine), sizes), sizes)
            found += [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]
        return found

    def _exchange(self, parts: Sequence[Tensor], sends: list[int], gets: list[int]) -> Tensor:
        """Give rank r its ``sends[r]`` numbers of ``parts``, take ``gets[r]`` from it."""
        like = _rows(self._matrices[0])
        flat = torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)
        sends, gets = (sizes + [0] * (self._size - len(sizes)) for sizes in (sends, gets))
        got = like.new_empty(sum(gets))
        dist.all_to_all_single(got, flat, gets, sends, group=self._group)
        return got

    def _shares(self, number: int) -> list[int]:
        """How many numbers of a matrix each rank holds; none of one that does not exist."""
        if number >= len(self._matrices):
            return []
        count, width = self._matrices[number].shape
        most = -(-count // self._size)
        return [width * max(0, min(most, count - rank * most)) for rank in range(self._size)]


def _rows(tensor: Tensor) -> Tensor:
    """This rank's part, without gradient."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
