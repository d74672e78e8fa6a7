"""A decoder that changes its plan while it runs (`tidar.decode.planner`); the tokens do not notice."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from tidar import layout
from tidar.config import SamplingParams
from tidar.decode.planner import AR, Acceptance, Times, best, candidates
from tidar.decode.tidar import Shape, TidarDecoder
from tidar.model import CausalLM

__all__ = ["PlannedDecoder", "measure"]

REPLAN = 8
"""Steps between two looks at the plan."""
PROBE = 64
"""Autoregressive steps after which a round of drafts asks whether they have become better."""


class PlannedDecoder(TidarDecoder):
    """Chooses method, draft length and proposals by itself.

    Args:
        model: a converted model.
        draft_len: the longest draft.
        times: seconds of a step by its queries, for each number of rows; what is missing is measured and kept there, so
            decoders of one model on one machine share it.
    """

    def __init__(self, model: CausalLM, *, draft_len: int, times: dict[int, Times]) -> None:
        super().__init__(model, draft_len=draft_len)
        self.plan = AR
        self.acceptance_seen = Acceptance()
        self._plans = list(candidates(draft_len))
        self._known = times
        self._steps = self._idle = 0
        self._block = draft_len  # masks in the blocks that made the drafts
        self._behind: list[int] = []  # offset of the certain token in its row's block

    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        certain = super().prefill(prompts, params)
        self._block, self._behind = self.draft_len, [0] * len(prompts)
        rows = len(prompts)
        if rows not in self._known:
            self._known[rows] = Times(measure(self.model, rows))
        self._times = self._known[rows]
        self._replan()
        return certain

    def shape(self) -> Shape:
        plan, held = self.plan, self._drafts.shape[1]
        if not self._times.sure_of(1):  # what everything is compared with
            return Shape(1, (), 1)
        if plan.method == "ar":
            probing = self._idle >= PROBE and self.draft_len > 1
            return Shape(1, (1,), self.draft_len) if probing else Shape(1, (), 1)
        k = min(plan.draft_len, held)
        if k == 1:  # nothing is drafted
            return Shape(1, (1,), plan.draft_len)
        return Shape(k, tuple(j for j in plan.proposals if j <= k), plan.draft_len)

    def step(self) -> list[list[int]]:
        shape = self.shape()
        self._drafts = self._drafts[:, : shape.drafts]
        begin = time.perf_counter()
        certain = super().step()
        seconds = time.perf_counter() - begin
        self._learn(shape, [len(new) for new in certain], seconds)
        return certain

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self._behind = [self._behind[r] for r in rows]

    def _learn(self, shape: Shape, accepted: list[int], seconds: float) -> None:
        self._times.update(shape.drafts + len(shape.proposals) * shape.masks, seconds)
        tested = []
        for n, behind in zip(accepted, self._behind, strict=True):
            count = min(shape.drafts, self._block - behind) - 1
            if count > 0:
                tested.append((behind + 1, count, min(n - 1, count)))
        if tested:
            self.acceptance_seen.update(tested)
        levels = [max((j for j in shape.proposals if j <= n), default=None) for n in accepted]
        self._block = shape.masks
        self._behind = [self._block if j is None else n - j for n, j in zip(accepted, levels, strict=True)]
        self._idle = 0 if shape.proposals else self._idle + (self.plan.method == "ar")
        self._steps += 1
        if self._steps % REPLAN == 0:
            self._replan()

    def _replan(self) -> None:
        self.plan = best(self._plans, self.acceptance_seen.rates(self.draft_len), self._times, self.plan)


@torch.inference_mode()
def measure(model: CausalLM, rows: int) -> list[tuple[int, float]]:
    """Seconds of a forward and head over 1, 8 and 48 queries of ``rows`` rows without a prefix, best of three."""
    points = []
    for queries in (1, 8, 48):
        plan = layout.causal([0] * rows, queries, device=model.device)
        tokens = torch.zeros(rows, queries, dtype=torch.long, device=model.device)
        runs = []
        for _ in range(4):
            begin = time.perf_counter()
            model.head(model.hidden(tokens, plan)).argmax(-1).tolist()
            runs.append(time.perf_counter() - begin)
        points.append((queries, min(runs[1:])))
    return points
