"""Two forwards in turn: one drafts after the last certain token, one verifies.

Drafting waits until the correction is known, so every draft is made from the whole text before it, and a forward has K
queries where TiDAR's has K(K+1); but it takes two of them. Which is quicker hangs on what queries cost. Both are steps
of the same kind: drafting is a step with one draft (the certain token) and one proposal, verifying one with K drafts
and no proposal. So the cache, the acceptance and the contract are TiDAR's.
"""

from __future__ import annotations

from tidar.decode.policy import Alternating
from tidar.decode.tidar import Acceptance, TidarDecoder
from tidar.model import CausalLM

__all__ = ["LinearDecoder"]


class LinearDecoder(TidarDecoder):
    """Up to ``draft_len`` + 1 tokens every two forwards.

    Args:
        model: a converted model.
        draft_len: K, tokens that are verified together; the first of them is certain.
        acceptance: as for `TidarDecoder`.
    """

    def __init__(self, model: CausalLM, *, draft_len: int, acceptance: Acceptance = "gumbel") -> None:
        super().__init__(model, draft_len=draft_len, acceptance=acceptance)
        self.policy = Alternating(draft_len)
