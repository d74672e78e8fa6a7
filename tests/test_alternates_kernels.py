"""What alternates need of layout and kernels: who sees them, where they stand, which are picked, what they tell."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import Case, agree, computed, exact
from torch import Tensor

from tidar import layout, mask, proposals
from tidar.config import SamplingParams
from tidar.errors import TidarError
from tidar.kernels import reference, reference_chain
from tidar.kernels import reference_step as plain
from tidar.kernels.reference_step import Picking, Runners
from tidar.proposals import KNOWN, RUNNERS_UP, outcomes, paired
from tidar.sampling import RowParams, runners_up

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# --- who sees whom ---


def test_layout_by_hand() -> None:
    found = layout.step([2], 2, [1, 2], 2, alternates=[1, 1, 2], pairs=1)
    sees = mask.dense(found)[0, 0] if mask.dense(found).dim() == 4 else mask.dense(found)[0]
    rows = [
        "1110 000 00 00",  # d_1
        "1111 000 00 00",  # d_2
        "1110 100 00 00",  # behind d_1
        "1110 110 00 00",  # and behind that
        "1111 001 00 00",  # behind d_2
        "1110 000 11 00",
        "1110 000 11 00",
        "1111 000 00 11",
        "1111 000 00 11",
    ]
    expected = [[c == "1" for c in row.replace(" ", "")] for row in rows]
    assert sees.tolist() == expected
    assert found.positions.tolist() == [[2, 3, 3, 4, 4, 3, 4, 4, 5]]
    assert (found.clean, found.rows.tolist()) == (5, [0, 1, 2, 3, 4, 6, 8])
    with pytest.raises(TidarError, match="levels must lie between 1 and the draft length 2"):
        layout.step([2], 2, [1], 2, alternates=[3])


# --- attention ---


@dataclasses.dataclass(frozen=True)
class Others(Case):
    """A step with alternates, whose levels stand before those of the blocks."""

    alternates: int = 4
    pairs: int = 1

    @property
    def queries(self) -> int:
        return self.causal + self.alternates + (len(self.levels) - self.alternates) * self.block

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"alternates": self.alternates, "pairs": self.pairs}


FEW = (1, 1, 3, 2, 0, 3)
CASES = {
    "a pair": Others(levels=FEW),
    "no pairs": Others(levels=FEW, pairs=0),
    "pairs only": Others(levels=(2, 2, 1, 1, 3), pairs=2),
    "blocks of one": Others(levels=FEW, block=1),
    "many": Others(
        alternates=21, pairs=7, levels=(2,) * 8 + (0, 0) + (4,) * 6 + (1, 4, 4, 2, 3, 0, 1, 4), causal=4, block=3
    ),
    "window": Others(levels=FEW, window=9, lengths=(5, 37)),
    "own levels": Others(levels=FEW, apart=True, lengths=(5, 37, 0)),
    "small tiles": dataclasses.replace(
        Others(alternates=9, pairs=4, levels=(1, 1, 2, 2, 1, 1, 3, 3, 0, 3)),
        tiles=dataclasses.replace(Case().tiles, rows=16),
    ),
}


def test_visible_is_the_layout() -> None:
    """The kernels' twin and the layout say the same, each in its own way."""
    for k, levels, m, others, pairs, window in (
        (3, [1, 3], 4, [2, 2, 1], 1, None),
        (4, [2], 2, [3, 3, 1, 1], 2, 3),
        (2, [1, 2], 1, [1], 0, None),
    ):
        plan = layout.step([6], k, levels, m, alternates=others, pairs=pairs)
        wanted = mask.dense(plan.windowed(window))
        wanted = wanted.view(wanted.shape[-2:])
        assert torch.equal(reference.visible(6, plan.queries, k, others + levels, window, len(others), pairs), wanted)


@pytest.mark.parametrize("name", CASES)
def test_attention_with_alternates(name: str) -> None:
    case = CASES[name]
    given = case.tensors()
    assert agree(computed(case, given), exact(case, given))


