"""What steps draft ahead for: the arithmetic by hand, the kernel that picks, and that decoders pick what is likely."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picking import chances_for, chances_of
from test_transition import with_transition
from torch import Tensor

from tidar.api import Model
from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.plan import Outcome, Shape
from tidar.decode.policy import Alternating, Fixed
from tidar.decode.tidar import TidarDecoder, _Picked
from tidar.errors import TidarError
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import MOST, Engine
from tidar.fast.lean import Hidden, LeanModel
from tidar.fast.step import Step
from tidar.kernels import reference_step as plain
from tidar.kernels.reference_step import HEAD, Picking
from tidar.proposals import chance, check_proposals, levels, outcomes, ranks

PROMPTS = [list(b"def f(x):\n    return x"), list(b"a"), list(b"class A:\n")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANCES = st.sampled_from([0.0, 1.0, 0.25, 0.5]) | st.floats(0, 1, width=32)


# --- the arithmetic ---


def test_outcomes_by_hand() -> None:
    """A draft stands as often as the root of its chance says, and only if those before it do."""
    found = outcomes(torch.tensor([[0.25, 0.81, 0.04], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.5]]))
    expected = [[0.5, 0.5 * 0.1, 0.5 * 0.9 * 0.8, 0.5 * 0.9 * 0.2], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected))


@given(st.integers(1, 16).flatmap(lambda k: st.lists(CHANCES, min_size=k - 1, max_size=k - 1)))
def test_outcomes_sum_to_one(chances: list[float]) -> None:
    found = outcomes(torch.tensor([chances], dtype=torch.float64).view(1, len(chances)))
    assert found.shape == (1, len(chances) + 1) and bool((found >= 0).all())
    assert float(found.sum()) == pytest.approx(1)


def test_one_draft_has_one_outcome() -> None:
    none = torch.empty(3, 0)
    assert outcomes(none).tolist() == [[1.0]] * 3
    assert ranks(none).tolist() == [[0]] * 3
    assert levels(ranks(none), 1).tolist() == [[1]] * 3
    assert levels(ranks(none), 0).shape == (3, 0)


def test_ranks_and_levels_by_hand() -> None:
    places = ranks(torch.tensor([[0.25, 0.81, 0.04], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.5]]))
    # Of 0.5, 0.05, 0.36, 0.09; of the last alone, the first alone and the second alone, the rest as they come.
    assert places.tolist() == [[0, 3, 1, 2], [1, 2, 3, 0], [0, 1, 2, 3], [1, 0, 2, 3]]
    assert levels(places, 1).tolist() == [[1], [4], [1], [2]]
    assert levels(places, 2).tolist() == [[1, 3], [1, 4], [1, 2], [1, 2]]
    assert levels(places, 3).tolist() == [[1, 3, 4], [1, 2, 4], [1, 2, 3], [1, 2, 3]]
    assert levels(places, 4).tolist() == [[1, 2, 3, 4]] * 4


def test_fewer_drafts_come_first_among_equals() -> None:
    # One draft stands in half of all cases, two or three in a quarter each.
    assert ranks(torch.tensor([[0.25, 0.25], [0.0, 0.5]])).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert ranks(chances_of(torch.tensor([[1.0, 2.0, 1.0]]))).tolist() == [[1, 0, 2]]


@given(st.data())
@settings(deadline=None)
def test_levels_are_the_likeliest(data: st.DataObject) -> None:
    k = data.draw(st.integers(1, 12))
    rows = data.draw(st.lists(st.lists(CHANCES, min_size=k - 1, max_size=k - 1), min_size=1, max_size=3))
    chances = torch.tensor(rows, dtype=torch.float32).view(len(rows), k - 1)
    places, likely = ranks(chances), outcomes(chances).tolist()
    for row, own in zip(places.tolist(), likely, strict=True):
        order = sorted(range(k), key=lambda n: (-own[n], n))
        assert row == [order.index(n) for n in range(k)]
    for count in range(k + 1):
        expected = [sorted(n + 1 for n in range(k) if row[n] < count) for row in places.tolist()]
        assert levels(places, count).tolist() == expected


def test_every_choice_can_be_asked_for() -> None:
    """The way back from outcomes to chances, which other tests steer by."""
    likely = torch.rand(200, 6, dtype=torch.float64) + 1e-3
    found = outcomes(chances_of(likely).double())
    torch.testing.assert_close(found, likely / likely.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    for count in range(1, 5):
        every = [list(some) for some in itertools.combinations(range(1, 5), count)]
        assert levels(ranks(chances_for(every, 4)), count).tolist() == every


def test_chance_is_the_probability_of_the_draft() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64)
    drafts = torch.randint(7, (2, 3))
    expected = torch.stack([logits[b].softmax(-1)[torch.arange(3), drafts[b]] for b in range(2)])
    torch.testing.assert_close(chance(logits, drafts), expected)
    sure = torch.full((1, 2, 4), -1e30)
    sure[0, :, 2] = 1e30
    assert chance(sure, torch.tensor([[2, 1]])).tolist() == [[1, 0]], "and never NaN"


def test_counts_are_checked() -> None:
    assert [check_proposals(4, count) for count in (None, 1, 4)] == [4, 1, 4]
    for k, count, said in ((0, None, "at least 1"), (4, 0, "between 1 and"), (4, 5, "draft length 4, not 5")):
        with pytest.raises(TidarError, match=said):
            check_proposals(k, count)
    for former in ([1, 3], (), 2.5, True):
        with pytest.raises(TidarError, match="must be a number between 1 and the draft length 4"):
            check_proposals(4, former)  # type: ignore[arg-type]


# --- the kernel that picks ---


def picked(embed: Callable[..., Tensor], chances: Tensor, k: int, count: int) -> tuple[list[list[int]], ...]:
    """Places and levels, from and in memory with garbage around what is read and written."""
    rows, table = len(chances), torch.randn(5, 8, device=DEVICE)
    wide = torch.full((rows, k + 3), torch.nan, device=DEVICE)
    wide[:, 1:k] = chances
    places, chosen = (torch.full((rows + 1, n), -7, dtype=torch.long, device=DEVICE) for n in (k, count))
    drafts = torch.randint(5, (rows, k + 3), device=DEVICE)
    out = embed(drafts, table, 4, k + 2 * count, k, picking=Picking(wide, places[:rows], chosen[:rows]))
    expected = torch.cat([table[drafts[:, :k]], table[4].expand(rows, 2 * count, 8)], 1)
    assert torch.equal(out, expected), "it embeds beside"
    assert bool((places[rows] == -7).all()) and bool((chosen[rows] == -7).all())
    return places[:rows].tolist(), chosen[:rows].tolist()


@pytest.mark.parametrize("k", [2, 3, 4, 5, 8, 15, 16, 31, 32, 33, 64])
def test_picking_is_the_twin(k: int) -> None:
    pytest.importorskip("triton")
    from tidar.kernels import accept as fused

    draw = random.Random(k)
    for count in sorted({1, 2, k // 2, k - 1, k} - {0}):
        for some in (1.0, 0.6, 0.1):
            # Of a few values only, exact roots, so that there are ties, and never another order of products.
            values = [0.0, 1.0, 0.25, 0.5625] if some == 1.0 else None
            rows = [
                [
                    draw.choice(values)
                    if values
                    else draw.choice([0.0, 1.0])
                    if draw.random() > some
                    else draw.random()
                    for _ in range(k - 1)
                ]
                for _ in range(4)
            ]
            chances = torch.tensor(rows, device=DEVICE)
            mine, theirs = (picked(module.embed, chances, k, count) for module in (fused, plain))
            assert mine == theirs
            for places, chosen in zip(*mine, strict=True):
                assert sorted(places) == list(range(k))
                assert chosen == [n + 1 for n in range(k) if places[n] < count]


def test_picking_what_is_wished_for() -> None:
    pytest.importorskip("triton")
    from tidar.kernels import accept as fused

    wanted = [list(some) for some in itertools.combinations(range(1, 7), 3)]
    for module in (fused, plain):
        _, found = picked(module.embed, chances_for(wanted, 6).to(DEVICE), 6, 3)
        assert found == wanted


def test_nan_picks_something() -> None:
    """A network that gave NaN ends in an error later; until then levels must be levels."""
    pytest.importorskip("triton")
    from tidar.kernels import accept as fused

    chances = torch.full((2, 5), torch.nan, device=DEVICE)
    chances[1, :3] = 0.5
    for embed in (fused.embed, plain.embed):
        places, found = picked(embed, chances, 6, 3)
        assert all(0 <= place < 6 for row in places for place in row)
        assert all(row == sorted(set(row)) and row[0] >= 1 and row[-1] <= 6 for row in found)


# --- what becomes of it ---


def test_accept_by_hand() -> None:
    """How far into its block what comes next begins, and which place this outcome had."""
    pytest.importorskip("triton")
    from tidar.kernels import accept as fused

    chosen = torch.tensor([[2, 4], [1, 3], [1, 3], [2, 3], [1, 2]], device=DEVICE)
    places = torch.tensor([[3, 0, 2, 1], [0, 2, 1, 3], [0, 2, 1, 3], [3, 1, 0, 2], [0, 1, 2, 3]], device=DEVICE)
    stand, behind, came = [1, 1, 2, 4, 4], [4, 0, 1, 1, 2], [3, 0, 2, 2, 3]
    drafts = torch.arange(20, device=DEVICE).view(5, 4)
    sampled = drafts.roll(-1, 1).contiguous()
    for row, n in enumerate(stand):
        sampled[row, n - 1] = 50 + row
    for module in (fused, plain):
        ints = [torch.zeros(5, dtype=torch.int32, device=DEVICE) for _ in range(3)]
        ring = torch.zeros(2, 5, 9, dtype=torch.int32, pin_memory=DEVICE == "cuda")
        given_ = [sampled, drafts.clone(), ints[0], ints[1] + 99, ints[2], ring, torch.zeros_like(ints[0][:1])]
        _, made, _ = module.accept(*given_, levels=chosen, places=places, masks=4, queries=12)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        assert (
            ring[0, :, :4].tolist() == [[*row, -1] for row in zip(stand, behind, came, strict=True)]
            and not ring[0, :, 4].any()
        )
        assert [row[HEAD : HEAD + n] for row, n in zip(ring[0].tolist(), stand, strict=True)] == [
            sampled[row, :n].tolist() for row, n in enumerate(stand)
        ]
        assert made.sum(1).tolist() == [max(0, 3 - late) for late in behind]


# --- decoders ---


class Sure(TidarDecoder):
    """Its drafts are the coming text up to a place, where they are wrong and known to be doubtful: with confident
    drafts one proposal meets every outcome."""

    def __init__(self, *args: object, truth: list[list[int]], trust: bool = True, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.truth, self.random, self.came, self.trust = truth, random.Random(3), list[Outcome](), trust

    def step(self) -> list[list[int]]:
        certain = super().step()
        self.came.append(self.outcome)
        return certain

    def _next_drafts(self, first: Tensor, hidden: Tensor, made: Tensor, *rest: Any) -> Tensor:
        drafts = super()._next_drafts(first, hidden, made, *rest)
        for row, length in enumerate(self.cache.lengths):
            wrong = self.random.randint(1, self.draft_len)
            for place in range(1, self.draft_len):
                right = self.truth[row][length + place]
                drafts[row, place] = right if place != wrong else (right + 1) % 200
                self._chances[row, place - 1] = 0.95 if (place != wrong) == self.trust else 0.05
        return drafts


@pytest.mark.parametrize("trust", [True, False])
def test_confident_drafts_meet_what_comes(qwen3: Model, trust: bool) -> None:
    params = SamplingParams(max_new_tokens=70, ignore_eos=True)
    prompts = sorted(PROMPTS, key=len)
    ahead = [
        c.token_ids for c in qwen3.generate(prompts, SamplingParams(max_new_tokens=90, ignore_eos=True), method="ar")
    ]
    truth = [prompt + text for prompt, text in zip(prompts, ahead, strict=True)]
    decoder = Sure(qwen3.core, draft_len=6, proposals=1, truth=truth, trust=trust)
    found = generation.generate(qwen3.core, prompts, [params] * 3, lambda: decoder, 3)
    assert [c.token_ids for c in found] == [text[:70] for text in ahead]
    came = [(n, late, place) for each in decoder.came for n, late, place, *_ in zip(*each, strict=True)]
    assert {n for n, *_ in came} == set(range(1, 7))
    met = [late == 0 and place == 0 for _, late, place in came]
    assert all(met) if trust else sum(met) < 0.5 * len(met)
    assert all((late == 0) == (place == 0) for _, late, place in came), "the only proposal is the likeliest"


def test_drafted_for_is_what_is_likely(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's own drafts, as if it were surer of them, step by step."""
    monkeypatch.setattr("tidar.decode.tidar.chance", lambda logits, drafts: chance(5 * logits, drafts))
    seen: list[tuple[list[list[float]], _Picked]] = []

    class Noting(TidarDecoder):
        def _pick(self, shape: Shape) -> _Picked:
            found = super()._pick(shape)
            seen.append((outcomes(self._chances[:, : shape.drafts - 1]).tolist(), found))
            return found

    params = [SamplingParams(max_new_tokens=30, temperature=0.7 * n, seed=n, ignore_eos=True) for n in range(3)]
    decoder = Noting(qwen3.core, draft_len=5, proposals=2)
    found = generation.generate(qwen3.core, PROMPTS, params, lambda: decoder, 3)
    assert [c.token_ids for c in found] == [c.token_ids for c in qwen3.generate(PROMPTS, params, method="ar")]
    chosen = set()
    for likely, each in seen:
        for own, places, two in zip(likely, each.places.tolist(), each.levels.tolist(), strict=True):
            order = sorted(range(5), key=lambda n: (-own[n], n))
            assert two == sorted(n + 1 for n in order[:2]) and [places[n] for n in order] == list(range(5))
            chosen.add(tuple(two))
    assert len(chosen) > 1


