"""The plain twin of `tidar.kernels.sample`: the sampler of `tidar.sampling`, which it must equal token for token."""

from __future__ import annotations

import torch
from torch import Tensor

from tidar import sampling as rule
from tidar.kernels.params import DeviceParams

__all__ = ["sample"]


def sample(
    logits: Tensor,
    params: DeviceParams,
    lengths: Tensor,
    *,
    first: int,
    suppressed: Tensor | None = None,
    seen: Tensor | None = None,
    drafts: Tensor | None = None,
    others: Tensor | None = None,
    pairs: int = 0,
    sampling: bool,
    filtering: bool,
    bad: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `tidar.kernels.sample.sample`; float64 logits too. Reads device values on the host."""
    rows = rule.RowParams(
        source=(),
        temperature=params.temperature,
        top_k=params.top_k.long(),
        top_p=params.top_p,
        penalty=params.penalty,
        seed=params.seed,
        any_sampling=sampling,
        any_filter=filtering,
        any_penalty=seen is not None,
        largest_k=int(params.top_k.max()),
    )
    count = logits.shape[1] - (0 if others is None else others.shape[1])
    places = torch.arange(count, device=logits.device).expand(len(logits), count)
    if others is not None:
        behind = others.clone()
        behind[:, 1 : 2 * pairs : 2] += 1
        places = torch.cat([places, behind], 1)
    positions = lengths.long()[:, None] + first + places
    if suppressed is not None:
        logits = logits.masked_fill(suppressed, -torch.inf)
    broken = ~logits.amax(-1).isfinite()
    if bad is not None and bool(broken.any()):
        bad.fill_(1)
    logits = torch.where(broken[..., None], 0.0, logits)
    if seen is not None:
        before = seen[:, None]
        seen = before if drafts is None else rule.seen_after(seen, drafts)
        if others is not None:
            after = torch.cat([before, seen], 1)  # of so many drafts
            seen = torch.cat([seen, after.gather(1, others[..., None].expand(-1, -1, after.shape[2]))], 1)
    tokens = rule.sample(rule.process(logits, rows, seen), rows, positions).masked_fill(broken, 0)
    return tokens if out is None else out.copy_(tokens)
