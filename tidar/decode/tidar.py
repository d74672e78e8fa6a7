"""TiDAR: draft by one-step diffusion and verify autoregressively, in one forward (paper, section 3.2).

Each step feeds the drafts d_1 … d_K and, for every number of drafts that may be accepted or for the likeliest ones
(`tidar.proposals`), a block of masks that drafts what would come next. d_1 is certain already. The autoregressive rows
at the drafts give s_1 … s_K; the first n drafts stand, where n is the first place with s_n ≠ d_{n+1} (or K). Block n
holds the next drafts, s_n is the next d_1.

Beyond the paper, a step may try *alternates*: tokens that came next after some d_{n+1} when it was drafted, each fed as
if it were s_n. If one of them is, its autoregressive row already tells the token behind s_n, which the block's masks,
made before s_n was known, miss more often than any other. The likelier half of them are followed by what would have
been drafted behind them: if that is right, the token after it is told too.

With shared noise (``acceptance="gumbel"``) s_j *is* the autoregressive sample at its position, so the text is token for
token that of `ArDecoder`, whatever was drafted. ``"ratio"`` is the min(1, p/q) rule: the same distribution, other
tokens. ``beta`` below 1 mixes the draft's logits into s_j and is lossy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tidar import layout
from tidar.config import SamplingParams
from tidar.decode.base import Rows
from tidar.decode.plan import Outcome, Shape
from tidar.decode.policy import Fixed, Policy
from tidar.errors import TidarError
from tidar.model import CausalLM
from tidar.proposals import (
    KNOWN,
    RUNNERS_UP,
    alternates,
    chance,
    check_alternates,
    check_proposals,
    levels,
    outcomes,
    paired,
    ranks,
)  # fmt: skip
from tidar.sampling import accept_matching, accept_ratio, draft_ratio, runners_up, sample, seen_after, trust

__all__ = ["Acceptance", "TidarDecoder"]

Acceptance = Literal["gumbel", "ratio"]


class _Picked(NamedTuple):
    """What a step drafts for: places of outcomes among the likeliest (B, K), levels of the proposals (B, P), ascending,
    and the alternates, seconds of pairs among them: drafts before each (B, A), and tokens (B, A)."""

    places: Tensor
    levels: Tensor
    below: Tensor
    alternates: Tensor


class _Told(NamedTuple):
    """What alternates tell of the next drafts: which one came (B,), seconds not counted, -1 if none; whether it has a
    second (B,); hidden states of both (B, 2, D), and the second's token (B,)."""

    met: Tensor
    paired: Tensor
    states: Tensor
    second: Tensor


