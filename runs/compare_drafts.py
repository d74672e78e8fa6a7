"""Ways to teach the drafts, compared: the same base, the same clean tokens in the same order, one change at a time.

    python runs/compare_drafts.py --base run/python-17m-ar/model --work DIR [--tokens 30_000_000] [--ways ce kl mix ...]
    python runs/compare_drafts.py --table

Each way is the recipe `python-17m` with a few settings changed (WAYS below), trained from the base for so many clean
tokens; a rollout costs about as much time again, which ``tokens_per_second`` shows. Then tokens per forward on held-out
prompts are decoded, greedily and sampled. One line a way goes to results/compare_drafts.jsonl: its settings, the final
validation (bits per byte of the AR half among it), and both decodings. A way whose run is whole in DIR is not run
again. ``--table`` trains nothing and prints the lines as a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import tidar
from runs import holdout, tokens_per_forward
from runs.script import run
from tidar.errors import TidarError
from tidar.provenance import record
from tidar.recipes import load_recipe
from tidar.train.trainer import train

RESULTS = Path(__file__).resolve().parent.parent / "results"
WAYS: dict[str, dict[str, Any]] = {
    "ce": {"kl_weight": 0.0},
    "kl": {"kl_weight": 1.0},
    "mix": {"kl_weight": 0.5},
    "three quarters": {"kl_weight": 0.75},
    "from text to KL": {"kl_from": 0.0, "kl_weight": 1.0},
    "from KL to text": {"kl_from": 1.0, "kl_weight": 0.0},
    "one block size": {"block_sizes": (16,)},
    "half the rate": {"lr": 2e-3},
    "twice the rate": {"lr": 8e-3},
    "decay": {"offset_decay": 0.87},
    "transition": {"transition": 256, "offset_decay": 0.87},
    "own text, greedy": {"draft_text": "model"},
    "own text, half sampled": {"draft_text": "model", "rollout_sampled": 0.5, "rollout_temperature": 0.8},
    "own text and transition": {
        "draft_text": "model",
        "rollout_sampled": 0.5,
        "rollout_temperature": 0.8,
        "transition": 256,
        "offset_decay": 0.87,
    },
}
"""Name: what it changes in `python-17m`, which mixes block sizes and has three quarters KL."""


def trained(way: str, args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The way's final model, and its validation."""
    out = args.work / way.replace(",", "").replace(" ", "-")
    changes = {
        "out": str(out),
        "model": args.base,
        "tokens": args.tokens,
        "data.sources": (args.corpus,),
        "device": args.device,
        "eval_every": 0,
        "save_every": 0,
        **WAYS[way],
        **dict(args.set),
    }
    if not (out / "model").is_dir():
        torch._dynamo.reset()
        train(load_recipe("python-17m", changes))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speed = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return out / "model", {**lines[-1], "tokens_per_second": speed[len(speed) // 2]}


def decoded(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens per forward of each sampling, over all outputs and over those that do not repeat themselves."""
    loaded = tidar.load(model, device=args.device, dtype="float32", fast=False)
    prompts = holdout.load(args.prompts, loaded.core.tokenizer)[: args.count]
    options = argparse.Namespace(
        new_tokens=args.new_tokens,
        check=0,
        batch_size=len(prompts),
        draft_len=[args.draft_len],
        out=args.work / "decoded.jsonl",
        acceptance=args.work / "acceptance.jsonl",
    )
    lines = tokens_per_forward.measure(loaded, prompts, options)
    kept = ("all", "not_repeating", "repeating_share", "lengths")
    return {line["sampling"]: {name: line[name] for name in kept} for line in lines}


def table(path: Path) -> str:
    """The newest line of each way, the best greedy drafts first."""
    try:
        lines = {line["way"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    except OSError as error:
        raise TidarError(f"cannot read {path} ({error}): train first, or name another --out") from error
    rows = []
    for way, line in lines.items():
        rates = [
            line["tokens_per_forward"][sampling][part].get("tokens_per_forward", float("nan"))
            for sampling in ("greedy", "sampled")
            for part in ("all", "not_repeating")
        ]
        rows.append(
            (-rates[0], [way, *(f"{rate:.2f}" for rate in rates), f"{line['validation']['bits_per_byte']:.3f}"])
        )
    head = ["way", "greedy", "not repeating", "T = 0.8", "not repeating", "AR bits/byte"]
    cells = [head, ["---"] * len(head), *(row for _, row in sorted(rows))]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def main(argv: Sequence[str] | None = None) -> None:
    from runs.train import setting

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the AR model to start from")
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--table", action="store_true", help="only print what is in --out")
    parser.add_argument("--corpus", default="corpus", help="prepared data")
    parser.add_argument("--tokens", type=int, default=30_000_000, help="clean tokens of each run")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--set", action="append", default=[], type=setting, metavar="NAME=VALUE", help="for all ways")
    parser.add_argument("--prompts", type=Path, default=RESULTS / "holdout_prompts.jsonl.gz")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--draft-len", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "compare_drafts.jsonl")
    args = parser.parse_args(argv)
    if args.table:
        print(table(args.out))
        return
    if args.base is None or args.work is None:
        parser.error("--base and --work are needed, or --table")
    for way in args.ways:
        model, validation = trained(way, args)
        numbers = {"validation": validation, "tokens_per_forward": decoded(model, args)}
        record(args.out, {"way": way, "changes": WAYS[way], "tokens": args.tokens, **numbers})


if __name__ == "__main__":
    run(main)
