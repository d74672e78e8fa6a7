"""A little text, a run on it that takes a second, and what to compare training with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tidar.data.config import DataConfig
from tidar.data.packing import PackedBatch
from tidar.model import CausalLM
from tidar.train.config import TrainConfig


def write_text(folder: Path, *, documents: int = 40) -> Path:
    """Documents of 1 … 20 words in a random order."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    words = ["def ", "return ", "x", " = ", "(y)", ":\n    ", "1"]
    for number in range(documents):
        text = "".join(draw.choices(words, k=draw.randint(1, 20)))
        (folder / f"{number:03d}.txt").write_text(f"{number}{text}")
    return folder


def pack(lengths: list[list[int]], *, seed: int = 0, vocab: int = 256) -> PackedBatch:
    """Rows of documents with the given lengths and random tokens."""
    starts = [[begin for begin, n in _spans(row) for _ in range(n)] for row in lengths]
    ends = [[begin + n for begin, n in _spans(row) for _ in range(n)] for row in lengths]
    tokens = torch.randint(vocab, (len(lengths), sum(lengths[0])), generator=torch.Generator().manual_seed(seed))
    return PackedBatch(tokens, torch.tensor(starts), torch.tensor(ends))


def _spans(row: list[int]) -> list[tuple[int, int]]:
    return [(sum(row[:i]), n) for i, n in enumerate(row)]


def plain_logits(model: CausalLM, ids: list[int], masks: int) -> Tensor:
    """Logits of clean tokens followed by one block of masks, from a plain forward with a mask made by hand."""
    size = len(ids) + masks
    sees = torch.ones(size, size).tril().bool()
    sees[len(ids) :, len(ids) :] = True
    tokens = torch.tensor([ids + [model.mask_id] * masks])
    out = model.hf(input_ids=tokens, position_ids=torch.arange(size)[None], attention_mask=sees[None, None])
    logits: Tensor = out.logits[0]
    return logits


def gradients(model: CausalLM) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.hf.named_parameters() if p.grad is not None}
    model.hf.zero_grad()
    return found


def config(root: Path, model: Path, **changes: Any) -> TrainConfig:
    """Twelve steps on the text in ``root / "text"``."""
    values: dict[str, Any] = {
        "out": str(root / "run"),
        "model": str(model),
        "data": DataConfig(sources=(str(root / "text"),), duplicates="keep", holdout=0.2),
        "seq_len": 24,
        "micro_batch": 2,
        "batch_tokens": 96,
        "tokens": 12 * 96,
        "block_sizes": (3, 4),
        "kl_weight": 0.5,
        "lr": 1e-2,
        "min_lr": 1e-3,
        "warmup": 0.2,
        "log_every": 2,
        "eval_tokens": 96,
        "save_every": 4,
    }
    return TrainConfig(**{**values, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: w for file in sorted(folder.glob("*.safetensors")) for name, w in load_file(file).items()}


def same_weights(one: Path, two: Path) -> bool:
    first, second = weights(one), weights(two)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
