"""Tiny random checkpoints of every supported family, with a byte tokenizer. Built once a test run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FAMILIES = (
    "llama qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text mistral ministral phi3 olmo2 olmo3 smollm3 granite cohere2 "
    "glm4 starcoder2 gpt_oss gpt_neox"
).split()
WINDOW = 9  # shorter than every text the tests decode
EOS = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and an end-of-text token; no mask token, so that conversion has something to add."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def tiny_config(family: str, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # large enough that continuations differ
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "tie_word_embeddings": family not in ("gpt_oss", "gpt_neox", "phi3"),
    }
    if family in ("mistral", "ministral", "gemma2", "gemma3_text", "olmo3", "gpt_oss", "cohere2", "phi3", "starcoder2"):
        values["sliding_window"] = WINDOW
    if family in ("gemma2", "gemma3_text", "olmo3", "gpt_oss", "cohere2", "qwen3"):
        values["layer_types"] = ["sliding_attention", "full_attention"]
    if family == "qwen3":
        values |= {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 0}
    if family in ("gemma2", "gemma3_text"):
        values["query_pre_attn_scalar"] = 8
    if family == "gemma2":
        values |= {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 20.0}
    if family == "granite":
        values |= {"logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 1.5}
    if family == "cohere2":
        values["logit_scale"] = 0.4
    if family in ("qwen3_moe", "gpt_oss"):
        values |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if family == "gpt_neox":
        del values["head_dim"], values["num_key_value_heads"]
    if family == "ministral":
        values["layer_types"] = ["sliding_attention", "full_attention"]
    return CONFIG_MAPPING[family](**{**values, **changes})


def save_plain(family: str, folder: Path, **changes: Any) -> Path:
    """An unconverted random checkpoint."""
    config = tiny_config(family, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(std=0.2)
    # What a real checkpoint may carry and neither side may apply silently.
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=EOS)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
