"""Named training runs, and runs described by a TOML file."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tidar.errors import TidarError
from tidar.tables import build, merged, read_toml
from tidar.train.config import TrainConfig

__all__ = ["RECIPES", "load_recipe"]

_SMOKE_SOURCES = tuple(
    str(Path(sysconfig.get_path("stdlib")) / name)
    for name in ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "unittest", "urllib", "xml")
)
# Of the paper, and of the runs that made the first half of the reference checkpoint; the default is what drafts better.
_PLAIN_DRAFTS: dict[str, Any] = {"kl_weight": 0.0, "transition": 0, "offset_decay": 1.0}
_PYTHON: dict[str, Any] = {
    **_PLAIN_DRAFTS,
    "data": {"sources": ("corpus",)},  # the folder that runs/corpus.py writes
    "device": "cuda",
    "dtype": "bf16",
    "seq_len": 2048,
    "micro_batch": 32,
    "batch_tokens": 131_072,
    "warmup": 0.02,
    "eval_every": 1000,
    "eval_tokens": 1_048_576,
    "save_every": 1000,
    "log_every": 50,
}
_FROM_BASE: dict[str, Any] = {
    **_PYTHON,
    "model": "run/python-17m-ar/model",
    "tokens": 380_000_000,
    "lr": 4e-3,
    "min_lr": 2e-5,
}
# The paper does not say what it trained on; this mix is ours: text, code and mathematics under open licences.
_WEB: dict[str, Any] = {
    "streams": (
        {"path": "HuggingFaceFW/fineweb-edu", "name": "sample-100BT", "weight": 5.0},
        {"path": "common-pile/stackv2_edu_filtered", "weight": 3.0},
        {"path": "HuggingFaceTB/finemath", "name": "finemath-4plus", "weight": 2.0},
    ),
    "lanes": 256,
    "holdout": 0.002,
}
# The paper's recipe (section 4.1), for 8 GPUs of 80 GiB or any more; AdamW's settings are ours where it gives none.
_PAPER: dict[str, Any] = {
    **_PLAIN_DRAFTS,
    "data": _WEB,
    "device": "cuda",
    "dtype": "bf16",
    "seq_len": 4096,
    "batch_tokens": 2_097_152,
    "optimizer": "adamw",
    "lr": 1e-5,
    "min_lr": 3e-6,
    "warmup": 0.01,
    "eval_every": 1000,
    "eval_tokens": 1_048_576,
    "save_every": 500,
    "keep_last": 3,
}
_ASSETS = Path(__file__).parent / "assets"

RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # About a minute on two CPU cores: a small model on short files of Python's own library. From fresh weights the
        # AR half must learn first, so it weighs more.
        "smoke": {
            "out": "run/smoke",
            "data": {"sources": _SMOKE_SOURCES, "max_bytes": 6000, "duplicates": "exact"},
            "vocab_size": 320,
            "arch": {
                "hidden_size": 96,
                "layers": 2,
                "heads": 2,
                "kv_heads": 1,
                "head_dim": 32,
                "intermediate_size": 192,
            },
            "seq_len": 128,
            "micro_batch": 16,
            "batch_tokens": 2048,
            "tokens": 500_000,
            "block_sizes": (4,),
            "alpha": 4.0,
            "kl_weight": 0.5,
            "lr": 3e-3,
            "min_lr": 3e-4,
            "warmup": 0.1,
            "eval_tokens": 8192,
        },
        # The reference checkpoint: an AR base, TiDAR from it in two runs, and the control that goes on as AR.
        "python-17m-ar": {
            **_PYTHON,
            "out": "run/python-17m-ar",
            "tokenizer": "corpus/tokenizer",
            "arch": {"layers": 10, "max_positions": 2048},
            "objective": "ar",
            "tokens": 300_000_000,
            "lr": 8e-3,
            "min_lr": 4e-4,
        },
        "python-17m": {
            **_FROM_BASE,
            "out": "run/python-17m",
            "block_sizes": (4, 8, 16, 16, 16),
            "kl_weight": 0.75,
        },
        # The same, but the base is frozen, and masks alone have adapters.
        "python-17m-adapters": {
            **_FROM_BASE,
            "out": "run/python-17m-adapters",
            "block_sizes": (4, 8, 16, 16, 16),
            "kl_weight": 0.75,
            "alpha": 0.0,
            "adapter_rank": 256,
            "lr": 2e-2,
            "min_lr": 1e-4,
        },
        # Goes on from the first: drafts learn what the model itself would write, each knowing the one before.
        "python-17m-rollout": {
            **_FROM_BASE,
            "out": "run/python-17m-rollout",
            "model": "run/python-17m/model",
            "block_sizes": (4, 8, 16, 16, 16),
            "draft_text": "model",
            "rollout_sampled": 0.5,
            "rollout_temperature": 0.8,
            "transition": 256,
            "offset_decay": 0.87,
            "kl_weight": 0.75,
            "tokens": 220_000_000,
            "micro_batch": 64,
            "lr": 2e-3,
        },
        # As many clean tokens as both.
        "python-17m-control": {
            **_FROM_BASE,
            "out": "run/python-17m-control",
            "objective": "ar",
            "tokens": 600_000_000,
        },
        # The paper's models. Where it trained one for each draft length, this is one for all; `--block-sizes 16`
        # makes one of the paper's.
        "qwen2.5-1.5b": {
            **_PAPER,
            "out": "run/qwen2.5-1.5b",
            "model": "Qwen/Qwen2.5-1.5B",
            "tokens": 50_000_000_000,
            "block_sizes": (4, 8, 16),
            "micro_batch": 2,
        },
        # What the same tokens do to the model as it is.
        "qwen2.5-1.5b-control": {
            **_PAPER,
            "out": "run/qwen2.5-1.5b-control",
            "model": "Qwen/Qwen2.5-1.5B",
            "objective": "ar",
            "tokens": 50_000_000_000,
            "micro_batch": 4,
        },
        "qwen3-8b": {
            **_PAPER,
            "out": "run/qwen3-8b",
            "model": "Qwen/Qwen3-8B-Base",
            "tokens": 150_000_000_000,
            "block_sizes": (16,),
            "micro_batch": 4,
            "activation_checkpointing": True,
        },
        # By the same recipe.
        "qwen3-4b": {
            **_PAPER,
            "out": "run/qwen3-4b",
            "model": "Qwen/Qwen3-4B-Base",
            "tokens": 50_000_000_000,
            "block_sizes": (4, 8, 16),
            "micro_batch": 8,
            "activation_checkpointing": True,
        },
        "llama-3.2-1b": {
            **_PAPER,
            "out": "run/llama-3.2-1b",
            "model": "meta-llama/Llama-3.2-1B",
            "tokens": 50_000_000_000,
            "block_sizes": (4, 8, 16),
            "micro_batch": 4,
        },
        # Instruction tuning, three epochs: answers alone are learnt. Of the reference checkpoint by default; for one
        # with a template of its own give `--model` and an empty `--data.chat-template`.
        "gsm8k": {
            "out": "run/gsm8k",
            "model": str(_ASSETS / "python-17m"),
            "data": {
                "sources": ("hf:openai/gsm8k/main",),
                "turn_fields": ("question", "answer"),
                "chat_template": str(_ASSETS / "templates" / "question.jinja"),
                "duplicates": "exact",
            },
            "device": "cuda",
            "dtype": "bf16",
            "seq_len": 1024,
            "micro_batch": 16,
            "batch_tokens": 32_768,
            "tokens": 6_000_000,
            "block_sizes": (4, 8, 16, 16, 16),
            "kl_weight": 0.75,
            "transition": 0,  # the reference checkpoint has one
            "offset_decay": 0.87,
            "lr": 1e-3,
            "min_lr": 1e-5,
            "warmup": 0.05,
            "eval_every": 50,
            "eval_tokens": 32_768,
        },
    }
)


def load_recipe(name: str, changes: Mapping[str, Any] = MappingProxyType({})) -> TrainConfig:
    """A named recipe, or a TOML file with `TrainConfig`'s fields.

    In a file, ``base = "python-17m"`` starts from a named recipe; ``[data]`` and ``[arch]`` are tables,
    and so is each ``[[data.streams]]``.

    Args:
        name: a key of `RECIPES`, or a path that ends in ``.toml``.
        changes: fields that replace the recipe's; ``arch.layers`` reaches into a table.

    Raises:
        TidarError: unknown recipe, unknown field, or a value of the wrong type.
    """
    if name.endswith(".toml"):
        values = read_toml(Path(name))
        base = values.pop("base", None)
        values = values if base is None else merged(_named(base), values)
    else:
        values = dict(_named(name))
    for path, value in changes.items():
        first, _, rest = path.partition(".")
        values = merged(values, {first: {rest: value} if rest else value})
    return build(TrainConfig, values, name)  # type: ignore[no-any-return]


def _named(name: str) -> Mapping[str, Any]:
    if not isinstance(name, str) or name not in RECIPES:
        raise TidarError(f"unknown recipe '{name}': use one of {', '.join(RECIPES)}, or a .toml file")
    return RECIPES[name]
