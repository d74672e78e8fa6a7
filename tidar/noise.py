"""Random numbers as a pure function of (seed, position, token): the noise that drafting and verification share.

No generator state: whoever asks for position i of a request gets the same numbers, in whatever forward, batch or order
(Philox-4x32-10, Salmon et al. 2011). So the same seed gives the same text for every decoding method, and a draft made
with the noise of its position agrees with the later sample there as often as the two distributions allow.

Shapes: B rows, R positions in a row, V vocabulary.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["ACCEPT", "DRAFT", "RESIDUAL", "SAMPLE", "gumbel", "philox", "uniform"]

SAMPLE = 0
"""Stream of the autoregressive sample, and of drafts that share its noise."""
DRAFT = 1
"""Stream of drafts that are independent of the sample (ratio acceptance). Their positions carry the length of the text
that they were drafted behind in their upper word: what is drafted anew has new noise."""
ACCEPT = 2
"""Stream of the accept-or-reject decisions (ratio acceptance)."""
RESIDUAL = 3
"""Stream of the token after the last accepted draft (ratio acceptance)."""

_LOW = 0xFFFFFFFF

Words: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox-4x32-10: four words of 32 random bits for each counter and key.

    Args:
        counter: four int64 tensors that broadcast against each other, each value in [0, 2^32).
        key: two more of the same kind.

    Returns:
        Four int64 tensors of the broadcast shape, each value in [0, 2^32).
    """
    full = torch.broadcast_tensors(*counter, *key)  # type: ignore[no-untyped-call]
    x0, x1, x2, x3 = (word.clone(memory_format=torch.contiguous_format) for word in full[:4])
    k0, k1 = key
    a, b = torch.empty_like(x0), torch.empty_like(x0)
    for _ in range(10):
        # A product of two words wraps modulo 2^64, which keeps both of its halves. Words 1 and 3 keep stray bits above
        # the lower 32: they are only xored, and what they are xored into is cut to 32 bits. In place, as the decoder
        # runs this on every step.
        torch.mul(x0, 0xD2511F53, out=a)
        torch.mul(x2, 0xCD9E8D57, out=b)
        torch.bitwise_right_shift(b, 32, out=x0).bitwise_xor_(x1).bitwise_xor_(k0).bitwise_and_(_LOW)
        torch.bitwise_right_shift(a, 32, out=x2).bitwise_xor_(x3).bitwise_xor_(k1).bitwise_and_(_LOW)
        x1, b, x3, a = b, x1, a, x3
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return x0, x1.bitwise_and_(_LOW), x2, x3.bitwise_and_(_LOW)


def _words(seeds_B: Tensor, positions_BR: Tensor, groups: int, stream: int) -> Words:
    """Four (B, R, groups) tensors: the random words of tokens 4g, 4g+1, 4g+2 and 4g+3."""
    seeds = seeds_B[:, None, None]
    positions = positions_BR[:, :, None]
    group = torch.arange(groups, device=positions_BR.device)
    return philox(
        (group, positions & _LOW, positions >> 32, torch.full_like(group[:1], stream)),
        (seeds & _LOW, seeds >> 32),
    )


def _open_unit(words: Tensor) -> Tensor:
    """(word + 1/2) / 2^32 in float64: exact, and strictly between 0 and 1."""
    return words.double().add_(0.5).mul_(2.0**-32)


def gumbel(seeds_B: Tensor, positions_BR: Tensor, vocab: int, *, stream: int = SAMPLE) -> Tensor:
    """Standard Gumbel noise: ``argmax(scores + gumbel)`` is a sample from ``softmax(scores)``.

    A row depends on its own seed and position only, never on the batch or vocabulary around it.

    Args:
        seeds_B: (B,) int64 in [0, 2^63).
        positions_BR: (B, R) int64, not negative; index in its sequence of the token that the noise samples.
        vocab: number of tokens V.
        stream: which of the independent noises.

    Returns:
        (B, R, V) float32.
    """
    words = _words(seeds_B, positions_BR, -(-vocab // 4), stream)
    # An exponential variable -log(1 - v), not -log(v): its small values are the large Gumbel values that win the
    # argmax, and there v keeps all its 32 bits, where 1 - v would be rounded to a coarse grid. The logarithms run in
    # float64, so that the float32 result does not hang on whose float32 logarithm (device, vector unit) ran.
    lanes = [_open_unit(w).neg_().log1p_().neg_().log_().neg_().float() for w in words]
    return torch.stack(lanes, -1).flatten(-2)[..., :vocab]


def uniform(seeds_B: Tensor, positions_BR: Tensor, *, stream: int) -> Tensor:
    """Uniform noise strictly between 0 and 1: (B, R) float32. Arguments as for `gumbel`."""
    word = _words(seeds_B, positions_BR, 1, stream)[0][..., 0]
    return _open_unit(word).float().clamp_(max=1 - 2.0**-24)
