"""Tokens per forward (T/NFE) on held-out files: the first 256 tokens of a file, 256 new tokens.

    python runs/tokens_per_forward.py --select holdout/files.jsonl --write results/holdout_prompts.jsonl.gz
    python runs/tokens_per_forward.py [--checkpoint FOLDER] [--prompts FILE] [--draft-len 4 8 16] [--device cuda]

The first form chooses 200 prompts and writes them down; the second measures, greedy and at T=0.8, top-p 0.95 (seed =
number of the prompt). One line a configuration goes to results/tokens_per_forward.jsonl:

- ``tokens_per_forward``: returned new tokens over forwards, prefill counted, both summed over the outputs; ``mean``:
  averaged over the outputs instead; ``without_prefill``: the paper's, tokens that decoding steps made over steps.
- over all outputs, and over those that did not fall into repetition (runs/repetition.py says what that is).
- ``lengths``: how many steps made 1, 2, … k tokens; an output's last step, which the limit may cut, left out.
- ``identical_to_ar``: outputs equal, token for token, to autoregressive decoding.

What each forward committed is kept in results/acceptance.jsonl, one line a configuration: ``committed`` has a list a
prompt, prefill first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoTokenizer

import tidar
from runs import holdout
from runs.repetition import repeats
from runs.script import run
from tidar.api import Model
from tidar.checkpoint import embedded_checkpoint
from tidar.config import SamplingParams
from tidar.provenance import provenance, record

RESULTS = Path(__file__).resolve().parent.parent / "results"
SAMPLING: dict[str, dict[str, float]] = {"greedy": {}, "sampled": {"temperature": 0.8, "top_p": 0.95}}


@dataclass
class Output:
    """One answer, and how many of its tokens each forward made."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    committed: list[int] = field(default_factory=list)
    forwards: int = 0
    repeats: bool = False


def decode(
    model: Model, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], **options: Any
) -> list[Output]:
    outputs = [Output() for _ in prompts]
    for chunk in model.stream(prompts, params, **options):
        output = outputs[chunk.index]
        output.tokens += chunk.token_ids
        output.text += chunk.text
        output.committed.append(len(chunk.token_ids))
        output.forwards += chunk.forwards
    for output in outputs:
        output.repeats = repeats(output.tokens, output.text)
    return outputs


def rates(outputs: Sequence[Output]) -> dict[str, Any]:
    """Tokens and bytes per forward over ``outputs``; only their number if there are none."""
    if not outputs:
        return {"outputs": 0}
    forwards = sum(o.forwards for o in outputs)
    steps = sum(len(o.committed) - 1 for o in outputs)
    return {
        "outputs": len(outputs),
        "tokens_per_forward": round(sum(len(o.tokens) for o in outputs) / forwards, 4),
        "mean": round(sum(len(o.tokens) / o.forwards for o in outputs) / len(outputs), 4),
        "without_prefill": round(sum(sum(o.committed[1:]) for o in outputs) / max(1, steps), 4),
        "bytes_per_forward": round(sum(len(o.text.encode()) for o in outputs) / forwards, 4),
    }


def summary(outputs: Sequence[Output], expected: Sequence[Output], k: int) -> dict[str, Any]:
    """One configuration's numbers; ``expected`` are the autoregressive answers to the first prompts."""
    lengths = Counter(n for o in outputs for n in o.committed[1:-1])
    differing = []
    for number, (output, other) in enumerate(zip(outputs, expected, strict=False)):
        if output.tokens != other.tokens:
            pairs = enumerate(zip(output.tokens, other.tokens, strict=True))
            differing.append([number, *next((at, a, b) for at, (a, b) in pairs if a != b)])
    return {
        "all": rates(outputs),
        "not_repeating": rates([o for o in outputs if not o.repeats]),
        "repeating_share": round(sum(o.repeats for o in outputs) / len(outputs), 4),
        "lengths": [lengths[n] for n in range(1, k + 1)],
        "identical_to_ar": f"{len(expected) - len(differing)}/{len(expected)}",
        "differing": differing,  # prompt, index of the first difference, token here, token of AR
    }


def write_acceptance(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), encoding="utf-8")
    os.replace(part, path)


