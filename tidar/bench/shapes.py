"""Models of published sizes with random weights: steps take what the real ones' take, drafts are worthless."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tidar import attention
from tidar.errors import TidarError
from tidar.kernels.quantised import check_kind
from tidar.model import CausalLM, Spec
from tidar.quantised import quantise_model

__all__ = ["SHAPES", "random_model"]

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "qwen3-32b": {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}
"""Sizes from the models' published config.json."""


class _Ids:
    """Stands for the tokenizer of a model that nobody reads text from."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.eos_token_id = size - 1

    def __len__(self) -> int:
        return self._size


def random_model(
    name: str,
    *,
    layers: int | None = None,
    device: str = "cuda",
    dtype: str = "bfloat16",
    weights: str | None = None,
) -> CausalLM:
    """A converted model of a size in `SHAPES`, with random weights; the last token is its mask.

    Args:
        name: of the size.
        layers: as many only; all by default.
        device: where.
        dtype: of the weights.
        weights: ``int8`` or ``fp8`` to hold projections and head so.

    Raises:
        TidarError: a size or weights that are not known, or too large for the device.
    """
    if name not in SHAPES:
        raise TidarError(f"size '{name}' is unknown: use one of {', '.join(SHAPES)}")
    sizes = dict(SHAPES[name])
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    kind = None if weights is None else check_kind(weights, torch.device(device))
    config = AutoConfig.for_model(**sizes, max_position_embeddings=8192)
    config._attn_implementation = attention.NAME
    try:
        with torch.device(device):
            hf = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    except torch.OutOfMemoryError:
        free = torch.cuda.mem_get_info()[0]
        raise TidarError(f"{name} does not fit into the {free / 2**30:.0f} GiB that are free: give --layers") from None
    hf.requires_grad_(False)
    if kind is not None:
        quantise_model(hf, kind)
    core = CausalLM(hf, _Ids(config.vocab_size), name)  # type: ignore[arg-type]
    core.weights = kind
    core.spec = Spec(mask_token_id=config.vocab_size - 1, block_sizes=(4, 8, 16))
    core.suppressed = (config.vocab_size - 1,)
    core.windows = tuple({getattr(layer.self_attn, "sliding_window", None) for layer in hf.base_model.layers})
    return core
