"""Models that nobody has trained yet, of a shape and for a tokenizer."""

from __future__ import annotations

import os
from dataclasses import asdict

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from tidar import attention
from tidar.checkpoint import load_tokenizer
from tidar.config import Architecture
from tidar.errors import TidarError
from tidar.model import KEY, CausalLM, Spec

__all__ = ["create_model", "fresh_config"]


def fresh_config(arch: Architecture, tokens: int) -> Qwen3Config:
    """Of a fresh Qwen3 model for so many token ids; the embedding has a multiple of 64 rows."""
    return Qwen3Config(
        vocab_size=-(-tokens // 64) * 64,
        hidden_size=arch.hidden_size,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        head_dim=arch.head_dim,
        intermediate_size=arch.intermediate_size,
        max_position_embeddings=arch.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=None,
    )


def create_model(arch: Architecture, tokenizer_dir: str | os.PathLike[str], *, seed: int = 0) -> CausalLM:
    """A freshly initialised Qwen3 model in fp32 for the tokenizer in ``tokenizer_dir``.

    Raises:
        TidarError: the tokenizer has no mask token.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    if tokenizer.mask_token_id is None:
        raise TidarError(f"the tokenizer in {tokenizer_dir} has no mask token: add one (mask_token) and save it again")
    config = fresh_config(arch, len(tokenizer))
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config._attn_implementation = attention.NAME
    setattr(config, KEY, asdict(Spec(mask_token_id=tokenizer.mask_token_id)))
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    hf = Qwen3ForCausalLM(config).float()
    torch.random.set_rng_state(state)
    hf.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[tokenizer.mask_token_id, *range(len(tokenizer), config.vocab_size)],
    )
    model = CausalLM(hf, tokenizer, "a fresh model")
    model.probe()
    return model
