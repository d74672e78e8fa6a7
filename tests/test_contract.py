"""The contract: the same seed gives the same tokens, whatever the method, draft length, proposals and batch."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picking import anything, steered, subset

from tidar.api import Method, Model
from tidar.config import SamplingParams
from tidar.errors import TidarError

PROMPTS = [list(b"def f(x):\n    return x"), list(b"a"), list(b"class A:\n"), list(b"0123456789" * 3)]
NEW = 20

PARAMS = {
    "temperature": SamplingParams(temperature=0.8, seed=1),
    "hot": SamplingParams(temperature=3.0, seed=2),
    "top-k": SamplingParams(temperature=1.0, top_k=7, seed=3),
    "top-p": SamplingParams(temperature=1.0, top_p=0.8, seed=4),
    "all": SamplingParams(temperature=1.2, top_k=40, top_p=0.95, repetition_penalty=1.3, seed=5),
    "greedy with penalty": SamplingParams(repetition_penalty=1.5),
}


def with_length(params: SamplingParams) -> SamplingParams:
    return SamplingParams(**{**params.__dict__, "max_new_tokens": NEW, "ignore_eos": True})


@pytest.mark.parametrize("name", PARAMS)
def test_same_tokens(qwen3: Model, name: str) -> None:
    params = with_length(PARAMS[name])
    alone = [qwen3.generate([p], params, method="ar")[0].token_ids for p in PROMPTS]
    assert len({tuple(t) for t in alone}) == len(PROMPTS)
    for k, batch in itertools.product((1, 2, 3, 4, 8, 16), (1, 4)):
        got = qwen3.generate(PROMPTS, params, draft_len=k, batch_size=batch)
        assert [c.token_ids for c in got] == alone, f"k = {k}, batch of {batch}"
        got = qwen3.generate(PROMPTS, params, draft_len=k, batch_size=batch, method="linear")
        assert [c.token_ids for c in got] == alone, f"linear, k = {k}, batch of {batch}"
    for proposals in (1, 2, 3, 4):
        got = qwen3.generate(PROMPTS, params, draft_len=4, proposals=proposals)
        assert [c.token_ids for c in got] == alone, f"{proposals} proposals"


@pytest.mark.parametrize("name", PARAMS)
def test_same_tokens_whatever_is_drafted_for(qwen3: Model, name: str) -> None:
    params = with_length(PARAMS[name])
    alone = [c.token_ids for c in qwen3.generate(PROMPTS, params, method="ar")]
    for levels in ((1,), (4,), (2, 3), (1, 4)):
        with steered(subset(*levels)) as picked:
            got = qwen3.generate(PROMPTS, params, draft_len=4, proposals=len(levels))
        assert [c.token_ids for c in got] == alone, f"proposals {levels}"
        assert picked == {levels}
    for count in (1, 2, 3):
        with steered(anything()) as picked:
            got = qwen3.generate(PROMPTS, params, draft_len=4, proposals=count)
        assert [c.token_ids for c in got] == alone, f"any {count} proposals"
        assert picked == set(itertools.combinations(range(1, 5), count))


def test_rows_keep_their_own_parameters(qwen3: Model) -> None:
    each = [with_length(p) for p in PARAMS.values()]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(each))]
    alone = [qwen3.generate([p], q, method="ar")[0].token_ids for p, q in zip(prompts, each, strict=True)]
    methods: tuple[Method, ...] = ("ar", "tidar", "linear", "auto")
    for method in methods:
        got = qwen3.generate(prompts, each, method=method, draft_len=4)
        assert [c.token_ids for c in got] == alone


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.floats(0, 4),
    st.integers(0, 30),
    st.floats(0.05, 1),
    st.floats(0.5, 2),
    st.integers(1, 8),
    st.data(),
)
def test_any_parameters(
    qwen3: Model, seed: int, temperature: float, top_k: int, top_p: float, penalty: float, k: int, data: st.DataObject
) -> None:
    params = SamplingParams(
        max_new_tokens=12, temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty, seed=seed
    )
    levels = data.draw(st.none() | st.sets(st.integers(1, k), min_size=1).map(sorted))
    proposals = data.draw(st.integers(1, k)) if levels is None else len(levels)
    ar = qwen3.generate(PROMPTS[:2], params, method="ar")
    with steered(anything() if levels is None else subset(*levels)):
        got = qwen3.generate(PROMPTS[:2], params, draft_len=k, proposals=proposals)
    assert [c.token_ids for c in got] == [c.token_ids for c in ar]
    assert [c.finish_reason for c in got] == [c.finish_reason for c in ar]
    assert [c.text for c in got] == [c.text for c in ar]


def test_seeds_differ_and_repeat(qwen3: Model) -> None:
    texts = [
        qwen3.generate(PROMPTS[0], SamplingParams(temperature=1.0, seed=s, max_new_tokens=NEW), draft_len=4)[
            0
        ].token_ids
        for s in (1, 2, 1)
    ]
    assert texts[0] == texts[2] != texts[1]


def test_ratio_is_seeded_and_greedy_when_cold(qwen3: Model) -> None:
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    greedy = qwen3.generate(PROMPTS, params, method="ar")
    assert [c.token_ids for c in qwen3.generate(PROMPTS, params, acceptance="ratio", draft_len=4)] == [
        c.token_ids for c in greedy
    ]
    warm = SamplingParams(temperature=1.0, max_new_tokens=NEW, seed=9, ignore_eos=True)
    one, two = (qwen3.generate(PROMPTS, warm, acceptance="ratio", draft_len=4) for _ in range(2))
    assert [c.token_ids for c in one] == [c.token_ids for c in two]
    single = [qwen3.generate([p], warm, acceptance="ratio", draft_len=4)[0].token_ids for p in PROMPTS]
    assert [c.token_ids for c in one] == single


def test_beta(qwen3: Model) -> None:
    """beta = 1 is exact; beta = 0 is something else, and is refused where exactness was asked for."""
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    exact = [c.token_ids for c in qwen3.generate(PROMPTS, params, method="ar")]
    assert [c.token_ids for c in qwen3.generate(PROMPTS, params, beta=1.0, draft_len=4)] == exact
    for beta in (0.0, 0.5):
        with pytest.warns(UserWarning, match="lossy"):
            lossy = qwen3.generate(PROMPTS, params, beta=beta, draft_len=4)
        assert [len(c.token_ids) for c in lossy] == [NEW] * len(PROMPTS)
        assert [c.token_ids for c in lossy] != exact
    with pytest.raises(TidarError, match="beta"):
        qwen3.generate(PROMPTS, params, beta=1.5)
    with pytest.raises(TidarError, match="ratio"), pytest.warns(UserWarning, match="lossy"):
        qwen3.generate(PROMPTS, params, beta=0.5, acceptance="ratio")