@pytest.mark.parametrize("fault", ["each other", "masks see them", "a later draft", "not themselves", "not the first"])
def test_a_wrong_view_of_alternates_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Others(levels=FEW, lengths=(5, 37))
    given = case.tensors()
    right, first = reference.visible, case.causal

    def wrong(length: int, *rest: Any) -> Tensor:
        seen = right(length, *rest)
        if fault == "each other":
            seen[first + 2, length + first] = True
        elif fault == "masks see them":
            seen[first + case.alternates, length + first] = True
        elif fault == "not the first":
            seen[first + 1, length + first] = False
        elif fault == "a later draft":
            seen[first, length + case.levels[0]] = True
        else:
            seen[first, length + first] = False
        return seen

    monkeypatch.setattr(reference, "visible", wrong)
    assert not agree(computed(case, given), exact(case, given))


def test_queries_must_be_as_many_as_said() -> None:
    case = Others(levels=FEW)
    given = case.tensors()
    for alternates, pairs in ((40, 1), (-1, 0), (6, 1), (4, 3), (4, -1)):  # the third leaves no masks
        with pytest.raises(TidarError, match="alternates with -?[0-9]* pairs"):
            reference.attend(**given, **case.options | {"alternates": alternates, "pairs": pairs})


def test_rotate_places_alternates() -> None:
    from tidar.kernels.rotate import rotate

    turn = torch.arange(64.0, device=DEVICE)[:, None].repeat(1, 16), torch.zeros(64, 16, device=DEVICE)
    place = [0, 1, 2, 1, 2, 3, 1, 1, 2, 3, 4]
    levels = torch.tensor([1, 1, 3, 1, 1, 3], device=DEVICE)
    stores = torch.zeros(3, 8, 1, 16, device=DEVICE), torch.zeros(3, 8, 1, 16, device=DEVICE)
    rest = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([4]).int(), torch.tensor([3]).int()
    for run in (rotate, plain.rotate):
        heads = torch.ones(1, 11, 3, 16, device=DEVICE)
        options: dict[str, Any] = {"eps": 1e-6, "causal": 3, "alternates": 4, "pairs": 1}
        given = *turn, *stores, *(t.to(DEVICE) for t in rest), levels
        q, k, _ = run(heads, None, None, *given, **options)
        for turned in (q, k):
            assert turned[0, :, 0, 0].tolist() == [4.0 + each for each in place]


# --- beside the network ---


def test_the_likeliest_pairs_by_hand() -> None:
    """Of an outcome and a token; outcomes of 4 drafts, the last of which has no other token."""
    levels, ranks = proposals.alternates(torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.0, 0.0, 1.0, 0.0]]), 6)
    pairs = [list(zip(*row, strict=True)) for row in zip(levels.tolist(), ranks.tolist(), strict=True)]
    # 0.6 · (.33, .12, .075, .05) and 0.1 · .33, of two drafts alike
    assert pairs[0] == [(2, 0), (2, 1), (2, 2), (1, 0), (3, 0), (2, 3)]
    assert pairs[1] == [(3, 0), (3, 1), (3, 2), (3, 3), (1, 0), (1, 1)]
    levels, ranks = proposals.alternates(torch.tensor([[0.5, 0.5]]), 6)
    assert levels.tolist() == [[1] * 6] and ranks.tolist() == [[0, 1, 2, 3, 0, 0]], "there are no more"
    assert paired(torch.tensor([[1, 2, 3]]), torch.tensor([[7, 8, 9]]), 2).tolist() == [[1, 7, 2, 8, 3]]


