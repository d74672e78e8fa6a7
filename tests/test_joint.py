"""The joint distribution of five tokens, through the real model, cache and decoders, against its enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from picking import chances_of, steered, subset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tidar import layout
from tidar.config import Architecture, SamplingParams
from tidar.decode.ar import ArDecoder
from tidar.decode.base import Decoder
from tidar.decode.linear import LinearDecoder
from tidar.decode.plan import Shape
from tidar.decode.policy import Fixed
from tidar.decode.tidar import TidarDecoder, _Picked
from tidar.fresh import create_model
from tidar.model import CausalLM
from tidar.sampling import RowParams, process

VOCAB, TOKENS, SAMPLES, ROWS = 4, 5, 100_000, 20_000
PROMPT = [2, 0]
ALPHA = 1e-6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    """Four tokens; attention layers as in any Qwen3; flat enough that subtle faults would show."""
    folder = tmp_path_factory.mktemp("four")
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate("abcd")}, unk_token="a"))
    PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", mask_token="<mask>"
    ).save_pretrained(folder)
    arch = Architecture(hidden_size=16, layers=2, heads=2, kv_heads=1, head_dim=8, intermediate_size=16)
    made = create_model(arch, folder, seed=3)
    with torch.no_grad():
        for name, parameter in made.hf.named_parameters():
            if parameter.ndim == 2:
                spread = 0.1 if "embed" in name else 0.25
                parameter.normal_(std=spread, generator=torch.Generator().manual_seed(len(name)))
    made.suppressed = tuple(range(VOCAB, made.vocab_size))
    return made


@torch.no_grad()
def enumerate_joint(model: CausalLM, params: SamplingParams) -> torch.Tensor:
    """(VOCAB ** TOKENS,) probabilities, by plain causal forwards without a cache."""
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=TOKENS)))
    full = torch.cat([torch.tensor(PROMPT).expand(len(texts), -1), texts], 1)
    plan = layout.causal([0], full.shape[1])
    logits = model.head(model.hidden(full, plan))[:, len(PROMPT) - 1 : -1].double()
    logits[..., VOCAB:] = -torch.inf
    rows = RowParams.of([params] * len(texts))
    seen = torch.zeros(len(texts), TOKENS, model.vocab_size, dtype=torch.bool)
    for step in range(TOKENS):
        seen[:, step].scatter_(1, full[:, : len(PROMPT) + step], True)
    probability = process(logits, rows, seen).softmax(-1)
    return probability.gather(2, texts[..., None])[..., 0].prod(1)


def draw(
    decoder_of: Callable[..., Decoder], model: CausalLM, params: SamplingParams, **options: object
) -> torch.Tensor:
    """Counts (VOCAB ** TOKENS,) over SAMPLES texts, each with its own seed."""
    counts = torch.zeros(VOCAB**TOKENS)
    weight = VOCAB ** torch.arange(TOKENS - 1, -1, -1)
    for first in range(0, SAMPLES, ROWS):
        each = [
            SamplingParams(**{**params.__dict__, "seed": seed}) for seed in range(first, min(first + ROWS, SAMPLES))
        ]
        decoder: Decoder = decoder_of(model, **options)
        with torch.inference_mode():
            texts = decoder.prefill([PROMPT] * len(each), each)
            while min(map(len, texts)) < TOKENS:
                texts = [old + new for old, new in zip(texts, decoder.step(), strict=True)]
        codes = torch.tensor([t[:TOKENS] for t in texts]) @ weight
        counts += torch.bincount(codes, minlength=len(counts))
    return counts


def p_value(counts: torch.Tensor, exact: torch.Tensor) -> float:
    possible = exact > 0
    assert not counts[~possible].any(), "a text came that has no probability"
    expected = exact[possible] * counts.sum()
    seen = counts[possible].double()
    rare = expected < 5  # pooled, for the chi-square approximation to hold
    if rare.any():
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    statistic = float(((seen - expected) ** 2 / expected).sum())
    # the survival function of chi-square
    return float(
        torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), torch.tensor(statistic / 2).double())
    )


PLAIN = SamplingParams(temperature=0.9)
ALL = SamplingParams(temperature=1.1, top_k=3, top_p=0.95, repetition_penalty=1.4)


def test_the_enumeration_is_what_ar_draws(model: CausalLM) -> None:
    exact = enumerate_joint(model, ALL)
    assert float(exact.sum()) == pytest.approx(1)
    assert float(exact.max()) < 0.05, "too peaked to show a subtle fault"
    assert p_value(draw(ArDecoder, model, ALL), exact) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("acceptance", ["gumbel", "ratio"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("params", [PLAIN, ALL], ids=["plain", "all"])
def test_joint(model: CausalLM, params: SamplingParams, k: int, acceptance: str) -> None:
    counts = draw(TidarDecoder, model, params, draft_len=k, acceptance=acceptance)
    assert p_value(counts, enumerate_joint(model, params)) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("acceptance", ["gumbel", "ratio"])
def test_joint_of_two_forwards(model: CausalLM, acceptance: str) -> None:
    counts = draw(LinearDecoder, model, ALL, draft_len=3, acceptance=acceptance)
    assert p_value(counts, enumerate_joint(model, ALL)) > ALPHA


@pytest.mark.slow
@pytest.mark.parametrize("acceptance", ["gumbel", "ratio"])
def test_joint_with_a_transition(model: CausalLM, acceptance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draft's q then hangs on the draft before it."""
    monkeypatch.setattr(model, "spec", model.spec)
    monkeypatch.setattr(model, "transition", None)
    model.add_transition(8).initialise(1)
    assert model.transition is not None
    torch.nn.init.normal_(model.transition.out.weight, std=2.0, generator=torch.Generator().manual_seed(2))
    counts = draw(TidarDecoder, model, ALL, draft_len=3, acceptance=acceptance)
    assert p_value(counts, enumerate_joint(model, ALL)) > ALPHA


