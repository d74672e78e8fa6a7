"""TiDAR: draft by one-step diffusion and verify autoregressively, in one forward (paper, section 3.2).

Each step feeds the drafts d_1 … d_K and, for every number of drafts that may be accepted, a block of masks that drafts
what would come next. d_1 is certain already. The autoregressive rows at the drafts give s_1 … s_K; the first n drafts
stand, where n is the first place with s_n ≠ d_{n+1} (or K). Block n holds the next drafts, s_n is the next d_1.

With shared noise (``acceptance="gumbel"``) s_j *is* the autoregressive sample at its position, so the text is token for
token that of `ArDecoder`, whatever was drafted. ``"ratio"`` is the min(1, p/q) rule: the same distribution, other
tokens. ``beta`` below 1 mixes the draft's logits into s_j and is lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tidar import layout
from tidar.config import SamplingParams
from tidar.decode.base import Rows
from tidar.errors import TidarError
from tidar.layout import check_proposals
from tidar.model import CausalLM
from tidar.sampling import accept_matching, accept_ratio, draft_ratio, sample, seen_after, trust

__all__ = ["Acceptance", "TidarDecoder"]

Acceptance = Literal["gumbel", "ratio"]


class TidarDecoder(Rows):
    """Up to ``draft_len`` tokens a forward.

    Args:
        model: a converted model.
        draft_len: K, drafts checked and masks in a proposal.
        proposals: the numbers of accepted drafts to draft for, among 1 … K; all by default.
        acceptance: ``gumbel`` (the same tokens as autoregressive decoding) or ``ratio``.
        beta: weight of the autoregressive logits; 1 is exact, less is lossy (paper, section 3.2, "trust").
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        draft_len: int,
        proposals: Sequence[int] | None = None,
        acceptance: Acceptance = "gumbel",
        beta: float = 1.0,
    ) -> None:
        super().__init__(model)
        if not 0 <= beta <= 1:
            raise TidarError(f"beta must lie in [0, 1] (1 is exact), not {beta}")
        if acceptance == "ratio" and beta != 1:
            raise TidarError("acceptance 'ratio' is exact and takes no beta below 1: leave one of them out")
        # With one draft there is nothing to draft ahead: the next d_1 is the autoregressive token.
        wanted = layout.all_proposals(draft_len) if proposals is None else proposals
        self.proposals = check_proposals(draft_len, wanted if draft_len > 1 or beta < 1 else ())
        self.draft_len = draft_len
        self.acceptance = acceptance
        self.beta = beta
        # kept[n]: the largest proposal that was drafted for at most n accepted drafts, -1 if none
        kept = [max((i for i, j in enumerate(self.proposals) if j <= n), default=-1) for n in range(draft_len + 1)]
        self._kept = torch.tensor(kept, device=model.device)
        self._level = torch.tensor(self.proposals or (0,), device=model.device)
        self._drafts = self._q = torch.empty(0, device=model.device)

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
        self._drafts = self._next_drafts(first, hidden[:, 2:], made)
        return certain

    def step(self) -> list[list[int]]:
        model, k = self.model, self.draft_len
        plan = layout.step(self.cache.lengths, k, self.proposals, device=model.device)
        hidden = model.hidden(plan.tokens(self._drafts, model.mask_id), plan, cache=self.cache)
        self.forwards += 1
        accepted, follow = self._verify(hidden)
        counts: list[int] = accepted.tolist()
        drafts = torch.cat([self._drafts, follow], 1).tolist()
        certain = [d[1:n] + d[-1:] for d, n in zip(drafts, counts, strict=True)]
        self.cache.commit(counts)
        self.note(certain)
        self._drafts = self._next_drafts(follow, *self._proposal(hidden[:, k:], accepted))
        return certain

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        index = torch.tensor(rows, device=self._drafts.device)
        self._drafts = self._drafts[index]
        if self.acceptance == "ratio":
            self._q = self._q[index]

    def _verify(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Accepted drafts (B,), and the autoregressive token (B, 1) after the last of them."""
        k = self.draft_len
        logits = self.model.head(hidden[:, :k])
        if self.beta < 1 and self.proposals:
            drafted = self._level - 1
            first = self.model.head(self.model.drafted(hidden[:, k::k], self._drafts[:, drafted]))
            logits[:, drafted] = trust(logits[:, drafted], first, self.beta)
        positions = self.lengths[:, None] + torch.arange(1, k + 1, device=logits.device)
        seen = None if self.seen is None else seen_after(self.seen, self._drafts)
        if self.acceptance == "ratio":
            accepted, follow = accept_ratio(self.scores(logits, seen), self._q, self._drafts, self.params, positions)
            return accepted, follow[:, None]
        sampled = self.draw(logits, positions, seen)
        accepted = accept_matching(sampled, self._drafts)
        return accepted, sampled.gather(1, accepted[:, None] - 1)

    def _proposal(self, masks: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, K-1, D) that draft what follows, and which of them (B, K-1) were computed.

        If "exactly n accepted" was not drafted for, the nearest lower proposal that was serves with its tail: its
        masks stood at the same positions, seeing fewer drafts.
        """
        k = self.draft_len
        chosen = self._kept[accepted]
        offset = torch.arange(1, k, device=masks.device) + (accepted - self._level[chosen])[:, None]
        made = (offset < k) & (chosen >= 0)[:, None]
        if not self.proposals:
            return masks.new_zeros(len(accepted), k - 1, masks.shape[-1]), made
        place = chosen.clamp(min=0)[:, None] * k + offset.clamp(0, k - 1)
        return masks.gather(1, place[..., None].expand(-1, -1, masks.shape[-1])), made

    def _next_drafts(self, first: Tensor, hidden: Tensor, made: Tensor) -> Tensor:
        """(B, K): the certain token, then K-1 drafts from mask states (B, K-1, D)."""
        if self.draft_len == 1:
            return first
        positions = self.lengths[:, None] + torch.arange(1, self.draft_len, device=first.device)
        # A transition wants the draft before, so its drafts are chosen one after another; else all at once.
        width = self.draft_len - 1 if self.model.transition is None else 1
        drafts, q = [first], []
        for part in (slice(at, at + width) for at in range(0, self.draft_len - 1, width)):
            states = (
                hidden[:, part] if self.model.transition is None else self.model.drafted(hidden[:, part], drafts[-1])
            )
            chosen, probs = self._choose(states, made[:, part], positions[:, part])
            drafts.append(chosen)
            q.append(probs)
        if self.acceptance == "ratio":
            self._q = torch.cat(q, 1)
        return torch.cat(drafts, 1)

    def _choose(self, states: Tensor, made: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Drafts (B, R) from states (B, R, D), and for "ratio" the probabilities (B, R, V) they were drawn from."""
        seen = None if self.seen is None else self.seen[:, None]
        scores = self.scores(self.model.head(states), seen)
        # A draft nobody made is token 0 with certainty: any draft is exact, and "ratio" must know its q.
        absent = torch.full_like(scores[:1, :1], -torch.inf)
        absent[..., 0] = 0
        scores = torch.where(made[..., None], scores, absent)
        if self.acceptance == "ratio":
            return draft_ratio(scores, self.params, positions)
        return sample(scores, self.params, positions), scores
