"""Score processing against transformers and plain Python; sampling, acceptance and their corner cases."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import plain_sampling
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tidar import sampling
from tidar.config import SamplingParams
from tidar.errors import TidarError
from tidar.noise import RESIDUAL
from tidar.sampling import RowParams, accept_matching, accept_ratio, draft_ratio, process, sample, seen_after, trust

MIXED = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.3, top_k=7, seed=2),
    SamplingParams(temperature=1.0, top_p=0.9, seed=3),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.2, seed=4),
    SamplingParams(temperature=2.0, top_k=10_000, top_p=0.3, repetition_penalty=0.8, seed=2**63 - 1),
    SamplingParams(temperature=0.5, top_k=1, seed=5),
    SamplingParams(top_k=3, top_p=0.5, seed=6),  # greedy: filters change nothing
]


def random_logits(rows: int, vocab: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(len(MIXED), rows, vocab, generator=generator, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [50, 3000])
def test_process_equals_transformers(dtype: torch.dtype, vocab: int) -> None:
    logits = random_logits(4, vocab, dtype=dtype)
    logits[..., 3] = -torch.inf  # a suppressed token
    text = torch.randint(vocab, (len(MIXED), 20), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(len(MIXED), 1, vocab, dtype=torch.bool).scatter_(2, text[:, None], True)
    before = logits.clone()
    got = process(logits, RowParams.of(MIXED), seen)
    assert torch.equal(logits, before)
    assert got.dtype == dtype
    for b, params in enumerate(MIXED):
        theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(params.repetition_penalty)])
        if params.temperature > 0:
            theirs.append(TemperatureLogitsWarper(params.temperature))
            if params.top_k:
                theirs.append(TopKLogitsWarper(params.top_k))
            theirs.append(TopPLogitsWarper(params.top_p))
        for r in range(4):
            expected = theirs(cast(torch.LongTensor, text[b : b + 1]), cast(torch.FloatTensor, logits[b, r : r + 1]))[0]
            assert torch.equal(got[b, r].isinf(), expected.isinf()), (b, r)
            torch.testing.assert_close(got[b, r].softmax(-1), expected.softmax(-1))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-8, 4), min_size=1, max_size=9),
    st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    st.integers(0, 10),
    st.sampled_from([0.05, 0.31, 0.5, 0.77, 0.99, 1.0]),
    st.sampled_from([1.0, 1.5, 0.5]),
    st.sets(st.integers(0, 8)),
)
def test_process_equals_plain_python_with_ties(
    values: list[int], temperature: float, top_k: int, top_p: float, penalty: float, text: set[int]
) -> None:
    """Few different logits: k exactly, lower ids first. Also as one row of a batch that needs everything."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    seen = sorted(t for t in text if t < len(values))
    expected = plain_sampling.probabilities([v / 2 for v in values], params, seen)
    weights = sorted(
        (p for p in plain_sampling.probabilities([v / 2 for v in values], replace(params, top_p=1.0), seen)),
        reverse=True,
    )
    edges = [math.fsum(weights[:i]) for i in range(len(weights) + 1)]
    assume(top_p == 1 or all(abs(edge - top_p) > 1e-9 for edge in edges))
    seen_11V = torch.zeros(1, 1, len(values), dtype=torch.bool)
    seen_11V[..., seen] = True
    logits = torch.tensor([[values]], dtype=torch.float64) / 2
    for others in ([], MIXED):
        rows = RowParams.of([params, *others])
        scores = process(logits.expand(1 + len(others), 1, -1), rows, seen_11V.expand(1 + len(others), 1, -1))
        got = sampling.probabilities(scores, rows)[0, 0].tolist()
        assert got == pytest.approx(expected, rel=1e-9)
        assert [g > 0 for g in got] == [e > 0 for e in expected]


def kept(logits: list[float], params: SamplingParams) -> list[int]:
    scores = process(torch.tensor([[logits]]), RowParams.of([params]))
    return scores[0, 0].isfinite().nonzero()[:, 0].tolist()


