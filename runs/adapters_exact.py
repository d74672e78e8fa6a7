"""Adapters leave their base as it is: logits to the bit, and decoded text token for token.

    python runs/adapters_exact.py BASE ADAPTERS [--count 20] [--new-tokens 128] [--general] [--device cuda]

On held-out prompts, in float32 and bfloat16: forwards without masks against the base in plain transformers with our
attention and in `tidar.load` (with ``--general``), and texts that TiDAR decodes with the adapters, greedily and at T =
0.8, top-p 0.95, against what the base alone decodes autoregressively. Text must be equal in float32; bfloat16 has ties.
One line a dtype goes to results/adapters_exact.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM

import tidar
from runs import holdout
from runs.script import run
from tidar.api import Model
from tidar.attention import NAME
from tidar.config import SamplingParams
from tidar.errors import TidarError
from tidar.provenance import record

RESULTS = Path(__file__).resolve().parent.parent / "results"
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95}}


@torch.no_grad()
def same_logits(model: Model, others: dict[str, Any], prompts: Sequence[Sequence[int]]) -> dict[str, str]:
    """Of how many prompts each of ``others`` gives the model's logits to the bit."""
    texts = [torch.tensor([ids], device=model.core.device) for ids in prompts]
    found = {}
    for name, other in others.items():
        same = sum(torch.equal(model.core.hf(text).logits, other(text).logits) for text in texts)
        found[f"logits as {name}"] = f"{same}/{len(texts)}"
    return found


def same_text(alone: Model, model: Model, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any]:
    """Of how many prompts the model decodes, at draft lengths 4 and 16, what the base decodes one token at a time."""
    found: dict[str, Any] = {}
    for name, values in SAMPLING.items():
        params = [
            SamplingParams(max_new_tokens=new_tokens, seed=n, ignore_eos=True, **values) for n in range(len(prompts))
        ]
        begun = time.perf_counter()
        expected = [c.token_ids for c in alone.generate(prompts, params, method="ar", batch_size=20)]
        for k in (4, 16):
            got = model.generate(prompts, params, draft_len=k, batch_size=20)
            same = sum(g.token_ids == e for g, e in zip(got, expected, strict=True))
            found[f"{name} k={k} as base's AR"] = f"{same}/{len(prompts)}"
            found[f"{name} k={k} tokens per forward"] = round(sum(g.tokens_per_forward for g in got) / len(got), 3)
        found[f"{name} seconds"] = round(time.perf_counter() - begun, 1)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of the base")
    parser.add_argument("adapters", help="folder of its adapters")
    parser.add_argument("--prompts", type=Path, default=RESULTS / "holdout_prompts.jsonl.gz")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--general", action="store_true", help="without captured steps, and logits too")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "adapters_exact.jsonl")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise TidarError("there is no GPU here: use --device cpu")
    torch.set_float32_matmul_precision("highest")
    for dtype in args.dtype:
        options: dict[str, Any] = {"device": args.device, "dtype": dtype, "fast": False if args.general else None}
        alone, model = tidar.load(args.base, **options), tidar.load(args.base, adapter=args.adapters, **options)
        prompts = [p.ids for p in holdout.load(args.prompts, model.core.tokenizer)][: args.count]
        found: dict[str, Any] = {"check": "adapters", "dtype": dtype, "fast": model.fast, "prompts": len(prompts)}
        found["new_tokens"] = args.new_tokens
        if args.general:
            plain: Any = AutoModelForCausalLM.from_pretrained(
                args.base, dtype=model.core.dtype, attn_implementation=NAME
            )
            others = {"transformers": plain.to(args.device).eval(), "tidar.load(base)": alone.core.hf}
            found |= same_logits(model, others, prompts)
        found |= same_text(alone, model, prompts, args.new_tokens)
        record(args.out, found)
        print({name: value for name, value in found.items() if name not in ("check", "prompts")})


if __name__ == "__main__":
    run(main)
