"""A lean model with its kernels: what a step is made of, and what computes a prompt.

Legend: B rows, K drafts, A alternates with their seconds, P proposals of M masks each, L = K + A + P·M queries, D
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tidar.fast.adapted import NOWHERE, Masks
from tidar.fast.lean import Attend, Hidden, Layer, LeanModel
from tidar.fast.queries import StepLayout
from tidar.fast.slots import Slots
from tidar.kernels.reference_chain import Blocks, PlainLists
from tidar.kernels.workspace import Workspace, fixed_tiles

__all__ = ["AT_ONCE", "Flags", "Network"]

AT_ONCE = 128
"""Queries up to which the head is read once, for all of them, before it is known which masks draft what follows. With
256 an H200 gained no time over reading it again, and all their logits take memory."""


class Flags(NamedTuple):
    """What the rows of a batch need between them; a step without a flag leaves its code out."""

    sampling: bool
    """Some row has a temperature above 0."""
    filtering: bool
    """Some row has top-k or top-p on."""
    penalty: bool
    """Some row has a repetition penalty."""


class Network:
    """A lean model, its kernels, and what is computed from it once.

    Args:
        lean: the model.
        ops: kernels or twins.
        positions: longest text and what may stand behind its end.
    """

    def __init__(self, lean: LeanModel, ops: Any, positions: int) -> None:
        self.lean, self.ops = lean, ops
        core = lean.core
        device = lean.embedding.device
        self.cos, self.sin = lean.rotary(positions)
        self.suppressed = torch.zeros(core.vocab_size, dtype=torch.bool, device=device)
        self.suppressed[list(core.suppressed)] = True
        self.mask_id = core.spec.mask_token_id if core.spec else 0
        self.adapters = core.adapters
        self.transition = lean.transition()
        # What attention's splits are chosen for; behind longer prefixes they are long, but still right.
        self.longest = min(2048, core.max_positions // 2)

    def workspace(self, rows: int, queries: int) -> Workspace:
        """Where the splits of the layers' attention meet, in steps of so many rows and queries each."""
        lean, dtype, device = self.lean, self.lean.embedding.dtype, self.lean.embedding.device
        fixed = fixed_tiles(lean.head_dim, dtype.itemsize) if lean.deterministic else None
        heads = lean.heads, lean.kv_heads, lean.head_dim
        return Workspace.for_step(rows, queries, *heads, self.longest, dtype=dtype, device=device, chosen=fixed)

    def hidden(self, tokens: Tensor, layout: StepLayout, slots: Slots) -> Hidden:
        """Hidden states, B·L of them, of the first ``layout.causal`` of ``tokens`` (B, ·), and of alternates and masks
        behind them."""
        rows, queries = len(tokens), layout.queries
        given = tokens, self.lean.embedding, self.mask_id, queries, layout.causal
        x = self.ops.embed(*given, picking=layout.picking).view(rows * queries, -1)
        masks = NOWHERE
        if self.adapters is not None and layout.clean < queries:
            masks = Masks(queries, layout.clean)
            masks.of(x).copy_(self.adapters.mask_embedding)
        return self.lean(x, self.attending(rows, layout, slots), masks)

    def attending(self, rows: int, layout: StepLayout, slots: Slots) -> Attend:
        """What the layers attend to: the rows' pages, and each other as ``layout`` says."""
        lean, ops, pages, queries = self.lean, self.ops, slots.pages, layout.queries
        # In one launch every tile of queries turns the own keys it sees for itself: a few in a step, but all before it
        # in a long prompt. And keys are not in the cache when it begins.
        few = layout.causal <= 32 and not lean.deterministic
        cached = layout.counts if lean.deterministic else None

        def attend(number: int, layer: Layer, heads: Tensor) -> Tensor:
            stores = pages.keys[number], pages.values[number], layout.table, layout.lengths
            heads = heads.view(rows, queries, -1, lean.head_dim)
            rotary = layer.q_norm, layer.k_norm, self.cos, self.sin
            options = {
                "causal": layout.causal,
                "alternates": layout.alternates,
                "pairs": layout.pairs,
                "scale": lean.scale,
                "window": layer.window,
                "workspace": layout.workspace,
            }
            out: Tensor
            if few:
                out = ops.rotate_attend(heads, *rotary, *stores, layout.counts, layout.levels, eps=lean.eps, **options)
            else:
                placed = *stores, layout.counts, layout.levels
                sizes = {"causal": layout.causal, "alternates": layout.alternates, "pairs": layout.pairs}
                q, k, v = ops.rotate(heads, *rotary, *placed, eps=lean.eps, **sizes)
                out = ops.attend(q, k, v, *stores, layout.levels, cached=cached, **options)
            return out.view(rows * queries, -1)

        return attend

    def logits(self, hidden: Hidden, rows: Tensor) -> Tensor:
        """Of the chosen hidden states (B, R, V), rows (B, R) int32."""
        return self.lean.logits(hidden, rows.view(-1)).view(*rows.shape, -1)

    def ends(self, hidden: Hidden) -> Sequence[Tensor]:
        """Logits (N, V) of all hidden states, and if there is a transition what its gate takes from them (N, W)."""
        return (self.lean.logits(hidden, None),) if self.transition is None else self.lean.ends(hidden, None)

    def sample(
        self,
        logits: Tensor,
        slots: Slots,
        flags: Flags,
        *,
        first: int,
        drafts: Tensor | None = None,
        others: Tensor | None = None,
        pairs: int = 0,
    ) -> Tensor:
        """Tokens (B, R) of their logits (B, R, V), the first one ``first`` behind the rows' lengths; the last rows are
        those of alternates behind so many drafts ``others`` (B, A)."""
        sampled: Tensor = self.ops.sample(
            logits,
            slots.params,
            slots.lengths,
            first=first,
            suppressed=self.suppressed,
            seen=slots.seen if flags.penalty else None,
            drafts=drafts if flags.penalty else None,
            others=others,
            pairs=pairs,
            sampling=flags.sampling,
            filtering=flags.filtering,
            bad=slots.bad,
        )
        return sampled

    def draft(
        self,
        hidden: Hidden,
        states: Tensor,
        made: Tensor,
        slots: Slots,
        flags: Flags,
        every: Sequence[Tensor] | None = None,
        given: Tensor | None = None,
        ranked: bool = False,
    ) -> None:
        """Choose the drafts behind the certain tokens from the hidden states ``x[states]`` of masks, both (B, M - 1),
        but for those that are ``given`` (`tidar.kernels.accept.accept`). If ``ranked``, what came next after each can
        be told afterwards from `lists`.

        A draft that nobody made is token 0: any draft is exact. ``every`` are the `ends` of all hidden states, if they
        are known; a transition's were prepared then.
        """
        places = slice(1, 1 + states.shape[1])
        drafts, chances = slots.drafts[:, places], slots.chances[:, places]
        lists = self.lists(slots, states.shape[1], ranked=ranked)
        if self.transition is None:
            self.ops.draft(
                self.logits(hidden, states) if every is None else every[0],
                slots.params,
                slots.lengths,
                made,
                first=1,
                suppressed=self.suppressed,
                seen=slots.seen if flags.penalty else None,
                sampling=flags.sampling,
                filtering=flags.filtering,
                bad=slots.bad,
                rows=None if every is None else states,
                given=given,
                out=drafts,
                chances=chances,
                runners=lists.runners if ranked else None,
            )
            return
        table, mix = self.transition
        if every is None:
            base, state = (made.view(*states.shape, -1) for made in self.lean.ends(hidden, states.view(-1)))
        else:
            base, state = every
        self.ops.chain(
            base,
            state,
            slots.drafts[:, 0],
            made,
            table,
            mix,
            self.suppressed,
            temperature=slots.params.temperature,
            seed=slots.params.seed,
            lengths=slots.lengths,
            offset=1,
            sampling=flags.sampling,
            rows=None if every is None else states,
            given=given,
            out=drafts,
            chances=chances,
            shortlists=lists,
        )

    def prepare(self, logits: Tensor, blocks: Blocks, slots: Slots, flags: Flags, ranked: bool) -> None:
        """List tokens for all masks, from all logits (B, L, V), beside the check of the drafts, just launched."""
        self.ops.prepare(
            logits,
            self.suppressed,
            self.lists(slots, blocks.stride - 1, ranked=ranked),
            blocks,
            temperature=slots.params.temperature,
            seed=slots.params.seed,
            lengths=slots.lengths,
            offset=0,
            sampling=flags.sampling,
            beside=True,
        )

    def lists(self, slots: Slots, places: int, *, ranked: bool) -> Any:
        """Where a chain of so many drafts leaves what it knows: `tidar.kernels.shortlists`, or its twin."""
        # Without a transition there is no chain, and runners-up have no list.
        make = PlainLists.of if self.transition is None else self.ops.shortlists
        sizes: dict[str, Any] = {"states": AT_ONCE, "ranked": ranked, "device": slots.device}
        return slots.once(("shortlists", places, ranked), lambda: make(slots.rows, places, **sizes))
