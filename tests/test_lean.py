"""The lean model against transformers' modules, through the whole of decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tidar import layout
from tidar.checkpoint import load_model
from tidar.errors import TidarError
from tidar.fast.lean import FAMILIES, LeanModel
from tidar.kernels import reference
from tidar.model import CausalLM

PAGE = 4


class Pages:
    """A paged cache of B rows, pages in no order, read and written by the plain kernels."""

    def __init__(self, lean: LeanModel, rows: int, layers: int, dtype: torch.dtype) -> None:
        pages = 12
        order = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(0))
        self.table = order.view(rows, pages).int()
        shape = (layers, rows * pages, PAGE, lean.kv_heads, lean.head_dim)
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(rows, dtype=torch.int32)
        self.lean = lean

    def attend(self, causal: int, levels: tuple[int, ...]) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        def run(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            stores = self.keys[layer], self.values[layer], self.table, self.lengths
            window = self.lean.windows[layer]
            out = reference.attend(
                q,
                k,
                v,
                *stores,
                torch.tensor(levels, dtype=torch.long),
                causal=causal,
                scale=self.lean.scale,
                window=window,
            )
            reference.write_kv(k, v, *stores, torch.full_like(self.lengths, causal))
            return out

        return run


def general(model: CausalLM, text: list[int], k: int, proposals: tuple[int, ...], drafts: Tensor) -> Tensor:
    """(L, D) of a step after ``text``, from one plain forward over everything."""
    from tidar.cache import SlotCache

    cache = SlotCache(1)
    if text:
        model.hidden(torch.tensor([text]), layout.causal([0], len(text)), cache=cache)
        cache.commit([len(text)])
    plan = layout.step([len(text)], k, proposals)
    return model.hidden(plan.tokens(drafts[None], model.mask_id), plan, cache=cache)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_the_general_path(family: str, converted: Callable[[str], Path]) -> None:
    model = load_model(converted(family), dtype="float64")
    lean = LeanModel(load_model(converted(family), dtype="float64"))
    texts = [list(b"def add(a, b)"), list(b"xy")]
    pages = Pages(lean, 2, len(lean.windows), torch.float64)
    longest = max(map(len, texts))
    with torch.inference_mode():
        padded = torch.tensor([t + [0] * (longest - len(t)) for t in texts])
        positions = torch.arange(longest).expand(2, -1)
        found = lean(padded, positions, pages.attend(longest, ()))
        for row, text in enumerate(texts):
            plain = model.hidden(torch.tensor([text]), layout.causal([0], len(text)))[0]
            torch.testing.assert_close(found[row, : len(text)], plain, rtol=1e-6, atol=1e-6)
        pages.lengths = torch.tensor([len(t) for t in texts], dtype=torch.int32)
        for k, proposals, accepted in ((3, (1, 2, 3), (2, 3)), (1, (), (1, 1)), (4, (2,), (4, 1)), (2, (1, 2), (1, 2))):
            drafts = torch.randint(200, (2, k), generator=torch.Generator().manual_seed(k))
            plan = layout.step(pages.lengths.tolist(), k, proposals)
            tokens = plan.tokens(drafts, model.mask_id)
            found = lean(tokens, plan.positions, pages.attend(k, proposals))
            for row in range(2):
                expected = general(model, texts[row], k, proposals, drafts[row])
                torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-6)
                texts[row] += drafts[row, : accepted[row]].tolist()
            pages.lengths = torch.tensor([len(t) for t in texts], dtype=torch.int32)


@pytest.mark.parametrize("family", FAMILIES)
def test_fusing_changes_nothing_and_holds_nothing_twice(family: str, converted: Callable[[str], Path]) -> None:
    model = load_model(converted(family), dtype="float32")
    tokens, plan = torch.randint(200, (1, 9)), layout.causal([0], 9)
    before = model.hidden(tokens, plan)
    names = {name: weight.clone() for name, weight in model.hf.named_parameters()}
    lean = LeanModel(model)
    torch.testing.assert_close(model.hidden(tokens, plan), before)
    assert all(torch.equal(weight, names[name]) for name, weight in model.hf.named_parameters())
    fused = lean._layers[0].qkv.untyped_storage().data_ptr()
    body: Any = model.hf.base_model
    attention = body.layers[0].self_attn
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert part.weight.untyped_storage().data_ptr() == fused


def test_what_it_does_not_do_is_refused(converted: Callable[[str], Path]) -> None:
    with pytest.raises(TidarError, match="model family 'gemma2' has no fast path"):
        LeanModel(load_model(converted("gemma2")))
    model = load_model(converted("llama"))
    model.hf.config.hidden_act = "gelu"
    with pytest.raises(TidarError, match="activation 'gelu' has no fast path"):
        LeanModel(model)
