"""Times of every candidate cut of the step's products and attention on this GPU: what the defaults are chosen by.

    python runs/tune_kernels.py [--sizes 17m 1.5b 8b] [--write results/tuning.jsonl]

Kernels are compiled first, in parallel processes; then each is timed alone, as replays of a CUDA graph of 20 calls that
take turns among many weights or caches, so that they come from memory as in a step. One line a case: ``found`` is a
list of microseconds and cut, the fastest first; ``default`` is what is taken without measuring.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tidar.kernels.product_tiles import candidates, default_tiles, graph_time
from tidar.kernels.reference_products import Ready
from tidar.kernels.workspace import Tiles, Workspace, tiles
from tidar.provenance import record

ROOT = Path(__file__).resolve().parent.parent
TOGETHER = 200_000_000
"""Bytes of weights to take turns among: several times the L2 cache."""
LONGEST = {"17m": 1024, "1.5b": 2048, "8b": 2048}


class Size(NamedTuple):
    """Of a model: width, query and key heads, head width, MLP, vocabulary, layers, and the prefix to measure behind."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    layers: int
    prefix: int


SIZES = {
    "17m": Size(384, 6, 2, 64, 1024, 4096, 10, 384),
    "1.5b": Size(1536, 12, 2, 128, 8960, 151936, 28, 1024),
    "8b": Size(4096, 32, 8, 128, 12288, 151936, 36, 1024),
}
ROWS = (1, 16, 144, 256)
STEPS = {"ar": (1, 0), "verify": (16, 0), "4 proposals": (16, 4), "15 proposals": (16, 15)}


class Case(NamedTuple):
    """One kernel of one model: a product's kind with its weight, or attention of a step."""

    size: str
    kind: str
    rows: int
    features: int
    depth: int


def cases(names: Sequence[str]) -> Iterator[Case]:
    """Everything to measure."""
    for name in names:
        size = SIZES[name]
        heads = (size.heads + 2 * size.kv_heads) * size.head_dim
        for rows in ROWS:
            yield Case(name, "norm_linear", rows, heads, size.width)
            yield Case(name, "linear_add", rows, size.width, size.heads * size.head_dim)
            yield Case(name, "norm_gated", rows, 2 * size.mlp, size.width)
            yield Case(name, "linear_add", rows, size.width, size.mlp)
            if rows <= 16:
                yield Case(name, "head", rows, size.vocab, size.width)
        for step in STEPS:
            yield Case(name, step, 1, 0, 0)


def cuts(case: Case) -> list[Any]:
    """Candidates, the default first."""
    if case.kind not in STEPS:
        return list(candidates(case.rows, case.features, case.depth, 2))
    size, (causal, blocks) = SIZES[case.size], STEPS[case.kind]
    queries = causal * (1 + blocks)
    default = tiles(1, queries, size.heads, size.kv_heads, size.head_dim, LONGEST[case.size])
    found = {default: None}
    for rows in {16} if default.rows == 16 else {32, 64, 128}:
        for keys, stages in ((64, 2), (64, 3), (128, 2)):
            for splits in (1, 2, 3, 5, 9, 17):
                warps = 8 if rows == 128 else 4
                found[Tiles(rows=rows, keys=keys, splits=splits, warps=warps, stages=stages)] = None
    return list(found)


