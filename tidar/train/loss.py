"""The paper's loss (section 3.1), without ever holding the logits of a whole batch.

``L = [α · mean CE(AR row i-1, x_i) + mean D(mask row i)] / (1 + α)``, where D is the cross-entropy with x_i, the
divergence KL(p || q) from the AR distribution p of the same forward (detached: the draft learns, the teacher does
not), or a mixture. The draft may have labels and teacher of its own: the model's continuations (`tidar.train.rollout`)
in place of the text. Both halves predict the same token i, so they are handled as a pair: a chunk of tokens at a time,
each chunk's logits made, used forward *and backward*, and dropped. What remains is the gradient of the hidden states,
with which the backbone's backward starts once. Where the halves run apart (`tidar.train.sliced`) each has its own call.

Legend: B rows, S clean tokens a row, N = B·S, n tokens of a chunk, P halves (1: AR only, 2: AR and draft), D width of
the hidden state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from tidar.train.world import ALONE, World

__all__ = ["Counts", "Part", "Targets", "count", "pairs", "train_loss"]

CHUNK_ELEMENTS = 2**28  # logits of one chunk: 1 GiB in fp32

Head = Callable[[Tensor], Tensor]
Bend = Callable[[Tensor, Tensor], Tensor]
Part = Literal["whole", "clean", "masks"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """What the rows of one micro-batch are to predict.

    Attributes:
        labels: (B, S) int64, the clean tokens.
        has_ar: (B, S) float, 1 where the token before belongs to the same document, so that an AR row predicts it.
        draft: (B, S) float, weight of the mask row's loss, or None for AR training.
        learned: (B, S) float, 0 for tokens that neither half is to predict; None: all are.
        drafted: (B, S) int64, labels of the mask rows; None: ``labels``.
        teacher: (B, S, D) detached, hidden states whose distributions the mask rows learn; None: the AR rows.
        before: (B, S) int64, the token before each mask's, which a transition reads.
    """

    labels: Tensor
    has_ar: Tensor
    draft: Tensor | None
    learned: Tensor | None = None
    drafted: Tensor | None = None
    teacher: Tensor | None = None
    before: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Labels of each half over a whole optimizer step, 0-dimensional tensors: the means' denominators."""

    ar: Tensor
    draft: Tensor


def count(micro_batches: list[Targets], world: World = ALONE) -> Counts:
    """Labels of both halves over all micro-batches of a step, on all ranks. Under random masking the 1/t weights make
    every token count once in expectation, so the draft's denominator is the number of tokens to be learnt in either
    case."""
    ar = [t.has_ar.sum() for t in micro_batches]
    draft = [torch.ones_like(t.has_ar).sum() if t.learned is None else t.learned.sum() for t in micro_batches]
    sums = world.sum(torch.stack([torch.stack(ar).sum(), torch.stack(draft).sum()])).clamp(min=1)
    return Counts(ar=sums[0], draft=sums[1])


def pairs(hidden: Tensor, halves: int) -> Tensor:
    """(P, N, D): for token i its AR row i-1 and its mask row i. A row's first token has no AR row; what stands there
    has weight 0."""
    size = hidden.shape[1] // halves
    before = torch.nn.functional.pad(hidden[:, : size - 1], (0, 0, 1, 0))
    both = [before] if halves == 1 else [before, hidden[:, size:]]
    return torch.stack([half.reshape(-1, hidden.shape[-1]) for half in both])