def test_filters_at_their_edges() -> None:
    equal = [0.0] * 4
    assert kept(equal, SamplingParams(temperature=1.0, top_p=0.5)) == [0, 1]  # one half is there: no third
    assert kept(equal, SamplingParams(temperature=1.0, top_p=0.51)) == [0, 1, 2]
    assert kept(equal, SamplingParams(temperature=1.0, top_p=1e-9)) == [0]
    assert kept(equal, SamplingParams(temperature=1.0, top_p=1 - 1e-9)) == [0, 1, 2, 3]  # 1 in float32
    tail = [0.0, -50.0, -60.0, -200.0, -300.0, -400.0]  # masses lost in rounding or underflow count for top-k
    assert kept(tail, SamplingParams(temperature=1.0, top_k=5)) == [0, 1, 2, 3, 4]
    long_tie = [float(i % 3 == 0) for i in range(3000)]
    assert kept(long_tie, SamplingParams(temperature=1.0, top_k=500)) == list(range(0, 1500, 3))
    assert kept(long_tie, SamplingParams(temperature=0.01, top_p=0.5)) == list(range(0, 1500, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """Bit for bit, on a vocabulary long and flat enough for every rounding to show, also if threads split one row."""
    torch.set_num_threads(2)
    logits = random_logits(5, 40_001, dtype=dtype) / 10
    positions = torch.arange(5).expand(len(MIXED), 5) + 11
    seen = logits > 0.3
    rows = RowParams.of(MIXED)
    together = process(logits, rows, seen)
    tokens = sample(together, rows, positions)
    for b in range(len(MIXED)):
        alone = rows.select([b])
        for part in (slice(0, 5), slice(0, 1), slice(2, 3)):
            scores = process(logits[b : b + 1, part], alone, seen[b : b + 1, part])
            if alone.any_sampling:
                assert torch.equal(scores[0], together[b, part]), b
            assert torch.equal(sample(scores, alone, positions[b : b + 1, part])[0], tokens[b, part]), b
    assert together[2].isfinite().all()  # no filter of a neighbour's, and no rounding at top_p = 1


def test_strided_logits() -> None:
    logits = random_logits(5, 200)
    rows = RowParams.of(MIXED)
    seen = logits > 0
    strided = logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not strided.is_contiguous()
    assert torch.equal(process(strided, rows, seen), process(logits, rows, seen))


def test_greedy_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise AssertionError("not needed")

    monkeypatch.setattr(sampling, "gumbel", fail)
    monkeypatch.setattr(sampling, "_filter", fail)
    rows = RowParams.of([SamplingParams(top_k=3, top_p=0.5)] * 2)
    logits = random_logits(3, 20)[:2]
    assert process(logits, rows) is logits
    assert torch.equal(sample(logits, rows, torch.zeros(2, 3, dtype=torch.long)), logits.argmax(-1))


def test_greedy_rows_among_sampled_ones() -> None:
    logits = random_logits(6, 30)
    logits[0, :, [4, 9]] = 50.0  # a tie: the lowest index wins
    rows = RowParams.of(MIXED)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    tokens = sample(process(logits, rows, seen), rows, torch.arange(6).expand(len(MIXED), 6))
    for b, params in enumerate(MIXED):
        if params.temperature == 0 or params.top_k == 1:
            assert torch.equal(tokens[b], logits[b].argmax(-1)), b
    assert tokens[0].tolist() == [4] * 6
    assert not torch.equal(tokens[2], logits[2].argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperature_near_zero_is_greedy(temperature: float, dtype: torch.dtype) -> None:
    logits = random_logits(4, 100, dtype=dtype)[:1] * 1e3
    rows = RowParams.of([SamplingParams(temperature=temperature, top_p=0.9)])
    scores = process(logits, rows)
    assert not scores.isnan().any()
    assert torch.equal(sample(scores, rows, torch.arange(4)[None]), logits.argmax(-1))


def test_sampling_is_a_function_of_seed_and_position() -> None:
    logits = torch.zeros(1, 50, 20)
    positions = torch.arange(50)[None]
    one, two = (RowParams.of([SamplingParams(temperature=1.0, seed=seed)]) for seed in (1, 2))
    tokens = sample(logits, one, positions)
    assert torch.equal(sample(logits.flip(1), one, positions.flip(1)).flip(1), tokens)
    assert not torch.equal(sample(logits, two, positions), tokens)
    assert not torch.equal(sample(logits, one, positions + 50), tokens)
    assert not torch.equal(draft_ratio(logits, one, positions)[0], tokens)  # its own stream


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", MIXED)
def test_bad_logits_are_an_error(bad: float, params: SamplingParams) -> None:
    logits = random_logits(3, 40)[:2]
    logits[1, 2, 17] = bad
    seen = torch.ones_like(logits, dtype=torch.bool)
    with pytest.raises(TidarError, match=r"NaN or infinite logits; try --dtype float32, or check the checkpoint"):
        process(logits, RowParams.of([params] * 2), seen)


def test_no_token_left_is_an_error() -> None:
    with pytest.raises(TidarError, match="infinite"):
        process(torch.full((1, 1, 5), -torch.inf), RowParams.of([SamplingParams()]))


def test_penalty_needs_the_text() -> None:
    with pytest.raises(AssertionError, match="tokens seen"):
        process(torch.zeros(1, 1, 5), RowParams.of([SamplingParams(repetition_penalty=2.0)]))


def test_row_params() -> None:
    rows = RowParams.of(MIXED)
    assert (rows.any_sampling, rows.any_filter, rows.any_penalty, rows.largest_k) == (True, True, True, 10_000)
    few = rows.select([5, 0])
    assert few.source == (MIXED[5], MIXED[0])
    assert few.temperature.tolist() == [0.8, 0.0]
    assert few.top_k.tolist() == [40, 0]
    assert few.top_p.tolist() == [0.95, 1.0]
    assert few.penalty.tolist() == [1.2, 1.0]
    assert few.seed.tolist() == [4, 0]
    assert rows.select([6]).seed.tolist() == [2**63 - 1]
    greedy = rows.select([0, 8])
    assert (greedy.any_sampling, greedy.any_filter, greedy.any_penalty, greedy.largest_k) == (False, False, False, 0)
    plain = rows.select([2])
    assert (plain.any_sampling, plain.any_filter, plain.any_penalty, plain.largest_k) == (True, False, False, 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_seen_after(k: int, batch: int, data: st.DataObject) -> None:
    vocab = 6
    drafts = [data.draw(st.lists(st.integers(0, vocab - 1), min_size=k, max_size=k)) for _ in range(batch)]
    texts = [data.draw(st.sets(st.integers(0, vocab - 1))) for _ in range(batch)]
    seen = torch.tensor([[t in text for t in range(vocab)] for text in texts])
    before = seen.clone()
    got = seen_after(seen, torch.tensor(drafts))
    assert torch.equal(seen, before)
    for b in range(batch):
        for j in range(k):
            assert {t for t in range(vocab) if got[b, j, t]} == texts[b] | set(drafts[b][: j + 1])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=6))
def test_accept_matching(pairs: list[tuple[int, int]]) -> None:
    sampled, drafts = (list(column) for column in zip(*pairs, strict=True))
    n = 1
    while n < len(drafts) and sampled[n - 1] == drafts[n]:
        n += 1
    accepted = accept_matching(torch.tensor([sampled, drafts[1:] + [0]]), torch.tensor([drafts, drafts]))
    assert accepted.tolist() == [n, len(drafts)]


def test_accept_ratio_of_greedy_rows_is_matching() -> None:
    k, vocab, batch = 5, 4, 64
    rows = RowParams.of([SamplingParams()] * batch)
    generator = torch.Generator().manual_seed(3)
    p_scores = torch.randn(batch, k, vocab, generator=generator)
    best = p_scores.argmax(-1)
    q_scores = torch.randn(batch, k - 1, vocab, generator=generator)
    right = torch.rand(batch, k - 1, 1, generator=generator) < 0.7
    q_scores = torch.where(right, p_scores[:, :-1] * 2, q_scores)
    positions = torch.arange(k).expand(batch, k)
    drafted, q = draft_ratio(q_scores, rows, positions[:, 1:])
    drafts = torch.cat([torch.zeros(batch, 1, dtype=torch.long), drafted], 1)
    n, following = accept_ratio(p_scores, q, drafts, rows, positions)
    assert torch.equal(n, accept_matching(best, drafts))
    assert torch.equal(following, best.gather(1, n[:, None] - 1)[:, 0])
    assert set(n.tolist()) == set(range(1, k + 1))


def test_accept_ratio_accepts_as_often_as_the_distributions_overlap() -> None:
    batch = 40_000
    rows = RowParams.of([SamplingParams(temperature=1.0, seed=i) for i in range(batch)])
    p, q = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    positions = torch.tensor([[1, 2]]).expand(batch, 2)
    drafted, q_probs = draft_ratio(q.log().expand(batch, 1, 4), rows, positions[:, :1])
    drafts = torch.cat([torch.zeros_like(drafted), drafted], 1)
    n, following = accept_ratio(p.log().expand(batch, 2, 4), q_probs, drafts, rows, positions)
    overlap = float(torch.minimum(p, q).sum())
    assert (n - 1).double().mean() == pytest.approx(overlap, abs=5 * 0.5 / math.sqrt(batch))
    assert set(following[n == 1].tolist()) == {0, 1}  # where p > q
    assert set(following[n == 2].tolist()) == {0, 1, 2}  # a sample of p


def test_accept_ratio_extremes() -> None:
    batch, vocab = 1000, 5
    rows = RowParams.of([SamplingParams(temperature=1.0, seed=i) for i in range(batch)])
    positions = torch.arange(4).expand(batch, 4)
    p_scores = torch.randn(batch, 4, vocab, generator=torch.Generator().manual_seed(0))
    drafted, q = draft_ratio(p_scores[:, :-1], rows, positions[:, :-1])
    drafts = torch.cat([drafted[:, :1], drafted], 1)
    n, following = accept_ratio(p_scores, q, drafts, rows, positions)
    assert (n == 4).all()  # p = q: all accepted
    assert torch.equal(following, sample(p_scores[:, 3:], rows, positions[:, 3:], stream=RESIDUAL)[:, 0])
    alone, following = accept_ratio(p_scores[:, :1], q[:, :0], drafts[:, :1], rows, positions[:, :1])
    assert (alone == 1).all()  # one draft: autoregressive sampling
    assert set(following.tolist()) == set(range(vocab))
    never = torch.full((batch, 2, vocab), -torch.inf)
    never[..., 2] = 0.0
    q_other = torch.tensor([0.5, 0.5, 0, 0, 0]).expand(batch, 1, vocab)
    n, following = accept_ratio(never, q_other, torch.zeros(batch, 2, dtype=torch.long), rows, positions[:, :2])
    assert (n == 1).all()  # p = 0 at the draft
    assert (following == 2).all()


def test_residual() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
    torch.testing.assert_close(sampling.residual(p, q), torch.tensor([[0.3, 0.0, 0.0]]))
    assert torch.equal(sampling.residual(p, p), p)
    assert torch.equal(sampling.residual(p, p + 1e-7), p)


def test_trust() -> None:
    a, m = torch.tensor([1.0, -torch.inf, 3.0]), torch.tensor([2.0, -torch.inf, 5.0])
    assert torch.equal(trust(a, m, 1.0), a)
    assert torch.equal(trust(a, m, 0.0), m)
    torch.testing.assert_close(trust(a, m, 0.25), torch.tensor([1.75, -torch.inf, 4.5]))
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(TidarError, match=r"beta must lie in \[0, 1\]"):
            trust(a, m, beta)
