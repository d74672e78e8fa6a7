"""The mask half in slices against the whole forward, through the optimizer step: losses, gradients, what is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from train_data import config, pack, records, weights, write_text

from tidar import layout
from tidar.attention import Prefix, Written
from tidar.checkpoint import load_model
from tidar.errors import TidarError
from tidar.model import CausalLM
from tidar.train import parallel, sliced, start, validate
from tidar.train.inputs import Blocks, draw_blocks, make_inputs
from tidar.train.sliced import Cut
from tidar.train.step import Stepper
from tidar.train.trainer import train
from tidar.train.world import ALONE

ROWS = [[1, 7, 12, 4], [13, 1, 1, 9], [24], [3, 21]]
LONG = [[250, 3, 131], [384]]
Converted = Callable[[str], Path]


class Gradients:
    """In the optimizer's place: keeps what it would have stepped by."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.param_groups: list[dict[str, Any]] = []
        self.found: dict[str, Tensor] = {}

    def step(self) -> None:
        self.found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}

    def zero_grad(self) -> None:
        for weight in self.model.parameters():
            weight.grad = None


def made_ready(
    folder: Path, rows: list[list[int]], *, dtype: str = "float64", micro_batch: int = 2, **changes: Any
) -> Stepper:
    size = sum(rows[0])
    plan = config(
        folder,
        folder,
        seq_len=size,
        micro_batch=micro_batch,
        batch_tokens=len(rows) * size,
        clip=1e9,
        **changes,
    )
    model = load_model(folder, dtype=dtype)
    if plan.transition:
        torch.manual_seed(0)
        for weight in model.add_transition(plan.transition).parameters():
            torch.nn.init.normal_(weight, std=0.3)
    parallel.apply(model, plan, ALONE)
    stepper = Stepper(model, plan)
    stepper.optimizer = Gradients(model)  # type: ignore[assignment]
    return stepper


