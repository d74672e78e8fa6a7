"""Training speed and memory, AR against TiDAR, through the trainer's own step, on one GPU or on several.

    python runs/train_speed.py [--shape qwen2.5-1.5b] [--seq-len 1024 2048] [--rows 64] [--seconds 10]
    torchrun --nproc-per-node 2 runs/train_speed.py --shape qwen3-8b --seq-len 4096 --rows 1 --activation-checkpointing

Random weights, and random tokens in documents of random length (mean 700), bf16. For each row length: clean tokens per
second of both objectives and their ratio; of each the share of the rate of matrix products, measured in the same run,
that its useful operations reach (MFU), the peak memory, and what `tidar train --plan` says of both. Each line is
appended to results/train_speed.jsonl. With --profile DIR, a table of one step's kernels is written there.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from runs.script import run
from tidar.bench.floors import rates
from tidar.bench.shapes import SHAPES, random_model
from tidar.data.config import DataConfig
from tidar.data.packing import PackedBatch
from tidar.model import CausalLM
from tidar.provenance import record
from tidar.train import parallel
from tidar.train.config import TrainConfig
from tidar.train.metrics import peak_memory_gib
from tidar.train.plan import GIB, expected_mfu, memory
from tidar.train.sizes import Sizes, sizes_of, work
from tidar.train.step import Stepper
from tidar.train.world import World, join

RESULTS = Path(__file__).resolve().parent.parent / "results" / "train_speed.jsonl"
SHAPES["python-17m"] = {
    "model_type": "qwen3",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}


def batch(rows: int, size: int, seed: int, vocab: int) -> PackedBatch:
    random = np.random.default_rng(seed)
    cuts = np.union1d(np.flatnonzero(random.random(rows * size) < 1 / 700), np.arange(0, rows * size, size))
    run = np.diff(cuts, append=rows * size)
    starts = np.repeat(cuts % size, run)
    parts = random.integers(0, vocab - 2, rows * size), starts, starts + np.repeat(run, run)
    return PackedBatch(*(torch.from_numpy(part.reshape(rows, size)) for part in parts))


def recipe(size: int, world: World, args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(sources=("random tokens",)),
        device=args.device,
        dtype="bf16",
        seq_len=size,
        micro_batch=args.rows,
        batch_tokens=args.accumulate * world.size * args.rows * size,
        block_sizes=(4, 8, 16),
        kl_weight=args.kl_weight,
        optimizer=args.optimizer,
        activation_checkpointing=args.activation_checkpointing,
    )


def ready(config: TrainConfig, world: World, args: argparse.Namespace) -> tuple[CausalLM, Sizes]:
    """A model of random weights, as training has it."""
    device = f"cuda:{torch.cuda.current_device()}" if args.device == "cuda" else args.device
    model = random_model(args.shape, layers=args.layers, device=device, dtype="float32")
    model.hf.requires_grad_(True)
    found = sizes_of(model.hf.config)
    parallel.apply(model, config, world)
    return model, found


def measure(config: TrainConfig, matmul: float, world: World, args: argparse.Namespace) -> dict[str, Any]:
    """Clean tokens/s of all ranks over at least ``args.seconds``, after the compilation."""
    device = torch.device(args.device)
    torch._dynamo.reset()
    gc.collect()  # a sharded model is held by cycles, and the one measured before must not count or fill the GPU
    if device.type == "cuda":
        torch.cuda.empty_cache()
    model, size = ready(config, world, args)
    stepper = Stepper(model, config, world)
    batches = [batch(config.micro_batch, config.seq_len, 4 * world.rank + i, model.vocab_size) for i in range(4)]

    def run(steps: int, first: int) -> float:
        begun = time.perf_counter()
        for step in range(first, first + steps):
            taken = [batches[(args.accumulate * step + i) % 4] for i in range(args.accumulate)]
            values = stepper(taken, step, 1e-5)
        assert bool(values.isfinite().all())  # waits for the GPU
        return time.perf_counter() - begun

    compiling = run(3, 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = int(world.most(max(2, args.seconds / (run(2, 3) / 2))))
    rate = steps * config.batch_tokens / world.most(run(steps, 5))
    if args.profile:
        profile(lambda: run(1, 5), Path(args.profile) / f"{args.shape}-{config.objective}-{world.rank}.txt")
    todo = work(size, config)
    planned = memory(size, config, world.size).total / GIB
    again = 4 / 3 if config.activation_checkpointing else 1
    return {
        "tokens_per_second": round(rate, 1),
        "mfu": round(rate * todo.training / (world.size * matmul), 4),
        "peak_memory_gib": round(world.most(peak_memory_gib(device)), 2),
        "planned_memory_gib": round(planned, 4),
        "planned_tokens_per_second": round(world.size * matmul * expected_mfu(size.width) / (todo.training * again), 1),
        "compile_seconds": round(compiling, 1),
    }


def profile(step: Any, path: Path) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as traced

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with traced(activities=activities) as found:
        step()
    path.parent.mkdir(parents=True, exist_ok=True)
    by = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
    path.write_text(found.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=90))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="python-17m")
    parser.add_argument("--layers", type=int, help="as many only")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--rows", type=int, default=64, help="of a forward on one GPU")
    parser.add_argument("--accumulate", type=int, default=2, help="forwards of one GPU in a step")
    parser.add_argument("--kl-weight", type=float, default=0.5)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="adamw")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--profile", metavar="DIR")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    world = join(args.device)
    cuda = args.device == "cuda"
    speeds = rates(torch.device("cuda", torch.cuda.current_device())) if cuda else None
    for size in args.seq_len:
        tidar = recipe(size, world, args)
        matmul = speeds.matmul if speeds else 1e11  # a CPU's share means nothing
        found = {name: measure(replace(tidar, objective=name), matmul, world, args) for name in ("ar", "tidar")}
        ratio = found["tidar"]["tokens_per_second"] / found["ar"]["tokens_per_second"]
        line = {"shape": args.shape, "layers": args.layers, "gpus": world.size, "seq_len": size, "rows": args.rows}
        line |= {"optimizer": args.optimizer, "activation_checkpointing": args.activation_checkpointing, **found}
        line |= {"ratio": round(ratio, 3), "rates": vars(speeds) if speeds else None}
        if world.main:
            record(args.out, line)
    world.leave()


if __name__ == "__main__":
    run(main)
