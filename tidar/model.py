"""A Hugging Face causal language model that a layout can be given to.

`CausalLM` has the parts that everything else is built from: `hidden` (tokens and a layout to hidden states), `head`
(hidden states to fp32 logits) and, between them for masks alone, `drafted`. Training, decoding and the probe all go
through them; modelling code is untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tidar import layout, mask
from tidar.adapters import AdapterSpec, MaskAdapters
from tidar.attention import Keys
from tidar.cache import SlotCache
from tidar.errors import TidarError
from tidar.families import logits_transform, position_limit
from tidar.kernels.quantised import Kind
from tidar.layout import Layout
from tidar.quantised import QuantisedLinear
from tidar.transition import Transition

__all__ = ["ADAPTERS", "KEY", "TRANSITION", "CausalLM", "Spec"]

KEY = "tidar"
TRANSITION, ADAPTERS = "transition", "adapters"  # prefixes of their weights


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The ``tidar`` key of a converted checkpoint's config.json."""

    mask_token_id: int
    """Embedding row of the mask token."""
    block_sizes: tuple[int, ...] = ()
    """Draft lengths the model was trained for; empty when converted only."""
    transition: int = 0
    """Width of its `Transition`; 0 when it has none."""


class CausalLM:
    """A model, its tokenizer and what decoding must know of them.

    Attributes:
        hf: the Hugging Face model, its attention replaced.
        tokenizer: its tokenizer.
        spec: what conversion recorded; None for a plain checkpoint, which decodes autoregressively only.
        transition: how drafts lean on the token before them, if they do.
        adapters: what masks are computed with beside the model's weights, which are frozen then.
        path: where it came from.
        vocab_size: width of the logits.
        eos_ids: tokens that end a text.
        suppressed: token ids that are never produced: the mask, rows beyond the tokenizer's vocabulary, and those
            of generation_config. Nothing else of generation_config is applied.
        max_positions: longest text in tokens.
        hard_limit: no position of a forward, masks' included, may pass ``max_positions``.
        windows: the sliding windows of its layers (None: full attention).
        weights: what its projections are held in, if not in its dtype (`tidar.quantised`).
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.path = path
        kept = getattr(hf.config, KEY, None)
        self.spec = None if kept is None else Spec(**{**kept, "block_sizes": tuple(kept.get("block_sizes", ()))})
        self.vocab_size = int(hf.get_output_embeddings().weight.shape[0])
        self.max_positions, self.hard_limit = position_limit(hf.config)
        generation = hf.generation_config
        eos = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
        self.eos_ids = frozenset([eos] if isinstance(eos, int) else eos or [])
        spare = set(range(len(tokenizer), self.vocab_size)) | set(generation.suppress_tokens or ())
        if self.spec is not None:
            spare.add(self.spec.mask_token_id)
        self.suppressed = tuple(sorted(spare))
        self.windows: tuple[int | None, ...] = (None,)
        self.transition: Transition | None = None
        self.adapters: MaskAdapters | None = None
        self.weights: Kind | None = None
        self._transform = logits_transform(hf.config)
        self._backbone: Callable[..., Any] = hf.base_model
        self._cached: Callable[..., Any] = hf.base_model

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def runner(self) -> Callable[..., Any]:
        """What runs the Hugging Face backbone: itself, or what `run_by` or `compile` has put before it."""
        return self._backbone

    @property
    def embedding(self) -> Tensor:
        """The embedding table (V, E)."""
        weight = self.hf.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def mask_id(self) -> int:
        """The mask token's id; `TidarError` when the checkpoint has none."""
        if self.spec is None:
            raise TidarError(
                f"{self.path} has no mask token: run `tidar convert {self.path} OUT` and train it, or use --method ar"
            )
        return self.spec.mask_token_id

    def hidden(
        self,
        tokens: Tensor,
        layout: Layout,
        *,
        cache: SlotCache | None = None,
        kind: mask.Kind = "dense",
        keys: Sequence[Keys] | None = None,
    ) -> Tensor:
        """Last hidden states (B, L, D) of ``tokens`` (B, L), each seeing what ``layout`` shows it.

        Args:
            tokens: ids of the layout's queries.
            layout: on the model's device.
            cache: keys and values of the prefix; the new ones are written to the layout's slots, uncommitted.
            kind: dense masks (any device) or FlexAttention block masks.
            keys: for each layer, where its keys and values go or what stands before them; needs `deal_keys` once.
        """
        if cache is not None:
            cache.place(layout)
        positions = layout.positions
        if self.hard_limit:
            # Drafts and masks past the end may stand anywhere; their positions must not switch the frequencies.
            positions = positions.clamp(max=self.max_positions - 1)
        with self.masked(layout):
            return self.backbone(tokens, positions, mask.render(layout, self.windows, kind), cache, keys)

    def masked(self, layout: Layout) -> AbstractContextManager[None]:
        """While it lasts, masks of ``layout`` meet the adapters. `hidden` does so itself; a backward that computes
        activations again needs it too."""
        return nullcontext() if self.adapters is None else self.adapters.over(layout)

    def backbone(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: mask.Masks,
        cache: SlotCache | None = None,
        keys: Sequence[Keys] | None = None,
    ) -> Tensor:
        # Compiled for training's one shape; a decoder's shapes change with every forward.
        run = self._backbone if cache is None else self._cached
        out = run(
            input_ids=tokens,
            position_ids=positions,
            # Any 4-D mask keeps transformers from making one of its own, or from guessing packed documents.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device),
            past_key_values=cache,
            use_cache=cache is not None,
            tidar=masks,
            tidar_keys=None if keys is None else tuple(keys),
        )
        return out.last_hidden_state  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (…, V) of hidden states (…, D), accumulated and returned in fp32 (fp64 for an fp64 model).

        A bf16 output would round different logits to ties.
        """
        projection = self.hf.get_output_embeddings()
        if isinstance(projection, QuantisedLinear):
            return self._transform(projection.wide(hidden))
        weight, bias = projection.weight, projection.bias
        wide = torch.promote_types(torch.float32, weight.dtype)
        if weight.dtype == wide:
            logits = torch.nn.functional.linear(hidden, weight, bias).to(wide)
        elif hidden.is_cuda and not torch.is_grad_enabled():
            flat = torch.mm(hidden.reshape(-1, hidden.shape[-1]), weight.T, out_dtype=wide)
            logits = flat.view(*hidden.shape[:-1], -1) if bias is None else flat.view(*hidden.shape[:-1], -1) + bias
        else:
            logits = torch.nn.functional.linear(
                hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)
            )
        return self._transform(logits)

    def drafted(self, hidden: Tensor, before: Tensor) -> Tensor:
        """What the head reads of masks: their hidden states (…, D), bent by the tokens ``before`` (…) theirs."""
        if self.transition is None:
            return hidden
        # Detached: the embedding has a model to serve; the transition may only read it.
        bent: Tensor = self.transition(hidden, torch.nn.functional.embedding(before, self.embedding.detach()))
        return bent

    def add_transition(self, width: int) -> Transition:
        """A transition of ``width`` on the model's device, its weights not set; the spec notes it."""
        assert self.spec is not None
        self.spec = replace(self.spec, transition=width)
        with torch.device("meta"):
            made = Transition(self.hf.get_output_embeddings().weight.shape[1], self.embedding.shape[1], width)
        self.transition = made.to(self.dtype).to_empty(device=self.device).eval()
        return self.transition

    def add_adapters(self, spec: AdapterSpec) -> MaskAdapters:
        """Adapters on the model's device, their weights not set; all other weights are frozen."""
        if self.spec is None:
            self.spec = Spec(mask_token_id=0)  # of any token: masks have the adapters' embedding
        with torch.device("meta"):
            made = MaskAdapters(self.hf, spec)
        self.adapters = made.to(self.dtype).to_empty(device=self.device).eval()
        return self.adapters

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights, the transition's and the adapters' last."""
        yield from (weight for _, weight in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All weights and their names, the transition's and the adapters' last and with a prefix; tied ones once."""
        yield from self.hf.named_parameters()
        if self.transition is not None:
            yield from self.transition.named_parameters(TRANSITION)
        if self.adapters is not None:
            yield from self.adapters.named_parameters(ADAPTERS)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights and buffers that a checkpoint holds, not detached, named as in `named_parameters`; tied ones
        under each of their names. Adapters lie beside their base, which is left out."""
        found = {} if self.adapters is not None else dict(self.hf.state_dict(keep_vars=True))
        if self.transition is not None:
            found |= self.transition.state_dict(keep_vars=True, prefix=f"{TRANSITION}.")
        if self.adapters is not None:
            found |= self.adapters.state_dict(keep_vars=True, prefix=f"{ADAPTERS}.")
        return found

    def deal_keys(self) -> None:
        """Give every layer its own of the ``keys`` of `hidden`. To be called before the model is compiled."""
        # Keys are taken down in the forward alone, not where compiled code computes activations again.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        for number, layer in enumerate(self.hf.base_model.layers):  # type: ignore[arg-type]
            # A hook, not the layer's number in the attention function: one compiled layer serves all.
            layer.register_forward_pre_hook(partial(_dealt, number), with_kwargs=True)

    def run_by(self, backbone: Callable[..., Any]) -> None:
        """Call ``backbone`` wherever the Hugging Face backbone was called, which it calls in turn."""
        self._backbone = self._cached = backbone

    def compile(self) -> None:
        """Compile the backbone; for training on a GPU, where one shape comes again and again."""
        # Past its recompile limit Dynamo would run unfused, many times slower, without a word.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # A few shapes at most: dynamic ones would cost all of them their speed.
        self._backbone = torch.compile(self.hf.base_model, dynamic=False)

    @torch.no_grad()
    def probe(self) -> None:
        """Prove on a few tokens that this model obeys a layout; note the windows its layers have.

        Raises:
            TidarError: a layer ignored the layout, or the head differs from the model's own.
        """
        seen: list[int | None] = []

        class Recorder(dict[int | None, Any]):
            def __missing__(self, window: int | None) -> Tensor:
                return mask.dense(plan.windowed(window))

            def __getitem__(self, window: int | None) -> Any:
                seen.append(window)
                return super().__getitem__(window)

        kind = self.hf.config.model_type
        count, masks = 5, 3
        text = torch.arange(1, count + 1, device=self.device)[None] % self.vocab_size
        plan = layout.prefill([count], masks, device=self.device)
        ours = self.backbone(plan.tokens(text, 0), plan.positions, Recorder())
        layers = self.hf.config.num_hidden_layers
        if len(seen) != layers:
            raise TidarError(f"model family '{kind}' is not supported: {len(seen)} of {layers} layers read the layout")
        self.windows = tuple(dict.fromkeys(seen))
        theirs = self.hf(input_ids=text, use_cache=False).logits[0].float()
        clean = self.head(ours[0, :count]).float()
        if bool(theirs.isfinite().all()) and not torch.allclose(
            clean, theirs, rtol=0.05, atol=0.05 * float(theirs.std())
        ):
            raise TidarError(f"model family '{kind}' is not supported: its logits change under the layout")


def _dealt(number: int, layer: nn.Module, words: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    every = options.get("tidar_keys")
    return (words, {**options, "tidar_keys": every[number]}) if isinstance(every, tuple) else None
