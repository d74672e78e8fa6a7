"""Adapters in the lean model: mask rows as on the plain path, clean rows and steps without masks as without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from picking import chances_for
from test_adapters import PROMPTS, adapted, plain  # noqa: F401
from test_lean import KERNELS, STEPS, general
from torch import Tensor

from tidar.api import Model
from tidar.bench import step as bench
from tidar.bench.floors import Rates, floor
from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.plan import Outcome, Shape
from tidar.decode.policy import Alternating, Autoregressive, Fixed, Policy
from tidar.errors import TidarError
from tidar.fast import ops
from tidar.fast.adapted import Masks
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import Engine
from tidar.fast.latency import Latency
from tidar.fast.lean import FAMILIES, LeanModel
from tidar.fast.network import Flags
from tidar.fast.step import Step
from tidar.model import Spec

GREEDY = Flags(sampling=False, filtering=False, penalty=False)
Plain = Callable[[str], Path]


@pytest.mark.parametrize("modules", [(), ("v_proj", "up_proj")], ids=["all", "some"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_equal_the_general_path(family: str, modules: tuple[str, ...], plain: Plain) -> None:  # noqa: F811
    model, core = (adapted(plain(family), modules=modules) for _ in range(2))
    engine = Engine(core, plain=True)
    network, lean = engine.network, engine.network.lean
    texts = [list(b"def add(a, b)") * 2, list(b"xy")]
    with torch.inference_mode():
        slots, _ = engine.open(engine, texts, [SamplingParams(max_new_tokens=50)] * 2)
        engine.prefill(slots, texts, 3, GREEDY)
        for k, levels, accepted in STEPS:
            drafts = torch.randint(200, (2, k), generator=torch.Generator().manual_seed(k))
            step = Step(network, slots, Shape(k, len(levels[0]), k), GREEDY)
            slots.chances[:, 1:k] = chances_for(levels, k)
            x = network.hidden(drafts, step._layout, slots).x
            found = KERNELS.norm(x, lean.norm, eps=lean.eps).view(2, -1, x.shape[1])
            for row in range(2):
                expected = general(model, texts[row], k, levels[row], drafts[row])
                torch.testing.assert_close(found[row], expected, rtol=0, atol=2e-5)
                texts[row] += drafts[row, : accepted[row]].tolist()
            slots.lengths.copy_(torch.tensor([len(t) for t in texts]))


POLICIES: dict[str, Callable[[], Policy]] = {
    "ar": Autoregressive,
    "k4": lambda: Fixed(4, 4),
    "pruned": lambda: Fixed(6, 2),
    "alternates": lambda: Fixed(4, 2, 3),
    "linear": lambda: Alternating(5),
}


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_text_is_that_of_the_base(deterministic: bool, plain: Plain) -> None:  # noqa: F811
    each = [SamplingParams(max_new_tokens=12 + 3 * n, temperature=0.9 * (n % 2), seed=n) for n in range(3)]
    base = Model(load_model(plain("qwen3"), dtype="float64"))
    expected = [c.token_ids for c in base.generate(PROMPTS, each, method="ar")]
    core = adapted(plain("qwen3"))
    drafted = Model(core).generate(PROMPTS, each, draft_len=4)
    engine = Engine(core, plain=True, deterministic=deterministic)
    for name, policy in POLICIES.items():
        made = partial(FastDecoder, engine, policy())
        found = generation.generate(core, PROMPTS, each, made, len(PROMPTS))
        assert [c.token_ids for c in found] == expected, name
        if name == "k4":  # the same drafts, so the same forwards
            assert [c.forwards for c in found] == [c.forwards for c in drafted]


def test_alternates_are_the_bases(plain: Plain) -> None:  # noqa: F811
    """They are no masks: what one tells is what the base will say, so it stands."""
    told: list[Sequence[int]] = [[0] * 3]

    class Listening(Fixed):
        def learn(self, shape: Shape, outcome: Outcome, seconds: float | None = None) -> None:
            assert all(n > sure for n, sure in zip(outcome.accepted, told[-1], strict=True))
            told.append(outcome.sure)

    decoder = FastDecoder(Engine(adapted(plain("qwen3")), plain=True), Listening(8, 8, 28), ahead=1)
    with torch.inference_mode():
        decoder.prefill(PROMPTS, [SamplingParams(max_new_tokens=400)] * 3)
        for _ in range(100):
            decoder.step()
            decoder._learn()
    assert sum(sure > 0 for each in told for sure in each) > 2


def test_steps_without_masks_run_nothing_more(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    engine = Engine(adapted(plain("llama")), plain=True)
    monkeypatch.setattr("tidar.fast.adapted.Masks.rows", lambda *_: pytest.fail("a step without masks met a pair"))
    monkeypatch.setattr(engine.network.ops, "gated", lambda *_: pytest.fail("another program for clean rows"))
    each = [SamplingParams(max_new_tokens=5)]
    found = generation.generate(engine.core, PROMPTS[:1], each, lambda: FastDecoder(engine, Autoregressive()), 1)
    assert len(found[0].token_ids) == 5


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_clean_rows_are_of_one_program(deterministic: bool, plain: Plain) -> None:  # noqa: F811
    """That of steps without masks: what the other says of them is not read."""
    lean = LeanModel(adapted(plain("llama")), ops.load(plain=True), deterministic=deterministic)
    masks, x = Masks(queries=7, clean=3), torch.randn(14, 32, dtype=torch.float64)
    alone, both, spoilt = x.clone(), x.clone(), x.clone()
    lean.mlp(alone, None, 0)
    lean.mlp(both, None, 0, masks)
    gated = lean._ops.gated

    def spoil(gates: Tensor) -> Tensor:
        made: Tensor = gated(gates)
        masks.rest(made).zero_()
        return made

    lean._ops.gated = spoil
    lean.mlp(spoilt, None, 0, masks)
    torch.testing.assert_close(masks.rest(both), masks.rest(alone))
    assert torch.equal(masks.of(spoilt), masks.of(both)) and not torch.equal(masks.of(both), masks.of(alone))
    assert torch.equal(masks.rest(spoilt), masks.rest(alone)) == deterministic


@pytest.mark.parametrize("deterministic", [False, True])
def test_layers_with_kernels(deterministic: bool, plain: Plain) -> None:  # noqa: F811
    """A norm formed with the sum before it sees what the pairs have added."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, masks, results = torch.randn(14, 32), Masks(queries=7, clean=3), []
    for twins in (True, False):
        core = adapted(plain("qwen2"), "float32")
        core.hf.to(device)  # type: ignore[arg-type]
        assert core.adapters is not None
        core.adapters.to(device)
        lean = LeanModel(core, ops.load(plain=twins), deterministic=deterministic)

        def attend(number: int, layer: Any, heads: Tensor) -> Tensor:
            return heads[:, :4].flatten(1) + heads[:, 4:].flatten(1)

        hidden = lean(x.to(device, copy=True), attend, masks)
        logits = lean.logits(hidden, torch.arange(14, dtype=torch.int32, device=device))
        results.append((hidden.x.cpu(), logits.cpu()))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def test_bench_counts_them(plain: Plain, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Their bytes and operations, in steps with masks; and random ones can be asked for."""
    base, core = (load_model(plain("qwen3"), dtype="float32") for _ in range(2))
    core.spec = base.spec = Spec(mask_token_id=0)
    bench.add_adapters(core, 5)
    assert core.adapters is not None and all(bool(w.any()) for w in core.adapters.parameters())
    count = sum(w.numel() for w in core.adapters.parameters())
    rate = Rates(bandwidth=4e12, matmul=8e14)
    for shape, masks in ((Shape(4, 3, 4), 12), (Shape(4, 0, 4), 0)):
        one, other = (floor(Engine(each, plain=True).network.lean, shape, 2, 10, rate) for each in (core, base))
        assert one.bytes - other.bytes == 4 * count * (masks > 0) and one.flops - other.flops == 2 * count * 2 * masks
    with pytest.raises(TidarError, match="has adapters of its own: leave out --adapter-rank"):
        bench.add_adapters(core, 5)

    monkeypatch.setattr(bench, "obstacle", lambda _: None)
    monkeypatch.setattr(bench, "Engine", lambda core, **options: Engine(core, plain=True, **options))
    monkeypatch.setattr(bench, "rates", lambda _: rate)
    monkeypatch.setattr(bench, "interleaved", lambda calls, **_: [call() or 1e-3 for call in calls])
    lines = [bench.run(each, draft_lens=(2,), prefixes=(8,), rows=(1,)) for each in (core, base)]
    assert [line[-1]["adapter_rank"] for line in lines] == [5, 0]


def test_their_steps_have_times_of_their_own(plain: Plain) -> None:  # noqa: F811
    folder = plain("llama")
    cores = [load_model(folder), adapted(folder, "float32"), adapted(folder, "float32", modules=("q_proj",))]
    assert len({Latency(core).path for core in cores}) == 3
