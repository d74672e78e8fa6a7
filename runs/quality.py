"""Autoregressive bits per byte on held-out documents, several checkpoints in one run.

    python runs/quality.py --holdout corpus/holdout --checkpoint base=DIR tidar=DIR control=DIR [--device cuda]

Each document is cut into windows of 2048 tokens, and a window predicts its tokens from those before it in the window;
the first of the next window is the last of this one, so every token but a document's first is predicted once. The
end-of-text token is predicted too and has no bytes. One line a checkpoint goes to results/quality.jsonl, with the ratio
to the checkpoint named ``control``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import logging as hf_logging

from runs.script import run
from tidar.checkpoint import load_model
from tidar.data.cache import TokenCache, open_cache
from tidar.data.tokenizer import vocabulary_digest
from tidar.errors import TidarError
from tidar.model import CausalLM
from tidar.provenance import record

RESULTS = Path(__file__).resolve().parent.parent / "results" / "quality.jsonl"
HEAD_ELEMENTS = 1 << 27  # logits held at a time


def windows(cache: TokenCache, size: int) -> list[tuple[int, int]]:
    """Runs ``[first, end)`` of the cache's tokens, at most ``size`` predictions each; long ones first."""
    runs = []
    for begin, end in zip(cache.offsets[:-1].tolist(), cache.offsets[1:].tolist(), strict=True):
        runs += [(first, min(first + size + 1, end)) for first in range(begin, end - 1, size)]
    return sorted(runs, key=lambda run: (run[0] - run[1], run[0]))


def predicted_bytes(cache: TokenCache, model: CausalLM) -> int:
    """UTF-8 bytes of all documents without their first tokens."""
    firsts = cache.tokens[cache.offsets[:-1]].tolist()
    pieces = model.tokenizer.convert_ids_to_tokens(firsts)  # byte-level: a character is a byte
    special = set(model.tokenizer.all_special_ids)
    return int(cache.meta["bytes"]) - sum(len(p) for i, p in zip(firsts, pieces, strict=True) if i not in special)


@torch.inference_mode()
def nats(model: CausalLM, cache: TokenCache, size: int, batch_tokens: int) -> float:
    """Summed cross-entropy of all predicted tokens."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    runs = windows(cache, size)
    while runs:
        width = runs[0][1] - runs[0][0]
        count = max(1, batch_tokens // width)
        chosen, runs = runs[:count], runs[count:]
        tokens = np.zeros((len(chosen), width), np.int64)
        for row, (first, end) in enumerate(chosen):
            tokens[row, : end - first] = cache.tokens[first:end]
        ids = torch.from_numpy(tokens).to(model.device)
        ends = torch.tensor([end - first for first, end in chosen], device=model.device)
        # Causal attention alone: padding stands at the end, where no token sees it.
        hidden = model.hf.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        real = torch.arange(1, width, device=model.device) < ends[:, None]
        rows, labels = hidden[real], ids[:, 1:][real]
        for at in range(0, len(labels), max(1, HEAD_ELEMENTS // model.vocab_size)):
            part = slice(at, at + max(1, HEAD_ELEMENTS // model.vocab_size))
            losses = torch.nn.functional.cross_entropy(model.head(rows[part]), labels[part], reduction="none")
            total += losses.double().sum()
    return float(total)


def measure(name: str, folder: str, cache: TokenCache, args: argparse.Namespace) -> dict[str, Any]:
    model = load_model(folder, device=args.device, dtype=args.dtype)
    if cache.meta.get("tokenizer") != vocabulary_digest(model.tokenizer):  # type: ignore[arg-type]
        raise TidarError(f"{args.holdout} was not made with the tokenizer of {folder}: prepare it with that one")
    begun = time.perf_counter()
    bits = nats(model, cache, args.window, args.batch_tokens) / math.log(2)
    return {
        "name": name,
        "dtype": args.dtype,
        "window": args.window,
        "tokens": len(cache.tokens) - cache.meta["documents"],
        "bytes": predicted_bytes(cache, model),
        "bits_per_byte": round(bits / predicted_bytes(cache, model), 6),
        "bits_per_token": round(bits / (len(cache.tokens) - cache.meta["documents"]), 6),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=FOLDER")
    return name, folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--holdout", type=Path, required=True, help="cache folder: holdout/ of runs/corpus.py")
    parser.add_argument("--checkpoint", type=named, nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--control", default="control", help="the name that the others are compared with")
    parser.add_argument("--window", type=int, default=2048, help="predictions a window")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_float32_matmul_precision("highest")
    hf_logging.disable_progress_bar()
    cache = open_cache(args.holdout)
    lines = [measure(name, folder, cache, args) for name, folder in args.checkpoint]
    base = next((line["bits_per_byte"] for line in lines if line["name"] == args.control), None)
    for line in lines:
        record(args.out, line | ({} if base is None else {"ratio_to_control": round(line["bits_per_byte"] / base, 5)}))
    for line in lines:
        ratio = "" if base is None else f"  {line['bits_per_byte'] / base - 1:+.2%} against {args.control}"
        print(f"{line['name']:12} {line['bits_per_byte']:.4f} bits/byte{ratio}")


if __name__ == "__main__":
    run(main)
