"""Parameters, widths and operations of a model that a recipe names, from its config.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from tidar import adapter_files
from tidar.checkpoint import load_tokenizer, read_config
from tidar.fresh import fresh_config
from tidar.model import KEY
from tidar.train.config import TrainConfig

__all__ = ["Sizes", "Work", "sizes", "sizes_of", "work"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters of a model, and the widths that its activations have.

    Attributes:
        layer: parameters of one layer's matrices.
        layers: how many there are.
        tables: parameters of embedding and head, once if they are tied.
        rest: norms, biases and the transition.
        width: D, of the residual stream.
        vocab: V, width of the logits.
        queries, keys: total width of the query heads, and of the key heads (the value heads' too).
        heads: query heads.
        inner: width of the MLP; of a mixture of experts that of all experts a token goes through.
        active: parameters of one layer's matrices that a token meets.
        pairs: parameters of adapters of masks; 0: the model itself is trained.
        attending: layers with a sliding window, as (window or None, how many).
    """

    layer: int
    layers: int
    tables: int
    rest: int
    width: int
    vocab: int
    queries: int
    keys: int
    heads: int
    inner: int
    active: int
    pairs: int
    attending: tuple[tuple[int | None, int], ...]

    @property
    def total(self) -> int:
        return self.layer * self.layers + self.tables + self.rest


def sizes(config: TrainConfig) -> Sizes:
    """Of the model that ``config`` names, or of its fresh one; no weight is read.

    Raises:
        TidarError: the model's config.json cannot be read.
    """
    name, rank, modules = config.model, config.adapter_rank, config.adapter_modules
    if name and adapter_files.found(name):
        spec = adapter_files.read(name)[0]
        name, rank, modules = adapter_files.base_of(name), spec.rank, spec.modules
    found = read_config(name) if name else fresh_config(config.arch, _token_ids(config))
    transition = config.transition if config.objective == "tidar" else 0
    return sizes_of(found, transition=transition, rank=rank, modules=modules)


def sizes_of(found: PretrainedConfig, *, transition: int = 0, rank: int = 0, modules: Sequence[str] = ()) -> Sizes:
    """Of a model with the configuration ``found``.

    Args:
        found: the configuration.
        transition: width of a transition, if it has none of its own.
        rank: of adapters of masks.
        modules: names of the layers that have them; all by default.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(found, dtype=torch.float32)
    layers = hf.base_model.layers
    matrices = {name: w for name, w in layers[0].named_parameters() if w.ndim >= 2}
    tables = {id(m.weight): m.weight.numel() for m in hf.modules() if isinstance(m, nn.Embedding)}
    head = hf.get_output_embeddings()
    tables[id(head.weight)] = head.weight.numel()
    experts = int(getattr(found, "num_local_experts", None) or getattr(found, "num_experts", None) or 1)
    chosen = int(getattr(found, "num_experts_per_tok", None) or 1)
    expert = sum(w.numel() for name, w in matrices.items() if experts > 1 and "experts" in name)
    layer = sum(w.numel() for w in matrices.values())
    width, head_dim = int(found.hidden_size), getattr(found, "head_dim", None)
    head_dim = int(head_dim or width // found.num_attention_heads)
    kv_heads = int(getattr(found, "num_key_value_heads", None) or found.num_attention_heads)
    inner = int(getattr(found, "moe_intermediate_size", None) or found.intermediate_size)
    everywhere = getattr(found, "sliding_window", None)  # of families whose layers do not differ
    windows = [getattr(getattr(each, "self_attn", None), "sliding_window", everywhere) for each in layers]
    total = sum(w.numel() for w in hf.parameters())
    has = (getattr(found, KEY, None) or {}).get("transition", 0)
    adapted = [
        part.in_features + part.out_features
        for path, part in layers[0].named_modules()
        if isinstance(part, nn.Linear) and (not modules or path.rpartition(".")[2] in modules)
    ]
    bent = (has or transition) * 3 * width
    return Sizes(
        layer=layer,
        layers=len(layers),
        tables=sum(tables.values()),
        rest=total - layer * len(layers) - sum(tables.values()) + bent,
        width=width,
        vocab=int(head.weight.shape[0]),
        queries=head_dim * int(found.num_attention_heads),
        keys=head_dim * kv_heads,
        heads=int(found.num_attention_heads),
        inner=inner * (chosen if experts > 1 else 1),
        active=layer - expert + expert * chosen // experts,
        pairs=sum(adapted) * rank * len(layers) + width if rank else 0,  # and the masks' embedding
        attending=tuple((window, windows.count(window)) for window in dict.fromkeys(windows)),
    )


def _token_ids(config: TrainConfig) -> int:
    return len(load_tokenizer(config.tokenizer)) if config.tokenizer else config.vocab_size


@dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations for one clean token.

    Attributes:
        training: forward and backward of its row in each half.
        rollout: forwards of the model's own text, if the drafts learn that.
    """

    training: float
    rollout: float


def work(size: Sizes, config: TrainConfig) -> Work:
    """Useful operations, as in PaLM's appendix B: 6 for each parameter of a product, and the attention. Documents are
    taken to fill their rows. What activation checkpointing computes again is not useful. Of a frozen model the text
    goes forward alone, and its masks' backward needs no gradient of a weight; adapters themselves are not counted."""
    halves = 2 if config.objective == "tidar" else 1
    length, k = config.seq_len, max(config.block_sizes)

    def attention(keys: float) -> float:  # of one row, forward: scores and values
        return sum(4.0 * size.queries * min(keys, window or keys) * count for window, count in size.attending)

    body, head = 2.0 * size.active * size.layers, 2.0 * size.vocab * size.width
    text = body + head + attention(length / 2)
    masks = body + head + attention(length / 2 + k) if halves == 2 else 0.0
    training = text + 2 * masks + attention(length / 2 + k) if size.pairs else 3 * (text + masks)
    rollout = 0.0
    if halves == 2 and config.draft_text == "model":
        # The text once, without the head; then each place of each block, with the head twice: to choose the token, and
        # as the draft's teacher.
        rollout = 2 * body + 2 * head + attention(length / 2) + attention(length / 2 + k / 2)
    return Work(training=training, rollout=rollout)
