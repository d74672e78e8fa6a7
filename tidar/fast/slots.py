"""The state of rows that step together, on the device, at addresses that never change: captured graphs hold them.

Legend: B rows, K drafts at most, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from tidar.config import SamplingParams
from tidar.fast.pages import Pages, table_row
from tidar.kernels.params import DeviceParams
from tidar.kernels.reference_step import HEAD

__all__ = ["DEPTH", "Slots"]

DEPTH = 16
"""Steps that may be in flight before the first of their results is read."""

T = TypeVar("T")
Move = Callable[[], object]


@runtime_checkable
class Lists(Protocol):
    """What a chain of drafts leaves of its runners-up (`tidar.kernels.shortlists`)."""

    def forget(self) -> None:
        """Name nothing but token 0."""
        ...


class Slots:
    """B rows. A row at rest has its length at its limit, which no step moves.

    Attributes:
        rows: B.
        pages: the cache.
        table: (B, n) int32, pages of each row.
        lengths: (B,) int32, committed tokens.
        limits: (B,) int32.
        drafts: (B, K) int64; the first is certain, its key and value are not in the cache yet.
        chances: (B, K) float32, of the drafts (`tidar.proposals`); the first is not read.
        params: sampling parameters.
        seen: (B, V) bool, tokens of each row's text, for penalties.
        tickets: (B,) int32, steps so far.
        ring: (DEPTH, B, HEAD + K) int32, in page-locked memory of the host; see `tidar.kernels.accept.accept`.
        bad: (1,) int32, not 0 once the network gave NaN.
        kept: what was made for these rows, by key; graphs live here.
    """

    def __init__(self, rows: int, most: int, vocab: int, width: int, pages: Pages, device: torch.device) -> None:
        self.rows, self.pages, self.device = rows, pages, device

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.table, self.lengths, self.limits, self.tickets = ints(rows, width), ints(rows), ints(rows), ints(rows)
        self.bad = ints(1)
        self.drafts = torch.zeros(rows, most, dtype=torch.long, device=device)
        self.chances = torch.zeros(rows, most, dtype=torch.float32, device=device)
        self.params = DeviceParams.of([SamplingParams()] * rows, device)
        self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device)
        self.ring = torch.zeros(DEPTH, rows, HEAD + most, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._named = torch.full((rows,), -1, pin_memory=device.type == "cuda")  # rows that are adopted
        self.kept: dict[object, object] = {}

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return self.table, self.lengths, self.limits, self.drafts, self.chances, self.seen, self.tickets, self.bad

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What ``make`` returned the first time that ``key`` was asked for."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]  # type: ignore[return-value]

    def open(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        limits: Sequence[int],
        pages: Sequence[list[int]],
    ) -> None:
        """Take new rows, without tokens yet, that end at their limits; the rest of the B rests."""
        rest = self.rows - len(prompts)
        width = self.table.shape[1]
        rows = [table_row(taken, width) for taken in pages] + [table_row([], width)] * rest
        self.table.copy_(torch.stack(rows))
        self.limits.copy_(torch.tensor([*limits, *[0] * rest], dtype=torch.int32))
        self.lengths.zero_()
        self.tickets.zero_()
        self.bad.zero_()
        self._forget()
        self.params.copy_(DeviceParams.of([*params, *[SamplingParams()] * rest], self.device))
        if any(each.repetition_penalty != 1 for each in params):
            self.seen.zero_()
            for row, prompt in enumerate(prompts):
                self.seen[row, list(prompt)] = True

    def adopt(self, other: Slots, rows: Sequence[int], ready: Callable[[Move], Move] = lambda move: move) -> None:
        """Take the named rows of ``other``, with their pages, as the steps that were launched leave them; the host does
        not wait for these.

        Args:
            other: nobody launches its steps any more.
            rows: of it.
            ready: makes what is launched for it, once: a captured graph, say.
        """
        # Read when the copy runs: that of an earlier batch has, as somebody has read what came of it or of a prefill.
        self._named.fill_(-1)
        self._named[: len(rows)] = torch.tensor(rows)
        self.once(("adopt", other), lambda: ready(lambda: self._take(other)))()
        self._forget()

    def _take(self, other: Slots) -> None:
        """The named rows, in whatever order a captured graph finds them."""
        named = self._named.to(self.device, non_blocking=True)
        real, at = named >= 0, named.clamp(min=0)
        for mine, theirs in zip(self._state[:-2], other._state[:-2], strict=True):
            mine.copy_(torch.where(real.view(-1, *[1] * (mine.dim() - 1)), theirs[at], mine.new_zeros(())))
        # Rows that pad keep parameters of nobody or of an earlier request: valid ones, where zeros would not be.
        for mine, theirs in zip(self.params.tensors, other.params.tensors, strict=True):
            mine.copy_(torch.where(real, theirs[at], mine))
        self.tickets.zero_()
        self.bad.copy_(other.bad)

    def _forget(self) -> None:
        """Runners-up of other rows' drafts would do no harm, but forwards would hang on who came before."""
        for made in self.kept.values():
            if isinstance(made, Lists):
                made.forget()

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Steps inside leave no trace but in pages behind the rows' lengths; `Lists` are empty afterwards."""
        held = [tensor.clone() for tensor in self._state]
        try:
            yield
        finally:
            for tensor, before in zip(self._state, held, strict=True):
                tensor.copy_(before)
            self._forget()
