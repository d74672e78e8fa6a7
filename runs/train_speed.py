"""Training speed and memory, AR against TiDAR, through the trainer's own step on one GPU.

    python runs/train_speed.py [--seq-len 1024 2048] [--micro-batch 64] [--seconds 10] [--device cuda]

Random tokens in documents of random length (mean 700), the 17 M shape, bf16. For each row length: clean tokens per
second of both objectives, the ratio, peak memory. Each line is appended to results/train_speed.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from tidar.checkpoint import create_model
from tidar.config import Architecture
from tidar.data.config import DataConfig
from tidar.data.packing import PackedBatch
from tidar.provenance import record
from tidar.train.config import TrainConfig
from tidar.train.metrics import peak_memory_gib
from tidar.train.step import Stepper

VOCAB = 8192
RESULTS = Path(__file__).resolve().parent.parent / "results" / "train_speed.jsonl"


def tokenizer(folder: Path) -> Path:
    """A tokenizer of the right size; no text passes through it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={f"token{i}": i for i in range(VOCAB - 2)}, merges=[]))
    core.add_special_tokens(["<eos>", "<mask>"])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", mask_token="<mask>")
    made.save_pretrained(folder)
    return folder


def batch(rows: int, size: int, seed: int) -> PackedBatch:
    random = np.random.default_rng(seed)
    cuts = np.union1d(np.flatnonzero(random.random(rows * size) < 1 / 700), np.arange(0, rows * size, size))
    run = np.diff(cuts, append=rows * size)
    starts = np.repeat(cuts % size, run)
    parts = random.integers(0, VOCAB - 2, rows * size), starts, starts + np.repeat(run, run)
    return PackedBatch(*(torch.from_numpy(part.reshape(rows, size)) for part in parts))


def measure(
    objective: Literal["ar", "tidar"], arch: Architecture, folder: Path, size: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Clean tokens/s over at least ``args.seconds``, after the compilation."""
    device = torch.device(args.device)
    rows = max(1, args.micro_batch * 1024 // size)
    config = TrainConfig(
        objective=objective,
        tokenizer=str(folder),
        data=DataConfig(sources=("random tokens",)),
        device=args.device,
        dtype="bf16",
        seq_len=size,
        micro_batch=rows,
        batch_tokens=2 * rows * size,
        block_sizes=(4, 8, 16),
        kl_weight=args.kl_weight,
    )
    torch._dynamo.reset()
    model = create_model(arch, folder, seed=0)
    model.hf.to(args.device)
    stepper = Stepper(model, config)
    batches = [batch(rows, size, seed) for seed in range(4)]

    def run(steps: int, first: int) -> float:
        begun = time.perf_counter()
        for step in range(first, first + steps):
            stepper([batches[(2 * step + i) % 4] for i in range(2)], step, 1e-4)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    compiling = run(3, 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = max(2, int(args.seconds / (run(2, 3) / 2)))
    rate = steps * config.batch_tokens / run(steps, 5)
    return {
        "tokens_per_second": round(rate),
        "peak_memory_gib": round(peak_memory_gib(device), 2),
        "compile_seconds": round(compiling, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--micro-batch", type=int, default=64, help="rows of 1024 tokens; fewer of longer ones")
    parser.add_argument("--kl-weight", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--intermediate-size", type=int, default=1024)
    args = parser.parse_args()
    arch = Architecture(hidden_size=args.hidden_size, layers=args.layers, intermediate_size=args.intermediate_size)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer(Path(folder))
        for size in args.seq_len:
            ar = measure("ar", arch, Path(folder), size, args)
            tidar = measure("tidar", arch, Path(folder), size, args)
            ratio = tidar["tokens_per_second"] / ar["tokens_per_second"]
            record(RESULTS, {"seq_len": size, "shape": vars(arch), "ar": ar, "tidar": tidar, "ratio": round(ratio, 3)})


if __name__ == "__main__":
    main()