def stepped(stepper: Stepper, rows: list[list[int]], step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Values and gradients of one step on ``rows``."""
    count = stepper.config.micro_batch
    batches = [pack(rows[i : i + count], seed=i) for i in range(0, len(rows), count)]
    values = stepper(batches, step, 1e-3)
    return values, stepper.optimizer.found  # type: ignore[attr-defined]


def same(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]], bound: float) -> None:
    """Losses to fp32, in which they are summed, and each gradient to ``bound`` of its largest element."""
    torch.testing.assert_close(found[0], wanted[0], rtol=2e-6, atol=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        assert float((found[1][name] - gradient).abs().max()) <= bound * scale, name


CASES: dict[str, dict[str, Any]] = {
    "two blocks": {"mask_slice": 8, "block_sizes": (4,)},
    "uneven": {"mask_slice": 11, "block_sizes": (4,)},
    "all in one": {"mask_slice": 24, "block_sizes": (4,)},
    "blocks of one": {"mask_slice": 3, "block_sizes": (1,), "kl_weight": 0.0},
    "k = 3, no phase": {"mask_slice": 7, "block_sizes": (3,), "random_phase": False, "alpha": 0.0},
    "k = 8, KL": {"mask_slice": 16, "block_sizes": (8,), "kl_weight": 1.0, "alpha": 0.3},
    "no KL": {"mask_slice": 10, "kl_weight": 0.0},
    "own words": {"mask_slice": 9, "draft_text": "model", "rollout_sampled": 0.5},
    "own words, transition": {"mask_slice": 9, "draft_text": "model", "transition": 8, "offset_decay": 0.8},
    "transition": {"mask_slice": 8, "transition": 8, "kl_weight": 0.0},
    "random masking": {"mask_slice": 9, "masking": "random"},
    "checkpointing": {"mask_slice": 9, "activation_checkpointing": True},
    "micro-batches": {"mask_slice": 9, "micro_batch": 1},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_slices_are_the_whole(converted: Converted, changes: dict[str, Any]) -> None:
    """In fp64 for three steps, which draw blocks and phases of their own."""
    folder = converted("llama")
    cut, whole = made_ready(folder, ROWS, **changes), made_ready(folder, ROWS, **{**changes, "mask_slice": 0})
    for step in range(3):
        same(stepped(cut, ROWS, step), stepped(whole, ROWS, step), 1e-10)


# Their norms compute in fp32, whatever the weights are.
FP32_INSIDE = ("gemma", "gemma2", "gemma3_text", "cohere2")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(converted: Converted, family: str) -> None:
    """Windows, soft-capping, sinks, experts, norms of keys, keys of other heads: in fp64."""
    folder = converted(family)
    found, wanted = (stepped(made_ready(folder, ROWS, mask_slice=most), ROWS) for most in (9, 0))
    same(found, wanted, 2e-6 if family in FP32_INSIDE else 1e-10)


def test_rounding_is_that_of_the_whole(converted: Converted) -> None:
    """fp32 and bf16 products: the sliced gradient is as far from fp64's as the whole one, though it is a sum over
    many more slices than there would be."""
    folder = converted("qwen3")
    exact = stepped(made_ready(folder, LONG, mask_slice=0, transition=0), LONG)[1]

    def error(mask_slice: int, dtype: str) -> float:
        stepper = made_ready(folder, LONG, mask_slice=mask_slice, transition=0, dtype="float32")
        object.__setattr__(stepper.config, "dtype", dtype)
        found = stepped(stepper, LONG)[1]
        parts = [(found[n].double() - g).norm() / g.norm() for n, g in exact.items()]
        return float(torch.stack(parts).mean())

    for dtype, bound in (("fp32", 2e-5), ("bf16", 0.1)):
        whole, cut = error(0, dtype), error(12, dtype)
        assert cut < bound
        assert cut < 1.2 * whole


def test_slices_add_to_bf16_keys_in_fp32() -> None:
    """A sum of 1000 small parts in bf16 stands still long before its end."""
    leaf = sliced._leaf(torch.ones(3, dtype=torch.bfloat16))
    for _ in range(1000):
        (leaf * 0.0625).sum().backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None and leaf.grad.tolist() == [62.5] * 3
    assert sliced._leaf(torch.ones(3, dtype=torch.float64)).grad_dtype == torch.float64


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(0, 8),
    st.integers(0, 40),
    st.integers(1, 16),
)
def test_slices_hold_whole_blocks(rows: list[list[int]], k: int, phase: int, spare: int, tile: int) -> None:
    """Every mask is in one slice, as is its whole block, and no slice passes the width that was asked for."""
    size = max(sum(row) for row in rows)
    rows = [row + [1] * (size - sum(row)) for row in rows]
    batch, most = pack(rows), 2 * k + spare
    whole = layout.training(batch.starts, batch.ends, torch.tensor(k), torch.tensor(phase % k))
    cut = Cut.of(size, most, k, tile)
    assert cut.width <= -(-most // tile) * tile and cut.width % tile == 0
    assert cut.count <= 1 + size // (k + 1)
    block = whole.block[:, size:] - size
    seen = torch.zeros(len(rows), size, dtype=torch.int64)
    for places, real in cut.places(whole):
        assert places.shape == real.shape == (len(rows), cut.width)
        for row in range(len(rows)):
            mine = places[row][real[row]].tolist()
            assert real[row].tolist() == [True] * len(mine) + [False] * (cut.width - len(mine))
            if mine:
                assert mine == list(range(mine[0], mine[-1] + 1))
                assert block[row, mine[0], 0] == mine[0] and block[row, mine[-1], 1] == mine[-1] + 1
            seen[row, mine] += 1
    assert bool((seen == 1).all())


def test_slices_are_even() -> None:
    """Not three full ones and one nearly empty, which would cost as much as a full one."""
    assert Cut.of(16384, 4096, 16, 128) == Cut(5, 3277, 3328)
    assert Cut.of(32768, 8192, 16, 128) == Cut(5, 6554, 6656)
    assert Cut.of(4096, 4096, 16, 128) == Cut(1, 4096, 4096)
    assert Cut.of(10, 8, 4) == Cut(2, 5, 8)


class Held:
    """Counts the bytes that autograd holds for a backward, each storage once."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._users: dict[int, int] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        with saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda saved: saved.tensor):
            yield

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        users = self._users.get(storage.data_ptr(), 0) + by
        if users == max(0, by):  # the first came, or the last went
            self.now += by * storage.nbytes()
            self.most = max(self.most, self.now)
        self._users[storage.data_ptr()] = users


class _Saved:
    def __init__(self, held: Held, tensor: Tensor) -> None:
        self.held, self.tensor = held, tensor.detach()
        held.change(self.tensor, 1)

    def __del__(self) -> None:
        self.held.change(self.tensor, -1)


def held_by(stepper: Stepper, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[int]]:
    """Most bytes held for a backward during a step, and those held at the beginning of each forward."""
    held, begun, hidden, leaf = Held(), [], stepper.model.hidden, sliced._leaf
    keys = 0

    def watched(*args: Any, **options: Any) -> Tensor:
        begun.append(held.now)
        return hidden(*args, **options)

    def kept(made: Tensor) -> Tensor:
        nonlocal keys
        keys += 2 * made.nbytes  # itself, which autograd may hold too, and its gradient
        return leaf(made)

    monkeypatch.setattr(stepper.model, "hidden", watched)
    monkeypatch.setattr(sliced, "_leaf", kept)
    with held.counting():
        stepped(stepper, rows)
    monkeypatch.undo()
    assert held.now == 0
    return held.most + keys, begun


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_half_and_one_slice_are_held(
    converted: Converted, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    folder = converted("llama")
    options: dict[str, Any] = {"block_sizes": (16,), "activation_checkpointing": checkpointing}
    whole, _ = held_by(made_ready(folder, LONG, **options), LONG, monkeypatch)
    stepper = made_ready(folder, LONG, mask_slice=64, **options)
    most, begun = held_by(stepper, LONG, monkeypatch)
    assert most < 0.6 * whole
    assert len(begun) == 9 and begun[0] == 0
    assert len(set(begun[1:])) == 1 and begun[1] > 0, "a slice was kept"


def test_activations_are_computed_again_once(converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each forward; and what is computed again is not held in place of the clean half's keys."""
    takers: list[Written] = []
    first: list[Tensor | None] = []

    class Noted(Written):
        def __init__(self) -> None:
            super().__init__()
            takers.append(self)

    def noted(made: Tensor) -> Tensor:
        first.append(made)
        return leaf(made)

    leaf, calls = sliced._leaf, []
    monkeypatch.setattr(sliced, "Written", Noted)
    monkeypatch.setattr(sliced, "_leaf", noted)
    for checkpointing in (False, True):
        options: dict[str, Any] = {"mask_slice": 9, "block_sizes": (4,), "activation_checkpointing": checkpointing}
        stepper = made_ready(converted("llama"), ROWS, micro_batch=4, **options)
        layer = stepper.model.hf.base_model.layers[0].self_attn  # type: ignore[union-attr, index]
        seen: list[int] = []
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        stepped(stepper, ROWS)
        calls.append(len(seen))
    assert calls == [1 + 4, 2 * (1 + 4)]
    last = [part for taker in takers for part in (taker.key, taker.value)]
    assert len(last) == len(first) == 8
    assert all(one is two for one, two in zip(last, first, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of Dynamo's own making
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("apart", [False, True])
def test_compiled(converted: Converted, checkpointing: bool, apart: bool) -> None:
    """As on a GPU, whole or layer by layer, but without a code generator: Dynamo takes it in one piece, and all slices,
    steps and layers of a kind (qwen3 has two) share what it made."""
    folder = converted("qwen3")
    options: dict[str, Any] = {"mask_slice": 9, "activation_checkpointing": checkpointing}
    wanted = [stepped(made_ready(folder, ROWS), ROWS, step) for step in (0, 1)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = partial(torch.compile, backend="aot_eager", fullgraph=True, dynamic=False)
    stepper = made_ready(folder, ROWS, **options)
    if apart:
        for layer in stepper.model.hf.base_model.layers:  # type: ignore[union-attr]
            layer.forward = compiled(layer.forward)
    else:
        stepper.model.run_by(compiled(stepper.model.hf.base_model))
    assert {draw_blocks(stepper.config, step).k for step in (0, 1)} == {3, 4}
    for step in (0, 1):
        same(stepped(stepper, ROWS, step), wanted[step], 1e-10)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (4 if apart else 2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_block_masks_of_slices(converted: Converted, family: str) -> None:
    """FlexAttention, which runs on GPUs, in more than a tile of queries and keys, with a window (qwen3), and padding:
    the hidden states of all masks are those of the whole forward, and Dynamo makes no more than two graphs."""
    model = load_model(converted(family), dtype="float64")
    model.deal_keys()
    dense = model.runner
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(dense, backend="eager", fullgraph=True, dynamic=False)
    cut = Cut.of(384, 180, 16, 128)
    assert (cut.count, cut.width) == (3, 256)
    for blocks in (Blocks(16, 5), Blocks(8, 3)):
        inputs = make_inputs(pack(LONG), blocks, mask_id=model.mask_id, device=torch.device("cpu"))
        size = inputs.layout.clean
        with torch.no_grad():
            model.run_by(dense)
            wanted = model.hidden(inputs.tokens, inputs.layout)
            model.run_by(compiled)
            written = [Written() for _ in range(2)]
            plan = layout.packed(inputs.layout.causal[:, :size, 0])
            clean = model.hidden(inputs.tokens[:, :size], plan, kind="block", keys=written)
            torch.testing.assert_close(clean, wanted[:, :size], rtol=1e-9, atol=1e-9)
            prefix = [Prefix(one.key, one.value) for one in written if one.key is not None and one.value is not None]
            for places, real in cut.places(inputs.layout):
                tokens = inputs.tokens.gather(1, size + places)
                found = model.hidden(tokens, layout.masks(inputs.layout, places, real), kind="block", keys=prefix)
                rows = wanted.gather(1, (size + places)[..., None].expand_as(found))
                torch.testing.assert_close(found[real], rows[real], rtol=1e-9, atol=1e-9)
                assert bool(found.isfinite().all()), "padding sees nothing"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_validation_keeps_nothing(converted: Converted) -> None:
    """Its forward is the whole one: with what a backward needs it would hold more than training ever does."""
    inputs = make_inputs(pack(ROWS[:2]), Blocks(4, 0), mask_id=0, device=torch.device("cpu"))
    folder, most = converted("llama"), []
    adapted = config(folder, folder, adapter_rank=2)  # which runs its halves apart too
    steppers = [made_ready(folder, ROWS, mask_slice=mask_slice) for mask_slice in (0, 9)]
    for stepper in [*steppers, Stepper(start.model(adapted, None), adapted)]:
        held = Held()
        with held.counting():
            validate._hidden(stepper, inputs)
        most.append(held.most)
    assert most[0] > 0 and most[1:] == [0, 0]


def test_a_run_that_was_too_large_goes_on(converted: Converted, tmp_path: Path) -> None:
    """With what the line on lacking memory says; rounding aside, to the same weights."""
    write_text(tmp_path / "text")
    plan = config(tmp_path, converted("llama"), optimizer="adamw")
    wanted = train(plan).model
    again = replace(plan, out=str(tmp_path / "again"))
    train(replace(again, max_seconds=1e-9))
    less = replace(again, mask_slice=9, micro_batch=1, activation_checkpointing=True)
    found = train(less, resume=True).model
    assert wanted is not None and found is not None
    for name, weight in weights(found).items():
        assert float((weight - weights(wanted)[name]).abs().mean()) < 1e-4, name


def test_a_run(converted: Converted, tmp_path: Path) -> None:
    """With validation, which has the whole forward."""
    write_text(tmp_path / "text")
    folder = converted("llama")
    options: dict[str, Any] = {"optimizer": "adamw", "eval_every": 6}
    runs = {}
    for name, most in (("whole", 0), ("sliced", 9)):
        plan = config(tmp_path, folder, out=str(tmp_path / name), mask_slice=most, **options)
        runs[name] = train(plan).model
    lines = [records(tmp_path / name) for name in runs]
    for one, two in zip(*lines, strict=True):
        assert one.keys() == two.keys()
        same_keys = {"loss", "ar", "draft", "kl", "grad_norm", "bits_per_byte", "draft_3", "draft_4"} & one.keys()
        assert len(same_keys) > 2
        for key in same_keys:
            assert one[key] == pytest.approx(two[key], rel=1e-3), key
    assert runs["whole"] is not None and runs["sliced"] is not None
    for name, weight in weights(runs["sliced"]).items():
        assert float((weight - weights(runs["whole"])[name]).abs().mean()) < 1e-4, name


@pytest.mark.parametrize("changes", [{"mask_slice": 7}, {"mask_slice": -1}, {"mask_slice": 16, "objective": "ar"}])
def test_wrong_width(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(TidarError, match="mask_slice must be 0, or at least twice"):
        config(tmp_path, tmp_path, block_sizes=(4,), **changes)
