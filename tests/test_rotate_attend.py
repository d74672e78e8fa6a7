"""Norms, rotation, the cache's write and attention in one launch, against the two launches and against the twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given as draws
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.policy import Fixed
from tidar.errors import TidarError
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import PIECES, Engine
from tidar.fast.lean import FAMILIES
from tidar.kernels import reference, reference_step
from tidar.kernels.workspace import Tiles

pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
from test_kernels import DEVICE, Case, _bfloat16_in_the_interpreter, agree  # noqa: F401

from tidar.kernels import step_attention
from tidar.kernels.rotate import rotate

EPS = 1e-6
STORES = ("k_pages", "v_pages")


@dataclass(frozen=True)
class Turned:
    """A step whose heads come as projected; some of its tokens are written, and of the rotary table not all is there.

    ``counts`` is repeated over the rows.
    """

    step: Case
    counts: tuple[int, ...] = (4, 2, 0)
    normed: bool = True
    positions: int = 512

    def tensors(self, seed: int = 0) -> dict[str, Any]:
        """Arguments of `rotate_attend`; a row has the pages that it writes to, but no other behind its prefix."""
        given, step = self.step.tensors(seed), self.step
        draw = torch.Generator().manual_seed(seed)
        counts = [self.counts[b % len(self.counts)] for b in range(len(step.lengths))]
        table, width, page = given["block_table"].cpu(), step.width, step.page
        used = {int(n) for b, length in enumerate(step.lengths) for n in table[b, : -(-length // page)]}
        fresh = [n for n in range(len(given["k_pages"])) if n not in used]
        for b, (length, count) in enumerate(zip(step.lengths, counts, strict=True)):
            for n in range(-(-length // page), min(-(-(length + count) // page), table.shape[1])):
                table[b, n] = fresh.pop()
        angle = torch.rand(self.positions, width // 2, generator=draw) * 7
        turn = {
            "cos": angle.cos().repeat(1, 2).to(step.dtype),
            "sin": angle.sin().repeat(1, 2).to(step.dtype),
            "counts": torch.tensor(counts, dtype=torch.int32),
            "block_table": table,
            **{n: torch.rand(width, generator=draw).to(step.dtype) + 0.5 for n in ("q_norm", "k_norm") if self.normed},
        }
        given |= {"q_norm": None, "k_norm": None} | {n: t.to(DEVICE) for n, t in turn.items()}
        return given | {"heads": torch.cat([given.pop(n) for n in ("q", "k_new", "v_new")], 2)}


def cloned(given: dict[str, Any]) -> dict[str, Any]:
    return {n: t if t is None else t.clone() for n, t in given.items()}


def at_once(case: Turned, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both stores."""
    now, workspace = cloned(given), case.step.workspace()
    out = step_attention.rotate_attend(**now, eps=EPS, **case.step.options, workspace=workspace)
    assert not workspace.arrived.any(), "the last split sets the counters back"
    assert all(torch.equal(bits(now[n]), bits(t)) for n, t in given.items() if t is not None and n not in STORES)
    return out, now["k_pages"], now["v_pages"]


