"""From logits to tokens: score processing, sampling, and how many drafts to accept (the contract of exact decoding).

Default acceptance, "gumbel": the autoregressive sample at position i is ``argmax(log p_i + g_i)`` with noise that
depends on (seed, i, token) only; a draft is ``argmax(log q_i + g_i)`` with the same noise; drafts are accepted while
they equal the samples, and the first sample that differs takes the draft's place. So the output *is* the
autoregressive sample, whatever q was. Greedy decoding is the same with g = 0.

Alternative, "ratio" (speculative sampling, Leviathan et al. 2023): a draft of q is accepted with probability
``min(1, p/q)``, else replaced by a sample of ``max(p - q, 0)``. It accepts a few more drafts and keeps the
distribution, but not the text, of autoregressive sampling with the same seed.

Shapes: B rows (requests), R logit rows each, K draft length, V vocabulary. Scores are float32 or float64 logits of p or
q up to a constant per row, -inf where a token is filtered out. ``positions`` are the indices, within their sequences,
of the tokens that the rows sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tidar.config import SamplingParams
from tidar.errors import TidarError
from tidar.noise import ACCEPT, DRAFT, RESIDUAL, SAMPLE, gumbel, uniform

__all__ = [
    "RowParams",
    "accept_matching",
    "accept_ratio",
    "draft_ratio",
    "probabilities",
    "process",
    "residual",
    "runners_up",
    "sample",
    "seen_after",
    "trust",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class RowParams:
    """The sampling parameters of a batch as (B,) tensors; the flags say what no row needs, so that it costs nothing.

    Attributes:
        source: the parameters of each row.
        temperature, top_k, top_p, penalty: as in `SamplingParams`, float64 (top_k: int64). Greedy rows have their
            filters off.
        seed: int64.
        any_sampling: some row has a temperature above 0.
        any_filter: some row has top-k or top-p on.
        any_penalty: some row has a repetition penalty; `process` then needs ``seen``.
        largest_k: the largest top-k, 0 if none is on.
    """

    source: tuple[SamplingParams, ...]
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    penalty: Tensor
    seed: Tensor
    any_sampling: bool
    any_filter: bool
    any_penalty: bool
    largest_k: int

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> RowParams:
        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        top_k = [p.top_k if p.temperature > 0 else 0 for p in params]
        top_p = [p.top_p if p.temperature > 0 else 1.0 for p in params]
        return cls(
            source=tuple(params),
            temperature=column([p.temperature for p in params], torch.float64),
            top_k=column(top_k, torch.int64),
            top_p=column(top_p, torch.float64),
            penalty=column([p.repetition_penalty for p in params], torch.float64),
            seed=column([p.seed for p in params], torch.int64),
            any_sampling=any(p.temperature > 0 for p in params),
            any_filter=any(top_k) or any(p < 1 for p in top_p),
            any_penalty=any(p.repetition_penalty != 1 for p in params),
            largest_k=max(top_k, default=0),
        )

    def select(self, rows: Sequence[int]) -> RowParams:
        """The parameters of these rows only, in this order."""
        return RowParams.of([self.source[row] for row in rows], self.seed.device)


def process(logits: Tensor, params: RowParams, seen: Tensor | None = None) -> Tensor:
    """Repetition penalty, temperature, top-k, top-p, in the order of transformers.

    Top-k keeps the first k tokens in descending order of score, the lower id first among equals; top-p keeps a token
    if the tokens before it in that order have a probability below top_p together (so always one at least).
    Greedy rows only get the penalty.

    Args:
        logits: (B, R, V) float32 or float64.
        params: B rows.
        seen: (B, R, V) or (B, 1, V) bool, the tokens in the text before each row's token (see `seen_after`); needed
            if ``params.any_penalty``.

    Returns:
        (B, R, V) scores in the dtype of ``logits``, which are not modified.

    Raises:
        TidarError: NaN or infinite logits.
    """

    def per_row(values_B: Tensor) -> Tensor:
        return values_B.to(logits.dtype)[:, None, None]

    scores = logits
    if params.any_penalty:
        assert seen is not None, "a repetition penalty needs the tokens seen"
        penalty = per_row(params.penalty)
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    highest = scores.amax(-1, keepdim=True)  # NaN if any score is, -inf if no token is left
    if not highest.isfinite().all():
        raise TidarError("the model produced NaN or infinite logits; try --dtype float32, or check the checkpoint")
    if not params.any_sampling:
        return scores
    temperature = per_row(torch.where(params.temperature > 0, params.temperature, 1))
    # Relative to the highest, so that a temperature near 0 cannot overflow.
    scores = (scores - highest) / temperature.clamp(min=torch.finfo(logits.dtype).tiny)
    return _filter(scores, params) if params.any_filter else scores


def _filter(scores: Tensor, params: RowParams) -> Tensor:
    """Top-k, then top-p, on scores whose maximum is 0 in every row.

    A full sort of the vocabulary would cost the CPU more than the rest of sampling: only tokens that can be kept are
    sorted. A token of probability below (1 - top_p) / V cannot be, since it and those after it would not make up the
    1 - top_p that remains. Nothing here lets one row's result depend on another row.
    """
    vocab = scores.shape[-1]
    top_k, top_p = params.top_k[:, None, None], params.top_p.to(scores.dtype)[:, None, None]
    by_count, by_mass = top_k > 0, (params.top_p < 1)[:, None, None]
    filtered = by_count | by_mass
    mass = scores.softmax(-1)  # not exp and sum: threads may split the sum of a single row
    floor = torch.where(by_count, 0, 0.5 * (1 - top_p) / vocab)  # half: room for rounding
    candidate = mass >= torch.where(filtered, floor, torch.inf)
    if params.largest_k:
        best = scores.topk(min(params.largest_k, vocab)).values
        kth = best.gather(-1, (top_k - 1).clamp(0, best.shape[-1] - 1).expand(-1, scores.shape[1], -1))
        candidate &= scores >= torch.where(by_count, kth, -torch.inf)

    # The candidates of each row side by side, lower ids first; then in descending order.
    at = candidate.nonzero(as_tuple=True)
    counts = candidate.sum(-1)
    before = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    beside = *at[:2], torch.arange(len(at[0]), device=scores.device) - before[at[:2]]
    packed = scores.new_full((*counts.shape, int(counts.max())), -torch.inf)
    packed[beside] = scores[at]
    ranked, order = packed.sort(dim=-1, descending=True, stable=True)

    keep = ~by_count | (torch.arange(ranked.shape[-1], device=scores.device) < top_k)
    running = torch.where(keep, ranked.exp(), 0).cumsum(-1)
    # The best score is 0, so the whole row sums to 1 / its probability.
    total = torch.where(by_count, running[..., -1:], 1 / mass.amax(-1, keepdim=True))
    # Without top-p all are kept, also where rounding lets the running sum reach the total early.
    keep = keep & (~by_mass | (pad(running[..., :-1], (1, 0)) < top_p * total))
    kept = torch.empty_like(keep).scatter_(-1, order, keep)[beside]
    out = scores.masked_fill(filtered, -torch.inf)
    out[at] = scores[at].masked_fill(~kept, -torch.inf)
    return out


def seen_after(seen_BV: Tensor, drafts_BK: Tensor) -> Tensor:
    """Which tokens are in the text after each draft: row j has ``seen_BV`` and drafts 0 … j.

    A repetition penalty must see the drafts before its row, not the committed text alone.

    Args:
        seen_BV: (B, V) bool, the tokens of the committed text.
        drafts_BK: (B, K) int64.

    Returns:
        (B, K, V) bool.
    """
    k = drafts_BK.shape[1]
    column = torch.arange(k, device=drafts_BK.device)
    up_to_row = drafts_BK[:, torch.minimum(column[:, None], column)]  # (B, K, K): drafts 0 … j, the last one repeated
    return seen_BV[:, None].repeat(1, k, 1).scatter_(2, up_to_row, True)


def sample(scores: Tensor, params: RowParams, positions_BR: Tensor, *, stream: int = SAMPLE) -> Tensor:
    """One token for each row of scores (B, R, V): argmax with the noise of its position, without noise where greedy.

    Returns:
        (B, R) int64; the lowest id among equals.
    """
    if params.any_sampling:
        noise = gumbel(params.seed, positions_BR, scores.shape[-1], stream=stream)
        scores = scores + noise * (params.temperature > 0)[:, None, None]
    return scores.argmax(-1)


def runners_up(scores: Tensor, params: RowParams, positions_BR: Tensor | None, chosen_BR: Tensor, count: int) -> Tensor:
    """(B, R, count) int64: after ``chosen``, the tokens of the highest scores (B, R, V); with positions, with the noise
    of `sample`. Token 0 behind the end of a small vocabulary."""
    if count == 0:
        return chosen_BR.new_zeros(*chosen_BR.shape, 0)
    if params.any_sampling and positions_BR is not None:
        noise = gumbel(params.seed, positions_BR, scores.shape[-1], stream=SAMPLE)
        scores = scores + noise * (params.temperature > 0)[:, None, None]
    there = min(count, scores.shape[-1] - 1)
    best = scores.scatter(2, chosen_BR[..., None], -torch.inf).topk(there).indices
    return torch.nn.functional.pad(best, (0, count - there))


def accept_matching(sampled_BK: Tensor, drafts_BK: Tensor) -> Tensor:
    """How many drafts n to commit (paper, section 3.2): n = 1, and while ``s_n == d_{n+1}``: n += 1.

    Args:
        sampled_BK: (B, K) int64, s_1 … s_K; s_j is the autoregressive sample after d_j.
        drafts_BK: (B, K) int64, d_1 … d_K; d_1 is itself an autoregressive sample.

    Returns:
        (B,) int64 in 1 … K. The token after the committed ones, the next block's d_1, is s_n.
    """
    return 1 + (sampled_BK[:, :-1] == drafts_BK[:, 1:]).cumprod(1).sum(1)


def probabilities(scores: Tensor, params: RowParams) -> Tensor:
    """(B, R, V) probabilities that `sample` draws from: softmax of the scores, one-hot for greedy rows."""
    best = torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1)
    return torch.where((params.temperature > 0)[:, None, None], scores.softmax(-1), best)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What a rejected draft of q is replaced from: max(p - q, 0), not normalised; p if rounding leaves nothing."""
    left = (p - q).clamp(min=0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, p)


