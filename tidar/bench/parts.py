"""Latency of a forward by its query slots, and how it is shared by attention and MLP: the paper's Figure 1.

The question behind it: how many tokens can a forward compute before it takes notably longer than one token?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from tidar.bench.step import at_rest
from tidar.errors import TidarError
from tidar.fast import obstacle
from tidar.fast.engine import Engine
from tidar.fast.queries import StepLayout
from tidar.fast.slots import Slots
from tidar.fast.timing import interleaved
from tidar.kernels.workspace import Workspace
from tidar.model import CausalLM

__all__ = ["QUERIES", "run"]

QUERIES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 272, 320, 384, 448, 512)
ROUNDS, REPEAT = 9, 3


@torch.inference_mode()
def run(core: CausalLM, *, prefixes: Sequence[int], queries: Sequence[int] = QUERIES) -> list[dict[str, Any]]:
    """One line a prefix and number of queries: milliseconds of all layers, of their attention (projections, rotation,
    attention itself) and of their MLPs, each captured as one graph; one row, without embedding and head.

    Raises:
        TidarError: no GPU, or a model that the fast path does not take.
    """
    if (why := obstacle(core)) is not None:
        raise TidarError(f"steps cannot be timed: {why}")
    engine = Engine(core)
    lines = []
    for prefix in prefixes:
        slots = at_rest(engine, 1, prefix)
        for count in queries:
            parts = {name: engine.captured(part, count) for name, part in _parts(engine, slots, count, prefix).items()}
            times = interleaved(list(parts.values()), rounds=ROUNDS, repeat=REPEAT)
            lines.append(
                {
                    "model": Path(core.path).name,
                    "dtype": str(core.dtype).removeprefix("torch."),
                    "weights": core.weights,
                    "layers": len(engine.network.lean.layers),
                    "prefix": prefix,
                    "queries": count,
                    **{f"{name}_milliseconds": round(s * 1e3, 5) for name, s in zip(parts, times, strict=True)},
                }
            )
        engine.forget(slots)
    return lines


def _parts(engine: Engine, slots: Slots, count: int, prefix: int) -> dict[str, Callable[[], object]]:
    """All layers, and each of their halves, on ``count`` causal queries behind the prefix."""
    network, device = engine.network, slots.device
    lean = network.lean
    sizes = 1, count, lean.heads, lean.kv_heads, lean.head_dim, 2 * prefix
    layout = StepLayout(
        causal=count,
        queries=count,
        levels=torch.empty(0, dtype=torch.long, device=device),
        counts=torch.zeros(1, dtype=torch.int32, device=device),
        lengths=slots.lengths,
        table=slots.table,
        workspace=Workspace.for_step(*sizes, dtype=lean.embedding.dtype, device=device),
    )
    x = torch.randn(count, lean.embedding.shape[1], device=device).to(lean.embedding.dtype)

    attend = network.attending(1, layout, slots)

    def run(attention: bool, mlp: bool) -> None:
        # On a copy: what grows over and over ends in infinities, and those are quicker than numbers.
        y, ready = x.clone(), None
        for number in range(len(lean.layers)):
            if attention:
                ready = lean.attention(y, ready, number, attend)
            if mlp:
                ready = lean.mlp(y, ready, number)
            if not (attention and mlp):
                ready = None  # it was for the other half

    return {"total": lambda: run(True, True), "attention": lambda: run(True, False), "mlp": lambda: run(False, True)}
