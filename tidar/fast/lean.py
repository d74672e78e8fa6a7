"""Llama-shaped models as few launches over query rows, beside the general path through transformers' modules.

Query, key and value projections are one product, gate and up another, and norms, activations and residuals belong to
the products beside them (`tidar.kernels.products`). The fused weights take the place of the model's own, which become
views of them: nothing is held twice, and the general path gives the same result as before. Quantised ones
(`tidar.quantised`) stay so. Adapters (`tidar.fast.adapted`) add to the rows of masks, behind the base's products.

Legend: N query rows, D width of the hidden state, A heads (queries, keys, values), H head width, F of the MLP, V
vocabulary, W width of the transition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from tidar.errors import TidarError
from tidar.fast.adapted import NONE, NOWHERE, Adapted, Masks, Pair
from tidar.fast.layers import Layer, fused, layer_of, weight_of
from tidar.kernels.hopper_code import able
from tidar.kernels.hopper_tiles import HopperTiles, hopper_tiles
from tidar.kernels.product_tiles import ProductTiles, default_tiles, fixed_tiles
from tidar.kernels.quantised import Quantised, Weight
from tidar.kernels.reference_products import Ready
from tidar.model import CausalLM

__all__ = ["FAMILIES", "Attend", "Hidden", "Layer", "LeanModel", "refusal"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Pre-norm, RMS norms, rotary positions, gated SiLU, no other scaling."""


class Hidden(NamedTuple):
    """Hidden states.

    Attributes:
        x: (N, D), before the last norm.
        ready: what their making left for that norm, if anything.
    """

    x: Tensor
    ready: Ready | None = None


Attend = Callable[[int, Layer, Tensor], Tensor]
"""Number of a layer, the layer, and its heads as projected (N, A, H), to what they attend to (N, Hq·H)."""


def refusal(core: CausalLM) -> str | None:
    """Why the model has no lean form, or None if it has one."""
    hf: Any = core.hf
    config = hf.config
    if config.model_type not in FAMILIES:
        return f"model family '{config.model_type}' has no fast path"
    if config.hidden_act != "silu":
        return f"activation '{config.hidden_act}' has no fast path"
    if core.hard_limit:
        return "rotary embeddings that change with the text's length have no fast path"
    if hf.get_output_embeddings().bias is not None:
        return "a head with a bias has no fast path"
    return None