@pytest.mark.parametrize("k", [2, 5, 16])
@pytest.mark.parametrize("scored", [False, True])
def test_embed_picks_their_tokens(scored: bool, k: int) -> None:
    """The best behind the draft, of tokens in their order or of lists with their scores, and what follows them."""
    from tidar.kernels import accept as fused

    rows, count, each, pairs, vocab, listed, states = 3, 2, 7, 3, 90, 16, 40
    table = torch.randn(vocab, 8, device=DEVICE)
    chances = torch.rand(rows, k + 2, device=DEVICE)
    drafts = torch.randint(vocab, (rows, k + 2), device=DEVICE)
    runners = Runners(*(torch.randint(vocab, (rows, k, RUNNERS_UP), device=DEVICE) for _ in range(2)))
    if scored:
        scores = torch.randn(rows, k, listed, listed, device=DEVICE).round(decimals=1)  # some are equal
        successors = torch.randint(2**62, (rows, k, listed), device=DEVICE) // 2**54 % vocab << 32
        whose = (torch.randint(n, (rows, k), device=DEVICE).int() for n in (listed, states))
        named = torch.randint(vocab, (states, listed), device=DEVICE).int()
        runners = Runners(named, successors + torch.randint(2**32, (rows, k, listed), device=DEVICE), scores, *whose)
    best, behind = runners.best()
    found = []
    for run in (fused.embed, plain.embed):
        places, chosen = (torch.full((rows, n), -7, device=DEVICE) for n in (k, each + pairs + count))
        tokens = torch.full((rows, each + pairs), -7, device=DEVICE)
        picking = Picking(chances, places, chosen, runners, tokens, pairs)
        out = run(drafts, table, vocab - 1, k + each + pairs + count * 4, k, picking=picking)
        below, rank = proposals.alternates(outcomes(chances[:, 1:k]), each)
        for row in range(rows):
            both = zip(below[row].tolist(), rank[row].tolist(), strict=True)
            wanted = [(level, int(best[row, level - 1, r]), int(behind[row, level - 1, r])) for level, r in both]
            flat = [(level, token) for level, *two in wanted[:pairs] for token in two]
            flat += [(level, token) for level, token, _ in wanted[pairs:]]
            assert chosen[row, :-count].tolist() == [level for level, _ in flat]
            assert tokens[row].tolist() == [token for _, token in flat]
        assert torch.equal(chosen[:, -count:], proposals.levels(places, count))
        assert torch.equal(out[:, :k], table[drafts[:, :k]])
        assert torch.equal(out[:, k : k + each + pairs], table[tokens])
        assert torch.equal(out[:, k + each + pairs :], table[-1].expand(rows, count * 4, 8))
        found.append((places, chosen, tokens, out))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_embed_picks_something_of_nan() -> None:
    from tidar.kernels import accept as fused

    table, drafts = torch.randn(9, 8, device=DEVICE), torch.ones(1, 5, dtype=torch.long, device=DEVICE)
    chances = torch.full((1, 5), torch.nan, device=DEVICE)
    runners = Runners(*(torch.full((1, 4, RUNNERS_UP), 3, device=DEVICE) for _ in range(2)))
    tokens, chosen = (
        torch.zeros(1, 3, dtype=torch.long, device=DEVICE),
        torch.zeros(1, 4, dtype=torch.long, device=DEVICE),
    )
    fused.embed(drafts, table, 8, 12, 5, picking=Picking(chances, chosen.new_zeros(1, 5), chosen, runners, tokens, 1))
    assert tokens.tolist() == [[3] * 3] and all(1 <= level <= 4 for level in chosen[0, :3].tolist())


def test_runners_up_by_hand() -> None:
    """Behind whichever token of the list before came; and in their lists of which the second is meant."""
    scores = torch.full((1, 2, 6, 6), -9.0)
    scores[0, 0, :3, :3] = torch.tensor([[9.0, 1.0, 2.0], [3.0, 5.0, 5.0], [0.0, 0.0, 0.0]])
    tokens = torch.tensor([[0] * 6, [70, 80, 90, 1, 2, 3]], dtype=torch.int32)
    listed = torch.tensor([[1, 0]], dtype=torch.int32)
    followers = torch.tensor([[[9] * 6, [10, 11, 12, 13, 14, 15]]]) << 32 | 77
    for came, wanted in ((0, [90, 80]), (1, [90, 70]), (2, [80, 90])):
        best, behind = Runners(tokens, followers, scores, torch.tensor([[came, 0]], dtype=torch.int32), listed).best()
        assert best[0, 0, :2].tolist() == wanted
        assert behind[0, 0, :2].tolist() == [{70: 10, 80: 11, 90: 12}[token] for token in wanted]
        assert not behind[0, 1].any(), "nothing is drafted behind the last"
    params = RowParams.of([SamplingParams()], device=torch.device("cpu"))
    named = runners_up(torch.tensor([[[1.0, 5.0, 3.0]]]), params, None, torch.tensor([[1]]), 4)
    assert named.tolist() == [[[2, 0, 0, 0]]], "a small vocabulary has no more"