def measure(model: Model, prompts: Sequence[holdout.Prompt], args: argparse.Namespace) -> list[dict[str, Any]]:
    ids = [p.ids for p in prompts]
    common = {
        "checkpoint": Path(model.core.path).name,
        "dtype": str(model.core.dtype).removeprefix("torch."),
        "new_tokens": args.new_tokens,
    }
    true = [(p.continuation, str(model.core.tokenizer.decode(p.continuation))) for p in prompts]
    real = sum(repeats(tokens, text) for tokens, text in true) / len(true)
    lines, kept = [], []
    for mode, values in SAMPLING.items():
        params = [
            SamplingParams(max_new_tokens=args.new_tokens, ignore_eos=True, seed=seed, **values)  # type: ignore[arg-type]
            for seed in range(len(ids))
        ]
        expected = decode(model, ids[: args.check], params[: args.check], method="ar", batch_size=args.batch_size)
        for k in args.draft_len:
            begun = time.perf_counter()
            outputs = decode(model, ids, params, draft_len=k, batch_size=args.batch_size)
            seconds = round(time.perf_counter() - begun, 1)
            head = {**common, "draft_len": k, "sampling": mode, **values}
            numbers = {**summary(outputs, expected, k), "repeating_share_of_files": round(real, 4)}
            lines.append(record(args.out, {**head, **numbers, "seconds": seconds}))
            committed, loops = [o.committed for o in outputs], [int(o.repeats) for o in outputs]
            kept.append({**head, "committed": committed, "repeats": loops, "provenance": provenance()})
    write_acceptance(args.acceptance, kept)
    return lines


def show(lines: Sequence[dict[str, Any]]) -> None:
    print(f"{'k':>3} {'sampling':9} {'not repeating':>14} {'all':>7} {'repeating':>10} {'= AR':>9}")
    for line in lines:
        fine, every = (line[part].get("tokens_per_forward", float("nan")) for part in ("not_repeating", "all"))
        print(
            f"{line['draft_len']:3} {line['sampling']:9} {fine:14.2f} {every:7.2f} {line['repeating_share']:10.1%} "
            f"{line['identical_to_ar']:>9}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder or hub id; the embedded one by default")
    parser.add_argument("--prompts", type=Path, default=RESULTS / "holdout_prompts.jsonl.gz")
    parser.add_argument("--select", type=Path, metavar="FILES", help="choose prompts from this jsonl instead")
    parser.add_argument("--write", type=Path, metavar="OUT", help="with --select: write the prompts, measure nothing")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--per-package", type=int, default=16, help="with --select: at most so many of one package")
    parser.add_argument("--tokenizer", help="with --write: a tokenizer's folder; the checkpoint's by default")
    parser.add_argument("--draft-len", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--check", type=int, default=200, help="prompts compared with autoregressive decoding")
    parser.add_argument("--device")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--general", action="store_true", help="not the fast path: the same counts, nothing to compile")
    parser.add_argument("--out", type=Path, default=RESULTS / "tokens_per_forward.jsonl")
    parser.add_argument("--acceptance", type=Path, default=RESULTS / "acceptance.jsonl")
    args = parser.parse_args(argv)
    if args.write and not args.select:
        parser.error("--write needs --select")
    if args.write:
        source = args.tokenizer or args.checkpoint or embedded_checkpoint()
        tokenizer = AutoTokenizer.from_pretrained(source)
        chosen = holdout.select(args.select, tokenizer, count=args.count, per_package=args.per_package)
        holdout.save(chosen, args.write)
        print(f"{len(chosen)} prompts of {len({p.package for p in chosen})} packages in {args.write}")
        return
    torch.set_float32_matmul_precision("highest")
    warnings.filterwarnings("ignore", message="draft length")
    model = tidar.load(args.checkpoint, device=args.device, dtype=args.dtype, fast=False if args.general else None)
    if args.select:
        prompts = holdout.select(args.select, model.core.tokenizer, count=args.count, per_package=args.per_package)
    else:
        prompts = holdout.load(args.prompts, model.core.tokenizer)[: args.count]
    show(measure(model, prompts, args))


if __name__ == "__main__":
    run(main)
