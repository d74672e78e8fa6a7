"""Held-out numbers while training: bits per byte of the AR half, and how often drafts are what AR would say.

Drafts are judged twice: against what AR says after each token of the held-out text, and against how AR itself goes on
from the start of each block, which is what greedy decoding meets. A transition is given what AR has before each draft,
as a decoder that accepted all drafts so far would. Exact tokens per forward come from decoding, which whoever starts
the run may hang in (`train`'s ``on_valid``).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from tidar.data.packing import PackedBatch, PackedData
from tidar.model import CausalLM
from tidar.train.config import TrainConfig
from tidar.train.inputs import Blocks, Inputs, make_inputs, preceding
from tidar.train.loss import CHUNK_ELEMENTS, pairs
from tidar.train.rollout import roll_out

if TYPE_CHECKING:
    from tidar.train.step import Stepper

__all__ = ["Validation", "leading_matches"]


class Validation:
    """A fixed sample of the held-out data, the same at every call.

    Args:
        config: ``eval_tokens``, ``seq_len``, ``micro_batch`` and ``block_sizes`` count.
        model: its tokenizer says how many bytes the sample has.
        folder: the prepared hold-out.
    """

    def __init__(self, config: TrainConfig, model: CausalLM, folder: Path) -> None:
        rows = config.micro_batch  # the training shape: nothing is compiled anew
        data = PackedData(folder, seq_len=config.seq_len, batch_size=rows, seed=0)
        self.config = config
        self.batches = [data.next() for _ in range(max(1, config.eval_tokens // (rows * config.seq_len)))]
        self.bytes = sum(_predicted_bytes(batch, model) for batch in self.batches)

    def run(self, stepper: Stepper) -> dict[str, Any]:
        """Returns ``bits_per_byte`` (AR) and, for each block size k of a TiDAR run, ``draft_k`` (mean cross-entropy of
        the masks on the text, nats), ``match_k`` (by offset in the block, how often the draft's first choice is AR's),
        ``tokens_per_forward_k`` (estimated from these), and ``rollout_match_k`` and ``rollout_tokens_per_forward_k``:
        the same for the model's own greedy continuations."""
        sizes: tuple[int | None, ...] = self.config.block_sizes if self.config.objective == "tidar" else (None,)
        record: dict[str, Any] = {}
        for k in sizes:
            blocks = None if k is None else Blocks(k, 0)
            sums = _Sums(k or 1)
            for batch in self.batches:
                inputs = make_inputs(batch, blocks, mask_id=stepper.mask_id, device=stepper.model.device)
                rows = _hidden(stepper, inputs)
                ar, ar_best = _judged(stepper, rows[0], inputs)
                sums.add_ar(inputs, ar)
                if blocks is not None:
                    losses, best = _judged(stepper, rows[1], inputs, inputs.targets.before)
                    sums.add_draft(inputs, losses)
                    sums.on_text.add(inputs, best == ar_best, inputs.targets.has_ar.bool())
                    own = roll_out(stepper.model, batch, blocks, kind=stepper.masks, autocast=stepper.autocast)
                    _, best = _judged(stepper, rows[1], inputs, preceding(inputs, own.tokens))
                    sums.on_own.add(inputs, best == own.tokens, own.own & _learned(inputs))
            record.setdefault("bits_per_byte", sums.ar / math.log(2) / self.bytes)
            if k is not None:
                record |= {f"draft_{k}": sums.draft}
                for name, agreement in (("", sums.on_text), ("rollout_", sums.on_own)):
                    record |= {f"{name}match_{k}": agreement.match, f"{name}tokens_per_forward_{k}": agreement.tokens}
        return record


def _hidden(stepper: Stepper, inputs: Inputs) -> Tensor:
    """(P, N, D), what predicts each token of the text in each half."""
    # With gradients on, though none is taken: the compiled forward of training serves again. Where training runs the
    # halves apart it is another one, and what it would keep for a backward may be more than there is room for.
    with torch.set_grad_enabled(not stepper.apart), stepper.autocast():
        hidden = stepper.model.hidden(inputs.tokens, inputs.layout, kind=stepper.masks)
    return pairs(hidden.detach(), 1 if inputs.targets.draft is None else 2)