def chunk_loss(
    head: Head,
    bend: Bend | None,
    rows_PnD: Tensor,
    labels_n: Tensor,
    has_ar_n: Tensor,
    draft_n: Tensor | None,
    drafted_n: Tensor,
    teacher_nD: Tensor | None,
    before_n: Tensor | None,
    ar_scale: Tensor,
    draft_scale: Tensor,
    kl_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """This chunk's share of the loss, and of the sums (3,) of AR cross-entropy, draft cross-entropy and KL. The last of
    the P halves is the draft's if ``draft_n`` is given, the first AR's unless it is that."""
    if bend is not None and before_n is not None:
        rows_PnD = torch.stack([*rows_PnD[:-1], bend(rows_PnD[-1], before_n)])
    logp = [logits.log_softmax(-1) for logits in head(rows_PnD).unbind()]
    loss = ar = draft = kl = logp[0].new_zeros(())
    # nll_loss, not gather: compiled, its backward is fused with the softmax's.
    if draft_n is None or len(logp) == 2:
        ar = (nll_loss(logp[0], labels_n, reduction="none") * has_ar_n).sum()
        loss = ar * ar_scale
    if draft_n is not None:
        nll = nll_loss(logp[-1], drafted_n, reduction="none")
        draft = labelled = (nll * draft_n).sum()
        if kl_weight is not None:
            teacher, taught = logp[0].detach(), draft_n * has_ar_n
            if teacher_nD is not None:
                with torch.no_grad():
                    teacher = head(teacher_nD).log_softmax(-1)
            kl = ((teacher.exp() * (teacher - logp[-1])).sum(-1) * taught).sum()
            labelled = (nll * (draft_n - kl_weight * taught)).sum() + kl_weight * kl
        loss = loss + labelled * draft_scale
    return loss, torch.stack([ar, draft, kl]).detach()


def train_loss(
    head: Head,
    hidden: Tensor,
    targets: Targets,
    counts: Counts,
    *,
    part: Part = "whole",
    alpha: float = 1.0,
    kl_weight: float | Tensor = 0.0,
    bend: Bend | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    chunk: Callable[..., tuple[Tensor, Tensor]] = chunk_loss,
    chunk_elements: int = CHUNK_ELEMENTS,
    vocab: int,
) -> Tensor:
    """Backpropagate one micro-batch's share of the loss into the model.

    Args:
        head: hidden states (…, D) to logits (…, V), at least fp32.
        hidden: (B, S, D) of an AR layout or (B, 2S, D) of a training layout, attached to the model's graph; (B, S, D)
            of one half if ``part`` says so. Without a graph nothing is learnt, only computed.
        targets: labels and weights; without ``draft`` the loss is the AR half alone.
        counts: labels of the whole optimizer step (all micro-batches, all ranks).
        part: which half is there. The masks alone need a ``teacher`` for KL.
        alpha: weight of the AR half.
        bend: mask states (n, D) and the tokens (n,) before them to what the head reads; None: the states themselves.
        kl_weight: share of KL in the draft's loss; 0-dimensional where it changes from step to step, so that nothing is
            compiled anew. A document's first token has no teacher and stays cross-entropy.
        autocast: makes the context in which the head runs; none by default.
        chunk: `chunk_loss`, or its compiled form.
        chunk_elements: logits held at once.
        vocab: V.

    Returns:
        (4,) detached: this micro-batch's share of the loss, of the mean AR cross-entropy, of the mean draft
        cross-entropy and of the mean KL, in nats. Shares of micro-batches add up to the step's values.
    """
    none = not isinstance(kl_weight, Tensor) and kl_weight == 0
    share = None if none else torch.as_tensor(kl_weight, device=hidden.device)
    assert part != "masks" or targets.teacher is not None or share is None
    ar_scale = (1.0 if targets.draft is None else alpha / (1 + alpha)) / counts.ar
    if part == "clean":
        targets = replace(targets, draft=None, teacher=None, before=None)
    halves = 2 if part == "whole" and targets.draft is not None else 1
    rows = hidden.reshape(1, -1, hidden.shape[-1]) if part == "masks" else pairs(hidden, halves)
    draft_scale = 1 / (1 + alpha) / counts.draft
    labels, has_ar = targets.labels.reshape(-1), targets.has_ar.reshape(-1)
    draft = None if targets.draft is None else targets.draft.reshape(-1)
    drafted = labels if targets.drafted is None else targets.drafted.reshape(-1)
    teacher = None if targets.teacher is None or share is None else targets.teacher.flatten(0, 1)
    before = None if targets.before is None or bend is None else targets.before.reshape(-1)
    tokens = labels.shape[0]
    pieces = max(1, -(-tokens * (halves + (teacher is not None)) * vocab // chunk_elements))
    size = -(-tokens // pieces)
    leaf, grad = rows.detach(), torch.empty_like(rows)
    total, sums = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros(3, dtype=torch.float32)
    learns = hidden.requires_grad
    for first in range(0, tokens, size):
        here = slice(first, first + size)
        piece = leaf[:, here].requires_grad_(learns)
        weights = None if draft is None else draft[here]
        taught = None if teacher is None else teacher[here]
        leads = None if before is None else before[here]
        words = (labels[here], has_ar[here], weights, drafted[here], taught, leads)
        with autocast(), torch.set_grad_enabled(learns):
            loss, sum_part = chunk(head, bend, piece, *words, ar_scale, draft_scale, share)
        if learns:
            loss.backward()  # type: ignore[no-untyped-call]
            assert piece.grad is not None
            grad[:, here] = piece.grad
        total, sums = total + loss.detach(), sums + sum_part
    if learns:
        rows.backward(grad)  # type: ignore[no-untyped-call]
    return torch.stack([total, sums[0] / counts.ar, sums[1] / counts.draft, sums[2] / counts.draft])
