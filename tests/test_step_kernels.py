"""The kernels before and behind the network, against their plain twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels import reference_step as plain
from tidar.kernels.reference_step import HEAD

pytest.importorskip("triton")
from tidar.kernels import accept as fused
from tidar.kernels.rotate import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


LEVELS = {
    "shared": [2, 3],
    "of each row": [[1, 3], [2, 3], [1, 2]],
    "none": [[], [], []],
}


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize(("heads", "kv", "width"), [(6, 2, 64), (3, 1, 24), (4, 4, 16)])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotate(heads: int, kv: int, width: int, normed: bool, dtype: torch.dtype, levels: str) -> None:
    torch.manual_seed(0)
    chosen = torch.tensor(LEVELS[levels], dtype=torch.long, device=DEVICE)
    rows, causal, page, pages = 3, 3 if chosen.numel() else 7, 4, 9
    queries = causal + 2 * chosen.shape[-1]  # the last one is behind the end of the rotary table in a row
    lengths, counts = ints(6, 0, 11), ints(5, 3, 0)
    table = torch.randperm(pages, device=DEVICE)[: 3 * 3].view(3, 3).int()
    projected = torch.randn(rows, queries, heads + 2 * kv, width, device=DEVICE).to(dtype)
    angle = torch.randn(14, width // 2, device=DEVICE).repeat(1, 2)
    norms = [torch.randn(width, device=DEVICE).to(dtype) if normed else None for _ in range(2)]
    results = []
    for run in (plain.rotate, rotate):
        stores = [torch.full((pages, page, kv, width), torch.nan, device=DEVICE).to(dtype) for _ in range(2)]
        turn = angle.cos().to(dtype), angle.sin().to(dtype)
        given: list[Any] = [projected, *norms, *turn, *stores, table, lengths, counts, chosen]
        q, k, v = run(*given, eps=1e-6, causal=causal)
        results.append((q, k, v, *stores))
    for mine, theirs in zip(*results, strict=True):
        close = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(theirs, mine, equal_nan=True, rtol=close, atol=close)
    written = ~results[1][3].isnan().all(-1).all(-1)
    # Row 2's table ends after 12 tokens, and it writes none; rows 0 and 1 write 5 and 3.
    assert int(written.sum()) == 8


def test_levels_that_do_not_fit() -> None:
    for run in (plain.rotate, rotate):
        stores = torch.zeros(4, 8, 1, 16, device=DEVICE), torch.zeros(4, 8, 1, 16, device=DEVICE)
        turn, heads = (torch.ones(20, 16, device=DEVICE),) * 2, torch.ones(2, 7, 3, 16, device=DEVICE)
        rest = ints(0, 1, 2, 3).view(2, 2), ints(4, 9), ints(3, 3)
        for levels, why in (
            (torch.ones(3, dtype=torch.long), "3 equal blocks"),
            (torch.ones(3, 2, dtype=torch.long), "shape"),
            (torch.ones(2, 4, dtype=torch.long, device=DEVICE)[:, ::2], "contiguous"),
            (torch.ones(2, 2), "integers"),
        ):
            with pytest.raises(TidarError, match=why):
                run(heads, None, None, *turn, *stores, *rest, levels.to(DEVICE), eps=1e-6, causal=3)


@pytest.mark.parametrize(
    ("levels", "places"),
    [
        ([1, 3], [[0, 1, 2, 1, 2, 3, 4]] * 2),
        ([[3, 0], [1, 2]], [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 1, 2, 2, 3]]),
        ([[], []], [[0, 1, 2]] * 2),
    ],
)
def test_where_queries_stand(levels: list[Any], places: list[list[int]]) -> None:
    """With a cosine that is the position, and no sine, ones are turned to their positions."""
    chosen = torch.tensor(levels, dtype=torch.long, device=DEVICE)
    cos = torch.arange(20.0, device=DEVICE)[:, None].repeat(1, 16)
    turn, expected = (cos, torch.zeros_like(cos)), torch.tensor(places, device=DEVICE) + ints(4, 9)[:, None]
    for run in (plain.rotate, rotate):
        stores = torch.zeros(4, 8, 1, 16, device=DEVICE), torch.zeros(4, 8, 1, 16, device=DEVICE)
        heads = torch.ones(2, len(places[0]), 3, 16, device=DEVICE)
        rest = ints(0, 1, 2, 3).view(2, 2), ints(4, 9), ints(3, 3), chosen
        q, k, _ = run(heads, None, None, *turn, *stores, *rest, eps=1e-6, causal=3)
        for turned in (q, k):
            assert torch.equal(turned, expected[:, :, None, None].expand_as(turned).float())


def test_rotate_drops_what_its_table_has_no_page_for() -> None:
    stores = torch.zeros(3, 2, 1, 16, device=DEVICE), torch.zeros(3, 2, 1, 16, device=DEVICE)
    heads = torch.ones(2, 2, 3, 16, device=DEVICE)
    turn = torch.ones(8, 16, device=DEVICE), torch.zeros(8, 16, device=DEVICE)
    table = ints(1, 2).view(2, 1)
    none = ints(dtype=torch.long)
    rotate(heads, None, None, *turn, *stores, table, ints(1, 0), ints(2, 2), none, eps=1e-6, causal=2)
    assert stores[1][:, :, 0, 0].tolist() == [[0, 0], [0, 1], [1, 1]]


def test_rotate_refuses_what_does_not_fit() -> None:
    heads, pages, ones = (torch.ones(shape, device=DEVICE) for shape in ((1, 2, 4, 16), (3, 2, 1, 16), (8, 16)))
    stores, turn = (pages, pages), (ones, ones)
    rest = ints(1).view(1, 1), ints(0), ints(1), ints()
    with pytest.raises(TidarError, match="counts must be int32"):
        rotate(heads, None, None, *turn, *stores, *rest[:2], ints(1, 1), ints(), eps=1e-6, causal=2)
    with pytest.raises(TidarError, match="both or not at all"):
        rotate(heads, turn[0][0], None, *turn, *stores, *rest, eps=1e-6, causal=2)
    with pytest.raises(TidarError, match="are not queries and"):
        rotate(heads[:, :, :2].contiguous(), None, None, *turn, *stores, *rest, eps=1e-6, causal=2)


def test_embed() -> None:
    table = torch.randn(7, 24, device=DEVICE)
    drafts = ints(1, 2, 3, 4, 5, 6, dtype=torch.long).view(2, 3)
    for count, queries in ((2, 5), (3, 3), (1, 1)):
        expected = plain.embed(drafts, table, 6, queries, count)
        assert torch.equal(fused.embed(drafts, table, 6, queries, count), expected)
        assert torch.equal(expected[:, :count], table[drafts[:, :count]])


PICKED: dict[str, list[list[int]]] = {  # of each row, for 1, 2, 3, 4 and 4 accepted drafts of 4
    "all": [[1, 2, 3, 4]] * 5,
    "the same": [[2, 4]] * 5,
    "of each row": [[2, 3], [1, 4], [2, 3], [1, 2], [3, 4]],
    "one": [[1], [1], [4], [3], [4]],
    "none": [[]] * 5,
}


@pytest.mark.parametrize("masks", [4, 2, 1])
@pytest.mark.parametrize("picked", PICKED)
@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("ranked", [True, False])
def test_accept(picked: str, masks: int, bad: int, ranked: bool) -> None:
    """Every number of accepted drafts, against the twin and against what it should be, written out."""
    rows, k, most, vocab = 5, 4, 6, 50
    levels = PICKED[picked]
    queries = k + len(levels[0]) * masks
    drafts = torch.arange(10, 10 + rows * most, device=DEVICE).view(rows, most) % vocab
    sampled = torch.cat([drafts[:, 1:k], drafts[:, :1] + 7], 1)
    for row, wrong in enumerate((0, 1, 2)):
        sampled[row, wrong] += 1
    expected = [1, 2, 3, 4, 4]
    places = torch.stack([torch.randperm(k, generator=torch.Generator().manual_seed(row)) for row in range(rows)])
    outcomes = []
    for run in (plain.accept, fused.accept):
        state: dict[str, Any] = {
            "drafts": drafts.clone(),
            "lengths": ints(5, 6, 7, 8, 3),
            "limits": ints(99, 99, 99, 10, 3),
            "tickets": ints(0, 1, 2, 3, 6),
            "ring": torch.full((4, rows, HEAD + most), -9, dtype=torch.int32, pin_memory=DEVICE == "cuda"),
            "bad": ints(bad),
            "seen": torch.zeros(rows, vocab, dtype=torch.bool, device=DEVICE),
        }
        states, made, _ = run(
            sampled.contiguous(),
            **state,
            levels=torch.tensor(levels, dtype=torch.long, device=DEVICE),
            places=places.to(DEVICE) if ranked else None,
            masks=masks,
            queries=queries,
        )
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        outcomes.append({**state, "states": states, "made": made})
    got = outcomes[1]
    for name, mine in outcomes[0].items():
        if levels[0] or name not in ("states", "made"):  # which nobody reads without proposals
            assert torch.equal(mine, got[name]), name
    assert got["lengths"].tolist() == [6, 8, 10, 10, 3]
    assert got["tickets"].tolist() == [1, 2, 3, 4, 7]
    assert int((got["ring"] != -9).any(-1).sum()) == rows, "one entry a row"
    for row, n in enumerate(expected):
        entry = got["ring"][[0, 1, 2, 3, 2][row], row].tolist()
        level = max((level for level in levels[row] if level <= n), default=None)
        behind = masks if level is None else n - level
        place = int(places[row, n - 1]) if ranked else -9
        assert entry[: HEAD + n] == [-1 if bad else n, behind, place, -1, 0, *sampled[row, :n].tolist()]
        assert entry[HEAD + n :] == [-9] * (most - n)
        assert got["drafts"][row].tolist() == [int(sampled[row, n - 1]), *drafts[row, 1:].tolist()]
        assert set(got["seen"][row].nonzero().flatten().tolist()) == set(sampled[row, :n].tolist())
        for j in range(1, masks if levels[row] else 1):
            there = level is not None and j + n - level < masks
            assert bool(got["made"][row, j - 1]) == there
            if level is not None and there:
                at = row * queries + k + levels[row].index(level) * masks + j + n - level
                assert int(got["states"][row, j - 1]) == at
    if levels[0]:
        assert bool((got["states"] >= 0).all()) and bool((got["states"] < rows * queries).all())
