"""Decoding by captured steps gives the tokens of the plain path.

On a GPU the kernels run, in captured graphs and float32; without one their plain twins, uncaptured and in float64.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tidar.api import Model
from tidar.checkpoint import embedded_checkpoint, load_model
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.plan import Outcome, Shape, few
from tidar.decode.policy import Alternating, Autoregressive, Fixed, Planning, Policy
from tidar.errors import TidarError
from tidar.fast import obstacle
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import MOST, Engine
from tidar.fast.latency import Latency
from tidar.fast.lean import FAMILIES, Hidden
from tidar.fast.network import Flags, Network
from tidar.fast.pages import PAGE, Pages
from tidar.fast.slots import Slots
from tidar.fast.step import Step

PROMPTS = [
    list(b"def add(a, b):"),
    list(b"x"),
    list(b"class Tree:\n    def __init__(self"),
    list(b"import os"),
    [7] * 70,
]
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", "float32") if GPU else ("cpu", "float64")
POLICIES: dict[str, Callable[[], Policy]] = {
    "ar": Autoregressive,
    "k1": lambda: Fixed(1, 0),
    "k3": lambda: Fixed(3, 3),
    "k6": lambda: Fixed(6, 6),
    "one": lambda: Fixed(6, 1),
    "two": lambda: Fixed(6, 2),
    "alternates": lambda: Fixed(4, 2, 3),
    "linear": lambda: Alternating(5),
}


class Restless(Fixed):
    """Another shape every step."""

    def __init__(self) -> None:
        super().__init__(6, 0)
        self.turn = 0

    def shape(self, held: int) -> Shape:
        self.turn += 1
        wanted = [
            Shape(held, held, 6),
            Shape(1, 0, 1),
            Shape(min(held, 3), 1, 4, 2),
            Shape(held, 0, 1),
        ]
        return wanted[self.turn % 4]

    def learn(self, shape: Shape, outcome: Outcome, seconds: float | None = None) -> None:
        assert all(1 <= n <= shape.drafts for n in outcome.accepted)
        assert all(0 <= place < shape.drafts for place in outcome.places)
        for n, behind in zip(outcome.accepted, outcome.behind, strict=True):
            assert behind == shape.masks or (0 <= behind < n and shape.proposals)
            assert behind == 0 or shape.proposals < shape.drafts


class Listening(Fixed):
    """Counts the steps it was told of."""

    told, closed = 0, False

    def learn(self, shape: Shape, outcome: Outcome, seconds: float | None = None) -> None:
        assert not self.closed
        self.told += 1

    def close(self) -> None:
        self.closed = True


def test_every_step_is_learnt_from(engine: Engine) -> None:
    """Those whose tokens were read, the last one too."""
    policy = Listening(4, 3)
    decoder = FastDecoder(engine, policy)
    generation.generate(engine.core, PROMPTS, params(), _once(decoder), len(PROMPTS))
    assert policy.closed and policy.told == decoder.forwards - 1 > 3, "one is the prompts'"
    policy = Listening(4, 3)
    chunks = generation.stream(engine.core, PROMPTS[:1], params()[:1], lambda: FastDecoder(engine, policy), 1)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert policy.closed


def _once(decoder: FastDecoder) -> Callable[[], FastDecoder]:
    return lambda: decoder


def params(**options: float) -> list[SamplingParams]:
    return [
        SamplingParams(max_new_tokens=9 + 7 * n, seed=n, **options)  # type: ignore[arg-type]
        for n in range(len(PROMPTS))
    ]


@pytest.fixture(scope="module")
def engine(converted: Callable[[str], Path]) -> Engine:
    return made(converted("qwen3"))


def made(folder: Path) -> Engine:
    return Engine(load_model(folder, device=DEVICE, dtype=DTYPE), plain=not GPU)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.1, "top_k": 9, "repetition_penalty": 1.3}]
)
def test_tokens_are_those_of_the_plain_path(
    engine: Engine, qwen3: Model, policy: str, ahead: int, options: dict[str, float]
) -> None:
    each = params(**options)
    expected = qwen3.generate(PROMPTS, each, method="ar")
    found = generation.generate(
        engine.core, PROMPTS, each, lambda: FastDecoder(engine, POLICIES[policy](), ahead=ahead), len(PROMPTS)
    )
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    if policy == "ar":
        assert [c.forwards for c in found] == [c.forwards for c in expected]


def test_changing_shapes_changes_no_token(engine: Engine, qwen3: Model) -> None:
    each = params(temperature=0.8, top_p=0.95)
    expected = qwen3.generate(PROMPTS, each, method="ar")
    found = generation.generate(engine.core, PROMPTS, each, lambda: FastDecoder(engine, Restless()), 3)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("proposals", [1, 2, 3])
def test_nothing_that_is_drafted_for_changes_a_token(
    proposals: int,
    options: dict[str, float],
    qwen3: Model,
    converted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With chances that say nothing of the drafts, each row and step drafts for others."""

    picked, real = set[tuple[int, ...]](), Step.__call__

    def noting(self: Step) -> None:
        real(self)
        picked.update(tuple(row) for row in self._levels.tolist())

    if not GPU:
        monkeypatch.setattr(Step, "__call__", noting)
    each = params(**options)
    expected = qwen3.generate(PROMPTS, each, method="ar")
    engine = made(converted("qwen3"))
    draft = engine.network.ops.draft

    def anything(*tensors: Tensor, chances: Tensor, **options: Any) -> None:
        draft(*tensors, chances=chances, **options)
        chances.uniform_()

    engine.network.ops.draft = anything
    found = generation.generate(engine.core, PROMPTS, each, lambda: FastDecoder(engine, Fixed(4, proposals)), 5)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert GPU or picked == set(itertools.combinations(range(1, 5), proposals))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, converted: Callable[[str], Path]) -> None:
    core = load_model(converted(family), dtype="float64")
    expected = Model(core).generate(PROMPTS, params(), method="ar")
    engine = made(converted(family))
    found = generation.generate(engine.core, PROMPTS, params(), lambda: FastDecoder(engine, Fixed(4, 3)), 3)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_reference_checkpoint_drafts_as_on_the_plain_path() -> None:
    """With a transition, and real acceptance: about as many forwards as the plain path, not only the same tokens."""
    import tidar

    plain = tidar.load(device=DEVICE, dtype=DTYPE, fast=False)
    prompts = [plain.core.tokenizer(text)["input_ids"] for text in ("def fib(n):\n", "import os\n\n\nclass Walker:\n")]
    each = [SamplingParams(max_new_tokens=24), SamplingParams(max_new_tokens=24, temperature=0.7, seed=3)]
    expected = plain.generate(prompts, each, method="tidar", draft_len=8)
    engine = made(embedded_checkpoint())
    found = generation.generate(engine.core, prompts, each, lambda: FastDecoder(engine, Fixed(8, 8)), 2)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    # Drafts are chosen from shortlists here (`tidar.kernels.chain`), there from the whole vocabulary.
    assert sum(c.forwards for c in found) <= 1.1 * sum(c.forwards for c in expected)
    assert sum(c.tokens_per_forward for c in found) > 3