@pytest.mark.parametrize("level", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)])
def test_joint_with_one_proposal(model: CausalLM, level: int) -> None:
    with steered(subset(level)):
        counts = draw(TidarDecoder, model, ALL, draft_len=3, proposals=1, acceptance="ratio")
    assert p_value(counts, enumerate_joint(model, ALL)) > ALPHA


def test_joint_without_proposals(model: CausalLM) -> None:
    """Of the drafts of the prefill, and of none."""

    def made(core: CausalLM, **options: Any) -> TidarDecoder:
        decoder = TidarDecoder(core, **options)
        decoder.policy = Fixed(3, 0)
        return decoder

    counts = draw(made, model, ALL, draft_len=3, acceptance="ratio")
    assert p_value(counts, enumerate_joint(model, ALL)) > ALPHA


class Telling(TidarDecoder):
    """What is drafted for hangs on the last draft, as its chance does."""

    def _pick(self, shape: Shape) -> _Picked:
        likely = torch.full((len(self._drafts), shape.drafts), 0.1)
        even = self._drafts[:, -1] % 2 == 0
        likely[even, 0], likely[~even, -1] = 1.0, 1.0
        self._chances = chances_of(likely)
        return super()._pick(shape)


def test_joint_where_drafts_say_what_is_drafted_for(model: CausalLM) -> None:
    """Then whether a draft is made hangs on one that stood in its place and was thrown away."""
    counts = draw(Telling, model, ALL, draft_len=3, proposals=1, acceptance="ratio")
    assert p_value(counts, enumerate_joint(model, ALL)) > ALPHA


def test_trusting_drafts_shows(model: CausalLM) -> None:
    """The test can fail: with beta = 0.5 the tokens are not the model's."""
    counts = draw(TidarDecoder, model, PLAIN, draft_len=2, beta=0.5)
    assert p_value(counts, enumerate_joint(model, PLAIN)) < ALPHA
