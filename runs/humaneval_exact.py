"""Greedy TiDAR against autoregressive decoding and against transformers, on the HumanEval prompts.

    python runs/humaneval_exact.py --data HumanEval.jsonl.gz [--checkpoint FOLDER] [--device cuda]

256 new tokens a prompt, end-of-text ignored, in fp32, fp64 and bf16. For each, a line in results/humaneval_exact.jsonl:

- ``identical_to_ar``: prompts whose tokens equal those of `method="ar"`.
- ``identical_to_transformers``: prompts whose every token is the first choice of the plain transformers model, given
  the tokens before it: what its greedy `generate` would say. One forward a prompt proves it.
- ``misses``: each place that differs (the first of each prompt against AR), its two tokens, and the ``gap``: how far
  the lower of their logits lies below the best, in fp64. Rounding decides near-ties; a miss whose gap is beyond what
  the dtype's rounding explains is a failure, and the exit code 1. In bf16 misses are expected: only the rates count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers import logging as hf_logging

import tidar
from runs.holdout import read_lines
from runs.script import run
from tidar.config import SamplingParams
from tidar.provenance import record

RESULTS = Path(__file__).resolve().parent.parent / "results" / "humaneval_exact.jsonl"
TIE = {"float64": 1e-9, "float32": 1e-3}  # logits; bf16 has no bound
PER_FORWARD = 16  # sequences whose logits are held at a time
Tokens = Sequence[int]


class Plain:
    """The checkpoint in transformers, with its own attention and greedy rules."""

    def __init__(self, path: str, device: torch.device, dtype: torch.dtype) -> None:
        # Not "eager": its softmax is fp32 in every dtype.
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        self.hf = model.to(device).eval()
        self.suppressed = list(self.hf.generation_config.suppress_tokens or ())

    @torch.inference_mode()
    def logits(self, prompts: Sequence[Tokens], outputs: Sequence[Tokens]) -> Iterator[Tensor]:
        """For each prompt the logits (T, V) that choose its T output tokens."""
        for first in range(0, len(prompts), PER_FORWARD):
            chosen = list(zip(prompts, outputs, strict=True))[first : first + PER_FORWARD]
            texts = [[*prompt, *output] for prompt, output in chosen]
            width = max(map(len, texts))
            # Padding on the right: no token sees it, and positions need no shift.
            tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=self.hf.device)
            real = torch.tensor([[i < len(text) for i in range(width)] for text in texts], device=self.hf.device)
            logits = self.hf(input_ids=tokens, attention_mask=real.long(), use_cache=False).logits
            logits[..., self.suppressed] = -torch.inf
            for row, (prompt, output) in enumerate(chosen):
                yield logits[row, len(prompt) - 1 : len(prompt) + len(output) - 1]

    def gap(self, text: Tokens, tokens: Tokens) -> float:
        """How far the lowest of ``tokens`` lies below the best one after ``text``."""
        last = next(self.logits([text], [[0]]))[0].double()
        return float(last.max() - last[list(tokens)].min())


def first_difference(a: Tokens, b: Tokens) -> int:
    """Equal tokens at the beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def compare(dtype: str, problems: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    model = tidar.load(args.checkpoint, device=args.device, dtype=dtype)
    core = model.core
    plain, exact = (Plain(core.path, core.device, d) for d in (core.dtype, torch.float64))
    prompts = [list(core.tokenizer(p["prompt"])["input_ids"]) for p in problems]
    params = SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True)
    fast = model.generate(prompts, params, draft_len=args.draft_len, batch_size=args.batch_size)
    outputs = [answer.token_ids for answer in fast]
    expected = [a.token_ids for a in model.generate(prompts, params, method="ar", batch_size=args.batch_size)]

    misses: list[dict[str, Any]] = []

    def miss(number: int, against: str, at: int, other: int) -> None:
        pair = [outputs[number][at], other]
        gap = exact.gap([*prompts[number], *outputs[number][:at]], pair)
        task = problems[number]["task_id"]
        misses.append({"task": task, "against": against, "position": at, "tokens": pair, "gap": gap})

    equal = [first_difference(a, b) for a, b in zip(outputs, expected, strict=True)]
    for number, at in enumerate(equal):
        if at < len(outputs[number]):
            miss(number, "ar", at, expected[number][at])
    best = [scores.argmax(-1).tolist() for scores in plain.logits(prompts, outputs)]
    agree = [[a == b for a, b in zip(output, row, strict=True)] for output, row in zip(outputs, best, strict=True)]
    if dtype in TIE:
        for number, row in enumerate(agree):
            for at in (i for i, same in enumerate(row) if not same):
                miss(number, "transformers", at, best[number][at])
    total = sum(map(len, outputs))
    return {
        "checkpoint": Path(core.path).name,
        "dtype": dtype,
        "draft_len": args.draft_len,
        "prompts": len(prompts),
        "tokens": total,
        "identical_to_ar": sum(at == len(output) for at, output in zip(equal, outputs, strict=True)),
        "tokens_before_first_difference": round(sum(equal) / total, 5),
        "identical_to_transformers": sum(map(all, agree)),
        "tokens_as_transformers": round(sum(map(sum, agree)) / total, 5),
        "largest_gap": max((m["gap"] for m in misses), default=0.0),
        "failures": sum(m["gap"] > TIE.get(dtype, torch.inf) for m in misses),
        "misses": misses,
        "tokens_per_forward": round(total / sum(answer.forwards for answer in fast), 4),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--checkpoint", help="folder or hub id; the embedded one by default")
    parser.add_argument("--limit", type=int, help="only the first N prompts")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float64", "bfloat16"])
    parser.add_argument("--draft-len", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=164)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    hf_logging.disable_progress_bar()
    torch.set_float32_matmul_precision("highest")
    problems = list(read_lines(args.data))[: args.limit]
    lines = [record(args.out, compare(dtype, problems, args)) for dtype in args.dtypes]
    for line in lines:
        print(
            f"{line['dtype']:9} = AR {line['identical_to_ar']}/{line['prompts']}, = transformers "
            f"{line['identical_to_transformers']}/{line['prompts']}, largest gap of a miss {line['largest_gap']:.2g}, "
            f"failures {line['failures']}"
        )
    return int(any(line["failures"] for line in lines))


if __name__ == "__main__":
    run(main)
