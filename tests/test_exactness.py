"""Greedy TiDAR is the model's own greedy decoding: every family, draft length, proposal and acceptance.

On a random model almost every step commits one token, which would prove little. So drafts are injected: the
autoregressive continuation, corrupted at a chosen place, such that every number of accepted drafts occurs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from picking import Wish, anything, steer, subset
from tiny import FAMILIES, WINDOW
from transformers import AutoModelForCausalLM, GenerationConfig

from tidar import layout
from tidar.api import Model
from tidar.cache import SlotCache
from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.linear import LinearDecoder
from tidar.decode.plan import Shape
from tidar.decode.policy import Fixed
from tidar.decode.tidar import TidarDecoder, _Picked

PROMPTS = [b"def add(a, b):\n    return", b"x", b"import os\n"]
NEW = 24
GREEDY = SamplingParams(max_new_tokens=NEW)


@functools.cache
def reference(folder: Path, prompt: tuple[int, ...], new: int) -> list[int]:
    """What transformers itself generates, its own attention, fp64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()
    keep = model.generation_config
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=keep.eos_token_id,
        pad_token_id=keep.pad_token_id,
        suppress_tokens=keep.suppress_tokens,
    )
    tokens = torch.tensor([prompt])
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, converted: Callable[[str], Path]) -> None:
    folder = converted(family)
    model = Model(load_model(folder, dtype="float64"))
    prompts = [list(p) for p in PROMPTS]
    expected = [reference(folder, tuple(p), NEW) for p in prompts]
    assert max(len(p) for p in prompts) + NEW > 2 * WINDOW
    assert [c.token_ids for c in model.generate(prompts, GREEDY, method="ar")] == expected
    for k in (1, 2, 3, 4, 8, 16):
        for method in ("tidar", "linear"):
            found = model.generate(prompts, GREEDY, draft_len=k, method=method)
            assert [c.token_ids for c in found] == expected, f"{method}, k = {k}"


class Injected(TidarDecoder):
    """Drafts are the truth, corrupted at a place that cycles, so that 1 … k drafts are accepted in turn.

    The drafts the model itself made are compared with a fresh prefill of the committed text: what a proposal saw was
    the prefix, the accepted drafts and its own masks, nothing else.
    """

    def __init__(
        self, *args: object, truth: Sequence[Sequence[int]], shift: int, wish: Wish | None = None, **kwargs: object
    ) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.truth = [list(t) for t in truth]
        self.clock = shift
        self.wish = anything() if wish is None else wish
        self.accepted: list[tuple[int, int]] = []  # (drafts accepted, proposal used; 0 for none)
        self.picked: set[tuple[int, ...]] = set()

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.truth = [self.truth[r] for r in rows]

    def _pick(self, shape: Shape) -> _Picked:
        steer(self, self.wish, shape)
        return super()._pick(shape)

    def _verify(self, hidden: torch.Tensor, shape: Shape, picked: _Picked) -> tuple[torch.Tensor, torch.Tensor]:
        accepted, follow = super()._verify(hidden, shape, picked)
        for n, levels in zip(accepted.tolist(), picked.levels.tolist(), strict=True):
            assert len(levels) == shape.proposals and levels == sorted(set(levels))
            self.picked.add(tuple(levels))
            self.accepted.append((n, max((j for j in levels if j <= n), default=0)))
        return accepted, follow

    def _next_drafts(self, first: torch.Tensor, hidden: torch.Tensor, made: torch.Tensor, *rest: Any) -> torch.Tensor:
        own = super()._next_drafts(first, hidden, made, *rest)
        k = self.draft_len
        if self.cache.lengths and k > 1 and self.accepted:
            self._check_proposals(hidden, made)
        drafts = own.new_empty(len(own), k)
        for row, length in enumerate(self.cache.lengths):
            ahead = (self.truth[row] + [0] * k)[length : length + k]
            assert ahead[0] == int(first[row]), "the certain token is not the autoregressive one"
            wrong = 1 + (self.clock + row) % k  # k: nothing is wrong
            drafts[row] = torch.tensor([t if i < wrong else (t + 1) % 200 for i, t in enumerate(ahead)])
        self.clock += 1
        return drafts

    def _check_proposals(self, hidden: torch.Tensor, made: torch.Tensor) -> None:
        k = self.draft_len
        for row, length in enumerate(self.cache.lengths):
            n, used = self.accepted[len(self.accepted) - len(self.cache.lengths) + row]
            if not used:
                assert not made[row].any()
                continue
            base = length - n + used  # the text that the proposal saw
            plan = layout.prefill([base], k)
            tokens = plan.tokens(torch.tensor([self.truth[row][:base]]), self.model.mask_id)
            fresh = self.model.hidden(tokens, plan)[0, -k:]
            late = n - used
            assert made[row].tolist() == [i + late < k for i in range(1, k)]
            for place in range(1, k - late):
                torch.testing.assert_close(hidden[row, place - 1], fresh[place + late], rtol=1e-5, atol=1e-5)


