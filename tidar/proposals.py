"""Which numbers of accepted drafts a step drafts ahead for: the likeliest ones, judged by the drafts' own chances.

The paper drafts for every outcome, K blocks of masks (section 3.2). Most of them are improbable: where one draft is
doubtful and the rest are not, two blocks meet nearly every outcome. So P of the K outcomes are picked anew in every
step. What is picked changes how many drafts stand, never a token.

Shapes: B rows, K drafts (the certain token among them), P proposals, A alternates.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from tidar.errors import TidarError

__all__ = [
    "KNOWN", "MOST_ALTERNATES", "RUNNERS_UP", "SHARES", "alternates", "chance", "check_alternates", "check_proposals",
    "levels", "outcomes", "paired", "ranks",
]  # fmt: skip

MOST_ALTERNATES = 32
"""A, at most."""
SHARES = (0.33, 0.12, 0.075, 0.05)
"""How often, about, each token that came next after a draft that fell is the one in its place, the best first."""
RUNNERS_UP = len(SHARES)
"""Such tokens of a draft that may become alternates: a power of 2, as the kernels count them."""

KNOWN = 0.9
"""Chance of a draft that an alternate told. The check has filters and penalties, the draft may have none, so some fall;
and where they do, the next step should not be without drafts."""


def check_proposals(draft_len: int, proposals: int | None) -> int:
    """P: as many as drafts by default.

    Raises:
        TidarError: a draft length below 1, or proposals outside 1 … K.
    """
    if draft_len < 1:
        raise TidarError(f"draft length must be at least 1, not {draft_len}")
    chosen = draft_len if proposals is None else proposals
    if not isinstance(chosen, int) or isinstance(chosen, bool) or not 1 <= chosen <= draft_len:
        raise TidarError(f"proposals must be a number between 1 and the draft length {draft_len}, not {chosen}")
    return chosen


def check_alternates(alternates: int) -> int:
    """A.

    Raises:
        TidarError: outside 0 … `MOST_ALTERNATES`.
    """
    if not isinstance(alternates, int) or isinstance(alternates, bool) or not 0 <= alternates <= MOST_ALTERNATES:
        raise TidarError(f"alternates must be a number between 0 and {MOST_ALTERNATES}, not {alternates}")
    return alternates


def chance(logits: Tensor, drafts: Tensor) -> Tensor:
    """Probabilities (B, R) of ``drafts`` (B, R) by their logits (B, R, V), before temperature and filters; tokens that
    are never drafted have logits of -inf."""
    return (logits.gather(2, drafts[..., None])[..., 0] - logits.logsumexp(2)).exp()


def outcomes(chances: Tensor) -> Tensor:
    """Probabilities (B, K) that exactly 1 … K drafts stand.

    Args:
        chances: (B, K - 1) floating point in 0 … 1, of each draft behind the certain token, as of `chance` or of
            `tidar.kernels.chain.chain`; 0 of a draft that nobody made.
    """
    # The model's own choice is the draft more often than the draft was probable: about as often as its root says.
    stands = chances.sqrt()
    one = stands.new_ones(len(stands), 1)
    return torch.cat([one, stands.cumprod(1)], 1) * (1 - torch.cat([stands, 0 * one], 1))


def ranks(chances: Tensor) -> Tensor:
    """Places (B, K) int64, from 0, of the outcomes 1 … K when the likeliest come first, and the least among equals."""
    likely = outcomes(chances)
    here, there = likely[:, :, None], likely[:, None, :]
    earlier = torch.ones(likely.shape[1], likely.shape[1], dtype=torch.bool, device=likely.device).tril(-1)
    return ((there > here) | ((there == here) & earlier)).sum(2)


def alternates(likely: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which tokens to try behind which drafts, the likeliest pairs of an outcome and a token first.

    Args:
        likely: (B, K) probabilities of the outcomes, as of `outcomes`.
        count: A.

    Returns:
        levels: (B, A) int64 in 1 … K - 1, the drafts before each alternate; none stands behind all.
        ranks: (B, A) int64, which of the tokens that came next after the draft behind those it is, from 0. Where there
            are no more pairs, the first one again.
    """
    worth = (likely[:, :-1, None] * likely.new_tensor(SHARES)).flatten(1)
    order = worth.argsort(dim=1, descending=True, stable=True)[:, :count]
    order = pad(order, (0, count - order.shape[1]))
    return order // RUNNERS_UP + 1, order % RUNNERS_UP


def paired(firsts: Tensor, seconds: Tensor, pairs: int) -> Tensor:
    """The first ``pairs`` of ``firsts`` (B, A), each before its own of ``seconds``, then the other ``firsts``."""
    both = torch.stack([firsts[:, :pairs], seconds[:, :pairs]], 2).flatten(1)
    return torch.cat([both, firsts[:, pairs:]], 1)


def levels(places: Tensor, count: int) -> Tensor:
    """The ``count`` likeliest numbers of drafts (B, P) int64 in 1 … K, ascending; ``places`` as of `ranks`."""
    return places.argsort(dim=1, stable=True)[:, :count].sort(1).values + 1
