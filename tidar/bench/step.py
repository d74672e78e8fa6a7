"""How long steps take, by what they feed: times, floors, and the speed-up they would give.

Rows are at rest at the given prefix: a step does all its work and moves nothing, so it can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tidar.adapters import AdapterSpec
from tidar.bench.floors import floor, rates
from tidar.bench.shapes import random_model
from tidar.checkpoint import embedded_checkpoint, load_model
from tidar.config import SamplingParams
from tidar.decode.plan import Shape, drafted, few, shapes
from tidar.errors import TidarError
from tidar.fast import obstacle
from tidar.fast.engine import Engine
from tidar.fast.network import Flags
from tidar.fast.slots import Slots
from tidar.fast.timing import interleaved
from tidar.model import CausalLM

__all__ = ["add_adapters", "at_rest", "model_of", "run", "step_shapes"]

ROUNDS, REPEAT = 15, 5


def step_shapes(draft_len: int) -> dict[str, Shape]:
    """Steps worth timing for a draft length K, by name: ``ar``; the two of two-forward decoding; one-forward steps with
    fewer and fewer proposals, and with alternates."""
    k = draft_len
    found = {
        "ar": Shape(1, 0, 1),
        "verify": Shape(k, 0, k),
        "draft": Shape(1, 1, k),
        "tidar": Shape(k, k, k),
    }
    for count in sorted({k - 1, k // 2 - 1, k // 4 - 1, 2, 1} & set(range(1, k)), reverse=True):
        found[f"tidar, {drafted(count)}"] = Shape(k, count, k)
    for plan in few(k):
        if plan.alternates and plan.draft_len == k:
            found[f"tidar, {drafted(plan.proposals, plan.alternates)}"] = shapes(plan)[0]
    return found


@torch.inference_mode()
def at_rest(engine: Engine, rows: int, prefix: int) -> Slots:
    """Rows behind a prefix of random keys and values; zeros would be quicker than real ones."""
    params = [SamplingParams(max_new_tokens=64, temperature=0.8, top_p=0.95, seed=n) for n in range(rows)]
    slots, _ = engine.open(engine, [[1] * prefix] * rows, params)
    slots.lengths.fill_(prefix)
    slots.limits.fill_(prefix)
    slots.pages.keys.normal_()
    slots.pages.values.normal_()
    slots.drafts.random_(0, engine.core.vocab_size - 1)
    return slots


def model_of(
    name: str | None, size: str | None, layers: int | None, dtype: str = "bfloat16", weights: str | None = None
) -> CausalLM:
    """A checkpoint, or random weights of a size in `tidar.bench.shapes`; for a GPU."""
    if size is not None:
        return random_model(size, layers=layers, dtype=dtype, weights=weights)
    path = embedded_checkpoint() if name is None else name
    return load_model(path, device="cuda", dtype=dtype, weights=weights)


@torch.no_grad()
def add_adapters(core: CausalLM, rank: int) -> None:
    """Random adapters of masks; zeros would be quicker.

    Raises:
        TidarError: the model has adapters.
    """
    if core.adapters is not None:
        raise TidarError(f"{core.path} has adapters of its own: leave out --adapter-rank")
    for weight in core.add_adapters(AdapterSpec(rank=rank, alpha=rank)).parameters():
        weight.normal_(std=0.02)


@torch.inference_mode()
def run(
    core: CausalLM,
    *,
    draft_lens: Sequence[int],
    prefixes: Sequence[int],
    rows: Sequence[int],
    sampled: bool = False,
    deterministic: bool = False,
) -> list[dict[str, Any]]:
    """One line a kind of step, draft length, batch and prefix.

    Each has ``milliseconds``, ``floor_milliseconds``, ``share`` (floor over time), ``over_ar`` (time over that of the
    autoregressive step measured in turn with it), and the rates that the floors rest on.

    Raises:
        TidarError: no GPU, or a model that the fast path does not take.
    """
    if (why := obstacle(core)) is not None:
        raise TidarError(f"steps cannot be timed: {why}")
    engine, rate = Engine(core, deterministic=deterministic), rates(core.device)
    flags = Flags(sampling=sampled, filtering=sampled, penalty=False)
    lines = []
    for count, prefix in product(rows, prefixes):
        slots = at_rest(engine, count, prefix)
        for draft_len in draft_lens:
            kinds = step_shapes(draft_len)
            calls = [engine.step(slots, shape, flags) for shape in kinds.values()]
            times = interleaved(calls, rounds=ROUNDS, repeat=REPEAT)
            for (name, shape), seconds in zip(kinds.items(), times, strict=True):
                least = floor(engine.network.lean, shape, count, prefix, rate)
                lines.append(
                    {
                        "model": Path(core.path).name,
                        "dtype": str(core.dtype).removeprefix("torch."),
                        "weights": core.weights,
                        "adapter_rank": core.adapters.spec.rank if core.adapters else 0,
                        "step": name,
                        "draft_len": draft_len,
                        "queries": shape.queries,
                        "batch": count,
                        "prefix": prefix,
                        "sampled": sampled,
                        "deterministic": deterministic,
                        "milliseconds": round(seconds * 1e3, 5),
                        "floor_milliseconds": round(least.seconds * 1e3, 5),
                        "share": round(least.seconds / seconds, 4),
                        "over_ar": round(seconds / times[0], 4),
                        "floor": asdict(least),
                        "rates": asdict(rate),
                    }
                )
        engine.forget(slots)
    return lines
