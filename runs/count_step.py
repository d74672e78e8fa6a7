"""Count what the attention of a decoding step reads, writes and multiplies: the table of docs/step-kernel.md.

    python runs/count_step.py [--prefix 1024] [--longest 2048] [--bandwidth 4.2] [--matmul 790]

Arithmetic on sizes, nothing is measured: 16 drafts, 15 proposals of 16 masks, one row, bf16, a GPU of 132 processors.
The rates (TB/s, TFLOP/s) only turn counts into times; docs/benchmarks.md has measured ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tidar.bench.shapes import SHAPES
from tidar.kernels.workspace import tiles

DRAFTS, PROPOSALS = 16, 15
NAMES = {"qwen2.5-1.5b": "1.5B", "qwen3-8b": "8B"}


def column(name: str, prefix: int, longest: int, bandwidth: float, matmul: float) -> dict[str, str]:
    """Lines of the table for one model."""
    size = SHAPES[name]
    layers, heads, kv = size["num_hidden_layers"], size["num_attention_heads"], size["num_key_value_heads"]
    width = size.get("head_dim", size["hidden_size"] // heads)
    queries = DRAFTS * (1 + PROPOSALS)
    cut, one = (tiles(1, count, heads, kv, width, longest) for count in (queries, 1))
    lines = queries * heads // kv
    cuts = -(-lines // cut.rows)
    programs = cuts * kv * cut.splits
    kept = 2 * prefix * kv * width * 2  # bytes of the prefix's keys and values
    own = 2 * queries * kv * width * 2 + 2 * queries * heads * width * 2  # and queries and the output
    parts = 2 * 4 * lines * kv * cut.splits * width if cut.splits > 1 else 0
    own_keys = DRAFTS * (DRAFTS + 1) / 2 + PROPOSALS * DRAFTS * ((DRAFTS + 1) / 2 + DRAFTS)  # the mean level
    needed = 4 * heads * width * (queries * prefix + own_keys)
    blocks = -(-cut.rows // (heads // kv) // DRAFTS) + 1  # that a tile of queries can touch
    done = 4 * kv * width * cuts * cut.rows * (prefix + DRAFTS * (1 + blocks))
    whole, step = layers * needed, layers * (kept + own)
    single = -(-heads // kv // one.rows) * kv * one.splits
    return {
        "a layer": f"{NAMES[name]} ({layers} layers, {heads} / {kv} heads)",
        f"query rows a key head, tiles of {cut.rows}": f"{lines}, {cuts}",
        "splits, programs": f"{cut.splits}, {programs}",
        "prefix keys and values, once": f"{kept / 1e6:.2f} MB",
        "own keys and values, queries, output": f"{own / 1e6:.2f} MB",
        "splits' parts, written and read (float32)": f"{parts / 1e6:.1f} MB",
        "prefix read by all tiles (from L2)": f"{cuts * kept / 1e6:.1f} MB",
        "prefix if each query read it": f"{queries * kept / 1e6:.0f} MB",
        "FLOP needed / done with padding": f"{needed / 1e9:.2f} / {done / 1e9:.2f} G",
        f"**a step**: FLOP needed, at {matmul:g} TFLOP/s": f"{whole / 1e9:.0f} G, {whole / matmul / 1e6:.0f} µs",
        f"bytes needed, at {bandwidth:g} TB/s": f"{step / 1e6:.0f} MB, {step / bandwidth / 1e6:.0f} µs",
        f"an AR step's prefix, at {bandwidth:g} TB/s": (
            f"{layers * kept / 1e6:.0f} MB, {layers * kept / bandwidth / 1e6:.0f} µs"
        ),
        "an AR step's splits, programs": f"{one.splits}, {single}",
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=2048, help="longest prefix that splits are chosen for")
    parser.add_argument("--bandwidth", type=float, default=4.2, help="TB/s")
    parser.add_argument("--matmul", type=float, default=790, help="TFLOP/s")
    args = parser.parse_args(argv)
    columns = [column(name, **vars(args)) for name in NAMES]
    for number, name in enumerate(columns[0]):
        print("| " + " | ".join([name, *(each[name] for each in columns)]) + " |")
        if number == 0:
            print("|---" * (1 + len(columns)) + "|")


if __name__ == "__main__":
    main()