class LeanModel:
    """A model of one of `FAMILIES`, ready for decoding.

    Args:
        core: the model; its projections become views of the fused ones.
        ops: the kernels or their plain twins (`tidar.fast.ops`).
        deterministic: a row's results do not depend on the rows beside it, to the bit.

    Attributes:
        core: the model.
        deterministic: as given.
        layers, adapted: its layers' weights and adapters.
        heads, kv_heads, head_dim: Hq, Hk, H.
        scale: factor on attention scores.
        eps: of the norms.
        embedding: (V, D).
        norm: (D,), of the last norm.
        head: (V, D).

    Raises:
        TidarError: another family, or a variant with something this path does not do.
    """

    def __init__(self, core: CausalLM, ops: Any, *, deterministic: bool = False) -> None:
        if (why := refusal(core)) is not None:
            raise TidarError(f"{why}: use the general one")
        hf: Any = core.hf
        config, body = hf.config, hf.base_model
        attentions = [layer.self_attn for layer in body.layers]
        self.core, self._ops, self.deterministic = core, ops, deterministic
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.head_dim: int = attentions[0].head_dim
        self.scale: float = attentions[0].scaling
        self.eps: float = config.rms_norm_eps
        # Mistral's layers ask their config, the others know their own.
        common = config.sliding_window if config.model_type == "mistral" else None
        windows = [getattr(a, "sliding_window", common) for a in attentions]
        self.layers = [layer_of(layer, window) for layer, window in zip(body.layers, windows, strict=True)]
        self.adapted = [Adapted.of(core.adapters, layer) for layer in body.layers]
        self.norm: Tensor = body.norm.weight.detach()
        self.head = weight_of(hf.get_output_embeddings())
        self._ends: Weight | None = None  # the head, and behind it the transition's gate
        if core.transition is not None and isinstance(self.head, Tensor):
            self._ends, _ = fused([hf.get_output_embeddings(), core.transition.state])
            self.head = weight_of(hf.get_output_embeddings())
        self.embedding: Tensor = body.embed_tokens.weight.detach()  # which may be the head

    @torch.no_grad()
    def rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (positions, H) of the rotary embedding, in the model's dtype."""
        body: Any = self.core.hf.base_model
        at = torch.arange(positions, device=self.embedding.device)[None]
        cos, sin = body.rotary_emb(self.embedding[:1, None], at)
        return cos[0].contiguous(), sin[0].contiguous()

    @torch.no_grad()
    def transition(self) -> tuple[Tensor, Tensor] | None:
        """What drafting with the core's transition needs beside `ends`: what each token before brings to the gate
        (V, W), and what the gate brings to each token's logit (V, W)."""
        made = self.core.transition
        if made is None:
            return None
        wide = torch.promote_types(self.embedding.dtype, torch.float32)
        table = rms_norm(self.embedding.to(wide), self.embedding.shape[1:])
        head = self.head.dequantised(wide) if isinstance(self.head, Quantised) else self.head.to(wide)
        mix = linear(head, made.out.weight.to(wide).T)
        brought = linear(table, made.token.weight.to(wide))
        return brought.to(self.embedding.dtype), mix.to(self.embedding.dtype)

    def __call__(self, x: Tensor, attend: Attend, masks: Masks = NOWHERE) -> Hidden:
        """Last hidden states of embeddings ``x`` (N, D), which are overwritten; adapters act on ``masks``."""
        ready = None
        for number in range(len(self.layers)):
            ready = self.attention(x, ready, number, attend, masks)
            ready = self.mlp(x, ready, number, masks)
        return Hidden(x, ready)

    def attention(
        self, x: Tensor, ready: Ready | None, number: int, attend: Attend, masks: Masks = NOWHERE
    ) -> Ready | None:
        """The first half of layer ``number``, added to ``x`` (N, D).

        Args:
            x: the residual stream.
            ready: what its making left for the norm of this half.
            number: of the layer.
            attend: what its heads attend to.
            masks: rows that adapters act on.

        Returns:
            The same for the half behind.
        """
        layer, pairs = self.layers[number], self.adapted[number] if masks.queries else NONE
        tiles = self._cut(layer.qkv, x)
        heads = self._ops.norm_linear(x, layer.norm, layer.qkv, layer.qkv_bias, eps=self.eps, tiles=tiles, ready=ready)
        self._adapt(pairs.qkv, heads, x, masks, layer.norm, ready)
        mixed = attend(number, layer, heads.view(len(x), -1, self.head_dim)).view(len(x), -1)
        self._adapt(pairs.out, x, mixed, masks)  # before the sum, whose norm is formed with it
        return self._add(x, mixed, layer.out, layer.out_bias, layer.mlp_norm)

    def mlp(self, x: Tensor, ready: Ready | None, number: int, masks: Masks = NOWHERE) -> Ready | None:
        """The second half of layer ``number``; arguments and result as `attention`'s."""
        layer, pairs = self.layers[number], self.adapted[number] if masks.queries else NONE
        tiles = self._cut(layer.gate_up, x)
        given = x, layer.mlp_norm, layer.gate_up, layer.gate_up_bias
        options = {"eps": self.eps, "tiles": tiles, "ready": ready}
        if pairs.gate_up is None:
            gated = self._ops.norm_gated(*given, **options)
        else:
            gates = self._ops.norm_linear(*given, **options)
            self._adapt(pairs.gate_up, gates, x, masks, layer.mlp_norm, ready)
            gated = self._ops.gated(gates)
            if self.deterministic:  # clean rows by the program of a step without masks, which rounds elsewhere
                masks.rest(gated).copy_(masks.rest(self._ops.norm_gated(*given, **options)))
        self._adapt(pairs.down, x, gated, masks)
        norm = self.layers[number + 1].norm if number + 1 < len(self.layers) else self.norm
        twice = self._ends is not None and number + 1 == len(self.layers)
        return self._add(x, gated, layer.down, layer.down_bias, norm, twice=twice)

    def _adapt(
        self,
        pair: Pair | None,
        out: Tensor,
        x: Tensor,
        masks: Masks,
        norm: Tensor | None = None,
        ready: Ready | None = None,
    ) -> None:
        """Add to the masks' rows of ``out`` (N, F) what ``pair`` makes of theirs of x (N, D), normed first."""
        if pair is None:
            return
        rows = masks.rows(x)
        tiles = self._cut(pair.down, x, rows)
        inner = self._ops.norm_linear(x, norm, pair.down, eps=self.eps, rows=rows, tiles=tiles, ready=ready)
        tiles = self._cut(pair.up, x, rows)
        if tiles is None:
            texts = masks.of(out)
            texts.baddbmm_(inner.view(len(texts), -1, inner.shape[1]), pair.up.T.expand(len(texts), -1, -1))
        else:
            self._ops.linear_add(out, inner, pair.up, into=rows, tiles=tiles)

    def _add(
        self, x: Tensor, a: Tensor, weight: Weight, bias: Tensor | None, norm: Tensor, *, twice: bool = False
    ) -> Ready | None:
        """``x += a · weightᵀ + bias``; what is left for the norm of the sum, and for a second one behind it."""
        tiles = self._cut(weight, x)
        if tiles is None:
            left: Ready | None = self._ops.linear_add_norm(x, a, weight, bias, norm, eps=self.eps)
        else:
            left = self._ops.linear_add(x, a, weight, bias, norm, tiles=tiles, twice=twice)
        return left

    def logits(self, hidden: Hidden, rows: Tensor | None) -> Tensor:
        """Logits (R, V) float32 (float64 of a float64 model) of the chosen ``rows`` (R,) int32, or of all."""
        return self._wide(hidden, self.head, rows)

    def ends(self, hidden: Hidden, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """`logits` (R, V) of a model with a transition, and what its gate takes from the same rows (R, W), in the same
        dtype; one product, if that can be."""
        # The transition norms what it takes once more, without weights (`tidar.transition`).
        (x, ready), both, vocab = hidden, self._ends, len(self.head)
        again, prepared = float(torch.finfo(x.dtype).eps), ready is not None and ready.weighed is not None
        tiles = None if both is None else self._cut(both, x, rows)
        # The kernel for Hopper tells four columns from the next four.
        fitting = tiles is not None and (vocab % 4 == 0 or not isinstance(tiles, HopperTiles))
        if both is not None and prepared and fitting:
            made = self._wide(hidden, both, rows, again=again, behind=vocab)
            return made[:, :vocab], made[:, vocab:]
        assert self.core.transition is not None
        gate = self.core.transition.state.weight.detach()
        return self.logits(hidden, rows), self._wide(hidden, gate, rows, again=again)

    def _wide(
        self, hidden: Hidden, weight: Weight, rows: Tensor | None, again: float | None = None, behind: int = 0
    ) -> Tensor:
        """A product (R, F) of chosen rows, normed, and from feature ``behind`` on normed ``again``, in float32 at
        least."""
        x, ready = hidden
        count = len(x if rows is None else rows)
        out = torch.empty(count, len(weight), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        options = {"eps": self.eps, "rows": rows, "tiles": self._cut(weight, x, rows), "ready": ready}
        made: Tensor = self._ops.norm_linear(x, self.norm, weight, out=out, again=again, behind=behind, **options)
        return made

    def on_hopper(self, rows: int) -> bool:
        """Whether all products of so many rows in the layers are `tidar.kernels.hopper`'s."""
        weights = [w for layer in self.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        x = self.embedding[:1].expand(rows, -1)
        return all(isinstance(self._cut(weight, x), HopperTiles) for weight in weights)

    def _cut(self, weight: Weight, x: Tensor, chosen: Tensor | None = None) -> ProductTiles | HopperTiles | None:
        """How a product of ``x`` (N, D), or its ``chosen`` rows (R,), with ``weight`` is cut up; None is cuBLAS."""
        (features, depth), size, narrow = weight.shape, x.element_size(), isinstance(weight, Quantised)
        count = len(x if chosen is None else chosen)
        if self.deterministic:
            return fixed_tiles(features, depth, size, narrow=narrow)
        if chosen is None and not narrow and able(x.device) and (tiles := hopper_tiles(count, features, depth, size)):
            return tiles
        return default_tiles(count, features, depth, size, narrow=narrow)
