"""The plain twins of `tidar.kernels.sample` and `draft`: the sampler of `tidar.sampling`, which they must equal token
for token."""

from __future__ import annotations

import torch
from torch import Tensor

from tidar import sampling as rule
from tidar.kernels.params import DeviceParams
from tidar.kernels.reference_chain import check_results, check_runners
from tidar.kernels.reference_step import Runners
from tidar.proposals import KNOWN, RUNNERS_UP, chance

__all__ = ["draft", "sample"]


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
    rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `tidar.kernels.sample.sample`; float64 logits too. Reads device values on the host."""
    if rows is not None:
        logits = logits[rows.long()]
    each = rule.RowParams(
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
    tokens = rule.sample(rule.process(logits, each, seen), each, positions).masked_fill(broken, 0)
    return tokens if out is None else out.copy_(tokens)


def draft(
    logits: Tensor,
    params: DeviceParams,
    lengths: Tensor,
    made: Tensor,
    *,
    first: int,
    suppressed: Tensor | None = None,
    seen: Tensor | None = None,
    sampling: bool,
    filtering: bool,
    bad: Tensor | None = None,
    rows: Tensor | None = None,
    given: Tensor | None = None,
    out: Tensor,
    chances: Tensor,
    runners: Runners | None = None,
) -> None:
    """As `tidar.kernels.draft.draft`; float64 logits too. Reads device values on the host."""
    check_results(made, given, out, chances)
    check_runners(made, runners)
    if rows is not None:
        logits = logits[rows.long()]
    tokens = sample(
        logits,
        params,
        lengths,
        first=first,
        suppressed=suppressed,
        seen=seen,
        sampling=sampling,
        filtering=filtering,
        bad=bad,
    )
    known = torch.zeros_like(made)
    if given is not None:
        known = torch.arange(made.shape[1], device=made.device) < given[:, None]
    chosen = torch.where(known, out, tokens * made)
    if suppressed is not None:
        logits = logits.masked_fill(suppressed, -torch.inf)
    out.copy_(chosen)
    chances.copy_((chance(logits, chosen).nan_to_num() * made).masked_fill(known, KNOWN))
    if runners is not None:  # without their noise, which would be made for the whole vocabulary
        others = logits.scatter(2, chosen[..., None], -torch.inf).sort(dim=2, descending=True, stable=True).indices
        count = min(RUNNERS_UP, logits.shape[2] - 1)
        runners.tokens[:, :, :count] = others[:, :, :count]
        runners.followers[:, :-1] = out[:, 1:, None]
