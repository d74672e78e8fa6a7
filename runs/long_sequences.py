"""Memory and speed of training on long rows: the mask half with the clean half, and in slices behind it.

    python runs/long_sequences.py [--model reference | qwen2.5-1.5b | FOLDER] [--seq-len 4096 8192 16384 32768]
        [--mask-slice 0 4096] [--activation-checkpointing] [--seconds 20] [--device cuda] [--out FILE]
    python runs/long_sequences.py --draw FIGURE [--out FILE]

Random tokens, one document a row, through the trainer's own step in bf16 (fp32 on a CPU), block length 16. For each row
length and width of slices (0: none): clean tokens a second, and the most memory that tensors had, and that was reserved
for them, at once. What rests between steps (weights and optimizer) is named apart. Weights of a size are random. Each
line is appended to results/long_sequences.jsonl, also if memory ran out. ``--draw`` measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from runs.script import run, save_figure
from tidar.bench.shapes import SHAPES, random_model
from tidar.checkpoint import embedded_checkpoint, load_model
from tidar.data.config import DataConfig
from tidar.data.packing import PackedBatch
from tidar.errors import TidarError
from tidar.model import CausalLM
from tidar.provenance import record
from tidar.train import parallel
from tidar.train.config import TrainConfig
from tidar.train.metrics import peak_memory_gib
from tidar.train.step import Stepper
from tidar.train.world import ALONE

RESULTS = Path(__file__).resolve().parent.parent / "results" / "long_sequences.jsonl"
COLOURS = ("#8c8c8c", "#1f5fa8", "#d9822b", "#4a9e5c")


def made(name: str, device: str) -> CausalLM:
    """The model of a size or a folder, in fp32."""
    if name not in SHAPES:
        folder = embedded_checkpoint() if name == "reference" else name
        return load_model(folder, device=device, dtype="float32")
    model = random_model(name, device=device, dtype="float32")
    model.hf.requires_grad_(True)
    return model


def batch(rows: int, size: int, vocab: int, seed: int) -> PackedBatch:
    tokens = torch.randint(vocab, (rows, size), generator=torch.Generator().manual_seed(seed))
    return PackedBatch(tokens, torch.zeros_like(tokens), torch.full_like(tokens, size))


def measure(size: int, mask_slice: int, args: argparse.Namespace) -> dict[str, Any]:
    """Steps over at least ``args.seconds``, after compilation."""
    device = torch.device(args.device)
    torch._dynamo.reset()
    model = made(args.model, args.device)
    config = TrainConfig(
        data=DataConfig(sources=("random tokens",)),
        device=args.device,
        dtype="bf16" if device.type == "cuda" else "fp32",
        seq_len=size,
        micro_batch=args.rows,
        batch_tokens=args.micro_batches * args.rows * size,
        mask_slice=mask_slice,
        block_sizes=(16,),
        kl_weight=args.kl_weight,
        activation_checkpointing=args.activation_checkpointing,
    )
    parallel.apply(model, config, ALONE)
    stepper = Stepper(model, config)
    batches = [batch(args.rows, size, model.mask_id, seed) for seed in range(args.micro_batches)]

    def run(steps: int, first: int) -> float:
        begun = time.perf_counter()
        for step in range(first, first + steps):
            stepper(batches, step, 1e-4)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    compiling = run(2, 0)
    found: dict[str, Any] = {"compile_seconds": round(compiling, 1)}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what compilation reserved
        torch.cuda.reset_peak_memory_stats()
        found["resting_gib"] = round(torch.cuda.memory_allocated() / 2**30, 3)
    steps = max(2, int(args.seconds / run(1, 2)))
    found["tokens_per_second"] = round(steps * config.batch_tokens / run(steps, 3))
    found["peak_memory_gib"] = round(peak_memory_gib(device), 3)
    if device.type == "cuda":
        found["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
    return found


def tried(size: int, mask_slice: int, args: argparse.Namespace) -> dict[str, Any]:
    """What `measure` finds, or that memory ran out."""
    try:
        return {"out_of_memory": False, **measure(size, mask_slice, args)}
    except torch.OutOfMemoryError:
        pass  # beyond this block nothing refers to the frames that hold the memory
    return {"out_of_memory": True}


def newest(path: Path) -> dict[tuple[str, int], dict[int, dict[str, Any]]]:
    """The last line of each (model, width of slices) and row length.

    Raises:
        TidarError: no such file, or nothing in it.
    """
    found: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise TidarError(f"cannot read {path} ({error}): measure first, or name another --out") from error
    for line in lines:
        found.setdefault((line["model"], line["mask_slice"]), {})[line["seq_len"]] = line
    if not found:
        raise TidarError(f"{path} is empty: measure first, or name another --out")
    return found


def draw(path: Path, out: Path) -> None:
    """Memory and speed against row length, a pair of panels for each model; where memory ran out nothing stands."""
    import matplotlib  # a machine that only measures need not have it
    from matplotlib import pyplot

    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "tidar", "svg.fonttype": "none", "font.family": "sans-serif"})
    curves = newest(path)
    models = list(dict.fromkeys(model for model, _ in curves))
    figure, rows = pyplot.subplots(len(models), 2, figsize=(8, 3.2 * len(models)), layout="constrained", squeeze=False)
    sizes = sorted({size for lines in curves.values() for size in lines})
    widths = sorted({width for _, width in curves})
    for (model, width), lines in sorted(curves.items()):
        panels = rows[models.index(model)]
        whole = [lines[size] for size in sorted(lines) if not lines[size]["out_of_memory"]]
        label = f"slices of {width}" if width else "one forward"
        for axes, key in zip(panels, ("peak_memory_gib", "tokens_per_second"), strict=True):
            axes.plot(
                [line["seq_len"] for line in whole],
                [line[key] for line in whole],
                color=COLOURS[widths.index(width) % len(COLOURS)],
                label=label,
                marker=".",
            )
    for model, (memory, speed) in zip(models, rows, strict=True):
        memory.set(title=model, ylabel="peak memory (GiB)", ylim=(0, None))
        speed.set(title=model, ylabel="clean tokens/s", ylim=(0, None))
        for axes in (memory, speed):
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.set_xlabel("clean tokens of a row")
            axes.legend(frameon=False, fontsize=8)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference", help=f"reference, {', '.join(SHAPES)}, or a folder")
    parser.add_argument("--seq-len", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--mask-slice", type=int, nargs="+", default=[0, 4096])
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step")
    parser.add_argument("--kl-weight", type=float, default=0.5)
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--draw", type=Path, metavar="FIGURE")
    args = parser.parse_args(argv)
    if args.draw is not None:
        draw(args.out, args.draw)
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        raise TidarError("there is no GPU here: use --device cpu and short rows")
    names = ("rows", "micro_batches", "activation_checkpointing", "kl_weight")
    for size in args.seq_len:
        for mask_slice in args.mask_slice:
            found = tried(size, mask_slice, args)
            kept = {"model": args.model, "seq_len": size, "mask_slice": mask_slice, "device": args.device}
            record(args.out, {**kept, **{name: getattr(args, name) for name in names}, **found})
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    run(main)
