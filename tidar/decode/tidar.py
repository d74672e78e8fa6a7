"""TiDAR: draft by one-step diffusion and verify autoregressively, in one forward (paper, section 3.2).

Each step feeds the drafts d_1 … d_K and, for every number of drafts that may be accepted or for the likeliest ones
(`tidar.proposals`), a block of masks that drafts what would come next. d_1 is certain already. The autoregressive rows
at the drafts give s_1 … s_K; the first n drafts stand, where n is the first place with s_n ≠ d_{n+1} (or K). Block n
holds the next drafts, s_n is the next d_1.

Beyond the paper, a block may bring *alternates*: tokens that came next after d_{n+1} when it was drafted, each fed as
if it were s_n. If one of them is, its autoregressive row already tells the token behind s_n, which the block's masks,
made before s_n was known, miss more often than any other.

With shared noise (``acceptance="gumbel"``) s_j *is* the autoregressive sample at its position, so the text is token for
token that of `ArDecoder`, whatever was drafted. ``"ratio"`` is the min(1, p/q) rule: the same distribution, other
tokens. ``beta`` below 1 mixes the draft's logits into s_j and is lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tidar import layout
from tidar.config import SamplingParams
from tidar.decode.base import Rows
from tidar.decode.plan import Outcome, Shape
from tidar.decode.policy import Fixed, Policy
from tidar.errors import TidarError
from tidar.model import CausalLM
from tidar.proposals import KNOWN, MOST_ALTERNATES, chance, check_alternates, check_proposals, levels, ranks
from tidar.sampling import accept_matching, accept_ratio, draft_ratio, runners_up, sample, seen_after, trust

__all__ = ["Acceptance", "TidarDecoder"]

Acceptance = Literal["gumbel", "ratio"]


class _Picked(NamedTuple):
    """What a step drafts for."""

    places: Tensor
    """(B, K) of each outcome among the likeliest."""
    levels: Tensor
    """(B, P), ascending."""
    alternates: Tensor
    """(B, P, A) tokens."""


class TidarDecoder(Rows):
    """Up to ``draft_len`` tokens a forward.

    Args:
        model: a converted model.
        draft_len: K, drafts checked and masks in a proposal.
        proposals: P, for how many numbers of accepted drafts to draft, the likeliest ones; all K by default.
        alternates: A, other tokens to try behind the drafts of each proposal.
        acceptance: ``gumbel`` (the same tokens as autoregressive decoding) or ``ratio``.
        beta: weight of the autoregressive logits; 1 is exact, less is lossy (paper, section 3.2, "trust").

    Attributes:
        outcome: of the last step.
    """

    outcome: Outcome

    def __init__(
        self,
        model: CausalLM,
        *,
        draft_len: int,
        proposals: int | None = None,
        alternates: int = 0,
        acceptance: Acceptance = "gumbel",
        beta: float = 1.0,
    ) -> None:
        super().__init__(model)
        if not 0 <= beta <= 1:
            raise TidarError(f"beta must lie in [0, 1] (1 is exact), not {beta}")
        if acceptance == "ratio" and beta != 1:
            raise TidarError("acceptance 'ratio' is exact and takes no beta below 1: leave one of them out")
        # With one draft there is nothing to draft ahead: the next d_1 is the autoregressive token.
        chosen = check_proposals(draft_len, proposals)
        self.proposals = chosen if draft_len > 1 or beta < 1 else 0
        self.draft_len = draft_len
        self.acceptance = acceptance
        self.beta = beta
        self.alternates = check_alternates(alternates)
        self.policy: Policy = Fixed(draft_len, self.proposals, self.alternates)
        self._drafts = self._q = self._chances = self._others = torch.empty(0, device=model.device)

    def shape(self) -> Shape:
        """Of the next step."""
        return self.policy.shape(self._drafts.shape[1])

    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        hidden = self.open(prompts, params, self.draft_len)
        clean = self.model.head(hidden[:, :1])
        if self.beta < 1:
            last = torch.tensor([[prompt[-1]] for prompt in prompts], device=self.model.device)
            clean = trust(clean, self.model.head(self.model.drafted(hidden[:, 1:2], last)), self.beta)
        seen = None if self.seen is None else self.seen[:, None]
        first = self.draw(clean, self.lengths[:, None], seen)
        certain: list[list[int]] = first.tolist()
        self.note(certain)
        made = torch.ones(len(prompts), self.draft_len - 1, dtype=torch.bool, device=first.device)
        self._drafts = self._next_drafts(first, hidden[:, 2:], made, self.alternates)
        return certain

    def step(self) -> list[list[int]]:
        model, shape = self.model, self.shape()
        picked = self._pick(shape)
        sizes = shape.drafts, picked.levels, shape.masks
        plan = layout.step(self.cache.lengths, *sizes, alternates=shape.alternates, device=model.device)
        clean = torch.cat([self._drafts, picked.alternates.flatten(1)], 1)
        hidden = model.hidden(plan.tokens(clean, model.mask_id), plan, cache=self.cache)
        self.forwards += 1
        accepted, follow = self._verify(hidden, shape, picked)
        counts: list[int] = accepted.tolist()
        drafts = torch.cat([self._drafts, follow], 1).tolist()
        certain = [d[1:n] + d[-1:] for d, n in zip(drafts, counts, strict=True)]
        self.cache.commit(counts)
        self.note(certain)
        masks, made, behind = self._proposal(hidden[:, plan.clean :], accepted, shape, picked)
        met, sure = self._met(hidden[:, shape.drafts : plan.clean], accepted, follow, behind, picked)
        self._drafts = self._next_drafts(follow, masks, made, shape.alternates, met >= 0, sure)
        places = picked.places.gather(1, accepted[:, None] - 1)[:, 0]
        self.outcome = Outcome(counts, behind.tolist(), places.tolist(), met.tolist())
        return certain

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        index = torch.tensor(rows, device=self._drafts.device)
        self._drafts, self._chances, self._others = self._drafts[index], self._chances[index], self._others[index]
        if self.acceptance == "ratio":
            self._q = self._q[index]

    def _pick(self, shape: Shape) -> _Picked:
        places = ranks(self._chances[:, : shape.drafts - 1])
        chosen = levels(places, shape.proposals)
        row = torch.arange(len(chosen), device=chosen.device)[:, None]
        return _Picked(places, chosen, self._others[row, chosen - 1, : shape.alternates])

    def _verify(self, hidden: Tensor, shape: Shape, picked: _Picked) -> tuple[Tensor, Tensor]:
        """Accepted drafts (B,), and the autoregressive token (B, 1) after the last of them."""
        k = shape.drafts
        logits = self.model.head(hidden[:, :k])
        if self.beta < 1 and shape.proposals:
            drafted = torch.arange(len(logits), device=logits.device)[:, None], picked.levels - 1
            begin = k + shape.proposals * shape.alternates
            first = self.model.head(self.model.drafted(hidden[:, begin :: shape.masks], self._drafts[drafted]))
            logits[drafted] = trust(logits[drafted], first, self.beta)
        positions = self.lengths[:, None] + torch.arange(1, k + 1, device=logits.device)
        seen = None if self.seen is None else seen_after(self.seen, self._drafts)
        if self.acceptance == "ratio":
            accepted, follow = accept_ratio(self.scores(logits, seen), self._q, self._drafts, self.params, positions)
            return accepted, follow[:, None]
        sampled = self.draw(logits, positions, seen)
        accepted = accept_matching(sampled, self._drafts)
        return accepted, sampled.gather(1, accepted[:, None] - 1)

    def _proposal(
        self, masks: Tensor, accepted: Tensor, shape: Shape, picked: _Picked
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (B, M-1, D) that draft what follows, and which of them (B, M-1) were computed; none without
        proposals. And how far into their block (B,) they begin, M where there is none.

        If "exactly n accepted" was not drafted for, the nearest lower proposal that was serves with its tail: its
        masks stood at the same positions, seeing fewer drafts.
        """
        if not shape.proposals:
            behind = torch.full_like(accepted, shape.masks)
            return masks, masks.new_zeros(masks.shape[:2], dtype=torch.bool), behind
        block = (picked.levels <= accepted[:, None]).sum(1, keepdim=True) - 1
        level = picked.levels.gather(1, block.clamp(min=0))[:, 0]
        behind = torch.where(block[:, 0] >= 0, accepted - level, shape.masks)
        offset = torch.arange(1, shape.masks, device=masks.device) + behind[:, None]
        place = block.clamp(min=0) * shape.masks + offset.clamp(max=shape.masks - 1)
        return masks.gather(1, place[..., None].expand(-1, -1, masks.shape[-1])), offset < shape.masks, behind

    def _met(
        self, states: Tensor, accepted: Tensor, follow: Tensor, behind: Tensor, picked: _Picked
    ) -> tuple[Tensor, Tensor]:
        """Which of its proposal's alternates the next certain token is (B,), -1 if none; and the hidden state (B, 1, D)
        of that alternate, of ``states`` (B, P·A, D)."""
        rows, proposals, each = picked.alternates.shape
        if proposals * each == 0:
            return torch.full_like(accepted, -1), states.new_zeros(rows, 1, states.shape[-1])
        row, block = (
            torch.arange(rows, device=states.device),
            ((picked.levels <= accepted[:, None]).sum(1) - 1).clamp(0),
        )
        same = (picked.alternates[row, block] == follow) & (behind == 0)[:, None]
        which = same.int().argmax(1)
        return torch.where(same.any(1), which, -1), states[row, block * each + which][:, None]

    def _next_drafts(
        self,
        first: Tensor,
        hidden: Tensor,
        made: Tensor,
        alternates: int,
        met: Tensor | None = None,
        sure: Tensor | None = None,
    ) -> Tensor:
        """(B, 1 + R): the certain token, then drafts from mask states (B, R, D); where ``met`` (B,), the first draft is
        the autoregressive token of state ``sure`` (B, 1, D)."""
        count = hidden.shape[1]
        self._q = hidden.new_zeros(len(first), 0, self.model.vocab_size)  # of drafts that are gone
        self._chances = hidden.new_zeros(len(first), 0, dtype=torch.float32)
        self._others = first.new_zeros(len(first), 1 + count, MOST_ALTERNATES)  # none behind all drafts
        if count == 0:
            return first
        positions = self.lengths[:, None] + torch.arange(1, count + 1, device=first.device)
        # A transition wants the draft before, so its drafts are chosen one after another; else all at once.
        width = count if self.model.transition is None else 1
        drafts, q, chances = [first], [], []
        for part in (slice(at, at + width) for at in range(0, count, width)):
            states = hidden[:, part]
            if self.model.transition is not None:
                states = self.model.drafted(states, drafts[-1])
            if part.start == 0 and met is not None and sure is not None:
                states = torch.where(met[:, None, None], torch.cat([sure, states[:, 1:]], 1), states)
            chosen, probs, chance, others = self._choose(states, made[:, part], positions[:, part], alternates)
            drafts.append(chosen)
            q.append(probs)
            chances.append(chance)
            self._others[:, part, :alternates] = others
        self._chances = torch.cat(chances, 1)
        if met is not None:
            self._chances[:, 0].masked_fill_(met, KNOWN)
        if self.acceptance == "ratio":
            self._q = torch.cat(q, 1)
        return torch.cat(drafts, 1)

    def _choose(
        self, states: Tensor, made: Tensor, positions: Tensor, alternates: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Drafts (B, R) from states (B, R, D), for "ratio" the probabilities (B, R, V) they were drawn from, what
        `tidar.proposals` judges them by (B, R), and the tokens (B, R, A) that came next."""
        seen = None if self.seen is None else self.seen[:, None]
        logits = self.model.head(states)
        scores = self.scores(logits, seen)
        # A draft nobody made is token 0 with certainty: any draft is exact, and "ratio" must know its q.
        absent = torch.full_like(scores[:1, :1], -torch.inf)
        absent[..., 0] = 0
        scores = torch.where(made[..., None], scores, absent)
        if self.acceptance == "ratio":
            # Drafts that were thrown away had a say in what is drafted now: their noise must not come again.
            drafts, q = draft_ratio(scores, self.params, positions + (self.lengths[:, None] << 32))
        else:
            drafts, q = sample(scores, self.params, positions), scores
        # What replaces a draft of "ratio" has noise of its own.
        shared = positions if self.acceptance == "gumbel" else None
        others = runners_up(scores, self.params, shared, drafts, alternates)
        return drafts, q, chance(logits, drafts) * made, others