def test_no_row_is_longer_than_the_model(engine: Engine, qwen3: Model) -> None:
    """Whatever number of new tokens is allowed: pages, limits and the prefixes that steps are measured behind."""
    each = [SamplingParams(max_new_tokens=2**40, seed=1)]
    decoder = FastDecoder(engine, Planning(4, list(few(4))))
    with torch.inference_mode():
        tokens = decoder.prefill(PROMPTS[:1], each)[0]
        longest = engine.core.max_positions
        assert decoder._slots.limits[0] == longest and decoder._slots.table.shape[1] * PAGE >= longest
        while len(tokens) < 30:
            tokens += decoder.step()[0]
    assert (
        tokens[:30]
        == qwen3.generate(PROMPTS[:1], SamplingParams(max_new_tokens=30, ignore_eos=True), method="ar")[0].token_ids
    )


def test_rows_and_pages_are_used_again(engine: Engine) -> None:
    def run() -> list[list[int]]:
        found = generation.generate(engine.core, PROMPTS, params(), lambda: FastDecoder(engine, Fixed(3, 2)), 5)
        return [c.token_ids for c in found]

    first = run()
    assert engine._pages is not None
    free, slots = engine._pages.free, len(engine._slots)
    assert run() == first
    assert (engine._pages.free, len(engine._slots)) == (free, slots)


