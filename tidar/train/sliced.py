"""Long rows: the clean half in one forward, the masks in slices behind it.

A mask sees clean tokens before its block and its own block; no clean token sees a mask, and no mask another block. So
the clean half can run alone, and whole blocks of masks after it, a slice at a time, against the keys and values that it
made in every layer. A slice goes forward and backward and is dropped; what it leaves is gradients: of the weights, and
of the clean half's keys and values, summed over slices. With these and that of its hidden states the clean half's
backward runs at the end. Memory is that of one half and one slice, in place of two halves.

A frozen base has nothing to learn from its own text: then the clean half runs without a graph, and has no backward.

The sums are those of the whole forward in another order. What it costs: the clean keys and values are copied before the
slice's own, each slice reads the weights again, and the AR distribution that teaches a draft is computed a second time.

Legend: B rows, S clean tokens a row, L masks of a slice, D width of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tidar import layout, mask
from tidar.attention import Prefix, Written
from tidar.layout import Layout
from tidar.model import CausalLM
from tidar.train.config import TrainConfig
from tidar.train.inputs import Inputs
from tidar.train.loss import Targets

__all__ = ["Cut", "Slices"]

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Cut:
    """Into how many slices the masks of a row are cut, all of one shape, whatever the blocks of a step.

    Slice j of ``count`` begins where the block of mask ``j * stride`` does, and is padded to ``width``.
    """

    count: int
    stride: int
    width: int

    @classmethod
    def of(cls, size: int, most: int, block: int, tile: int = 1) -> Cut:
        """As few and as even slices of S = ``size`` masks as can be.

        Args:
            size: S.
            most: width that no slice may pass.
            block: longest block, at most half of ``most``.
            tile: the width is rounded up to a multiple of it.
        """
        # A slice may reach back by a block less one mask.
        count = 1 if most >= size else -(-size // (most - block + 1))
        stride = -(-size // count)
        count = -(-size // stride)
        width = stride if count == 1 else stride + block - 1
        return cls(count, stride, -(-width // tile) * tile)

    def places(self, whole: Layout) -> Iterator[tuple[Tensor, Tensor]]:
        """For each slice of a `tidar.layout.training` layout the (B, L) places of its masks in their row, and whether
        they are masks or padding. The host waits for nothing."""
        size = whole.clean
        begins = whole.block[:, size:, 0] - size
        begins = begins[:, :: self.stride]
        column = torch.arange(self.width, device=begins.device)
        for number in range(self.count):
            place = begins[:, number, None] + column
            end = begins[:, number + 1, None] if number + 1 < self.count else size
            yield place.clamp(max=size - 1), place < end


class Slices:
    """Runs micro-batches of a model, their masks in slices.

    Args:
        model: not compiled yet, or compiled after `CausalLM.deal_keys`.
        config: ``mask_slice``, ``seq_len`` and ``block_sizes`` count; a ``mask_slice`` of 0 is one slice.
        kind: masks of all forwards.
        autocast: makes the context of a forward.
    """

    def __init__(
        self,
        model: CausalLM,
        config: TrainConfig,
        *,
        kind: mask.Kind,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        model.deal_keys()
        self.model = model
        self.kind = kind
        self.autocast = autocast
        self.taught = config.kl_at(0) is not None  # by the AR rows, if by nothing else
        tile = mask.BLOCK if kind == "block" else 1
        self.cut = Cut.of(config.seq_len, config.mask_slice or config.seq_len, max(config.block_sizes), tile)

    def __call__(self, inputs: Inputs, targets: Targets, loss: Loss) -> Tensor:
        """Backpropagate one micro-batch, as `train_loss` would its whole forward.

        Args:
            inputs: of a training layout.
            targets: its own, or those of a rollout.
            loss: `train_loss` of hidden states, targets and ``part``, all else given.

        Returns:
            (4,) detached, what `train_loss` returns.
        """
        whole, size = inputs.layout, inputs.layout.clean
        made = [Written() for _ in range(self.model.hf.config.num_hidden_layers)]
        plan = layout.packed(whole.causal[:, :size, 0])
        learns = self.model.adapters is None
        with self.autocast(), torch.set_grad_enabled(learns):
            clean = self.model.hidden(inputs.tokens[:, :size], plan, kind=self.kind, keys=made)
        written = [part for layer in made for part in (layer.key, layer.value) if part is not None]
        leaves = [_leaf(part) if learns else part for part in written]
        prefix = [Prefix(key, value) for key, value in zip(leaves[::2], leaves[1::2], strict=True)]
        end = clean.detach().requires_grad_(learns)
        losses = loss(end, targets, part="clean")
        if targets.teacher is None and self.taught:
            targets = replace(targets, teacher=pad(end.detach()[:, :-1], (0, 0, 1, 0)))
        for places, real in self.cut.places(whole):
            tokens = inputs.tokens.gather(1, size + places)
            plan = layout.masks(whole, places, real)
            with self.model.masked(plan):
                with self.autocast():
                    hidden = self.model.hidden(tokens, plan, kind=self.kind, keys=prefix)
                losses += loss(hidden, _taken(targets, places, real), part="masks")
        if learns:
            gradients = [leaf.grad for leaf in leaves]
            torch.autograd.backward([clean, *written], [end.grad, *gradients])
        return losses


def _leaf(made: Tensor) -> Tensor:
    """The same keys or values, apart from the graph that made them."""
    leaf = made.detach().requires_grad_()
    # Many slices add to it: a sum in bf16 would lose what a single backward keeps.
    leaf.grad_dtype = torch.promote_types(leaf.dtype, torch.float32)
    return leaf


def _taken(targets: Targets, places: Tensor, real: Tensor) -> Targets:
    """The targets of the masks at ``places`` (B, L); padding weighs nothing."""
    assert targets.draft is not None

    def at(part: Tensor) -> Tensor:
        index = places if part.ndim == 2 else places[..., None].expand(*places.shape, part.shape[2])
        return part.gather(1, index)

    def held(part: Tensor | None) -> Tensor | None:
        return None if part is None else at(part)

    return Targets(
        labels=at(targets.labels),
        has_ar=at(targets.has_ar),
        draft=at(targets.draft) * real,
        drafted=held(targets.drafted),
        teacher=held(targets.teacher),
        before=held(targets.before),
    )
