"""What `tidar bench` counts, without a GPU: the plain twins run where a GPU's clock is not asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tidar.api import Model
from tidar.bench import baselines, decode, parts, report, step
from tidar.bench.floors import Rates, floor
from tidar.checkpoint import load_model
from tidar.cli import main
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.plan import SINGLE, Shape
from tidar.decode.policy import Autoregressive
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import Engine
from tidar.fast.timing import interleaved
from tidar.model import CausalLM

RATE = Rates(bandwidth=4e12, matmul=8e14)


@pytest.fixture
def core(converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CausalLM:
    monkeypatch.setenv("TIDAR_CACHE", str(tmp_path / "cache"))
    for module in (decode, parts, step):
        monkeypatch.setattr(module, "obstacle", lambda _: None)
        monkeypatch.setattr(module, "Engine", lambda core, **options: Engine(core, plain=True, **options))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def timed(calls: Sequence[Callable[[], object]], *, rounds: int, repeat: int = 1) -> list[float]:
        return [1e-3 * (1 + number) for number, call in enumerate(calls) if call() is None]

    monkeypatch.setattr(step, "interleaved", timed)
    monkeypatch.setattr(parts, "interleaved", timed)
    monkeypatch.setattr(step, "rates", lambda _: RATE)
    return load_model(converted("qwen3"), dtype="float32")


def test_floor_is_the_larger_of_two(core: CausalLM) -> None:
    lean = Engine(core, plain=True).network.lean
    one = floor(lean, Shape(1, 0, 1), 1, 1000, RATE)
    layer = lean.layers[0]
    weights = sum(w.numel() for w in (layer.qkv, layer.out, layer.gate_up, layer.down)) * len(lean.layers)
    prefix = 2 * len(lean.layers) * lean.kv_heads * lean.head_dim * 4 * 1001
    assert one.bytes == 4 * (weights + lean.head.numel() + lean.embedding.shape[1]) + prefix  # float32
    attention = 4 * lean.heads * lean.head_dim * len(lean.layers) * 1001
    assert one.flops == 2 * weights + 2 * lean.head.numel() + attention
    assert one.bound == "memory" and one.seconds == one.bytes / RATE.bandwidth
    many = floor(lean, Shape(16, 16, 16), 64, 1, RATE)
    assert many.bound == "compute" and many.seconds == many.flops / RATE.matmul


def test_steps(core: CausalLM, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = step.run(core, draft_lens=(4, 2), prefixes=(8, 70), rows=(1, 2))
    assert len(lines) == 4 * len(step.step_shapes(4)) + 4 * len(step.step_shapes(2))
    assert [line["queries"] for line in lines[:4]] == [1, 4, 5, 20]
    assert lines[3]["over_ar"] == 4.0 and lines[3]["share"] == round(lines[3]["floor"]["seconds"] / 4e-3, 4)
    report.steps(lines, str(tmp_path / "steps.jsonl"))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("memory 4.00 TB/s") and len(shown) == 3 + len(lines)
    assert json.loads(shown[-1])["lines"] == lines
    kept = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert len(kept) == len(lines) and "revision" in kept[0]["provenance"]


def test_parts(core: CausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    lines = parts.run(core, prefixes=(8, 70), queries=(1, 5))
    assert [(line["prefix"], line["queries"]) for line in lines] == [(8, 1), (8, 5), (70, 1), (70, 5)]
    assert [lines[0][f"{part}_milliseconds"] for part in ("total", "attention", "mlp")] == [1, 2, 3]
    report.parts(lines, None)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["lines"] == lines


@pytest.mark.parametrize("sampling", [None, {"temperature": 0.8, "top_p": 0.9}])
def test_decoding(core: CausalLM, sampling: dict[str, float] | None, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [list(b"def f("), list(b"import"), list(b"class A:"), list(b"x = 1")]
    lines = decode.run(core, prompts, draft_len=4, batch=2, new_tokens=12, sampling=sampling)
    assert lines[0]["method"] == "ar" and lines[-1]["method"] == "auto"
    assert all(line["identical_to_ar"] == "4/4" for line in lines)
    assert lines[0]["speedup"] == 1 and lines[0]["tokens_per_step"] == 1
    for line in lines:
        low, high = line["speedup_95"]
        assert low <= line["speedup"] <= high
        assert line["tokens_per_step"] / line["step_over_ar"] == pytest.approx(line["speedup"], rel=0.01)
        assert sum(times for *_, times in line["shapes"]) == pytest.approx(2 * 11 / line["tokens_per_step"], abs=0.01)
    assert lines[0]["shapes"] == [[*SINGLE, 22]]
    assert {tuple(shape) for *shape, _ in lines[1]["shapes"]} == {Shape(4, 4, 4)}
    report.decoding(lines, None)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["lines"] == lines


def test_shapes_are_those_of_the_answers_now(core: CausalLM) -> None:
    decoder = FastDecoder(Engine(core, plain=True), Autoregressive())
    for seed in range(2):
        decoder.prefill([[1, 2, 3]], [SamplingParams(max_new_tokens=9, seed=seed)])
        for _ in range(3):
            decoder.step()
        assert decoder.taken == {SINGLE: 3}


@pytest.mark.parametrize(("batch", "warmed"), [(1, [0]), (2, [0, 2])])
def test_batches_are_warmed_before_any_is_timed(
    core: CausalLM, batch: int, warmed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them where there are several rows, whose ends come at times of their own."""
    first, counted = [], []
    real = decode.decode

    def noting(decoder: Any, prompts: Any, params: Any, outcome: decode.Outcome) -> None:
        real(decoder, prompts, params, outcome)
        first.append(params[0].seed)
        counted.append(outcome)

    monkeypatch.setattr(decode, "decode", noting)
    lines = decode.run(core, [list(b"def f("), list(b"import")] * 2, draft_len=4, batch=batch, new_tokens=4)
    every = list(range(0, 4, batch))
    assert first[:: len(lines)] == warmed + every
    assert len(set(map(id, counted[: len(warmed) * len(lines)]))) == len(warmed) * len(lines), "not counted"
    assert all(line["prompts"] == 4 for line in lines)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_baselines_decode_the_same(core: CausalLM, converted: Callable[[str], Path]) -> None:
    """The paper's own way, and stock transformers."""
    assert len(baselines.decoders(core, 4, {"temperature": 1.0})) == 1, "it has a sliding window"
    core = load_model(converted("llama"), dtype="float32")
    prompts, each = [list(b"def add(a, b):\n")], [SamplingParams(max_new_tokens=10, ignore_eos=True)]
    expected = Model(core, fast=False).generate(prompts, each, method="ar")[0].token_ids
    made = baselines.decoders(core, 4, None)
    assert len(made) == 3 and len(baselines.decoders(core, 4, {"temperature": 1.0})) == 2
    for name, make in made.items():
        outcome = decode.Outcome()
        decode.decode(make(), prompts, each, outcome)
        assert outcome.answers == [expected], name
        assert outcome.tokens == [9]
    flex = generation.generate(core, prompts, each, made["FlexAttention, sliced mask, no graph"], 1)
    assert flex[0].token_ids == expected


def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", "step"]) == 2
    assert "device 'cuda' is not available" in capsys.readouterr().err


def test_unknown_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--size", "gpt-5"]) == 2
    assert "size 'gpt-5' is unknown: use one of qwen2.5-1.5b, qwen3-8b, qwen3-32b" in capsys.readouterr().err


def test_median_of_rounds_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, **_: object) -> None:
            pass

        def record(self) -> None:
            pass

        synchronize = record

        def elapsed_time(self, _: Event) -> float:
            return float(len(order))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    found = interleaved([lambda: order.append("a"), lambda: order.append("b")], rounds=3, repeat=2)
    assert "".join(order) == "aaabbb" * 4, "the first of each keeps the GPU busy while the watch starts"
    assert found == [15 / 1e3 / 2, 18 / 1e3 / 2]
