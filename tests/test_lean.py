"""The lean model against transformers' modules, through the whole of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from picking import chances_for
from test_transition import with_transition
from torch import Tensor

from tidar import layout
from tidar.cache import SlotCache
from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.decode.plan import Shape
from tidar.errors import TidarError
from tidar.fast import ops
from tidar.fast.engine import Engine
from tidar.fast.lean import FAMILIES, LeanModel
from tidar.fast.network import Flags
from tidar.fast.step import Step
from tidar.model import CausalLM

KERNELS = ops.load(plain=True)


def general(model: CausalLM, text: list[int], k: int, levels: Sequence[int], drafts: Tensor) -> Tensor:
    """(L, D) of a step after ``text``, from plain forwards."""
    cache = SlotCache(1)
    model.hidden(torch.tensor([text]), layout.causal([0], len(text)), cache=cache)
    cache.commit([len(text)])
    plan = layout.step([len(text)], k, levels)
    return model.hidden(plan.tokens(drafts[None], model.mask_id), plan, cache=cache)[0]


STEPS: list[tuple[int, list[list[int]], tuple[int, int]]] = [
    (3, [[1, 2, 3]] * 2, (2, 3)),
    (1, [[], []], (1, 1)),
    (4, [[2], [4]], (4, 1)),
    (2, [[1, 2]] * 2, (1, 2)),
    (5, [[1, 4], [2, 3]], (2, 5)),
]
"""Drafts, what each row drafts for, and how many drafts stand in each."""


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_the_general_path(family: str, converted: Callable[[str], Path]) -> None:
    model = load_model(converted(family), dtype="float64")
    engine = Engine(load_model(converted(family), dtype="float64"), plain=True)
    network, lean = engine.network, engine.network.lean
    texts = [list(b"def add(a, b)") * 6, list(b"xy")]
    greedy = Flags(sampling=False, filtering=False, penalty=False)
    with torch.inference_mode():
        slots, _ = engine.open(engine, texts, [SamplingParams(max_new_tokens=50)] * 2)
        engine.prefill(slots, texts, 3, greedy)
        for k, levels, accepted in STEPS:
            drafts = torch.randint(200, (2, k), generator=torch.Generator().manual_seed(k))
            step = Step(network, slots, Shape(k, len(levels[0]), k), greedy)
            slots.chances[:, 1:k] = chances_for(levels, k)
            x = network.hidden(drafts, step._layout, slots).x
            assert step._levels.tolist() == levels
            found = KERNELS.norm(x, lean.norm, eps=lean.eps).view(2, -1, x.shape[1])
            for row in range(2):
                expected = general(model, texts[row], k, levels[row], drafts[row])
                # transformers computes norms in float32 whatever the model's dtype, the twins do not.
                torch.testing.assert_close(found[row], expected, rtol=0, atol=2e-5)
                texts[row] += drafts[row, : accepted[row]].tolist()
            slots.lengths.copy_(torch.tensor([len(t) for t in texts]))


@pytest.mark.parametrize("family", FAMILIES)
def test_fusing_changes_nothing_and_holds_nothing_twice(family: str, converted: Callable[[str], Path]) -> None:
    model = load_model(converted(family), dtype="float32")
    tokens, plan = torch.randint(200, (1, 9)), layout.causal([0], 9)
    before = model.hidden(tokens, plan)
    names = {name: weight.clone() for name, weight in model.hf.named_parameters()}
    lean = LeanModel(model, KERNELS)
    torch.testing.assert_close(model.hidden(tokens, plan), before)
    assert all(torch.equal(weight, names[name]) for name, weight in model.hf.named_parameters())
    fused = lean.layers[0].qkv
    assert isinstance(fused, Tensor)
    shared = fused.untyped_storage().data_ptr()
    body: Any = model.hf.base_model
    attention = body.layers[0].self_attn
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert part.weight.untyped_storage().data_ptr() == shared


def test_what_it_does_not_do_is_refused(converted: Callable[[str], Path]) -> None:
    with pytest.raises(TidarError, match="model family 'gemma2' has no fast path"):
        LeanModel(load_model(converted("gemma2")), KERNELS)
    model = load_model(converted("llama"))
    model.hf.config.hidden_act = "gelu"
    with pytest.raises(TidarError, match="activation 'gelu' has no fast path"):
        LeanModel(model, KERNELS)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_head_and_gate_are_one_product(family: str, converted: Callable[[str], Path]) -> None:
    """With tied weights and without; the kernels against the twins, which compute them apart."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = with_transition(converted(family), dtype="float32", device=device)
    body: Any = model.hf.base_model
    norm = body.norm.weight
    with torch.no_grad():  # with ones, a second norm would change nothing
        norm.copy_(torch.linspace(0.2, 3, len(norm)))
    names = {name: weight.clone() for name, weight in model.named_parameters()}
    plain, lean = LeanModel(model, KERNELS), LeanModel(model, ops.load(plain=False))
    assert all(torch.equal(weight, names[name]) for name, weight in model.named_parameters())
    assert model.transition is not None and isinstance(lean.head, Tensor)
    shared = lean.head.untyped_storage().data_ptr()
    assert model.transition.state.weight.untyped_storage().data_ptr() == shared
    assert model.hf.get_output_embeddings().weight.untyped_storage().data_ptr() == shared
    tied = model.hf.config.tie_word_embeddings
    assert (lean.embedding.untyped_storage().data_ptr() == shared) == tied

    def attend(number: int, layer: object, heads: Tensor) -> Tensor:
        return heads[:, : lean.heads].reshape(len(heads), -1)

    x = torch.randn(5, lean.embedding.shape[1], generator=torch.Generator().manual_seed(0)).to(device)
    rows = torch.tensor([4, 0, 0], dtype=torch.int32, device=device)
    with torch.inference_mode():
        wanted, hidden = plain(x.clone(), attend), lean(x.clone(), attend)
        for chosen in (None, rows):
            logits, gates = lean.ends(hidden, chosen)
            assert logits.untyped_storage().data_ptr() == gates.untyped_storage().data_ptr()
            torch.testing.assert_close((logits, gates), plain.ends(wanted, chosen), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lean.logits(hidden, chosen), logits, rtol=1e-4, atol=1e-5)