def by_hand(decoder: TidarDecoder) -> Tensor:
    """Chances of the prefill's drafts from a plain forward, the probability that the head gives each."""
    model = decoder.model
    expected = torch.zeros(len(decoder._drafts), decoder.draft_len - 1, dtype=torch.float64)
    for row, length in enumerate(decoder.cache.lengths):
        text, k = PROMPTS_SORTED[row][:length], decoder.draft_len
        tokens = torch.tensor([text + [model.mask_id] * k])
        sees = torch.ones(length + k, length + k).tril().bool()
        sees[length:, length:] = True
        out = model.hf.base_model(tokens, position_ids=torch.arange(length + k)[None], attention_mask=sees[None, None])
        states = out.last_hidden_state[0, length + 1 :]
        if model.transition is not None:
            states = model.drafted(states[None], decoder._drafts[row : row + 1, :-1])[0]
        logits = model.head(states)
        logits[:, list(model.suppressed)] = -torch.inf
        odds = logits.softmax(-1)
        expected[row] = odds.gather(1, decoder._drafts[row, 1:, None])[:, 0]
    return expected


PROMPTS_SORTED = sorted(PROMPTS, key=len)


@pytest.mark.parametrize("acceptance", ["gumbel", "ratio"])
@pytest.mark.parametrize("transition", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_chances_of_the_plain_decoder(
    transition: bool, temperature: float, acceptance: str, converted: Callable[[str], Path]
) -> None:
    folder = converted("llama")
    model = with_transition(folder) if transition else load_model(folder, dtype="float64")
    decoder = TidarDecoder(model, draft_len=6, acceptance=acceptance)  # type: ignore[arg-type]
    params = [SamplingParams(temperature=temperature, top_k=5, repetition_penalty=1.2, seed=n) for n in range(3)]
    with torch.inference_mode():
        decoder.prefill(PROMPTS_SORTED, params)
        torch.testing.assert_close(decoder._chances.double(), by_hand(decoder), rtol=1e-5, atol=1e-7)


def test_chances_of_drafts_that_nobody_made(qwen3: Model) -> None:
    decoder = TidarDecoder(qwen3.core, draft_len=6, proposals=1)
    with torch.inference_mode():
        decoder.prefill(PROMPTS, [SamplingParams()] * 3)
        decoder._chances = chances_for([[1], [2], [6]], 6)
        decoder._drafts[0, 1:] = decoder._drafts[2, 1:] = 7
        decoder.step()
        late = decoder.outcome.behind
        for row in range(3):
            made = max(0, 5 - late[row])
            assert (decoder._chances[row] > 0).tolist() == [True] * made + [False] * (5 - made)
    assert late[2] == 6, "below the lowest there are no drafts"
    assert late[0] in range(6)


def test_rows_keep_their_chances(qwen3: Model) -> None:
    decoder = TidarDecoder(qwen3.core, draft_len=6, proposals=2)
    with torch.inference_mode():
        decoder.prefill(PROMPTS, [SamplingParams(temperature=1.0, seed=n) for n in range(3)])
        before = decoder._chances.clone()
        assert len({tuple(row) for row in before.tolist()}) == 3
        decoder.select([2, 0])
        assert torch.equal(decoder._chances, before[[2, 0]])
        decoder.step()


# --- decoders on the device ---


def engine_of(folder: Path) -> Engine:
    return Engine(load_model(folder, dtype="float64"), plain=True)


@pytest.mark.parametrize(
    "policy", [lambda: Fixed(6, 2), lambda: Fixed(6, 1), lambda: Fixed(4, 4), lambda: Alternating(5)]
)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_fast_chances_are_the_plain_ones(
    policy: Callable[[], Fixed], options: dict[str, float], converted: Callable[[str], Path]
) -> None:
    """Step by step: drafts, chances, what is drafted for, and what it came to."""
    folder = converted("llama")
    each = [SamplingParams(max_new_tokens=60, seed=n, **options) for n in range(3)]  # type: ignore[arg-type]
    engine, core = engine_of(folder), load_model(folder, dtype="float64")
    assert core.suppressed
    fast, slow = FastDecoder(engine, policy(), ahead=1), TidarDecoder(core, draft_len=6)
    slow.policy, slow.draft_len = policy(), policy().open(3)
    learnt: list[Outcome] = []
    fast._policy.learn = lambda shape, outcome, seconds=None: learnt.append(outcome)  # type: ignore[method-assign]
    with torch.inference_mode():
        assert fast.prefill(PROMPTS, each) == slow.prefill(PROMPTS, each)
        for _ in range(12):
            held = slow._drafts.shape[1]
            slots = fast._slots
            assert slots.drafts[:3, :held].tolist() == slow._drafts.tolist()
            torch.testing.assert_close(slots.chances[:3, 1:held].double(), slow._chances.double(), rtol=1e-3, atol=1e-6)
            assert fast.step() == slow.step()
            fast._learn()
            assert learnt[-1] == slow.outcome


def test_the_fast_decoder_drafts_for_what_is_likely(converted: Callable[[str], Path]) -> None:
    engine = engine_of(converted("qwen3"))
    decoder = FastDecoder(engine, Fixed(4, 2), ahead=1)
    wanted = [[2, 4], [1, 3], [3, 4]]
    with torch.inference_mode():
        decoder.prefill(PROMPTS, [SamplingParams(max_new_tokens=50)] * 3)
        slots = decoder._slots
        slots.chances[:3, 1:4] = chances_for(wanted, 4)
        step = Step(engine.network, slots, Shape(4, 2, 4), decoder._flags)
        step()
    assert step._levels[:3].tolist() == wanted
    entry = slots.ring[0, :3].tolist()
    for (n, late, place, *_), own, places in zip(entry, wanted, step._places[:3].tolist(), strict=True):
        level = max((level for level in own if level <= n), default=None)
        assert late == (4 if level is None else n - level) and place == places[n - 1]
        assert (place < 2) == (n in own)


def test_rows_move_with_their_chances(converted: Callable[[str], Path]) -> None:
    engine = engine_of(converted("qwen3"))
    decoder = FastDecoder(engine, Fixed(4, 2), ahead=1)
    with torch.inference_mode():
        decoder.prefill(
            [*PROMPTS, PROMPTS[0]], [SamplingParams(max_new_tokens=50, temperature=1.0, seed=n) for n in range(4)]
        )
        old = decoder._slots
        before = old.chances.clone()
        assert len({tuple(row) for row in before[:4, 1:4].tolist()}) == 4
        decoder.select([3, 1])
        assert decoder._slots is not old and decoder._slots.rows == 2
        assert torch.equal(decoder._slots.chances[:2], before[[3, 1]])
        assert before.shape == (4, MOST)
        with old.untouched():
            old.chances.fill_(0.5)
        assert torch.equal(old.chances, before), "what is measured leaves no trace"


def test_runners_up_stay_with_their_drafts(converted: Callable[[str], Path]) -> None:
    """Neither other rows nor steps that were measured or captured leave theirs."""
    engine = engine_of(converted("qwen3"))
    params = [SamplingParams(max_new_tokens=50)]
    slots, other = (engine.open(user, PROMPTS[:1], params)[0] for user in (engine, params[0]))
    lists = engine.network.lists(slots, 3, ranked=True)
    kept = (lists.runners.tokens, lists.runners.followers)

    def left(change: Callable[[], object]) -> bool:
        for each in kept:
            each.fill_(3)
        change()
        return any(bool(each.any()) for each in kept)

    def measured() -> None:
        with slots.untouched():
            for each in kept:
                each.fill_(4)

    assert left(lambda: None)
    assert not left(measured)
    assert not left(lambda: slots.adopt(other, [0]))
    assert not left(lambda: slots.open(PROMPTS[:1], params, [60], [[0]]))


@pytest.mark.parametrize("transition", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9}])
def test_the_head_for_all_rows_or_for_some(
    transition: bool, options: dict[str, float], converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same drafts, chances and outcomes, whether logits are computed before or behind the check."""
    folder = converted("qwen3")
    engine = Engine(with_transition(folder) if transition else load_model(folder, dtype="float64"), plain=True)
    params = [SamplingParams(max_new_tokens=40, seed=n, **options) for n in range(3)]  # type: ignore[arg-type]
    found, heads = [], list[list[bool]]()
    real = type(engine.network.lean).logits

    def counting(lean: LeanModel, hidden: Hidden, rows: Tensor | None) -> Tensor:
        heads[-1].append(rows is None)
        return real(lean, hidden, rows)

    monkeypatch.setattr(type(engine.network.lean), "logits", counting)
    for most in (0, 10_000):
        monkeypatch.setattr("tidar.fast.step.AT_ONCE", most)
        heads.append([])
        decoder, seen = FastDecoder(engine, Fixed(5, 2), ahead=1), []
        with torch.inference_mode():
            decoder.prefill(PROMPTS, params)
            for _ in range(8):
                seen.append((decoder.step(), decoder._slots.drafts[:3, :5].tolist()))
        found.append((seen, decoder._slots.chances[:3, 1:5].clone()))
        del decoder
        engine._slots.clear()
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
    assert (found[0][1] > 0).any()
    assert not any(heads[0]) and any(heads[1])
