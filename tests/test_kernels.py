"""The step kernels against their plain twin, and the twin against the layout; in Triton's interpreter without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given as draws
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tidar import layout, mask
from tidar.errors import TidarError
from tidar.kernels import reference
from tidar.kernels.workspace import Tiles, Workspace, own_keys, tiles

triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
from tidar.kernels import step_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = 200 if DEVICE == "cuda" else 2
# float32: rounding a score of 20 moves its weight by 2e-6; tf32 would move it by 3e-4 and more.
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    """A step: what is asked of the kernel, and how it is cut up."""

    causal: int = 4
    block: int = 4
    levels: tuple[int, ...] = (1, 2, 3, 4)
    apart: bool = False  # each row has levels of its own: the same, moved on by one from row to row
    lengths: tuple[int, ...] = (0, 37)
    heads: int = 2
    group: int = 2
    width: int = 64
    page: int = 16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    tiles: Tiles = Tiles(rows=64, keys=16, splits=3, warps=4, stages=2)  # noqa: RUF009

    @property
    def queries(self) -> int:
        return self.causal + self.block * len(self.levels)

    @property
    def each(self) -> list[list[int]]:
        """Levels of each row."""
        step = self.causal + 1
        return [[(level + self.apart * b) % step for level in self.levels] for b in range(len(self.lengths))]

    def tensors(self, seed: int = 0) -> dict[str, Any]:
        """Arguments of `attend`, with garbage wherever no committed key is; in which pages is drawn anew each time."""
        draw = torch.Generator().manual_seed(seed)
        rows, pages = len(self.lengths), max(self.lengths) // self.page + 2

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).to(self.dtype)

        table = torch.randperm(rows * pages + 1, generator=draw)[: rows * pages].view(rows, pages).int()
        stores = []
        for _ in range(2):
            store = torch.full((rows * pages + 1, self.page, self.heads, self.width), torch.nan, dtype=self.dtype)
            store[:, ::2] = 3e4  # not all stale values are NaN
            for b, length in enumerate(self.lengths):
                for i in range(length):
                    store[table[b, i // self.page], i % self.page] = normal(self.heads, self.width)
            stores.append(store)
        # Entries behind a row's prefix are not read: they may be nonsense.
        for b, length in enumerate(self.lengths):
            table[b, -(-length // self.page) :] = 10**6
        made = {
            "q": normal(rows, self.queries, self.heads * self.group, self.width) * 2,
            "k_new": normal(rows, self.queries, self.heads, self.width),
            "v_new": normal(rows, self.queries, self.heads, self.width),
            "k_pages": stores[0],
            "v_pages": stores[1],
            "block_table": table,
            "lengths": torch.tensor(self.lengths, dtype=torch.int32),
            "levels": torch.tensor(self.each if self.apart else self.levels, dtype=torch.int32),
            "sinks": normal(self.heads * self.group) if self.sinks else None,
        }
        return {name: None if t is None else t.to(DEVICE) for name, t in made.items()}

    @property
    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap}

    def workspace(self) -> Workspace:
        rows, shape = len(self.lengths), (self.queries, self.heads * self.group, self.heads, self.width)
        made = Workspace.for_step(rows, *shape, 64, dtype=self.dtype, device=DEVICE, chosen=self.tiles)
        for tensor in (made.part, made.peaks, made.totals):
            tensor.fill_(torch.nan)
        return made


def exact(case: Case, given: dict[str, Any]) -> Tensor:
    wide = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in given.items()}
    return reference.attend(**wide, **case.options)


def computed(case: Case, given: dict[str, Any]) -> Tensor:
    out = torch.full_like(given["q"], torch.nan)
    workspace = case.workspace()
    done = step_attention.attend(**given, **case.options, out=out, workspace=workspace)
    assert done is out
    assert not workspace.arrived.any(), "the last split sets the counters back"
    return out


def agree(out: Tensor, wanted: Tensor) -> bool:
    """Each query of each head, so that no one is lost in the mean; a NaN never agrees."""
    error = (out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return bool((error < BOUND[out.dtype]).all())


@pytest.fixture(autouse=True, scope="module")
def _bfloat16_in_the_interpreter() -> Iterator[None]:
    """Triton's interpreter multiplies bfloat16 matrices by their bit patterns, and cuts off instead of rounding."""
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    bfloat16, float32 = triton.language.bfloat16, triton.language.float32

    def widened(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, *(cast(self, x, float32) if x.dtype == bfloat16 else x for x in (a, b)), *rest)

    def rounded(self: Any, source: Any, wanted: Any) -> Any:
        if wanted.scalar == bfloat16 and source.dtype.scalar.primitive_bitwidth == 8:
            source = cast(self, source, float32)  # else numbers of 8 bits would become bit patterns
        if (source.dtype.scalar, wanted.scalar) != (float32, bfloat16):
            return cast(self, source, wanted)
        near = torch.from_numpy(source.data).bfloat16().view(torch.uint16)
        return TensorHandle(near.numpy(), bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", widened)
        patch.setattr(InterpreterBuilder, "cast_impl", rounded)
        yield


# --- the twin against the layout ---


def by_layout(case: Case, given: dict[str, Any], plan: layout.Layout) -> Tensor:
    """Attention over one dense run of key slots under the layout's own mask."""
    rows, wide = len(case.lengths), torch.float64
    plan = plan.windowed(case.window)
    stores = [torch.zeros(rows, plan.kv_len, case.heads, case.width, dtype=wide) for _ in range(2)]
    for store, pages, new in zip(stores, ("k_pages", "v_pages"), ("k_new", "v_new"), strict=True):
        for b, length in enumerate(case.lengths):
            for i in range(length):
                store[b, i] = given[pages][given["block_table"][b, i // case.page], i % case.page].to(wide)
            store[b, plan.slots[b]] = given[new][b].cpu().to(wide)
    out = torch.empty(rows, case.queries, case.heads * case.group, case.width, dtype=wide)
    seen = mask.dense(plan)[:, 0]
    for head in range(case.heads * case.group):
        key, value = (store[:, :, head // case.group] for store in stores)
        score = given["q"][:, :, head].cpu().to(wide) @ key.transpose(1, 2) / case.width**0.5
        if case.softcap is not None:
            score = case.softcap * (score / case.softcap).tanh()
        weight = score.exp() * seen
        extra = given["sinks"][head].cpu().to(wide).exp() if case.sinks else 0.0
        out[:, :, head] = weight @ value / (weight.sum(-1, keepdim=True) + extra)
    return out


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("window", [None, 1, 5, 24])
def test_twin_is_the_step_layout(k: int, window: int | None) -> None:
    every = tuple(range(1, k + 1))
    for levels, apart in ((every, False), (every[::2], False), ((), False), (every[:3], True)):
        case = Case(k, k, levels, apart, lengths=(0, 16, 21), window=window, softcap=20.0, sinks=True)
        given = case.tensors()
        plan = layout.step(case.lengths, k, torch.tensor(case.each, dtype=torch.long) if apart else levels)
        torch.testing.assert_close(exact(case, given).cpu(), by_layout(case, given, plan))


@pytest.mark.parametrize("window", [None, 4])
def test_twin_is_the_draft_and_verify_layout(window: int | None) -> None:
    lengths = (0, 5, 33)
    drafting = Case(causal=3, block=4, levels=(3,), lengths=lengths, window=window)
    given = drafting.tensors()
    plan = layout.prefill([3] * 3, 4, starts=lengths)
    torch.testing.assert_close(exact(drafting, given).cpu(), by_layout(drafting, given, plan))
    verifying = Case(causal=4, block=0, levels=(), lengths=lengths, window=window)
    given = verifying.tensors()
    torch.testing.assert_close(exact(verifying, given).cpu(), by_layout(verifying, given, layout.causal(lengths, 4)))


# --- the kernel against the twin ---

WIDE = Tiles(rows=128, keys=64, splits=2, warps=8, stages=2)
CASES = {
    "one token": Case(1, 0, (), lengths=(0, 16, 47)),
    "one token, one split": Case(1, 0, (), lengths=(16,), group=1, tiles=Tiles(16, 16, 1, 4, 2)),
    "k=1": Case(1, 1, (1,)),
    "k=2": Case(2, 2, (1, 2), lengths=(1, 32)),
    "k=3": Case(3, 3, (1, 2, 3), lengths=(48, 2)),
    "k=4": Case(),
    "k=8": Case(8, 8, (1, 2, 3, 4, 5, 6, 7, 8), lengths=(20,), heads=1, group=4),
    "k=16": Case(16, 16, tuple(range(1, 17)), lengths=(70,), heads=1, group=2, width=128, page=64, tiles=WIDE),
    "some proposals": Case(8, 8, (2, 7), lengths=(15, 17)),
    "levels from none, unsorted": Case(4, 3, (3, 0, 4)),
    "levels of each row": Case(8, 8, (2, 7), apart=True, lengths=(15, 0, 17)),
    "levels of each row, 16 bits": Case(5, 3, (0, 4, 1), apart=True, lengths=(3, 40), dtype=torch.float16),
    "verification": Case(5, 0, (), lengths=(0, 31, 33)),
    "draft forward": Case(3, 7, (3,), lengths=(0, 64)),
    "more causal tokens than a tile": Case(40, 3, (40, 17), lengths=(9,), tiles=Tiles(16, 16, 2, 4, 2)),
    "blocks wider than a tile": Case(2, 20, (1, 2), lengths=(9,), heads=1, tiles=Tiles(16, 16, 2, 4, 2)),
    "group of 6": Case(group=6, heads=1, lengths=(33,)),
    "group of 7": Case(group=7, heads=1, lengths=(33,), tiles=Tiles(32, 32, 1, 4, 2)),
    "D=128": Case(width=128, lengths=(16, 3)),
    "D=80": Case(width=80, lengths=(16, 3)),
    "D=96, one split": Case(width=96, lengths=(18,), tiles=Tiles(64, 16, 1, 4, 2)),
    "own keys in as many tiles as splits": Case(33, 3, (20,), lengths=(0, 9, 40), tiles=Tiles(16, 16, 3, 4, 2)),
    "pages of 64": Case(page=64, lengths=(64, 127)),
    "blocks that fill tiles": Case(8, 8, (1, 5, 8), lengths=(20, 64), tiles=Tiles(16, 32, 2, 4, 2)),
    "tiles of a page": Case(page=64, lengths=(0, 63, 64, 150), tiles=Tiles(64, 64, 2, 4, 2)),
    "tiles across pages": Case(page=16, lengths=(100, 3), tiles=Tiles(64, 64, 2, 4, 2)),
    "more splits than keys": Case(lengths=(0, 20), tiles=Tiles(64, 16, 8, 4, 2)),
    "one token, many splits": Case(1, 0, (), lengths=(200, 0), group=3, tiles=Tiles(16, 16, 32, 4, 2)),
    "parts joined in turns": Case(3, 3, (1, 3), lengths=(150,), heads=1, tiles=Tiles(64, 16, 11, 4, 2)),
    "window of 1": Case(window=1, lengths=(0, 20)),
    "window within the step": Case(8, 8, (1, 5), window=3, lengths=(18,)),
    "window": Case(window=20, lengths=(5, 70)),
    "window on a page": Case(window=16, lengths=(16, 64), tiles=Tiles(64, 16, 2, 4, 2)),
    "softcap": Case(softcap=3.0),
    "sinks": Case(sinks=True),
    "sinks, one split": Case(sinks=True, tiles=Tiles(32, 32, 1, 4, 2)),
    "everything": Case(window=30, softcap=10.0, sinks=True, width=80, group=3, lengths=(50, 0, 7), page=64),
    "float16": Case(dtype=torch.float16),
    "bfloat16": Case(dtype=torch.bfloat16, window=30, sinks=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernel_is_the_twin(case: Case) -> None:
    given = case.tensors()
    assert agree(computed(case, given), exact(case, given))


@draws(st.data())
@settings(max_examples=25, deadline=None)
def test_kernel_is_the_twin_anywhere(data: st.DataObject) -> None:
    def pick(*options: Any) -> Any:
        return data.draw(st.sampled_from(options))

    causal = pick(1, 2, 3, 4, 6)
    levels = tuple(data.draw(st.lists(st.integers(0, causal), max_size=4)))
    case = Case(
        causal=causal,
        block=pick(1, 2, 3, 4, 9) if levels else 0,
        levels=levels,
        apart=pick(False, True),
        lengths=tuple(data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=2))),
        heads=pick(1, 2),
        group=pick(1, 2, 3, 4, 7),
        width=pick(64, 80),
        page=pick(16, 64),
        window=pick(None, 1, 2, 7, 33),
        softcap=pick(None, 5.0),
        sinks=pick(False, True),
        tiles=Tiles(pick(32, 64), pick(16, 32), pick(1, 2, 5), 4, 2),
    )
    given = case.tensors(data.draw(st.integers(0, 99)))
    assert agree(computed(case, given), exact(case, given))


def test_a_workspace_serves_one_launch_after_another() -> None:
    """As layers and steps use it: longer and shorter prefixes, the parts of the one before in the way."""
    case = Case(tiles=Tiles(64, 16, 5, 4, 2))
    workspace = case.workspace()
    for lengths in ((70, 3), (0, 40), (33, 0), (70, 3)):
        now = replace(case, lengths=lengths)
        given = now.tensors()
        assert agree(step_attention.attend(**given, **now.options, workspace=workspace), exact(now, given))
        assert not workspace.arrived.any()


def test_the_same_bits_whoever_comes_last() -> None:
    case = Case(8, 8, (1, 4, 7), lengths=(260,), group=6, page=64, dtype=torch.bfloat16, tiles=Tiles(64, 64, 5, 4, 3))
    given, workspace = case.tensors(), case.workspace()
    runs = [step_attention.attend(**given, **case.options, workspace=workspace) for _ in range(RUNS)]
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert not workspace.arrived.any()


def test_chosen_tiles_and_strided_tensors() -> None:
    """As a model calls it: values a view of a fused projection, pages a layer's slice, sizes chosen by `tiles`."""
    case = Case(heads=2, group=3, dtype=torch.float16, levels=(1, 4))
    given = case.tensors()
    wanted = exact(case, given)
    fused = torch.cat([given["q"], given["k_new"], given["v_new"]], 2)
    given |= {"q": fused[:, :, :6], "k_new": fused[:, :, 6:8], "v_new": fused[:, :, 8:]}
    for name in ("k_pages", "v_pages"):
        given[name] = torch.stack([given[name] * 0, given[name]])[1]
    given["levels"] = given["levels"].long()
    assert agree(step_attention.attend(**given, **case.options), wanted)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("apart", [False, True])
def test_a_captured_step_follows_lengths_and_levels(apart: bool) -> None:
    case = Case(lengths=(20, 37), apart=apart, dtype=torch.bfloat16)
    given, workspace = case.tensors(), case.workspace()
    out = torch.empty_like(given["q"])

    def run() -> None:
        step_attention.attend(**given, **case.options, out=out, workspace=workspace)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in (1, 2):
        other = replace(case, lengths=(37 - seed, 5), levels=(2, seed, 0, 4))
        fresh = other.tensors(seed)
        for name, tensor in given.items():
            if tensor is not None:
                tensor.copy_(fresh[name])
        for tensor in (out, workspace.part, workspace.peaks, workspace.totals):
            tensor.fill_(torch.nan)
        graph.replay()
        assert agree(out, exact(other, fresh))


# --- planted faults ---


def test_a_wrong_length_is_caught() -> None:
    case = Case(lengths=(20, 37))
    given = case.tensors()
    wanted = exact(case, given)
    for wrong in ([21, 37], [20, 36], [37, 20]):
        given["lengths"] = torch.tensor(wrong, dtype=torch.int32, device=DEVICE)
        given["block_table"] = given["block_table"].clamp(max=0)
        assert not agree(computed(case, given), wanted)


def test_a_stale_key_is_caught() -> None:
    """One key behind the prefix, of an ordinary size: what NaN would shout, the comparison still hears."""
    case = Case(lengths=(20,))
    given = case.tensors()
    wanted = exact(case, given)
    page, slot = given["block_table"][0, 20 // 16], 20 % 16
    given["k_pages"][page, slot], given["v_pages"][page, slot] = given["k_new"][0, 0], given["v_new"][0, 0]
    assert agree(computed(case, given), wanted)
    given["lengths"] += 1
    assert not agree(computed(case, given), wanted)


def test_levels_of_another_row_are_caught() -> None:
    case = Case(8, 4, (1, 4), apart=True, lengths=(20, 20))
    given = case.tensors()
    swapped = given | {"levels": given["levels"].flip(0)}
    assert agree(computed(case, given), exact(case, given))
    assert not agree(computed(case, given), exact(case, swapped))
    assert not agree(computed(case, given), exact(case, given | {"levels": given["levels"][0]}))


@pytest.mark.parametrize("fault", ["other proposal", "later draft", "causal masks", "window off by one"])
def test_a_wrong_mask_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(lengths=(5, 37), window=30)
    given = case.tensors()
    right = reference.visible

    def wrong(length: int, queries: int, causal: int, levels: list[int], window: int | None, *rest: int) -> Tensor:
        seen = right(length, queries, causal, levels, window if fault != "window off by one" else 31, *rest)
        if fault == "other proposal":
            seen[8, length + 7] = True
        elif fault == "later draft":
            seen[4, length + 1] = True
        elif fault == "causal masks":
            seen[8, length + 9 : length + 12] = False
        return seen

    monkeypatch.setattr(reference, "visible", wrong)
    assert not agree(computed(case, given), exact(case, given))


# --- the write ---

WRITTEN = ("k_new", "v_new", "k_pages", "v_pages", "block_table", "lengths")


def test_steps_and_writes_are_one_causal_text() -> None:
    """Five tokens one at a time, with a write in between, and in one forward of verification."""
    whole = Case(causal=5, levels=(), block=0, lengths=(14, 0))
    given = whole.tensors()
    wanted = exact(whole, given)
    given["block_table"] = torch.arange(len(given["k_pages"]) - 1, device=DEVICE).view(2, -1).int()
    fresh = whole.tensors()
    for b, length in enumerate(whole.lengths):
        for i in range(length):
            for name in ("k_pages", "v_pages"):
                place = given["block_table"][b, i // 16], i % 16
                given[name][place] = fresh[name][fresh["block_table"][b, i // 16], i % 16]
    one = replace(whole, causal=1)
    lengths, counts = given["lengths"], torch.ones(2, dtype=torch.int32, device=DEVICE)
    for i in range(5):
        now = given | {n: given[n][:, i : i + 1] for n in ("q", "k_new", "v_new")}
        assert agree(computed(one, now), wanted[:, i : i + 1])
        reference.write_kv(**{n: now[n] for n in WRITTEN}, counts=counts)
        lengths += 1


# --- sizes and mistakes ---


def test_tiles() -> None:
    # Near what was measured fastest on an H200, at prefixes of half of the longest: (rows, splits).
    fastest = {
        "17M": ((6, 2, 64, 1024), {1: (16, 9), 16: (16, 9), 32: (16, 9), 80: (16, 5), 256: (64, 5)}),
        "1.5B": ((12, 2, 128, 2048), {1: (16, 17), 16: (16, 6), 32: (16, 6), 64: (64, 9), 128: (64, 4), 256: (64, 3)}),
        "8B": ((32, 8, 128, 2048), {1: (16, 17), 16: (16, 6), 32: (64, 6), 64: (64, 3), 128: (64, 2), 256: (64, 2)}),
    }
    for model, (shape, cases) in fastest.items():
        for queries, expected in cases.items():
            chosen = tiles(1, queries, *shape)
            assert (chosen.rows, chosen.splits) == expected, (model, queries)
    assert tiles(8, 256, 32, 8, 128, 2048).splits == 1, "rows enough to fill the GPU"
    assert tiles(1, 1, 12, 2, 128, 0).splits == 1
    step_15b, step_8b, token = (tiles(1, *case, 128, 2048) for case in ((256, 12, 2), (256, 32, 8), (1, 12, 2)))
    assert own_keys(step_8b, 16, 16, 15, 4) == 32
    assert own_keys(step_15b, 16, 16, 15, 6) == 64
    assert own_keys(token, 1, 0, 0, 6) == 16


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"dtype": torch.float64}, "tidar.kernels.reference"),
    "queries": ({"levels": torch.tensor([1, 2, 3])}, "equal blocks of masks"),
    "queries, rows apart": ({"levels": torch.ones(2, 3, dtype=torch.long)}, "equal blocks of masks"),
    "levels of other rows": ({"levels": torch.ones(3, 4, dtype=torch.long)}, r"of shape \(A \+ P,\) or \(B, A \+ P\)"),
    "levels of blocks": ({"levels": torch.ones(2, 2, 4, dtype=torch.long)}, r"of shape \(A \+ P,\) or \(B, A \+ P\)"),
    "strided levels": ({"levels": torch.ones(4, 2, dtype=torch.long).T}, "contiguous in a row"),
    "levels between": ({"levels": torch.ones(2, 4)}, "levels must be integers"),
    "window": ({"window": 0}, "above 0"),
    "sinks": ({"sinks": torch.zeros(3)}, "sinks"),
    "lengths": ({"lengths": torch.zeros(2, dtype=torch.long)}, "int32"),
    "table": ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, "block_table"),
    "pages": ({"v_pages": torch.zeros(2, 16, 3, 64)}, "pages"),
    "values": ({"v_new": torch.zeros(2, 20, 3, 64)}, "new keys and values"),
    "mixed": ({"q": torch.zeros(2, 20, 4, 64, dtype=torch.float16)}, "one dtype"),
    "heads": ({"q": torch.zeros(2, 20, 3, 64)}, "queries must be"),
    "out": ({"out": torch.zeros(2, 20, 4, 32)}, "out"),
    "workspace": ({"workspace": Case(causal=2).workspace()}, "workspace"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(change: dict[str, Any], message: str) -> None:
    case = Case(dtype=change.pop("dtype", torch.float32))
    given: dict[str, Any] = {"out": None, "workspace": None} | case.tensors() | case.options
    with pytest.raises(TidarError, match=message):
        step_attention.attend(**(given | change))
    with pytest.raises(TidarError, match="powers of 2"):
        replace(case, tiles=Tiles(24, 16, 1, 4, 2)).workspace()
