"""The noise of `tidar.noise` as Triton device functions, the same bits: the same seed must give the same tokens."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gumbel", "words"]


@triton.jit
def words(seed, position, groups, STREAM: tl.constexpr = 0):
    """Random bits of tokens 4g, 4g+1, 4g+2 and 4g+3 for each group g: one call of Philox makes those of all four.

    Args:
        seed: int64 in [0, 2^63). Seed, position and groups may be blocks that broadcast against each other.
        position: int64, not negative; index in its sequence of the token that the noise samples.
        groups: (…, n) int32.
        STREAM: which of the independent noises of `tidar.noise`; 0 is that of the autoregressive sample.

    Returns:
        (…, 4n) uint32.
    """
    low, high = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, groups.to(tl.uint32), low, high, STREAM)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise, float32, made of random bits, uint32."""
    v = (bits.to(tl.float64) + 0.5) * 2.0**-32
    # 1 - v has 33 bits at most, so it is exact and its logarithm is log1p(-v). Logarithms in float64 may differ between
    # devices in their last bit, which rounding to float32 takes away.
    return (-tl.log(-tl.log(1.0 - v))).to(tl.float32)