def test_accept_by_hand() -> None:
    """Levels 1 and 3 of four drafts are drafted for; a pair behind 1, one behind 2, and single ones behind 3 and 1."""
    from tidar.kernels import accept as fused

    others = torch.tensor([[50, 60, 51, 61, 52, 53]] * 7, device=DEVICE)
    levels = torch.tensor([[1, 1, 2, 2, 3, 1, 1, 3]] * 7, device=DEVICE)
    #          pair, right | pair, wrong | of another level | second alone | single | single, seen twice | none stands
    stand = [1, 2, 2, 1, 3, 1, 4]
    follow = [50, 51, 50, 60, 52, 53, 99]
    met, given, behind = [0, 1, -1, -1, 2, 3, -1], [2, 1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0, 1]
    told = torch.tensor([[60, 31, 99, 33, 34, 35]] * 7, device=DEVICE)
    drafts = torch.arange(35, device=DEVICE).view(7, 5)
    sampled = drafts[:, :4].roll(-1, 1)
    for row, n in enumerate(stand):
        sampled[row, n - 1] = follow[row]
    queries = 4 + 6 + 2 * 5
    for module in (fused, plain):
        ints = [torch.zeros(7, dtype=torch.int32, device=DEVICE) for _ in range(3)]
        ring = torch.zeros(2, 7, 9, dtype=torch.int32, pin_memory=DEVICE == "cuda")
        after = drafts.clone()
        rest = [after, ints[0], ints[1] + 99, ints[2], ring, torch.zeros_like(ints[0][:1])]
        options = {"places": None, "alternates": others, "pairs": 2, "masks": 5, "queries": queries}
        states, made, sure = module.accept(torch.cat([sampled, told], 1), *rest, levels=levels, **options)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        assert ring[0, :, 1].tolist() == behind and ring[0, :, 3].tolist() == met
        assert ring[0, :, 4].tolist() == sure.tolist() == given
        seconds = [60, 99, 0, 0, 34, 35, 0]
        for row in range(7):
            block = 5 if stand[row] >= 3 else 0
            plainly = [row * queries + 10 + block + behind[row] + j for j in (1, 2, 3, 4)]
            assert made[row].tolist() == [j + behind[row] < 5 for j in (1, 2, 3, 4)]
            assert states[row, : 4 - behind[row]].tolist() == plainly[: 4 - behind[row]]
            wanted = [follow[row], *drafts[row, 1:].tolist()]
            wanted[1] = seconds[row] if given[row] else wanted[1]
            wanted[2] = 31 if given[row] > 1 else wanted[2]
            assert after[row].tolist() == wanted