class TidarDecoder(Rows):
    """Up to ``draft_len`` tokens a forward.

    Args:
        model: a converted model.
        draft_len: K, drafts checked and masks in a proposal.
        proposals: P, for how many numbers of accepted drafts to draft, the likeliest ones; all K by default.
        alternates: A, other tokens to try behind drafts.
        acceptance: ``gumbel`` (the same tokens as autoregressive decoding) or ``ratio``.
        beta: weight of the autoregressive logits; 1 is exact, less is lossy (paper, section 3.2, "trust").
    """

    outcome: Outcome
    """Of the last step."""

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
        nothing = torch.empty(0, device=model.device)
        self._drafts = self._q = self._chances = self._others = self._masks = self._sure = nothing

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
        self._drafts = self._next_drafts(first, hidden[:, 2:], made, self.alternates > 0)
        return certain

    def step(self) -> list[list[int]]:
        model, shape = self.model, self.shape()
        picked = self._pick(shape)
        others: dict[str, Any] = {"alternates": picked.below, "pairs": shape.pairs, "device": model.device}
        plan = layout.step(self.cache.lengths, shape.drafts, picked.levels, shape.masks, **others)
        clean = torch.cat([self._drafts, picked.alternates], 1)
        hidden = model.hidden(plan.tokens(clean, model.mask_id), plan, cache=self.cache)
        self.forwards += 1
        accepted, follow = self._verify(hidden, shape, picked)
        counts: list[int] = accepted.tolist()
        drafts = torch.cat([self._drafts, follow], 1).tolist()
        certain = [d[1:n] + d[-1:] for d, n in zip(drafts, counts, strict=True)]
        self.cache.commit(counts)
        self.note(certain)
        masks, made, behind = self._proposal(hidden[:, plan.clean :], accepted, shape, picked)
        told = self._told(hidden[:, shape.drafts : plan.clean], accepted, follow, shape, picked)
        self._drafts = self._next_drafts(follow, masks, made, shape.alternates > 0, told)
        places = picked.places.gather(1, accepted[:, None] - 1)[:, 0]
        met = [-1] * len(counts) if told is None else told.met.tolist()
        self.outcome = Outcome(counts, behind.tolist(), places.tolist(), met, self._sure.tolist())
        return certain

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        index = torch.tensor(rows, device=self._drafts.device)
        self._drafts, self._chances, self._others = self._drafts[index], self._chances[index], self._others[index]
        self._masks = self._masks[index]
        if self.acceptance == "ratio":
            self._q = self._q[index]

    def _pick(self, shape: Shape) -> _Picked:
        chances = self._chances[:, : shape.drafts - 1]
        places, pairs = ranks(chances), shape.pairs
        below, rank = alternates(outcomes(chances), shape.alternates)
        row = torch.arange(len(below), device=below.device)[:, None]
        firsts = self._others[row, below - 1, rank]
        seconds = self._behind(firsts[:, :pairs], below[:, :pairs]) if pairs else firsts
        tokens = paired(firsts, seconds, pairs)
        return _Picked(places, levels(places, shape.proposals), paired(below, below, pairs), tokens)

    def _behind(self, tokens: Tensor, below: Tensor) -> Tensor:
        """What would have been drafted behind ``tokens`` (B, A), had they been the drafts behind ``below`` (B, A)."""
        row = torch.arange(len(tokens), device=tokens.device)[:, None]
        states = self._masks[row, below.clamp(max=self._masks.shape[1] - 1)]
        if self.model.transition is not None:
            states = self.model.drafted(states, tokens)
        scores = self.scores(self.model.head(states), None if self.seen is None else self.seen[:, None])
        if self.acceptance == "ratio":
            return scores.argmax(2)
        return sample(scores, self.params, self.lengths[:, None] + 1 + below)

    def _verify(self, hidden: Tensor, shape: Shape, picked: _Picked) -> tuple[Tensor, Tensor]:
        """Accepted drafts (B,), and the autoregressive token (B, 1) after the last of them."""
        k = shape.drafts
        logits = self.model.head(hidden[:, :k])
        if self.beta < 1 and shape.proposals:
            drafted = torch.arange(len(logits), device=logits.device)[:, None], picked.levels - 1
            begin = k + shape.others
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

    def _told(self, states: Tensor, accepted: Tensor, follow: Tensor, shape: Shape, picked: _Picked) -> _Told | None:
        """What the alternates, of hidden states (B, A, D), tell now that ``accepted`` drafts stand; None of none."""
        pairs = shape.pairs
        if not shape.others:
            return None
        same = (picked.alternates == follow) & (picked.below == accepted[:, None])
        same[:, 1 : 2 * pairs : 2] = False
        at, row = same.int().argmax(1), torch.arange(len(same), device=same.device)
        with_second = at < 2 * pairs
        met = torch.where(with_second, at // 2, at - pairs).masked_fill(~same.any(1), -1)
        second = at + with_second
        both = torch.stack([states[row, at], states[row, second]], 1)
        return _Told(met, with_second, both, picked.alternates[row, second])

    def _next_drafts(
        self, first: Tensor, hidden: Tensor, made: Tensor, ranked: bool, told: _Told | None = None
    ) -> Tensor:
        """(B, 1 + R): the certain token, then drafts from mask states (B, R, D); if ``ranked``, with runners-up.
        Where an alternate came the first draft is the autoregressive token of its state; where its second
        is this, so is the next."""
        count = hidden.shape[1]
        self._q = hidden.new_zeros(len(first), 0, self.model.vocab_size)  # of drafts that are gone
        self._chances = hidden.new_zeros(len(first), 0, dtype=torch.float32)
        self._others = first.new_zeros(len(first), 1 + count, RUNNERS_UP)  # none behind all drafts
        self._masks = hidden
        self._sure = sure = torch.zeros_like(first[:, 0])
        if count == 0:
            return first
        positions = self.lengths[:, None] + torch.arange(1, count + 1, device=first.device)
        # A transition wants the draft before, and so do alternates, so these drafts are chosen one after another; else
        # all at once.
        alone = count if self.model.transition is not None else 2 if told is not None else 0
        ends = [*range(1, min(alone, count) + 1), *([count] if alone < count else [])]
        drafts, q, chances = [first], [], []
        for part in (slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)):
            states, at = hidden[:, part], part.start
            if self.model.transition is not None:
                states = self.model.drafted(states, drafts[-1])
            if told is not None and at < 2:
                stays = told.met >= 0
                if at:
                    stays = stays & told.paired & (drafts[-1][:, 0] == told.second)
                sure += stays
                states = torch.where(stays[:, None, None], told.states[:, at, None], states)
            chosen, probs, chance, behind = self._choose(
                states, made[:, part] | (at < sure[:, None]), positions[:, part], ranked
            )
            drafts.append(chosen)
            q.append(probs)
            chances.append(chance)
            self._others[:, part] = behind
        known = torch.arange(count, device=first.device) < sure[:, None]
        self._chances = torch.cat(chances, 1).masked_fill(known, KNOWN)
        if self.acceptance == "ratio":
            self._q = torch.cat(q, 1)
        return torch.cat(drafts, 1)

    def _choose(
        self, states: Tensor, made: Tensor, positions: Tensor, ranked: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Drafts (B, R) from states (B, R, D), for "ratio" the probabilities (B, R, V) they were drawn from, what
        `tidar.proposals` judges them by (B, R), and the tokens that came next (B, R, `tidar.proposals.RUNNERS_UP`), 0
        unless ``ranked``."""
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
        next_best = drafts.new_zeros(*drafts.shape, RUNNERS_UP)
        if ranked:
            next_best = runners_up(scores, self.params, shared, drafts, RUNNERS_UP)
        return drafts, q, chance(logits, drafts) * made, next_best
