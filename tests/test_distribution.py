"""The distribution that block drafting really produces, against the exact joint; and faults that must show.

A toy model of 4 tokens: autoregressive logits depend on the last two tokens, drafts on the last committed token only,
so that they are poor. It is flat, so that subtle faults show. The joint over 5 tokens is enumerated; a hundred thousand
texts, one row of a batch each, are decoded in blocks with the functions of `tidar.sampling`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import plain_sampling
import pytest
import torch
from torch import Tensor

from tidar import noise, sampling
from tidar.config import SamplingParams
from tidar.sampling import RowParams, accept_matching, accept_ratio, draft_ratio, process, sample, seen_after

VOCAB, TOKENS, SAMPLES, PROMPT = 4, 5, 120_000, (2, 0)
_generator = torch.Generator().manual_seed(7)
AR = 0.9 * torch.randn(VOCAB, VOCAB, VOCAB, generator=_generator)
DRAFT = 0.7 * torch.randn(4, VOCAB, VOCAB, generator=_generator)  # offset from the last committed token, that token

PLAIN = SamplingParams(temperature=0.9)
FILTERED = SamplingParams(temperature=1.2, top_k=3, top_p=0.9)
EVERYTHING = SamplingParams(temperature=1.1, top_k=3, top_p=0.95, repetition_penalty=1.6)
PENALISED = SamplingParams(temperature=1.0, repetition_penalty=1.6)


@dataclass(frozen=True)
class Drafting:
    """The faults that peers have, each off by default."""

    argmax_drafts: bool = False  # but verified as if drawn from softmax(q)
    verify_unfiltered: bool = False  # top-k and top-p where a block starts, not in verification and correction
    first_unchecked: bool = False  # the block's first token comes from the draft head
    q_temperature: float = 1.0  # q verified at another temperature than it was drawn at
    committed_penalty: bool = False  # the penalty does not see the drafts before a row
    keep_rejected: bool = False  # the rejected draft stays


CORRECT = Drafting()


@cache
def exact(params: SamplingParams) -> Tensor:
    """Probabilities (VOCAB ** TOKENS,) of all texts, first token most significant."""
    out: list[float] = []

    def extend(text: list[int], probability: float) -> None:
        if len(text) == len(PROMPT) + TOKENS:
            out.append(probability)
            return
        after = plain_sampling.probabilities(AR[text[-2], text[-1]].tolist(), params, text)
        for token in range(VOCAB):
            extend([*text, token], probability * after[token])

    extend(list(PROMPT), 1.0)
    return torch.tensor(out, dtype=torch.float64)


def rows_of(params: SamplingParams, count: int) -> RowParams:
    """The same parameters ``count`` times, with seeds 0, 1, 2, …"""
    one = RowParams.of([params])
    columns = {name: getattr(one, name).expand(count) for name in ("temperature", "top_k", "top_p", "penalty")}
    return replace(one, seed=torch.arange(count), **columns)


def decode(k: int, params: SamplingParams, acceptance: str, how: Drafting = CORRECT, count: int = SAMPLES) -> Tensor:
    """Texts (count, TOKENS) by block drafting; row i has seed i."""
    rows = rows_of(params, count)
    verify = rows_of(replace(params, top_k=0, top_p=1.0), count) if how.verify_unfiltered else rows
    believed = replace(rows, temperature=rows.temperature * how.q_temperature)
    text = torch.zeros(count, len(PROMPT) + (TOKENS + 1) * k, dtype=torch.long)
    text[:, : len(PROMPT)] = torch.tensor(PROMPT)
    length = torch.full((count, 1), len(PROMPT))
    seen = torch.zeros(count, VOCAB, dtype=torch.bool)
    seen[:, PROMPT] = True
    first = sample(process(AR[PROMPT][None, None].expand(count, 1, -1), rows, seen[:, None]), rows, length)
    column = torch.arange(k)
    while int(length.min()) < len(PROMPT) + TOKENS:
        last = text.gather(1, length - 1)
        drafts, q = first, torch.zeros(count, 0, VOCAB)
        if k > 1:
            logits = DRAFT[column[1:], last]
            scores = process(logits, rows, seen[:, None])
            if acceptance == "gumbel":
                drafted = sample(scores, rows, length + column[1:])
            else:
                drafted, q = draft_ratio(scores, rows, length + column[1:])
                if how.argmax_drafts:
                    drafted = scores.argmax(-1)
                if how.q_temperature != 1:
                    q = sampling.probabilities(process(logits, believed, seen[:, None]), believed)
            drafts = torch.cat([first, drafted], 1)

        context = torch.cat([last, drafts], 1)
        seen_BKV = seen_after(seen, drafts)
        p = process(
            AR[context[:, :-1], context[:, 1:]],
            verify,
            seen[:, None].expand_as(seen_BKV) if how.committed_penalty else seen_BKV,
        )
        positions = length + 1 + column
        if acceptance == "gumbel":
            sampled = sample(p, rows, positions)
            n = accept_matching(sampled, drafts)
            first = sampled.gather(1, n[:, None] - 1)
        else:
            n, following = accept_ratio(p, q, drafts, rows, positions)
            first = following[:, None]
        if how.keep_rejected:
            first = torch.where(n[:, None] < k, drafts.gather(1, n[:, None].clamp(max=k - 1)), first)
        text.scatter_(1, length + column, drafts)
        seen = seen_BKV[torch.arange(count), n - 1]
        length = length + n[:, None]
        if how.first_unchecked:
            first = sample(process(DRAFT[0, text.gather(1, length - 1)], rows, seen[:, None]), rows, length)
    return text[:, len(PROMPT) : len(PROMPT) + TOKENS]


def p_value(texts: Tensor, params: SamplingParams) -> float:
    """Of a chi-square test against the exact joint; 0 if an impossible text occurs."""
    place = (texts * VOCAB ** torch.arange(TOKENS - 1, -1, -1)).sum(1)
    observed = torch.bincount(place, minlength=VOCAB**TOKENS).double()
    expected = exact(params) * len(texts)
    if observed[expected == 0].any():
        return 0.0
    rare = expected < 10  # together one cell
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    possible = expected > 0
    statistic = ((observed - expected)[possible].square() / expected[possible]).sum()
    return float(torch.special.gammaincc((possible.sum() - 1) / 2.0, statistic / 2))


def test_the_joint_is_flat_and_filtered_as_meant() -> None:
    for params, possible in ((PLAIN, VOCAB**TOKENS), (FILTERED, None), (EVERYTHING, None), (PENALISED, VOCAB**TOKENS)):
        joint = exact(params)
        assert math.isclose(float(joint.sum()), 1)
        support = int((joint > 0).sum())
        assert support == possible if possible else VOCAB**TOKENS / 20 < support < VOCAB**TOKENS / 2
        assert int((joint * SAMPLES > 10).sum()) > 100


@pytest.mark.parametrize("acceptance", ["gumbel", "ratio"])
@pytest.mark.parametrize("params", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_joint(k: int, params: SamplingParams, acceptance: str) -> None:
    assert p_value(decode(k, params, acceptance), params) > 1e-6


@pytest.mark.parametrize("params", [PLAIN, FILTERED, PENALISED, EVERYTHING])
def test_shared_noise_gives_the_autoregressive_sample(params: SamplingParams) -> None:
    alone = decode(1, params, "gumbel", count=20_000)
    for k in (2, 3, 4):
        assert torch.equal(decode(k, params, "gumbel", count=20_000), alone), k


FAULTS: dict[str, tuple[SamplingParams, str, Drafting]] = {
    "argmax drafts verified as samples": (PLAIN, "ratio", Drafting(argmax_drafts=True)),
    "ratio: filters not in verification": (FILTERED, "ratio", Drafting(verify_unfiltered=True)),
    "gumbel: filters not in verification": (FILTERED, "gumbel", Drafting(verify_unfiltered=True)),
    "ratio: first token unchecked": (PLAIN, "ratio", Drafting(first_unchecked=True)),
    "gumbel: first token unchecked": (PLAIN, "gumbel", Drafting(first_unchecked=True)),
    "q at another temperature": (PLAIN, "ratio", Drafting(q_temperature=1.3)),
    "ratio: penalty of the committed text": (PENALISED, "ratio", Drafting(committed_penalty=True)),
    "gumbel: penalty of the committed text": (PENALISED, "gumbel", Drafting(committed_penalty=True)),
    "ratio: rejected draft kept": (PLAIN, "ratio", Drafting(keep_rejected=True)),
    "gumbel: rejected draft kept": (PLAIN, "gumbel", Drafting(keep_rejected=True)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str) -> None:
    params, acceptance, how = FAULTS[fault]
    for k in (2, 3):  # a third of the samples is enough
        assert p_value(decode(k, params, acceptance, how, count=SAMPLES // 3), params) < 1e-12


BROKEN: dict[str, tuple[str, object]] = {
    "residual not truncated": ("residual", lambda p, q: p),
    "residual of the absolute difference": ("residual", lambda p, q: (p - q).abs() + p * (p == q).all(-1, True)),
    "residual drawn with the noise of the draft": ("RESIDUAL", noise.DRAFT),
    "residual drawn with the noise of the rejection": ("RESIDUAL", noise.ACCEPT),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_residual_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, value = BROKEN[fault]
    monkeypatch.setattr(sampling, name, value)
    assert p_value(decode(2, PLAIN, "ratio"), PLAIN) < 1e-12
    assert p_value(decode(3, PLAIN, "ratio"), PLAIN) < 1e-12
