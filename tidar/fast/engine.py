"""What decoders of one model on one device share: kernels, cache, captured graphs, and rows to decode with.

Legend: B rows, M masks.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.config import SamplingParams
from tidar.decode.base import PREFILL_PIECE
from tidar.decode.clock import Clock, Measured
from tidar.decode.plan import Plan, Shape, shapes
from tidar.fast import ops
from tidar.fast.latency import Latency
from tidar.fast.lean import Hidden, LeanModel
from tidar.fast.network import Flags, Network
from tidar.fast.pages import Pages, pages_for
from tidar.fast.queries import StepLayout
from tidar.fast.slots import Slots
from tidar.fast.step import Step
from tidar.fast.timing import interleaved
from tidar.model import CausalLM

__all__ = ["MOST", "ROWS", "Engine"]

MOST = 64
"""Longest draft."""
ROWS = (1, 2, 4, 8, 16, 32, 64)
"""Batches that graphs are captured for; others are padded."""
LEAST_PREFIX = 256
"""Steps behind shorter ones are not told apart."""
SHORT = 48 * 2**20
"""Bytes of a weight, on average, up to which a product of few rows is short; some 12 microseconds of an H200."""
ROUNDS, REPEAT = 9, 8
"""Times that each step is measured for a planner, all of them in turn, and steps between two looks at the clock."""
PIECES = (64, 256, PREFILL_PIECE)
"""Prompt parts of one forward; others are padded. Few, because each is compiled for."""


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph, and what was captured, whose tensors it reads: without it their memory would be given away."""

    graph: torch.cuda.CUDAGraph
    call: Callable[[], object]

    def __call__(self) -> None:
        self.graph.replay()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Python's collector waits: graphs of an engine that is gone would be destroyed, which CUDA answers by breaking a
    capture off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Engine:
    """Decoding on the device alone.

    Args:
        core: a model that `tidar.fast.lean.refusal` does not refuse.
        plain: run the kernels' plain twins, uncaptured, on any device; for tests.
        deterministic: a row's logits do not depend on what else is in a step, to the bit: all choices of tiles are
            independent of it. So tokens are the same in bf16 too, whatever the method, draft length and batch.

    Attributes:
        core: the model.
        plain: as given.
        network: its lean form.
    """

    def __init__(self, core: CausalLM, *, plain: bool = False, deterministic: bool = False) -> None:
        self.core, self.plain = core, plain
        kernels = ops.load(plain=plain)
        lean = LeanModel(core, kernels, deterministic=deterministic)
        self.network = Network(lean, kernels, core.max_positions + MOST)
        self._pages: Pages | None = None
        self._slots: list[tuple[Slots, weakref.ref[object]]] = []
        self.latency = Latency(core)
        self._clocks: dict[object, Measured] = {}

    def open(
        self, user: object, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> tuple[Slots, list[list[int]]]:
        """Rows for these prompts, and the pages they hold, until ``user`` is gone."""
        longest = self.core.max_positions
        limits = [min(len(p) + each.max_new_tokens, longest) for p, each in zip(prompts, params, strict=True)]
        wanted = [pages_for(limit) for limit in limits]
        pages = self._room(sum(wanted))
        slots = self.slots(user, len(prompts), pages)
        taken = [pages.take(count) for count in wanted]
        slots.open(prompts, params, limits, taken)
        return slots, taken

    def slots(self, user: object, rows: int, pages: Pages) -> Slots:
        """Idle rows, at least so many, that belong to ``user`` while it lives."""
        size = next((n for n in ROWS if n >= rows), rows)
        for at, (slots, owner) in enumerate(self._slots):
            if slots.rows == size and slots.pages is pages and owner() is None:
                self._slots[at] = slots, weakref.ref(user)
                return slots
        width = pages_for(self.core.max_positions + MOST)
        made = Slots(size, MOST, self.core.vocab_size, width, pages, self.core.device)
        self._slots.append((made, weakref.ref(user)))
        return made

    def forget(self, slots: Slots) -> None:
        """Drop rows with their graphs, and all pages if nobody else has any."""
        self._slots = [(each, owner) for each, owner in self._slots if each is not slots]
        if all(each.pages is not self._pages for each, _ in self._slots):
            self._pages = None

    def _room(self, count: int) -> Pages:
        """Pages of which ``count`` are free."""
        if self._pages is None or self._pages.free < count:
            # Graphs hold the addresses of the old ones: they go when nobody decodes with them.
            self._slots = [(slots, owner) for slots, owner in self._slots if owner() is not None]
            self._pages = None
            lean = self.network.lean
            size = max(64, 1 << (count - 1).bit_length())
            layers, dtype = len(lean.layers), lean.embedding.dtype
            self._pages = Pages(layers, size, lean.kv_heads, lean.head_dim, dtype=dtype, device=self.core.device)
        return self._pages

    def step(self, slots: Slots, shape: Shape, flags: Flags) -> Callable[[], object]:
        """A step of these rows that waits for nothing: a captured graph, or the twins."""
        return slots.once((shape, flags), lambda: self._ready(slots, Step(self.network, slots, shape, flags)))

    @torch.inference_mode()
    def _ready(self, slots: Slots, step: Step) -> Callable[[], object]:
        with slots.untouched():
            return self.captured(step, slots.rows * step.shape.queries)

    def captured(self, call: Callable[[], object], rows: int) -> Callable[[], object]:
        """``call``, whose products have so many rows, as a CUDA graph, after it ran twice; itself without graphs."""
        if self.plain or self.core.device.type != "cuda":
            return call
        from tidar.kernels.pdl import overlapping

        with overlapping(self._overlaps(rows)):
            # Kernels are compiled, and libraries make their handles, outside of the capture.
            call()
            call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with _nothing_collected(), torch.cuda.graph(graph):
                call()
        return Captured(graph, call)

    def _overlaps(self, rows: int) -> bool:
        """Launches overlap, which was measured to pay where they are short (docs/benchmarks.md): with all weights in
        the L2 cache, and with few rows and weights that take a few microseconds to read; and where products begin
        with their weights, before what makes their rows has ended."""
        lean = self.network.lean
        weights = [w for layer in lean.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        held = sum(w.nbytes for w in weights)
        cache = torch.cuda.get_device_properties(self.core.device).L2_cache_size
        short = held + lean.head.nbytes <= cache or (rows <= 32 and held <= SHORT * len(weights))
        return bool(short or lean.on_hopper(rows))

    def clock(self, slots: Slots, plans: Sequence[Plan], flags: Flags, halfway: int) -> Clock:
        """What steps of these plans take for these rows; measured once, and asked for again whenever rows have left.

        Args:
            slots: the rows.
            plans: of which.
            flags: of the steps.
            halfway: the longest prefix that a row will have when half of its tokens are made.
        """
        prefix = max(LEAST_PREFIX, 1 << halfway.bit_length())
        key = slots.rows, prefix, flags, tuple(plans)
        if key not in self._clocks:
            self._clocks[key] = self._measured(slots, plans, flags, prefix, halfway)
        return self._clocks[key]

    @torch.inference_mode()
    def _measured(self, slots: Slots, plans: Sequence[Plan], flags: Flags, prefix: int, halfway: int) -> Measured:
        # And the steps by which a plan begins without drafts.
        first = [Shape(1, 1, plan.draft_len) for plan in plans if plan.draft_len > 1]
        every = list(dict.fromkeys([*first, *(shape for plan in plans for shape in shapes(plan))]))
        key = f"{slots.rows} rows, prefix {prefix}, {flags}"
        if self.network.lean.deterministic:
            key += ", deterministic"
        known = self.latency.get(key)
        if any(shape not in known for shape in every):
            if sys.stderr.isatty():
                print("tidar: measuring what steps take here; once, up to a minute", file=sys.stderr)
            with slots.untouched():
                slots.limits.clamp_(max=halfway)
                slots.lengths.copy_(slots.limits)  # rows at rest: a step moves nothing
                calls = [self.step(slots, shape, flags) for shape in every]
                times = interleaved(calls, rounds=ROUNDS, repeat=REPEAT, gpu=self.core.device.type == "cuda")
            known = dict(zip(every, times, strict=True))
            self.latency.keep(key, known)
        return Measured({shape: known[shape] for shape in every})

    def prefill(self, slots: Slots, prompts: Sequence[Sequence[int]], masks: int, flags: Flags) -> tuple[Tensor, int]:
        """Compute the prompts, each alone; leave certain token and drafts in ``slots``.

        Returns:
            The certain tokens (B,) on the device, and the forwards that the longest prompt took.
        """
        network = self.network
        device, width = slots.device, network.lean.embedding.shape[1]
        last = torch.zeros(slots.rows, 1 + masks, width, dtype=network.lean.embedding.dtype, device=device)
        forwards = 0
        for row, prompt in enumerate(prompts):
            starts = range(0, len(prompt), PREFILL_PIECE)
            forwards = max(forwards, len(starts))
            for start in starts:
                piece = prompt[start : start + PREFILL_PIECE]
                end = start + len(piece) == len(prompt)
                hidden = self._piece(slots, row, piece, masks if end else 0)
                slots.lengths[row] = start + len(piece)
            last[row] = hidden
        base = torch.arange(slots.rows, dtype=torch.int32, device=device)[:, None] * (1 + masks)
        ends = Hidden(last.view(-1, width))
        certain = network.sample(network.logits(ends, base), slots, flags, first=0)
        slots.drafts[:, :1] = certain
        if flags.penalty:
            slots.seen.scatter_(1, certain, True)
        if masks > 1:
            states = base + torch.arange(2, 1 + masks, dtype=torch.int32, device=device)
            made = torch.ones(states.shape, dtype=torch.bool, device=device)
            network.draft(ends, states, made, slots, flags)
        return certain[:, 0], forwards

    def _piece(self, slots: Slots, row: int, piece: Sequence[int], masks: int) -> Tensor:
        """Hidden states (1 + masks, D) of a piece's last token and of the masks behind it."""
        network, device = self.network, slots.device
        count = len(piece)
        size = next(n for n in PIECES if n >= count)
        tokens = torch.zeros(1, size, dtype=torch.long)
        tokens[0, :count] = torch.tensor(piece)
        one = slice(row, row + 1)
        layout = StepLayout(
            causal=size,
            queries=size + masks,
            levels=torch.tensor([count] if masks else [], dtype=torch.long, device=device),
            counts=torch.tensor([count], dtype=torch.int32, device=device),
            lengths=slots.lengths[one],
            table=slots.table[one],
            workspace=slots.once(
                ("prefill", size, masks),
                lambda: network.workspace(1, size + masks),
            ),
        )
        x = network.hidden(tokens.to(device), layout, slots).x
        return torch.cat([x[count - 1 : count], x[size:]])