def one_by_one(
    case: Turned, given: dict[str, Any], turn: Callable[..., Any], attend: Callable[..., Tensor], **more: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of two functions."""
    now = cloned(given)
    names = ("heads", "q_norm", "k_norm", "cos", "sin")
    cache = [now[n] for n in (*STORES, "block_table", "lengths")]
    levels = now["levels"]
    heads = turn(*(now[n] for n in names), *cache, now["counts"], levels, eps=EPS, causal=case.step.causal)
    out = attend(*heads, *cache, levels, sinks=now["sinks"], **case.step.options, **more)
    return out, now["k_pages"], now["v_pages"]


def exact(case: Turned, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The twins', attention in float64."""

    def attend(*tensors: Tensor, **options: Any) -> Tensor:
        sinks = options.pop("sinks")
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        return reference.attend(*wide, sinks=None if sinks is None else sinks.double(), **options)

    return one_by_one(case, given, reference_step.rotate, attend)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same(mine: Tensor, theirs: Tensor) -> bool:
    """To the bit in the interpreter; a compiler may sum a norm in another order."""
    if DEVICE == "cpu":
        return torch.equal(bits(mine), bits(theirs))
    close = 1e-5 if mine.dtype == torch.float32 else 2e-2
    return torch.allclose(mine.float(), theirs.float(), close, close, equal_nan=True)


def close(mine: Tensor, theirs: Tensor) -> bool:
    bound = 1e-5 if mine.dtype == torch.float32 else 2e-2
    return torch.allclose(mine.float(), theirs.float(), bound, bound, equal_nan=True)


def right(case: Turned, given: dict[str, Any]) -> bool:
    mine, wanted = at_once(case, given), exact(case, given)
    return agree(mine[0], wanted[0]) and close(mine[1], wanted[1]) and close(mine[2], wanted[2])


SMALL = Tiles(16, 16, 3, 4, 2)
CASES = {
    "a token": Turned(Case(1, 0, (), lengths=(0, 16, 47)), counts=(1, 1, 0)),
    "a token, one split": Turned(Case(1, 0, (), lengths=(15, 16), tiles=Tiles(16, 16, 1, 4, 2)), (1,), False),
    "every count": Turned(Case(lengths=(0, 14, 15, 16, 37)), counts=(0, 1, 2, 3, 4)),
    "k=3": Turned(Case(3, 3, (1, 2, 3), lengths=(48, 2)), counts=(3, 1), normed=False),
    "k=8": Turned(Case(8, 8, (1, 2, 3, 4, 5, 6, 7, 8), lengths=(20,), heads=1, group=4), counts=(8,)),
    "levels of each row": Turned(Case(8, 8, (2, 7), apart=True, lengths=(15, 0, 17)), counts=(8, 3)),
    "verification": Turned(Case(5, 0, (), lengths=(0, 31, 33)), counts=(5,)),
    "draft forward": Turned(Case(3, 7, (3,), lengths=(0, 64)), counts=(3, 2), normed=False),
    "more causal tokens than a tile": Turned(
        Case(40, 3, (40, 17), lengths=(9,), tiles=Tiles(16, 16, 2, 4, 2)), counts=(39,)
    ),
    "own keys in more tiles than splits": Turned(Case(33, 3, (20,), lengths=(7,), heads=1, tiles=SMALL), counts=(33,)),
    "causal tokens end with the last tile": Turned(Case(8, 0, (), lengths=(5,), tiles=SMALL), counts=(8,)),
    "and a head behind": Turned(Case(6, 4, (5, 3), lengths=(5,), group=3, tiles=SMALL), (6,), False),
    "own keys in larger tiles": Turned(
        Case(16, 16, (3, 16), lengths=(70,), heads=1, page=64, tiles=Tiles(64, 64, 2, 4, 2)), (16,), False
    ),
    "more splits than keys": Turned(Case(lengths=(0, 20), tiles=Tiles(64, 16, 8, 4, 2))),
    "tiles across pages": Turned(Case(lengths=(100, 3), tiles=Tiles(64, 64, 2, 4, 2))),
    "window within the step": Turned(Case(8, 8, (1, 5), window=3, lengths=(18,)), counts=(8,)),
    "positions end": Turned(Case(lengths=(20, 37)), positions=39),
    "positions end in one row": Turned(Case(levels=(0, 2, 3), apart=True, lengths=(34, 35)), positions=39),
    "D=80": Turned(Case(width=80, lengths=(16, 3)), normed=False),
    "everything": Turned(
        Case(window=30, softcap=10.0, sinks=True, width=96, group=3, lengths=(50, 7), page=64), counts=(4, 3)
    ),
    "float16": Turned(Case(dtype=torch.float16), normed=False),
    "bfloat16": Turned(Case(dtype=torch.bfloat16, window=30, sinks=True)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_launch_is_two(case: Turned, monkeypatch: pytest.MonkeyPatch) -> None:
    given = case.tensors()
    assert right(case, given)
    # Keys that are turned come in smaller tiles, and so in another order of sums.
    monkeypatch.setattr(step_attention, "TURNED", 64)
    apart = one_by_one(case, given, rotate, step_attention.attend, workspace=case.step.workspace())
    mine = at_once(case, given)
    # Padded halves move the terms of a product.
    exactly = same if case.step.width == 64 else close
    assert exactly(mine[0], apart[0])
    assert same(mine[1], apart[1]) and same(mine[2], apart[2])


@draws(st.data())
@settings(max_examples=12, deadline=None)
def test_one_launch_is_two_anywhere(data: st.DataObject) -> None:
    def pick(*options: Any) -> Any:
        return data.draw(st.sampled_from(options))

    causal = pick(1, 2, 3, 6, 17)
    levels = tuple(data.draw(st.lists(st.integers(0, causal), max_size=3)))
    step = Case(
        causal=causal,
        block=pick(1, 3, 4, 9) if levels else 0,
        levels=levels,
        apart=pick(False, True),
        lengths=tuple(data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=2))),
        heads=pick(1, 2),
        group=pick(1, 3, 4),
        width=pick(64, 80),
        page=pick(16, 64),
        window=pick(None, 2, 7, 33),
        sinks=pick(False, True),
        tiles=Tiles(pick(16, 32), pick(16, 32), pick(1, 2, 5), 4, 2),
    )
    counts = tuple(data.draw(st.lists(st.integers(0, causal), min_size=2, max_size=2)))
    case = Turned(step, counts, pick(True, False))
    assert right(case, case.tensors(data.draw(st.integers(0, 99))))


def test_what_has_no_page_is_dropped() -> None:
    """A row at the end of its table, whose next entry is the next row's first page."""
    case = Turned(Case(lengths=(15, 31, 32)), counts=(4,))
    given = case.tensors()
    given["block_table"] = torch.arange(6, dtype=torch.int32, device=DEVICE).view(3, 2)
    for name in STORES:
        given[name] = torch.randn_like(given[name][:6])
    out, *stores = at_once(case, given)
    assert agree(out, exact(case, given)[0])
    for name, store in zip(STORES, stores, strict=True):
        written = (store != given[name]).flatten(2).all(2).flatten()
        assert written.nonzero().flatten().tolist() == [15, 16, 17, 18, 63]


def test_norms_round_as_the_twin_does() -> None:
    """Before the weight and behind it; sums in another order move a few."""
    case = Turned(Case(lengths=(20, 37), dtype=torch.bfloat16), counts=(4,))
    given = case.tensors()
    before, mine, wanted = (bits(t) for t in (given["k_pages"], at_once(case, given)[1], exact(case, given)[1]))
    written = mine != before
    assert int(written.sum()) > 900 and (mine == wanted)[written].double().mean() > 0.99


# --- planted faults ---


@pytest.mark.parametrize(
    "fault", ["a position", "a level", "another row's levels", "a count", "the sine", "a weight", "another row's key"]
)
def test_a_fault_is_caught(fault: str) -> None:
    case = Turned(Case(levels=(1, 2, 3), apart=True, lengths=(20, 37)), counts=(3, 4))
    given = case.tensors()
    mine, wanted = at_once(case, given), exact(case, given)
    if fault == "a position":
        given["cos"], given["sin"] = given["cos"].roll(1, 0), given["sin"].roll(1, 0)
    elif fault == "a level":
        given["levels"][0, 1] += 1
    elif fault == "another row's levels":
        given["levels"] = given["levels"][0]
    elif fault == "a count":
        given["counts"][0] -= 1
    elif fault == "the sine":
        given["sin"] *= -1
    elif fault == "a weight":
        given["k_norm"][3] *= 1.01
    else:
        given["heads"][0, 2, -3] = given["heads"][1, 2, -3]
    faulty = exact(case, given)
    assert agree(mine[0], wanted[0]) and close(mine[1], wanted[1])
    assert not (agree(mine[0], faulty[0]) and close(mine[1], faulty[1]) and close(mine[2], faulty[2]))


def test_mistakes() -> None:
    case = Turned(Case())
    given = case.tensors() | {"eps": EPS} | case.step.options
    with pytest.raises(TidarError, match="both or not at all"):
        step_attention.rotate_attend(**(given | {"k_norm": None}))
    with pytest.raises(TidarError, match="counts must be int32"):
        step_attention.rotate_attend(**(given | {"counts": given["counts"].long()}))
    with pytest.raises(TidarError, match="equal blocks of masks"):
        step_attention.rotate_attend(**(given | {"levels": given["levels"][:3]}))
    with pytest.raises(TidarError, match="are not queries and"):
        step_attention.rotate_attend(**(given | {"heads": given["heads"][:, :, :-3].contiguous()}))
    odd = {n: given[n][..., :63].contiguous() for n in ("heads", "cos", "sin", *STORES)}
    with pytest.raises(TidarError, match="have no halves"):
        step_attention.rotate_attend(**(given | odd))


# --- who calls it ---


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_tables_repeat_their_first_half(family: str, converted: Callable[[str], Path]) -> None:
    """The kernels read no more of them."""
    network = Engine(load_model(converted(family), dtype="float32"), plain=True).network
    for table in (network.cos, network.sin):
        assert torch.equal(*table.chunk(2, -1))


def test_steps_take_one_launch_and_prompts_two(converted: Callable[[str], Path]) -> None:
    engine = Engine(load_model(converted("qwen3"), dtype="float32"), plain=True)
    seen = []

    def spied(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append((name, args[0].shape[1]))
            return run(*args, **options)

        return call

    names = ("rotate", "attend", "rotate_attend")
    kernels = vars(engine.network.ops)
    engine.network.ops = SimpleNamespace(**kernels | {name: spied(name, kernels[name]) for name in names})
    params = [SamplingParams(max_new_tokens=6)]
    list(generation.generate(engine.core, [[1, 2, 3]], params, lambda: FastDecoder(engine, Fixed(2, 2)), 1))
    prompts = {name for name, queries in seen if queries >= PIECES[0]}
    steps = {name for name, queries in seen if queries < PIECES[0]}
    assert (prompts, steps) == ({"rotate", "attend"}, {"rotate_attend"})
