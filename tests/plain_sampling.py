"""Sampling written down a second time, one row in plain Python: what `tidar.sampling` is checked against."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from tidar.config import SamplingParams


def probabilities(logits: Sequence[float], params: SamplingParams, seen: Collection[int] = ()) -> list[float]:
    """Distribution of the next token after repetition penalty, temperature, top-k and top-p."""
    scores = list(logits)
    for token in set(seen):
        scores[token] *= params.repetition_penalty ** (1 if scores[token] < 0 else -1)
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.temperature == 0:
        return [float(token == order[0]) for token in range(len(scores))]
    weights = [math.exp((s - scores[order[0]]) / params.temperature) for s in scores]
    kept = order[: params.top_k or None]
    total = math.fsum(weights[t] for t in kept)
    nucleus = [t for i, t in enumerate(kept) if math.fsum(weights[u] for u in kept[:i]) < params.top_p * total]
    total = math.fsum(weights[t] for t in nucleus)
    return [weights[t] / total if t in nucleus else 0.0 for t in range(len(scores))]
