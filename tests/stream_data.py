"""Streams in which every token is unique, so that what became of each can be told."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tidar.data.config import DataConfig, Stream
from tidar.data.packing import PackedBatch
from tidar.data.streaming import StreamedData

EOS = 0
WORDS = 60_000


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """The words ``w1``, ``w2`` … are the tokens 1, 2 …"""
    core = Tokenizer(models.WordLevel({"<eos>": EOS, **{f"w{i}": i for i in range(1, WORDS)}}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def write(folder: Path, files: Sequence[int], *, first: int = 1, longest: int = 20) -> list[list[int]]:
    """Files of so many documents of 1 … ``longest`` words each; returns each document's words, with the end."""
    folder.mkdir(parents=True)
    draw, found = random.Random(first), []
    for number, count in enumerate(files):
        lines = []
        for _ in range(count):
            words = list(range(first, first + draw.randint(1, longest)))
            first += len(words)
            found.append([*words, EOS])
            lines.append(json.dumps({"text": " ".join(f"w{word}" for word in words), "n": 1}))
        (folder / f"{number:03}.jsonl").write_text("\n".join(lines) + "\n")
    return found


def stream(folder: Path, **changes: Any) -> Stream:
    return Stream(**{"path": str(folder / "*.jsonl"), **changes})


def config(*streams: Stream, **changes: Any) -> DataConfig:
    return DataConfig(**{"streams": streams, "holdout": 0.0, "shuffle": 120, "workers": 0, "patience": 0.0, **changes})


def opened(plan: DataConfig, **changes: Any) -> StreamedData:
    """Steps of four micro-batches of four rows, in eight lanes."""
    shape: dict[str, Any] = {"seq_len": 16, "batch_size": 4, "accumulate": 4, "lanes": 8, "seed": 7}
    return StreamedData(plan, tokenizer(), **{**shape, **changes})


def steps(data: StreamedData, count: int, *, rank: int = 0, size: int = 1) -> list[list[PackedBatch]]:
    """The micro-batches of ``rank`` in each of so many steps."""
    found = []
    for _ in range(count):
        mine = []
        for index in range(4):
            if index % size == rank:
                mine.append(data.next())
            else:
                data.skip()
        found.append(mine)
    return found


def same(one: list[list[PackedBatch]], two: list[list[PackedBatch]]) -> bool:
    """Whether both are the same micro-batches, to the bit."""
    pairs = [(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)]
    return bool(pairs) and all(torch.equal(p, q) for a, b in pairs for p, q in zip(a[:3], b[:3], strict=True))
