"""Which Hugging Face models TiDAR is exact on, and how their heads differ.

A family is admitted by name, then proved by one probe forward at load (`tidar.model`): some families drop the extra
keyword silently and would decode nonsense.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PretrainedConfig

from tidar.errors import TidarError

__all__ = ["SUPPORTED", "check_config", "logits_transform", "position_limit"]

SUPPORTED = (
    "llama qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text mistral ministral phi3 olmo2 olmo3 smollm3 granite cohere2 "
    "glm4 starcoder2 gpt_oss gpt_neox"
).split()

_REASONS = {
    "nemotron": "its layers drop the keyword that carries the layout",
    "stablelm": "its layers drop the keyword that carries the layout",
    "falcon": "its attention cannot be replaced from outside",
    "gemma3": "this is the multimodal model; convert its text model (model_type gemma3_text)",
    "gemma3n": "its layers share keys and values",
    "llama4": "its attention is chunked",
    "llama4_text": "its attention is chunked",
    "qwen3_next": "it has linear-attention layers",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
}


def check_config(config: PretrainedConfig) -> None:
    """Refuse, by name and reason, what the layout cannot be exact on.

    Raises:
        TidarError: unsupported family, or an unsupported variant of a supported one.
    """
    kind = config.model_type
    if kind not in SUPPORTED:
        reason = _REASONS.get(kind, "it has not been shown to be exact")
        raise TidarError(f"model family '{kind}' is not supported: {reason}; supported are {', '.join(SUPPORTED)}")
    if config.is_encoder_decoder:
        raise TidarError(f"'{kind}' here is an encoder-decoder; TiDAR needs a decoder-only model")
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        raise TidarError(f"this '{kind}' variant has layers of type {sorted(odd)}, which cannot take the layout")
    if getattr(config, "attention_chunk_size", None):
        raise TidarError(f"this '{kind}' variant attends in chunks, which the layout cannot express")
    if getattr(config, "num_kv_shared_layers", 0):
        raise TidarError(f"this '{kind}' variant shares keys and values between layers, which the cache cannot keep")
    if getattr(config, "attention_dropout", 0.0):
        # Only training would apply it, and a dropped key breaks the loss's promise as much as decoding's.
        config.attention_dropout = 0.0


def position_limit(config: PretrainedConfig) -> tuple[int, bool]:
    """Longest text in tokens, and whether the limit is hard.

    With ``longrope`` and ``dynamic`` scaling the largest position of a *forward* picks the frequencies, so a mask
    row past the original length would change the clean rows: such models are kept within it.
    """
    limit = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer = [r for r in rope.values() if isinstance(r, dict)] or [rope]
    for parameters in by_layer:
        if parameters.get("rope_type", parameters.get("type")) in ("longrope", "dynamic"):
            original = parameters.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return int(original or limit), True
    return limit, False


def logits_transform(config: PretrainedConfig) -> Callable[[Tensor], Tensor]:
    """What a family does to the head's output: Gemma soft-caps, Cohere and Granite scale."""
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)

    def transform(logits: Tensor) -> Tensor:
        if scale != 1.0:
            logits = logits * scale
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return transform