@pytest.mark.parametrize("sampling", [False, True])
def test_the_chain_tells_what_came_next(sampling: bool) -> None:
    """Of all drafts but those that were given; and what would have followed."""
    from tidar.kernels import chain as fused
    from tidar.kernels.shortlists import Shortlists

    draw = torch.Generator().manual_seed(1)
    rows, places, vocab, width = 3, 4, 300, 20

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(DEVICE)

    base, state, tokens, mix = (
        normal(rows, places, vocab),
        normal(rows, places, width),
        normal(vocab, width),
        normal(vocab, width),
    )
    first, suppressed = torch.tensor([3, 7, 9], device=DEVICE), torch.zeros(vocab, dtype=torch.bool, device=DEVICE)
    made = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool, device=DEVICE)
    known = torch.tensor([1, 0, 2], dtype=torch.int32, device=DEVICE)
    given = base, state, first, made, tokens, mix, suppressed
    options: dict[str, Any] = {
        "temperature": torch.tensor([0.9, 0.0, 0.7], device=DEVICE),
        "seed": torch.tensor([5, 6, 7], device=DEVICE),
        "lengths": torch.tensor([11, 2, 5], dtype=torch.int32, device=DEVICE),
        "offset": 1,
        "sampling": sampling,
    }
    lists = Shortlists.for_step(rows, places, ranked=True, device=DEVICE)
    named = reference_chain.PlainLists.of(rows, places, ranked=True, device=DEVICE)
    found = []
    for module, kept in ((fused, lists), (reference_chain, named)):
        chances, out = torch.zeros(rows, places, device=DEVICE), torch.full((rows, places), 44, device=DEVICE)
        module.chain(*given, **options, given=known, out=out, chances=chances, shortlists=kept)
        found.append((out, chances, *kept.runners.best()))
    out, chances, others, behind = found[0]
    torch.testing.assert_close(chances, found[1][1])
    chances = chances.cpu()
    assert torch.equal(out, found[1][0])
    assert torch.equal(others[0, 1:], found[1][2][0, 1:]) and torch.equal(others[1], found[1][2][1])
    assert torch.equal(behind[0, 1:], found[1][3][0, 1:]) and torch.equal(behind[1], found[1][3][1])
    assert out[0, 0] == 44 and out[2].tolist() == [44, 44, 0, 0] and 44 not in out[1]
    assert chances[0, 0] == pytest.approx(KNOWN) and chances[0, 3] == 0 and bool((chances[1] < 1).all())
    assert chances[2].tolist() == pytest.approx([KNOWN, KNOWN, 0, 0])
    for place in range(places - 1):
        same = {int(out[1, place]), *others[1, place].tolist()}
        assert len(same) == RUNNERS_UP + 1, "none twice, and not the draft"
        # What follows a token is what the chain drafts behind it.
        for token, follower in zip(others[1, place].tolist(), behind[1, place].tolist(), strict=True):
            forced = torch.tensor([[44] * place + [token] + [0] * (places - place - 1)], device=DEVICE)
            one: dict[str, Any] = {n: v[1:2] if isinstance(v, Tensor) else v for n, v in options.items()}
            one["given"] = torch.tensor([place + 1], dtype=torch.int32, device=DEVICE)
            rest = base[1:2], state[1:2], first[1:2], made[1:2], tokens, mix, suppressed
            assert reference_chain.chain(*rest, **one, out=forced)[0, place + 1] == follower


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tidar.kernels import accept
kinds = dict(named="*i32", followers="*i64", scores="*fp32", came="*i32", listed="*i32", sampled="*i64",
    drafts="*i64", lengths="*i32", limits="*i32", tickets="*i32", ring="*i32", places="*i64", given="*i32",
    levels="*i64", alternates="*i64", states="*i32", made="*i1", seen="*i1", bad="*i32",
    table="*bf16", out="*bf16", chances="*fp32")
sizes = dict(DRAFTS=16, DRAFTS_UP=16, PROPOSALS=3, PDL=1, QUERIES=80, OTHERS=16, PAIRS=5)
for kernel, more in (
    (accept._embed, dict(D=384, WIDTH=512, RUNS=15, SLOTS=256, SHARES=(0.3, 0.1, 0.1, 0.1), SLOT_BITS=22)),
    (accept._accept, dict(PROPOSALS_UP=4, OTHERS_UP=16, HEAD=5, MASKS=16, MASKS_UP=16, DEPTH=16)),
):
    fixed, names = sizes | more, kernel.arg_names
    types = {n: "constexpr" if n in fixed else kinds.get(n, "i32") for n in names}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in fixed.items()}, {})
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=1))
"""


@pytest.mark.slow
def test_picking_and_accepting_compile_for_hopper(tmp_path: Path) -> None:
    """The interpreter takes programs that the compiler does not; the compiler needs no GPU."""
    (tmp_path / "compile.py").write_text(COMPILE)
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, tmp_path / "compile.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