def run_injected(
    model: Model, prompts: list[list[int]], new: int, k: int, proposals: Sequence[int] | int | None
) -> set[tuple[int, ...]]:
    """With these proposals in every step, or with so many, in every step and row others; returns what they were."""
    # The last step looks past the end that is asked for.
    ahead = [SamplingParams(max_new_tokens=new + k, ignore_eos=True)] * len(prompts)
    params = [SamplingParams(max_new_tokens=new, ignore_eos=True)] * len(prompts)
    truth = [c.token_ids for c in model.generate(prompts, ahead, method="ar")]
    decoders: list[Injected] = []
    wish = subset(*proposals) if isinstance(proposals, Sequence) else anything()
    count = len(proposals) if isinstance(proposals, Sequence) else proposals

    def make() -> Injected:
        texts = sorted(zip(prompts, truth, strict=True), key=lambda pair: len(pair[0]))
        decoder = Injected(
            model.core,
            draft_len=k,
            proposals=count or None,
            truth=[[*p, *t] for p, t in texts],
            shift=len(decoders),
            wish=wish,
        )
        if count == 0:
            decoder.policy = Fixed(k, 0)
        decoders.append(decoder)
        return decoder

    answers = generation.generate(model.core, prompts, params, make, batch_size=len(prompts))
    assert [a.token_ids for a in answers] == [t[:new] for t in truth]
    got = {n for d in decoders for n, _ in d.accepted}
    assert got == set(range(1, k + 1)), f"accepted counts {sorted(got)} of 1 … {k}"
    picked = {levels for d in decoders for levels in d.picked}
    if isinstance(proposals, Sequence):
        assert picked == {tuple(sorted(proposals))}
    chosen = set(proposals) if isinstance(proposals, Sequence) else set(range(1, k + 1))
    used = {used for d in decoders for _, used in d.accepted}
    if k > 1:
        assert used - {0} == chosen, "a proposal was never used"
    return picked


@pytest.mark.parametrize("family", FAMILIES)
def test_injected(family: str, converted: Callable[[str], Path]) -> None:
    model = Model(load_model(converted(family), dtype="float64"))
    run_injected(model, [list(p) for p in PROMPTS], 40, 4, None)


ENOUGH = {1: 8, 2: 12, 3: 24, 8: 80, 16: 200}  # new tokens in which every number of accepted drafts occurs


