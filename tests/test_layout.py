"""Layouts against masks written down independently, and against the leaks other implementations have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar import layout, mask
from tidar.errors import TidarError

FIGURE_3 = """
####...........
#####..........
######.........
####..###......
####..###......
####..###......
#####....###...
#####....###...
#####....###...
######......###
######......###
######......###
"""


def show(dense: torch.Tensor) -> str:
    return "\n".join("".join("#" if seen else "." for seen in row) for row in dense.tolist())


def test_step_is_figure_3() -> None:
    # prefix A B C, drafts D E F, three proposals of three masks
    plan = layout.step([3], 3)
    assert plan.positions.tolist() == [[3, 4, 5, 4, 5, 6, 5, 6, 7, 6, 7, 8]]
    assert plan.rows.tolist() == [0, 1, 2, 4, 5, 7, 8, 10, 11]
    assert show(mask.dense(plan)[0, 0]) == FIGURE_3.strip()


def documents(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    starts, ends = [], []
    at = 0
    for length in lengths:
        starts += [at] * length
        ends += [at + length] * length
        at += length
    return torch.tensor([starts]), torch.tensor([ends])


def training_by_hand(lengths: list[int], k: int, phase: int) -> torch.Tensor:
    """The paper's three rules, one pair of tokens at a time."""
    where = [(d, p) for d, length in enumerate(lengths) for p in range(length)]
    size = len(where)
    seen = torch.zeros(2 * size, 2 * size, dtype=torch.bool)
    for i, (doc_i, pos_i) in enumerate(where):
        for j, (doc_j, pos_j) in enumerate(where):
            if doc_i != doc_j:
                continue
            block_i, block_j = (pos_i + phase) // k, (pos_j + phase) // k
            seen[i, j] = pos_j <= pos_i  # clean: causal
            seen[size + i, j] = block_j < block_i  # mask: clean tokens of earlier blocks
            seen[size + i, size + j] = block_i == block_j  # mask: its own block, both ways
    return seen


lengths_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(lengths_strategy, st.integers(1, 7), st.integers(0, 6))
def test_training(lengths: list[int], k: int, phase: int) -> None:
    starts, ends = documents(lengths)
    plan = layout.training(starts, ends, torch.tensor(k), torch.tensor(phase % k))
    assert torch.equal(mask.dense(plan)[0, 0], training_by_hand(lengths, k, phase % k))
    positions = [p for length in lengths for p in range(length)]
    assert plan.positions[0].tolist() == positions * 2


@given(lengths_strategy, st.integers(1, 7), st.integers(0, 6))
def test_training_leaks_nothing(lengths: list[int], k: int, phase: int) -> None:
    starts, ends = documents(lengths)
    size = starts.shape[1]
    seen = mask.dense(layout.training(starts, ends, k, phase % k))[0, 0]
    doc = starts[0].repeat(2)
    assert not (seen & (doc[:, None] != doc)).any(), "documents see each other"
    assert not seen[:size, size:].any(), "a clean token sees a mask"
    assert not seen[size:, :size].triu().any(), "a mask sees its own label or later tokens"
    assert seen.diagonal().all()


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=3),
    st.integers(1, 5),
    st.data(),
)
def test_step_by_hand(lengths: list[int], k: int, data: st.DataObject) -> None:
    count, apart = data.draw(st.integers(0, k)), data.draw(st.booleans())
    some = st.permutations(range(1, k + 1)).map(lambda levels: sorted(levels[:count]))
    levels = [data.draw(some) for _ in lengths] if apart else [data.draw(some)] * len(lengths)
    masks = data.draw(st.none() | st.integers(1, 6))
    plan = layout.step(lengths, k, torch.tensor(levels, dtype=torch.long) if apart else levels[0], masks)
    width = k if masks is None else masks
    assert plan.queries == k + width * count
    dense = mask.dense(plan)
    for row, length in enumerate(lengths):
        kinds = [("draft", i, 0) for i in range(1, k + 1)] + [("mask", j, o) for j in levels[row] for o in range(width)]
        assert plan.rows.tolist() == [q for q, (kind, _, place) in enumerate(kinds) if kind == "draft" or place]
        for q, (kind, j, place) in enumerate(kinds):
            assert plan.positions[row, q] == length + (j - 1 if kind == "draft" else j + place)
            expected = {*range(length), *(length + i for i in range(j))}  # the prefix and drafts 1 … j
            if kind == "mask":
                expected |= {length + i for i, other in enumerate(kinds) if other[:2] == ("mask", j)}
            assert set(dense[row, 0, q].nonzero()[:, 0].tolist()) == expected


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=3), st.integers(0, 4))
def test_prefill_by_hand(rows: list[tuple[int, int]], k: int) -> None:
    starts, counts = [s for s, _ in rows], [c for _, c in rows]
    if max(counts) == 0:
        counts[0] = 1
    plan = layout.prefill(counts, k, starts=starts)
    dense = mask.dense(plan)
    width = max(counts)
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        assert len(set(plan.slots[b].tolist())) == plan.queries, "two queries write one slot"
        for q in range(plan.queries):
            seen = set(dense[b, 0, q].nonzero()[:, 0].tolist())
            slot = int(plan.slots[b, q])
            if q >= width:
                assert seen == {*range(start + count + k)}
                assert plan.positions[b, q] == start + count + q - width == slot
            elif q >= width - count:
                assert seen == {*range(slot + 1)} and plan.positions[b, q] == slot
            else:
                assert seen == {slot} and slot >= start + count + k, "padding touches only itself"


