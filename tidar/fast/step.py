"""One decoding step on the device, from the drafts of the last to those of the next: what a CUDA graph captures.

No shape, grid or branch here depends on a device value.
"""

from __future__ import annotations

import torch

from tidar.decode.plan import Shape
from tidar.fast.network import AT_ONCE, Flags, Network
from tidar.fast.queries import StepLayout
from tidar.fast.slots import Slots
from tidar.kernels.reference_chain import Blocks
from tidar.kernels.reference_step import Picking

__all__ = ["Step"]


class Step:
    """One step of B rows in one shape; called, it moves `Slots` on by a step.

    Args:
        network: the model.
        slots: its rows.
        shape: what it feeds.
        flags: what the rows need.
    """

    def __init__(self, network: Network, slots: Slots, shape: Shape, flags: Flags) -> None:
        self._network, self._slots, self._flags = network, slots, flags
        rows, device = slots.rows, slots.device
        self.shape = shape
        k, proposals, others, pairs = shape.drafts, shape.proposals, shape.others, shape.pairs
        # What a step of one draft may come to is certain, and drafted for or not.
        self._levels = torch.ones(rows, others + proposals, dtype=torch.long, device=device)
        self._places = torch.zeros(rows, k, dtype=torch.long, device=device)
        self._alternates = torch.zeros(rows, others, dtype=torch.long, device=device)
        runners = None
        if others:  # of the drafts that a step like this one made
            runners = network.lists(slots, shape.masks - 1, ranked=True).runners
        picking = Picking(slots.chances, self._places, self._levels, runners, self._alternates, pairs)
        index = torch.arange(rows, device=device)[:, None] * shape.queries + torch.arange(k + others, device=device)
        self._verify = index.int()
        self._blocks = Blocks(shape.queries, k + others, shape.masks, self._levels[:, others:])
        self._layout = StepLayout(
            causal=k,
            queries=shape.queries,
            levels=self._levels,
            counts=torch.full((rows,), k, dtype=torch.int32, device=device),
            lengths=slots.lengths,
            table=slots.table,
            workspace=network.workspace(rows, shape.queries),
            picking=picking if k > 1 else None,
            alternates=others,
            pairs=pairs,
        )

    def __call__(self) -> None:
        network, slots, flags = self._network, self._slots, self._flags
        k, others, pairs = self.shape.drafts, self.shape.others, self.shape.pairs
        hidden = network.hidden(slots.drafts, self._layout, slots)
        drafting = self.shape.proposals > 0 and self.shape.masks > 1
        every, ranked = None, others > 0
        # A head that takes chosen rows is another program, which may round otherwise: not where bits count.
        if drafting and len(hidden.x) <= AT_ONCE and not network.lean.deterministic:
            every = network.ends(hidden)
            logits = every[0].view(slots.rows, self.shape.queries, -1)
        else:
            logits = network.logits(hidden, self._verify)
        below = self._levels[:, :others] if others else None
        drafts = slots.drafts[:, :k]
        sampled = network.sample(
            logits[:, : k + others], slots, flags, first=1, drafts=drafts, others=below, pairs=pairs
        )
        if every is not None and network.transition is not None:
            network.prepare(logits, self._blocks, slots, flags, ranked)
        states, made, given = network.ops.accept(
            sampled,
            slots.drafts,
            slots.lengths,
            slots.limits,
            slots.tickets,
            slots.ring,
            slots.bad,
            levels=self._levels,
            places=self._places,
            alternates=self._alternates,
            pairs=pairs,
            masks=self.shape.masks,
            queries=self.shape.queries,
            seen=slots.seen if flags.penalty else None,
        )
        if drafting:
            network.draft(hidden, states, made, slots, flags, every, given if others else None, ranked)