def _judged(stepper: Stepper, rows: Tensor, inputs: Inputs, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropies with the text (B, S) and likeliest tokens (B, S) of one half's ``rows`` (N, D); drafts are given
    the tokens (B, S) ``before`` them."""
    model, labels = stepper.model, inputs.targets.labels
    size = max(1, CHUNK_ELEMENTS // model.vocab_size)
    losses, best = [], []
    with torch.no_grad(), stepper.autocast():
        for first in range(0, labels.numel(), size):
            part = slice(first, first + size)
            states = rows[part] if before is None else model.drafted(rows[part], before.reshape(-1)[part])
            logits = model.head(states)
            losses.append(nll_loss(logits.log_softmax(-1), labels.reshape(-1)[part], reduction="none"))
            best.append(logits.argmax(-1))
    return torch.cat(losses).view(labels.shape), torch.cat(best).view(labels.shape)


def _learned(inputs: Inputs) -> Tensor:
    """(B, S) bool, tokens that are to be predicted."""
    learned = inputs.targets.learned
    return torch.ones_like(inputs.targets.labels, dtype=torch.bool) if learned is None else learned.bool()


class _Sums:
    """Totals over the sample for block length k."""

    def __init__(self, k: int) -> None:
        self.ar = 0.0  # nats over all predicted tokens
        self._draft = [0.0, 0]
        self.on_text, self.on_own = _Agreement(k), _Agreement(k)

    def add_ar(self, inputs: Inputs, losses: Tensor) -> None:
        self.ar += float(losses[inputs.targets.has_ar.bool()].double().sum())

    def add_draft(self, inputs: Inputs, losses: Tensor) -> None:
        judged = losses[_learned(inputs)]
        self._draft[0] += float(judged.double().sum())
        self._draft[1] += judged.numel()

    @property
    def draft(self) -> float:
        return self._draft[0] / max(1, self._draft[1])


class _Agreement:
    """How often drafts in blocks of k were what AR says."""

    def __init__(self, k: int) -> None:
        self.k = k
        self._hits, self._seen = torch.zeros(k), torch.zeros(k)
        self._steps = [0.0, 0]

    def add(self, inputs: Inputs, match: Tensor, judged: Tensor) -> None:
        """Count ``match`` (B, S) where ``judged`` (B, S), and the whole blocks in which every draft is."""
        size = match.shape[1]
        block = inputs.layout.block[:, size:]
        slot = torch.arange(size, device=match.device) + size
        offset = (slot - block[..., 0])[judged]
        self._hits += torch.bincount(offset[match[judged]], minlength=self.k).cpu()
        self._seen += torch.bincount(offset, minlength=self.k).cpu()
        begins = (block[..., 0] == slot) & (block[..., 1] - block[..., 0] == self.k)
        whole = leading_matches(judged, begins, self.k) == self.k
        lengths = leading_matches(match, begins, self.k)[whole]
        self._steps[0] += float(lengths.double().sum())
        self._steps[1] += lengths.numel()

    @property
    def match(self) -> list[float]:
        return [round(x, 4) for x in (self._hits / self._seen.clamp(min=1)).tolist()]

    @property
    def tokens(self) -> float:
        return self._steps[0] / max(1, self._steps[1])


def leading_matches(match: Tensor, begins: Tensor, k: int) -> Tensor:
    """Tokens a decoding step would commit for each whole block: 1, the AR token itself, and the drafts behind it up
    to the first that AR would not have said.

    Args:
        match: (B, S) bool, draft and AR agree on token i.
        begins: (B, S) bool, a whole block of k begins at i.
        k: block length.

    Returns:
        (blocks,) int64, each in 1 … k.
    """
    padded = torch.nn.functional.pad(match, (0, k - 1), value=False)
    blocks = padded.unfold(1, k, 1)[begins]
    return 1 + blocks[:, 1:].long().cumprod(-1).sum(-1)


def _predicted_bytes(batch: PackedBatch, model: CausalLM) -> int:
    """UTF-8 bytes of the text that the AR half predicts: of each document what is learnt, without its first token."""
    total = 0
    size = batch.tokens.shape[1]
    predicted = torch.arange(size) > batch.starts
    if batch.learned is not None:
        predicted &= batch.learned
    for tokens, starts, wanted in zip(batch.tokens, batch.starts, predicted, strict=True):
        # A run of predicted tokens ends where the document or what is learnt of it does.
        runs = (starts * 2 + wanted).unique_consecutive(return_counts=True)[1].tolist()
        for part, one in zip(tokens.split(runs), wanted.split(runs), strict=True):
            if one[0]:
                total += len(model.tokenizer.decode(part.tolist(), skip_special_tokens=True).encode())  # type: ignore[union-attr]
    return max(1, total)