def test_two_streams_at_once_do_not_meet(engine: Engine, qwen3: Model) -> None:
    each = [SamplingParams(max_new_tokens=30)]

    def stream(prompt: list[int]) -> list[int]:
        return qwen3.generate([prompt], each, method="ar")[0].token_ids

    def fast(prompt: list[int]) -> Iterator[generation.Chunk]:
        return generation.stream(engine.core, [prompt], each, lambda: FastDecoder(engine, Fixed(3, 3)), 1)

    streams = [fast(p) for p in PROMPTS[:3]]
    tokens: list[list[int]] = [[], [], []]
    for _ in range(30):
        for mine, running in zip(tokens, streams, strict=True):
            mine += next(
                running, generation.Chunk(index=0, token_ids=[], text="", forwards=0, finish_reason=None)
            ).token_ids
    assert tokens == [stream(p) for p in PROMPTS[:3]]


def test_nan_of_masks_is_an_error(converted: Callable[[str], Path]) -> None:
    """Which the next step need not see: what they draft is a token."""
    engine = made(converted("qwen3"))
    decoder, network = FastDecoder(engine, Fixed(3, 2)), engine.network
    with torch.inference_mode():
        decoder.prefill(PROMPTS[:1], params()[:1])
        slots = decoder._slots
        states = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE)
        hidden = Hidden(torch.full_like(network.lean.embedding[:2], torch.nan))
        network.draft(hidden, states, torch.ones(1, 2, dtype=torch.bool, device=DEVICE), slots, Flags(*[False] * 3))
        assert slots.drafts[0, 1:3].tolist() == slots.chances[0, 1:3].tolist() == [0, 0]
        with pytest.raises(TidarError, match="NaN or infinite logits"):
            decoder.step()


def test_nan_is_an_error(converted: Callable[[str], Path]) -> None:
    engine = made(converted("qwen3"))
    decoder = FastDecoder(engine, Autoregressive())
    with torch.inference_mode():
        decoder.prefill(PROMPTS[:1], params()[:1])
        engine.network.lean.norm.fill_(torch.nan)
        with pytest.raises(TidarError, match="NaN or infinite logits"):
            list(iter(decoder.step, None))