def draft_ratio(q_scores: Tensor, params: RowParams, positions_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Drafts for `accept_ratio`: samples (B, R) int64 of q, and the probabilities (B, R, V) they were drawn from.

    ``positions_BR`` must be others whenever a place is drafted anew.
    """
    return sample(q_scores, params, positions_BR, stream=DRAFT), probabilities(q_scores, params)


def accept_ratio(
    p_scores: Tensor, q_probs: Tensor, drafts_BK: Tensor, params: RowParams, positions_BK: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept each draft with probability min(1, p/q); after the last one accepted, a token from the residual.

    Args:
        p_scores: (B, K, V), processed scores of the token after d_1 … d_K.
        q_probs: (B, K-1, V), what d_2 … d_K were drawn from (`draft_ratio`).
        drafts_BK: (B, K) int64, d_1 … d_K; d_1 is final already.
        params: B rows.
        positions_BK: (B, K) int64, index of the token after d_1 … d_K.

    Returns:
        n (B,) int64 in 1 … K, the drafts to commit, and the token after them (B,) int64: a sample of p if all K were
        accepted.
    """
    p = probabilities(p_scores, params)
    wanted = drafts_BK[:, 1:, None]
    p_draft, q_draft = p[:, :-1].gather(2, wanted)[..., 0], q_probs.gather(2, wanted)[..., 0]
    accepted = uniform(params.seed, positions_BK[:, :-1], stream=ACCEPT) * q_draft < p_draft
    n = 1 + accepted.cumprod(1).sum(1)

    last = (n - 1)[:, None]
    end = last[..., None].expand(-1, -1, p.shape[-1])
    # With q = 0 behind the last draft, the residual there is p itself.
    left = residual(p.gather(1, end), pad(q_probs, (0, 0, 0, 1)).gather(1, end))
    following = sample(left.log(), params, positions_BK.gather(1, last), stream=RESIDUAL)
    return n, following[:, 0]


def trust(ar_logits: Tensor, draft_logits: Tensor, beta: float) -> Tensor:
    """``beta * ar + (1 - beta) * draft``, the paper's mix of both heads. Lossy: exact only at beta = 1.

    Raises:
        TidarError: beta outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise TidarError(f"beta must lie in [0, 1] (1 trusts the autoregressive logits alone), not {beta}")
    if beta in (0, 1):  # 0 times the -inf of a suppressed token would be NaN
        return ar_logits if beta == 1 else draft_logits
    return beta * ar_logits + (1 - beta) * draft_logits
