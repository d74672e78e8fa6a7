"""A row's bits do not depend on what else is in a step, where tiles are fixed; in the interpreter without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import DEVICE, _bfloat16_in_the_interpreter, agree  # noqa: F401
from torch import Tensor

from tidar.api import Model, load
from tidar.checkpoint import embedded_checkpoint, load_model
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.plan import Shape
from tidar.decode.policy import Alternating, Autoregressive, Fixed, Policy
from tidar.errors import TidarError
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import Engine
from tidar.fast.network import Flags
from tidar.fast.step import Step
from tidar.kernels import reference
from tidar.kernels.product_tiles import fixed_tiles
from tidar.kernels.workspace import Tiles, Workspace
from tidar.kernels.workspace import fixed_tiles as attention_tiles

pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
from tidar.kernels import products, step_attention

HEADS, KV, WIDTH, PAGE, TEXT = 4, 2, 32, 16, 90
SMALL = Tiles(rows=16, keys=16, splits=3, warps=4, stages=2)


class Text:
    """Queries, keys and values of a text of TEXT tokens, the latter two in pages; NaN behind ``known`` tokens."""

    def __init__(self, known: int, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)
        self.q, keys, values = (torch.randn(TEXT, n, WIDTH, generator=draw) for n in (HEADS, KV, KV))
        self.q *= 2
        pages = -(-TEXT // PAGE)
        self.table = torch.randperm(pages, generator=draw)[None].int()
        self.stores = []
        for part in (keys, values):
            store = torch.full((pages, PAGE, KV, WIDTH), torch.nan)
            for i in range(known):
                store[self.table[0, i // PAGE], i % PAGE] = part[i]
            self.stores.append(store.to(dtype).to(DEVICE))
        self.own = keys, values
        self.dtype = dtype

    def attend(
        self, start: int, causal: int, levels: tuple[int, ...] = (), *, cached: int, window: int | None = None
    ) -> Tensor:
        """(causal, HEADS, WIDTH) of the tokens from ``start``, in a step with random masks behind them."""
        masks = torch.randn(4 * len(levels), HEADS, WIDTH)
        q = torch.cat([self.q[start : start + causal], masks])[None].to(self.dtype).to(DEVICE)
        own = []
        for _ in self.own:
            # Causal keys are taken from the pages alone.
            nothing = torch.full((causal, KV, WIDTH), torch.nan)
            own.append(torch.cat([nothing, torch.randn(len(masks), KV, WIDTH)])[None].to(self.dtype).to(DEVICE))
        workspace = Workspace.for_step(
            1, q.shape[1], HEADS, KV, WIDTH, 64, dtype=self.dtype, device=DEVICE, chosen=SMALL
        )
        keys, values = own
        out = step_attention.attend(
            q,
            keys,
            values,
            self.stores[0],
            self.stores[1],
            self.table.to(DEVICE),
            torch.tensor([start], dtype=torch.int32, device=DEVICE),
            torch.tensor(levels, dtype=torch.int32, device=DEVICE),
            causal=causal,
            window=window,
            cached=torch.tensor([cached], dtype=torch.int32, device=DEVICE),
            workspace=workspace,
        )
        return out[0, :causal]

    def exact(self, at: int, window: int | None) -> Tensor:
        """(HEADS, WIDTH) of token ``at``, in float64."""
        first = 0 if window is None else max(0, at - window + 1)
        k, v = (part[first : at + 1].to(self.dtype).double().repeat_interleave(2, 1) for part in self.own)
        score = torch.einsum("hd,nhd->hn", self.q[at].to(self.dtype).double(), k) / WIDTH**0.5
        return torch.einsum("hn,nhd->hd", score.softmax(-1), v).to(DEVICE)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_attends_alike_in_every_step(dtype: torch.dtype, window: int | None) -> None:
    for at in (0, 5, 63, 81):
        text = Text(at + 1, dtype)
        alone = text.attend(at, 1, cached=1, window=window)[0]
        assert agree(alone, text.exact(at, window))
        for back, causal, levels in ((0, 4, (1, 3)), (3, 8, (2, 4, 8)), (5, 6, ())):
            start = at - back
            if start < 0 or start + causal > TEXT:
                continue
            # Nothing behind the query is known: those that see more see NaN only where they may.
            among = text.attend(start, causal, levels, cached=back + 1, window=window)[back]
            assert torch.equal(among, alone), (at, back, levels)
        if at:
            assert torch.equal(text.attend(0, at + 1, cached=at + 1, window=window)[at], alone), "as in a prompt"


def test_without_the_cache_it_does_not() -> None:
    """The same step as it is cut up otherwise: it is the alignment that makes the bits equal, not chance."""
    text = Text(TEXT, torch.float32)
    at, start, causal = 70, 60, 16
    alone = text.attend(at, 1, cached=1)[0]
    own = [part[None, start : start + causal].contiguous().to(DEVICE) for part in text.own]
    lengths = torch.tensor([start], dtype=torch.int32, device=DEVICE)
    levels = torch.empty(0, dtype=torch.int32, device=DEVICE)
    q = text.q[None, start : start + causal].contiguous().to(DEVICE)
    given: Any = (q, *own, *text.stores, text.table.to(DEVICE), lengths, levels)
    workspace = Workspace.for_step(1, causal, HEADS, KV, WIDTH, 64, dtype=q.dtype, device=DEVICE, chosen=SMALL)
    among = step_attention.attend(*given, causal=causal, workspace=workspace)[0, at - start]
    assert agree(among, text.exact(at, None)) and not torch.equal(among, alone)
    assert torch.equal(reference.attend(*given, causal=causal), reference.attend(*given, causal=causal, cached=lengths))


@pytest.mark.parametrize("itemsize", [2, 4])
def test_fixed_tiles(itemsize: int) -> None:
    for features, depth in ((640, 384), (384, 1024), (17920, 1536), (4096, 12288), (151936, 4096)):
        tiles = fixed_tiles(features, depth, itemsize)
        assert not tiles.tma and tiles.splits == 1 and depth % tiles.depth == 0
    assert attention_tiles(128, itemsize).splits > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_product_is_alike_in_every_step(dtype: torch.dtype) -> None:
    x, norm = torch.randn(70, 96).to(dtype).to(DEVICE), torch.rand(96).to(dtype).to(DEVICE)
    weight = (torch.randn(64, 96) / 10).to(dtype).to(DEVICE)
    tiles = fixed_tiles(64, 96, dtype.itemsize)
    for run in (products.norm_linear, products.norm_gated):
        whole = run(x, norm, weight, eps=1e-6, tiles=tiles)
        for row in (0, 33, 69):
            assert torch.equal(run(x[row : row + 1], norm, weight, eps=1e-6, tiles=tiles)[0], whole[row])


def engine_of(converted: Callable[[str], Path]) -> Engine:
    return Engine(load_model(converted("qwen3"), device=DEVICE, dtype="bfloat16"), deterministic=True)


def hidden(engine: Engine, text: list[int], start: int, shape: Shape) -> Tensor:
    """(drafts, D) of the text from ``start`` as the drafts of a step, with their logits behind them."""
    network, greedy = engine.network, Flags(sampling=False, filtering=False, penalty=False)
    with torch.inference_mode():
        slots, _ = engine.open(engine, [text[:start]], [SamplingParams(max_new_tokens=40)])
        engine.prefill(slots, [text[:start]], shape.masks if shape.proposals else 0, greedy)
        step = Step(network, slots, shape, greedy)
        drafts = torch.tensor([text[start : start + shape.drafts]], device=engine.core.device)
        states = network.hidden(drafts, step._layout, slots)
        logits = network.lean.logits(states, step._verify[:, : shape.drafts].flatten())
        return torch.cat([states.x[: shape.drafts].float(), logits], 1)


@pytest.mark.skipif(DEVICE == "cpu", reason="whole steps of such tiles take minutes in the interpreter")
def test_a_token_is_alike_in_every_step(converted: Callable[[str], Path]) -> None:
    """Through the whole network, in bf16: prompt, drafts and masks before and around it."""
    text, one = list(b"def add(a, b):\n    return a + b\n" * 3), Shape(1, 0, 1)
    engine = engine_of(converted)
    for at in (40, 66):
        alone = hidden(engine, text, at, one)[0]
        for back, shape in ((0, Shape(4, 2, 4)), (3, Shape(5, 0, 5)), (2, Shape(3, 3, 3)), (1, Shape(4, 2, 4, 3))):
            assert torch.equal(hidden(engine, text, at - back, shape)[back], alone), (at, shape)


@pytest.mark.skipif(DEVICE == "cpu", reason="whole steps of such tiles take minutes in the interpreter")
def test_tokens_are_the_same_in_bf16(converted: Callable[[str], Path]) -> None:
    engine, prompts = engine_of(converted), [list(b"def add(a, b):"), list(b"x"), list(b"import os\nimport sys\n")]
    each = [SamplingParams(max_new_tokens=8, seed=n, temperature=0.8 * (n % 2)) for n in range(3)]

    def decode(policy: Callable[[], Policy], batch: int) -> list[list[int]]:
        found = generation.generate(engine.core, prompts, each, lambda: FastDecoder(engine, policy()), batch)
        return [completion.token_ids for completion in found]

    expected = decode(Autoregressive, 1)
    assert decode(lambda: Fixed(3, 2), 3) == expected
    assert decode(lambda: Fixed(3, 2, 4), 3) == expected
    assert decode(lambda: Alternating(4), 2) == expected


def test_the_way_there_is_the_same(converted: Callable[[str], Path]) -> None:
    """Through the plain twins: keys are written before they are attended to, in prompts and steps."""
    model = load_model(converted("qwen3"), dtype="float64")
    prompts, each = [list(b"def add(a, b):"), list(b"x")], [SamplingParams(max_new_tokens=12)] * 2
    expected = [c.token_ids for c in Model(model).generate(prompts, each, method="ar")]
    engine = Engine(load_model(converted("qwen3"), dtype="float64"), plain=True, deterministic=True)
    for policy in (Autoregressive(), Fixed(3, 2), Fixed(4, 2, 3)):
        found = generation.generate(engine.core, prompts, each, partial(FastDecoder, engine, policy), 2)
        assert [c.token_ids for c in found] == expected


@pytest.mark.skipif(DEVICE == "cpu", reason="whole steps of such tiles take minutes in the interpreter")
def test_the_reference_checkpoint_is_the_same_in_bf16() -> None:
    """Of its real size: parts of many query rows are joined by a launch, those of few by the last program."""
    engine = Engine(load_model(embedded_checkpoint(), device=DEVICE, dtype="bfloat16"), deterministic=True)
    text = engine.core.tokenizer("import os\n\n\nclass Walker:\n    def walk(self, top):\n" * 9)["input_ids"]
    for at in (30, 100, 150):
        alone = hidden(engine, text, at, Shape(1, 0, 1))[0]
        for back, shape in (
            (0, Shape(16, 15, 16)),
            (5, Shape(16, 0, 16)),
            (3, Shape(4, 3, 4)),
            (2, Shape(8, 3, 8, 4)),
        ):
            assert torch.equal(hidden(engine, text, at - back, shape)[back], alone), (at, shape)
    each = [SamplingParams(max_new_tokens=100, ignore_eos=True, seed=n, temperature=0.8 * (n % 2)) for n in range(6)]
    prompts = [text[:40], text[7:90], text[:130], text[3:20], text[50:150], text[9:59]]

    def decode(policy: Policy, batch: int) -> list[list[int]]:
        found = generation.generate(engine.core, prompts, each, partial(FastDecoder, engine, policy), batch)
        return [completion.token_ids for completion in found]

    expected = decode(Autoregressive(), 1)
    for policy, batch in ((Fixed(16, 15), 1), (Fixed(8, 3), 6), (Fixed(8, 3, 4), 6), (Alternating(16), 2)):
        assert decode(policy, batch) == expected


def test_it_takes_the_fast_path(converted: Callable[[str], Path]) -> None:
    if DEVICE == "cpu":
        with pytest.raises(TidarError, match="takes the fast path, and the model is on cpu.*float32"):
            load(converted("qwen3"), deterministic=True)
        return
    model = load(converted("qwen3"), deterministic=True)
    assert model.deterministic
    with pytest.raises(TidarError, match="Gumbel"):
        model.generate("x", method="tidar", acceptance="ratio")