@pytest.mark.parametrize("fault", ["none", "stale buffer", "wrong row length", "lost keys"])
def test_planted_faults_are_caught(
    fault: str, converted: Callable[[str], Path], qwen3: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the equality tests rest on: a fault in what a captured step reads changes the text."""
    each = [SamplingParams(max_new_tokens=40)] * 2
    expected = [c.token_ids for c in qwen3.generate(PROMPTS[:2], each, method="ar")]
    engine = made(converted("qwen3"))
    real = Step.__init__

    def planted(self: Step, network: Network, slots: Slots, shape: Shape, flags: Flags) -> None:
        real(self, network, slots, shape, flags)
        if fault == "stale buffer":
            self._layout = replace(self._layout, lengths=slots.lengths.clone())
        elif fault == "wrong row length":
            self._layout = replace(self._layout, lengths=slots.lengths.flip(0).contiguous())
        elif fault == "lost keys":
            self._layout.counts.zero_()

    monkeypatch.setattr(Step, "__init__", planted)
    found = generation.generate(engine.core, PROMPTS[:2], each, lambda: FastDecoder(engine, Fixed(3, 3)), 2)
    assert ([c.token_ids for c in found] == expected) == (fault == "none")


def test_rows_move_to_smaller_batches(engine: Engine, qwen3: Model) -> None:
    """Two that are alike end at once, so that the smaller batch is padded; with penalties, which padding must bear."""
    prompts = [PROMPTS[0], *PROMPTS[:4]]
    each = [
        SamplingParams(max_new_tokens=new, seed=seed, temperature=0.9, repetition_penalty=1.3)
        for new, seed in ((3, 0), (3, 0), (9, 2), (16, 3), (23, 4))
    ]
    expected = qwen3.generate(prompts, each, method="ar")
    for ahead in (1, 3):
        decoder = FastDecoder(engine, Fixed(3, 3), ahead=ahead)
        sizes: list[tuple[int, int]] = []
        real = decoder.select

        def noting(rows: list[int], decoder: FastDecoder = decoder, real: Callable[..., None] = real) -> None:
            real(rows)
            sizes.append((len(rows), decoder._slots.rows))  # noqa: B023

        decoder.select = noting  # type: ignore[method-assign]
        found = generation.generate(engine.core, prompts, each, _once(decoder), 5)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert sizes == [(3, 4), (2, 2), (1, 1)]


def test_rows_are_adopted_as_they_stand(engine: Engine) -> None:
    """Whichever, in any order, again and again through what is captured once; the rest is at rest."""
    pages = engine._room(8)
    large, small = (Slots(n, MOST, 50, 4, pages, engine.core.device) for n in (5, 2))
    ready: list[object] = []

    def captured(move: Callable[[], object]) -> Callable[[], object]:
        ready.append(move)
        return engine.captured(move, 2)

    for turn, rows in enumerate(([4, 1], [3], [0, 2])):
        for tensor in (*large._state, *large.params.tensors):
            span = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape) + turn
            tensor.copy_(span % 2 if tensor.dtype == torch.bool else span)
        small.tickets.fill_(9)
        params = [t.clone() for t in small.params.tensors]
        small.adopt(large, rows, captured)
        for mine, theirs in zip(small._state[:-2], large._state[:-2], strict=True):
            assert torch.equal(mine[: len(rows)], theirs[rows]) and not mine[len(rows) :].any()
        for mine, theirs, before in zip(small.params.tensors, large.params.tensors, params, strict=True):
            assert torch.equal(mine, torch.cat([theirs[rows], before[len(rows) :]]))
        assert not small.tickets.any() and torch.equal(small.bad, large.bad)
    assert len(ready) == 1


@pytest.mark.skipif(not GPU, reason="nothing is captured without a GPU")
def test_no_graph_is_collected_during_a_capture(engine: Engine) -> None:
    old: list[object] = [engine.captured(lambda: torch.zeros(1, device=DEVICE), 1)]
    old.append(old)  # only the collector can free it
    gone, holder = weakref.ref(old[0]), [old]
    turns: list[int] = []
    del old
    threshold = gc.get_threshold()

    def call() -> None:
        torch.zeros(1, device=DEVICE)
        turns.append(len(turns))
        if len(turns) == 3:  # the one that is captured
            holder.clear()
            gc.set_threshold(20, 1, 1)
            assert [[] for _ in range(1000)]  # far more than the collector lets pass

    try:
        engine.captured(call, 1)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert gone() is None


def test_planning_measures_once_and_keeps_it(
    engine: Engine, qwen3: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path))
    measured: list[str] = []
    real = Latency.keep

    def noting(self: Latency, key: str, seconds: dict[Shape, float]) -> None:
        measured.append(key)
        real(self, key, seconds)

    monkeypatch.setattr(Latency, "keep", noting)
    each = [SamplingParams(max_new_tokens=20)] * 2
    expected = [c.token_ids for c in qwen3.generate(PROMPTS[:2], each, method="ar")]
    for _ in range(2):
        fresh = Engine(engine.core, plain=not GPU)
        for _ in range(2):
            decoder = FastDecoder(fresh, Planning(4, list(few(4))))
            found = generation.generate(fresh.core, PROMPTS[:2], each, _once(decoder), 2)
            assert [c.token_ids for c in found] == expected
    assert measured and len(set(measured)) == len(measured), "a kind of batch was measured twice"
    (file,) = tmp_path.iterdir()
    file.write_text("{not json")
    before = len(measured)
    fresh = Engine(engine.core, plain=not GPU)
    generation.generate(fresh.core, PROMPTS[:1], each[:1], lambda: FastDecoder(fresh, Planning(4, list(few(4)))), 1)
    assert len(measured) == before + 1
    assert "steps" in file.read_text()


def test_what_keeps_a_model_from_the_fast_path(
    converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = load_model(converted("llama"), dtype="float32")
    with pytest.raises(TidarError, match="no fast path: the model is on cpu"):
        Model(core, fast=True)
    assert Model(core)._engine is None
    monkeypatch.setattr(type(core), "device", property(lambda _: torch.device("cuda")))
    assert obstacle(core) is None
    monkeypatch.setattr(type(core), "dtype", property(lambda _: torch.float64))
    assert obstacle(core) == "the kernels have no torch.float64"
    monkeypatch.setattr(type(core), "dtype", property(lambda _: torch.bfloat16))
    core.hard_limit = True
    assert "rotary" in str(obstacle(core))
    monkeypatch.setattr(core.hf.config, "model_type", "gemma2")
    assert obstacle(core) == "model family 'gemma2' has no fast path"


def test_too_small_a_gpu_is_told_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "zeros", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * 2**20, 2**30))
    with pytest.raises(TidarError, match=r"no memory for a cache of 6400 tokens \(0.0 GiB\): about 4608 would fit"):
        Pages(4, 100, 2, 64, dtype=torch.bfloat16, device=torch.device("cpu"))
