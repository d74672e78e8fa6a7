"""Low-rank adapters that act on masks alone, so that the text stays that of the base.

The base is frozen. Beside its linear layers stand LoRA pairs (Hu et al. 2021): a layer's output gains ``scale · BAx``,
but only in rows that the layout says are masks, as in gated LoRA (Samragh et al. 2025) and I-DLM. Clean rows never see
a mask, so all they are computed from is the base; a forward without masks runs nothing but the base's own code. The
masks' embedding is the adapters' too: a base needs no spare row of its vocabulary, and no token has to be forbidden.

They are attached from outside, by hooks on the modules: neither modelling code nor the names of weights change.

Legend: B rows, L queries, E width of the embedding, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tidar.errors import TidarError
from tidar.layout import Layout
from tidar.quantised import QuantisedLinear

__all__ = ["AdapterSpec", "LowRank", "MaskAdapters"]


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What adapters are, and what they belong to."""

    rank: int
    """r of every pair."""
    alpha: float
    """The scale is alpha / r (Hu et al. 2021, section 4.1)."""
    modules: tuple[str, ...] = ()
    """Last names of the linear layers that have a pair; none: all within the decoder's layers."""
    base: str = ""
    """Folder or hub id of the base."""
    digest: str = ""
    """Of its weights (`tidar.adapter_files.digest`)."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LowRank(nn.Module):
    """``scale · B A x``.

    Args:
        depth: width of x.
        features: width of the result.
        spec: rank and scale.
    """

    def __init__(self, depth: int, features: int, spec: AdapterSpec) -> None:
        super().__init__()
        self.scale = spec.scale
        # Named as PEFT names them.
        self.lora_A = nn.Linear(depth, spec.rank, bias=False)
        self.lora_B = nn.Linear(spec.rank, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.lora_B(self.lora_A(x)) * self.scale
        return made


class MaskAdapters(nn.Module):
    """Pairs beside a model's linear layers; the names of its weights are the layers' own, ``lora_A`` and ``lora_B``.

    Args:
        hf: the Hugging Face model, which is given hooks and frozen.
        spec: which layers, and how wide.

    Attributes:
        spec: as given, all its modules named.
        mask_embedding: (E,), what the embedding module gives for a mask.

    Raises:
        TidarError: a layer by such a name does not exist.
    """

    def __init__(self, hf: Any, spec: AdapterSpec) -> None:
        super().__init__()
        self._first: int | None = None  # query from which on there are masks; None: nowhere
        layers = f"{hf.base_model_prefix}.layers."
        linear = {
            name: part
            for name, part in hf.named_modules()
            if isinstance(part, nn.Linear | QuantisedLinear) and name.startswith(layers)
        }
        there = sorted({name.rpartition(".")[2] for name in linear})
        if absent := set(spec.modules) - set(there):
            raise TidarError(f"there is no linear layer {min(absent)} to adapt: choose among {', '.join(there)}")
        self.spec = replace(spec, modules=tuple(sorted(spec.modules or there)))
        hf.requires_grad_(False)
        for name, part in linear.items():
            if name.rpartition(".")[2] in self.spec.modules:
                features, depth = part.weight.shape
                pair = LowRank(depth, features, spec)
                _put(self, name, pair)
                # Past nn.Module, which would make it the layer's child and its weights the base's. Not in a table here:
                # code compiled for one layer could not serve the next.
                part.__dict__["mask_pair"] = pair
                part.register_forward_hook(self._adapt)
        table = hf.get_input_embeddings()
        self.mask_embedding = nn.Parameter(torch.empty(table.weight.shape[1]))
        table.register_forward_hook(self._embed)

    @contextmanager
    def over(self, layout: Layout) -> Iterator[None]:
        """While it lasts, forwards are of ``layout``."""
        before = self._first
        self._first = layout.clean if layout.clean < layout.queries else None
        try:
            yield
        finally:
            self._first = before

    def beside(self, part: nn.Module) -> LowRank | None:
        """The pair of a linear layer, if it has one."""
        return part.__dict__.get("mask_pair")

    @torch.no_grad()
    def initialise(self, table: nn.Module, like: Tensor, seed: int) -> None:
        """Weights that change nothing yet, drawn from ``seed``; a mask begins as the mean of some tokens.

        Args:
            table: the base's embedding module, whose output may be scaled.
            like: (n,) ids of these.
            seed: of the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        for pair in self.modules():
            if isinstance(pair, LowRank):
                weight = pair.lora_A.weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * pair.lora_A.in_features**-0.5)
                pair.lora_B.weight.zero_()
        total = torch.stack([table(ids).double().sum(0) for ids in torch.split(like, 4096)]).sum(0)
        self.mask_embedding.copy_(total / len(like))

    def _adapt(self, part: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if self._first is not None:
            assert out.dim() == 3, "rows of a batch were flattened before this layer"
            # In place: clean rows are not even copied.
            pair: Any = part.mask_pair
            out[:, self._first :] += pair(inputs[0][:, self._first :])

    def _embed(self, _: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> None:
        if self._first is not None:
            out[:, self._first :] = self.mask_embedding


def _put(root: nn.Module, path: str, leaf: nn.Module) -> None:
    """``leaf`` as ``root.path``, in empty modules made for the dots between."""
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(root, parent):
            root.add_module(parent, nn.Module())
        root = getattr(root, parent)
    root.add_module(name, leaf)