@pytest.mark.slow
@pytest.mark.parametrize("k", ENOUGH)
@pytest.mark.parametrize("family", FAMILIES)
def test_injected_family_and_length(family: str, k: int, converted: Callable[[str], Path]) -> None:
    model = Model(load_model(converted(family), dtype="float64"))
    prompts = [list(p) for p in PROMPTS]
    run_injected(model, prompts, ENOUGH[k], k, None)
    if k > 1:
        run_injected(model, prompts, ENOUGH[k], k, (1, (k + 1) // 2 + 1) if k > 2 else (2,))


@pytest.mark.parametrize(("k", "new"), [(1, 8), (2, 12), (3, 24), (8, 80), (16, 200)])
def test_injected_lengths(qwen3: Model, k: int, new: int) -> None:
    run_injected(qwen3, [list(p) for p in PROMPTS], new, k, None)


@pytest.mark.parametrize("proposals", [p for n in range(4) for p in itertools.combinations(range(1, 4), n)])
def test_injected_subsets(qwen3: Model, proposals: tuple[int, ...]) -> None:
    run_injected(qwen3, [list(p) for p in PROMPTS], 30, 3, proposals)


@pytest.mark.parametrize("proposals", [(1,), (16,), (4, 8, 12, 16), (2, 3, 5, 7, 11, 13), tuple(range(9, 17))])
def test_injected_subsets_of_16(qwen3: Model, proposals: tuple[int, ...]) -> None:
    run_injected(qwen3, [list(p) for p in PROMPTS], 200, 16, proposals)


@pytest.mark.parametrize(("k", "proposals"), [(3, 1), (3, 2), (4, 2), (6, 1), (6, 5)])
def test_injected_where_rows_and_steps_differ(qwen3: Model, k: int, proposals: int) -> None:
    """Every choice of so many proposals comes."""
    found = run_injected(qwen3, [list(p) for p in PROMPTS], 120, k, proposals)
    assert found == set(itertools.combinations(range(1, k + 1), proposals))


@pytest.mark.parametrize("proposals", [3, 8, 15])
def test_injected_where_rows_and_steps_differ_of_16(qwen3: Model, proposals: int) -> None:
    assert len(run_injected(qwen3, [list(p) for p in PROMPTS], 400, 16, proposals)) >= 16


class InjectedLinear(LinearDecoder):
    """What it drafts is the truth, corrupted at a place that cycles."""

    def __init__(self, *args: object, truth: Sequence[Sequence[int]], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.truth, self.clock = [list(t) for t in truth], 0
        self.shapes: list[Shape] = []
        self.accepted: set[int] = set()

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.truth = [self.truth[r] for r in rows]

    def _verify(self, hidden: torch.Tensor, shape: Shape, picked: _Picked) -> tuple[torch.Tensor, torch.Tensor]:
        accepted, follow = super()._verify(hidden, shape, picked)
        self.shapes.append(shape)
        if not shape.proposals:
            self.accepted.update(accepted.tolist())
        return accepted, follow

    def _next_drafts(self, first: torch.Tensor, hidden: torch.Tensor, made: torch.Tensor, *rest: Any) -> torch.Tensor:
        drafts = super()._next_drafts(first, hidden, made, *rest)
        for row, length in enumerate(self.cache.lengths):
            wrong = 1 + (self.clock + row) % self.draft_len  # as long as the drafts: nothing is wrong
            for place in range(1, drafts.shape[1]):
                token = self.truth[row][length + place]
                drafts[row, place] = token if place < wrong else (token + 1) % 200
        self.clock += drafts.shape[1] > 1
        return drafts


@pytest.mark.parametrize("k", [2, 3, 4, 8, 16])
def test_injected_linear(qwen3: Model, k: int) -> None:
    prompts, new = sorted((list(p) for p in PROMPTS), key=len), 12 * k
    ahead = qwen3.generate(prompts, SamplingParams(max_new_tokens=new + 2 * k, ignore_eos=True), method="ar")
    truth = [[*p, *c.token_ids] for p, c in zip(prompts, ahead, strict=True)]
    decoder = InjectedLinear(qwen3.core, draft_len=k, truth=truth)
    params = [SamplingParams(max_new_tokens=new, ignore_eos=True)] * len(prompts)
    answers = generation.generate(qwen3.core, prompts, params, lambda: decoder, batch_size=len(prompts))
    assert [a.token_ids for a in answers] == [c.token_ids[:new] for c in ahead]
    assert decoder.accepted == set(range(1, k + 1))
    # In turn: the prefill has drafted, so a check comes first.
    assert decoder.shapes[:4] == [Shape(k, 0, k), Shape(1, 1, k)] * 2


def test_cache_holds_what_a_fresh_prefill_would(qwen3: Model) -> None:
    prompt = list(PROMPTS[0])
    truth = qwen3.generate([prompt], SamplingParams(max_new_tokens=60, ignore_eos=True), method="ar")[0].token_ids
    decoder = Injected(qwen3.core, draft_len=4, truth=[[*prompt, *truth]], shift=0)
    fresh = TidarDecoder(qwen3.core, draft_len=4)
    with torch.inference_mode():
        decoder.prefill([prompt], [GREEDY])
        for _ in range(12):
            decoder.step()
        length = decoder.cache.lengths[0]
        fresh.prefill([[*prompt, *truth][:length]], [GREEDY])
    assert length > len(prompt) + 20
    for ours, theirs in ((decoder.cache._keys, fresh.cache._keys), (decoder.cache._values, fresh.cache._values)):
        for mine, new in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine[:, :, :length], new[:, :, :length], rtol=1e-5, atol=1e-5)


def test_a_mask_left_in_the_cache_shows(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that others have had: after a block accepted as a whole, a mask's key and value stay."""
    prompt = list(PROMPTS[0])
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    truth = qwen3.generate([prompt], SamplingParams(max_new_tokens=60, ignore_eos=True), method="ar")[0].token_ids

    def run() -> list[int]:
        decoder = Injected(qwen3.core, draft_len=4, truth=[[*prompt, *truth]], shift=0)
        decoder._check_proposals = lambda *_: None  # type: ignore[method-assign]
        return generation.generate(qwen3.core, [prompt], [params], lambda: decoder, 1)[0].token_ids

    assert run() == truth[:40]
    kept = SlotCache.commit

    def leave(self: SlotCache, counts: list[int]) -> None:
        if counts == [4]:  # the first mask's slot takes the place of the next token's
            for store in (self._keys, self._values):
                for layer in store:
                    layer[:, :, self.lengths[0] + 3] = layer[:, :, self.lengths[0] + 4]
        kept(self, counts)

    monkeypatch.setattr(SlotCache, "commit", leave)
    with pytest.raises(AssertionError, match="the certain token is not the autoregressive one"):
        run()


def test_long_prompts_in_pieces(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [list(b"abcdefgh" * 9), list(b"xyz"), list(b"0123456789" * 4)]
    whole = [c.token_ids for c in qwen3.generate(prompts, GREEDY)]
    monkeypatch.setattr("tidar.decode.base.PREFILL_PIECE", 16)
    pieces = qwen3.generate(prompts, GREEDY, draft_len=4)
    assert [c.token_ids for c in pieces] == whole
    assert pieces[0].forwards >= 5 + 1  # ceil(72 / 16) pieces, then steps