@given(lengths_strategy, st.integers(1, 7), st.integers(0, 6))
def test_rollout_by_hand(lengths: list[int], k: int, phase: int) -> None:
    """Every token of every block's continuation: the document before the block, and the continuation up to itself."""
    size, phase = sum(lengths), phase % k
    blocks = []  # (begin of the document, block's first token, its end)
    for at, length in zip([sum(lengths[:d]) for d in range(len(lengths))], lengths, strict=True):
        for first in range(k - phase, length, k):
            blocks.append((at, at + first, at + min(first + k, length)))
    starts, firsts, ends = torch.tensor([*blocks, (0, 0, 0)])[None].unbind(-1)  # and one of padding
    written: set[int] = set()
    for offset in range(k):
        plan = layout.rollout(starts, firsts, ends, offset, size)
        dense = mask.dense(plan)[0, 0]
        assert plan.kv_len == 2 * size and plan.queries == len(blocks) + 1
        for q, (at, first, end) in enumerate([*blocks, (0, 0, 0)]):
            slot, seen = int(plan.slots[0, q]), set(dense[q].nonzero()[:, 0].tolist())
            if first + offset >= end:
                assert slot == size and seen == {size}
                continue
            assert slot == size + first + offset and slot != size and slot not in written
            written.add(slot)
            assert plan.positions[0, q] == first + offset - at
            assert seen == {*range(at, first), *range(size + first, slot + 1)}
            for window in (1, 3):
                near = mask.dense(plan.windowed(window))[0, 0, q].nonzero()[:, 0].tolist()
                assert near == sorted(seen, key=lambda s: s % size)[-window:]
    assert len(written) == sum(end - first for _, first, end in blocks)


@given(lengths_strategy, st.integers(1, 7), st.integers(0, 6), st.data())
def test_masks_alone(lengths: list[int], k: int, phase: int, data: st.DataObject) -> None:
    """A run of whole blocks sees what it sees among all: clean tokens, and of masks its own; padding sees itself."""
    starts, ends = documents(lengths)
    size = starts.shape[1]
    whole = layout.training(starts, ends, k, phase % k)
    cuts = sorted({size, *(whole.block[0, size:, 0] - size).tolist()})
    first, end = sorted((data.draw(st.sampled_from(cuts)), data.draw(st.sampled_from(cuts))))
    width = end - first + data.draw(st.integers(first == end, 3))
    places = torch.arange(first, first + width)[None]
    plan = layout.masks(whole, places.clamp(max=size - 1), places < end)
    count = end - first
    for window in (None, 1, 4):
        among_all = mask.dense(whole.windowed(window))[0, 0, size + first : size + end]
        alone = mask.dense(plan.windowed(window))[0, 0]
        assert torch.equal(alone[:count, :size], among_all[:, :size])
        assert torch.equal(alone[:count, size : size + count], among_all[:, size + first : size + end])
        assert not alone[:count, size + count :].any()
        assert torch.equal(alone[count:], torch.eye(size + width, dtype=torch.bool)[size + count :])
    assert torch.equal(plan.positions[0, :count], whole.positions[0, size + first : size + end])
    assert plan.slots[0].tolist() == list(range(size, size + width)) and plan.clean == 0


@given(lengths_strategy, st.integers(1, 7), st.integers(1, 6))
def test_window_counts_positions(lengths: list[int], k: int, window: int) -> None:
    starts, ends = documents(lengths)
    for plan in (layout.training(starts, ends, k), layout.step(lengths, k), layout.causal(lengths)):
        full, windowed = mask.dense(plan), mask.dense(plan.windowed(window))
        for b in range(full.shape[0]):
            # position of every key: a committed slot's own number, or that of the query that writes it
            position = torch.arange(plan.kv_len)
            position[plan.slots[b]] = plan.positions[b]
            near = position[None] > plan.positions[b][:, None] - window
            assert torch.equal(windowed[b, 0], full[b, 0] & near)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.sampled_from([1, 3, 16, 64]), st.booleans())
def test_block_mask_equals_dense(lengths: list[int], k: int, narrow: bool) -> None:
    starts, ends = documents(lengths)
    plan = layout.training(starts, ends, torch.tensor(k), torch.tensor(k // 2)).windowed(40 if narrow else None)
    block = mask.block_mask(plan)
    dense = mask.dense(plan)[0, 0]
    queries = plan.queries
    # what the kernel would compute: full tiles whole, partial tiles through mask_mod, the rest not at all
    tile, tiles = mask.BLOCK, -(-queries // mask.BLOCK)
    rebuilt = torch.zeros(tiles * tile, tiles * tile, dtype=torch.bool)
    q, kv = torch.arange(queries)[:, None], torch.arange(queries)[None]
    exact = block.mask_mod(torch.tensor(0), torch.tensor(0), q, kv)
    padded = torch.nn.functional.pad(exact, (0, tiles * tile - queries, 0, tiles * tile - queries))
    for i in range(tiles):
        rows = slice(i * tile, (i + 1) * tile)
        for j in block.kv_indices[0, 0, i, : block.kv_num_blocks[0, 0, i]].tolist():
            rebuilt[rows, j * tile : (j + 1) * tile] = padded[rows, j * tile : (j + 1) * tile]
        assert block.full_kv_indices is not None and block.full_kv_num_blocks is not None
        for j in block.full_kv_indices[0, 0, i, : block.full_kv_num_blocks[0, 0, i]].tolist():
            rebuilt[rows, j * tile : (j + 1) * tile] = True
    assert torch.equal(rebuilt[:queries, :queries], dense)


def test_bad_levels() -> None:
    with pytest.raises(TidarError, match="at least 1"):
        layout.step([3], 0)
    for wrong in ([1, 5], [0, 1]):
        with pytest.raises(TidarError, match="between 1 and the draft length 4"):
            layout.step([3], 4, wrong)