def calls(case: Case, copies: int | None = None) -> Callable[[Any], list[Callable[[], object]]]:
    """For a cut: the call with each of several weights or caches."""
    return _attention(case, copies or 20) if case.kind in STEPS else _product(case, copies)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def _product(case: Case, copies: int | None) -> Callable[[Any], list[Callable[[], object]]]:
    from tidar.kernels import products, residual

    size = SIZES[case.size]
    # A model whose weights all fit into the cache has them there.
    many = size.layers if case.size == "17m" else max(1, TOGETHER // (2 * case.features * case.depth))
    weights = [_random(case.features, case.depth) * 0.02 for _ in range(copies or many)]
    x, norm = _random(case.rows, case.depth), torch.ones(case.depth, device="cuda").bfloat16()
    after = torch.ones(case.features, device="cuda").bfloat16()
    ready = Ready(x, torch.ones(case.depth // 16, case.rows, device="cuda"))
    y = torch.zeros(case.rows, case.features, device="cuda").bfloat16()
    logits = torch.empty(case.rows, case.features, device="cuda") if case.kind == "head" else y

    def run(cut: Any, weight: torch.Tensor) -> object:
        if case.kind == "linear_add":
            if cut is None:
                return residual.linear_add_norm(y, x, weight, None, after, eps=1e-6)
            return products.linear_add(y, x, weight, norm=after, tiles=cut)
        if case.kind == "norm_gated":
            return products.norm_gated(x, norm, weight, eps=1e-6, tiles=cut, ready=ready)
        return products.norm_linear(x, norm, weight, eps=1e-6, out=logits, tiles=cut, ready=ready)

    return lambda cut: [lambda w=w: run(cut, w) for w in weights]  # type: ignore[misc]


def _attention(case: Case, copies: int) -> Callable[[Any], list[Callable[[], object]]]:
    from tidar.kernels.step_attention import attend

    size, (causal, blocks) = SIZES[case.size], STEPS[case.kind]
    queries = causal * (1 + blocks)
    q = _random(1, queries, size.heads, size.head_dim)
    new = [_random(1, queries, size.kv_heads, size.head_dim) for _ in range(2)]
    pages = size.prefix // 64 + 2
    stores = [[_random(pages, 64, size.kv_heads, size.head_dim) for _ in range(2)] for _ in range(copies)]
    table = torch.randperm(pages, device="cuda").int()[None]
    lengths = torch.tensor([size.prefix], dtype=torch.int32, device="cuda")
    levels = torch.arange(1, blocks + 1, device="cuda")[None]
    shape = 1, queries, size.heads, size.kv_heads, size.head_dim, LONGEST[case.size]

    def for_cut(cut: Any) -> list[Callable[[], object]]:
        workspace = Workspace.for_step(*shape, dtype=q.dtype, device="cuda", chosen=cut)

        def run(keys: torch.Tensor, values: torch.Tensor) -> object:
            given: list[Any] = [q, *new, keys, values, table, lengths, levels]
            return attend(*given, causal=causal, workspace=workspace)

        return [lambda store=store: run(*store) for store in stores]  # type: ignore[misc]

    return for_cut


def compile_all(case: Case) -> None:
    """Run each candidate once: compiled kernels are kept on disk for the process that measures."""
    run = calls(case, copies=1)
    for cut in cuts(case):
        _microseconds(run, cut, measure=lambda made: float(made[0]() is None))


def _microseconds(
    run: Callable[[Any], list[Callable[[], object]]],
    cut: Any,
    measure: Callable[[list[Callable[[], object]]], float] = graph_time,
) -> float | None:
    from triton.runtime.errors import OutOfResources

    try:
        return measure(run(cut)) * 1e3
    except OutOfResources:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--write", type=Path, default=ROOT / "results" / "tuning.jsonl")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    wanted = list(cases(args.sizes))
    processes = max(1, (os.cpu_count() or 2) - 2)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_all, wanted))
    for case in wanted:
        run = calls(case)
        timed = [(_microseconds(run, cut), None if cut is None else astuple(cut)) for cut in cuts(case)]
        found = sorted(((round(time, 2), cut) for time, cut in timed if time is not None), key=lambda each: each[0])
        default = _default(case)
        record(args.write, {**case._asdict(), "default": default and astuple(default), "found": found})
        torch.cuda.empty_cache()


def _default(case: Case) -> Any:
    return cuts(case)[0] if case.kind in STEPS else default_tiles(case.rows, case.features, case.depth, 2)


if __name__ == "__main__":
    main()
