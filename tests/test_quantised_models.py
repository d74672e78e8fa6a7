"""Models with weights in one byte a number: the same tokens whatever the method, less memory, clear refusals."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fast import POLICIES, PROMPTS, params

import tidar
from tidar import layout
from tidar.api import Model
from tidar.bench import step
from tidar.bench.floors import Rates, floor
from tidar.checkpoint import load_model, save_model
from tidar.cli import main
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.plan import Shape
from tidar.errors import TidarError
from tidar.fast import ops
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import Engine
from tidar.fast.latency import Latency
from tidar.fast.lean import FAMILIES, LeanModel
from tidar.kernels.quantised import Quantised, check_kind, quantise
from tidar.quantised import QuantisedLinear, _by_digits, _whole

SAMPLED = {"temperature": 0.9, "top_p": 0.9}


def tokens(found: list[generation.Completion]) -> list[list[int]]:
    return [each.token_ids for each in found]


@pytest.mark.parametrize("options", [{}, SAMPLED])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "phi3"])
def test_methods_agree_on_a_cpu(family: str, options: dict[str, float], converted: Callable[[str], Path]) -> None:
    model = tidar.load(converted(family), device="cpu", weights="int8")
    expected = tokens(model.generate(PROMPTS, params(**options), method="ar"))
    assert model.core.weights == "int8" and not model.fast
    for method, length in (("tidar", 6), ("linear", 5), ("auto", 4)):
        found = model.generate(PROMPTS, params(**options), method=method, draft_len=length, batch_size=3)  # type: ignore[arg-type]
        assert tokens(found) == expected, method


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_captured_steps_give_the_same(policy: str, options: dict[str, float], converted: Callable[[str], Path]) -> None:
    core = load_model(converted("qwen3"), dtype="float64", weights="int8")
    expected = tokens(Model(core, fast=False).generate(PROMPTS, params(**options), method="ar"))
    engine = Engine(core, plain=True)
    found = generation.generate(core, PROMPTS, params(**options), lambda: FastDecoder(engine, POLICIES[policy]()), 3)
    assert tokens(found) == expected


@pytest.mark.parametrize("fault", ["scale", "values", "none"])
def test_faults_change_the_text(fault: str, converted: Callable[[str], Path]) -> None:
    core = load_model(converted("qwen3"), dtype="float64", weights="int8")
    each = [SamplingParams(max_new_tokens=40)] * 2
    expected = tokens(Model(core, fast=False).generate(PROMPTS[:2], each, method="ar"))
    engine = Engine(core, plain=True)
    down = engine.network.lean.layers[0].down
    assert isinstance(down, Quantised)
    if fault == "scale":
        down.scale.copy_(down.scale.roll(1))
    elif fault == "values":
        down.values[3:9] = 0
    found = generation.generate(core, PROMPTS[:2], each, lambda: FastDecoder(engine, POLICIES["k3"]()), 2)
    assert (tokens(found) == expected) == (fault == "none")


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_held_twice(family: str, converted: Callable[[str], Path]) -> None:
    model = load_model(converted(family), dtype="float32", weights="int8")
    ids, plan = torch.randint(200, (1, 9)), layout.causal([0], 9)
    before = model.hidden(ids, plan)
    hf: Any = model.hf
    assert not any(isinstance(part, torch.nn.Linear) for part in hf.modules())
    floating = sum(p.numel() for p in hf.parameters())
    assert floating - hf.base_model.embed_tokens.weight.numel() < 32 * 16, "only norms and biases beside the embedding"
    assert hf.get_output_embeddings().weight.values.dtype == torch.int8, "a tied head has a copy of its own"
    lean = LeanModel(model, ops.load(plain=True))
    torch.testing.assert_close(model.hidden(ids, plan), before)
    attention = hf.base_model.layers[0].self_attn
    qkv = lean.layers[0].qkv
    assert isinstance(qkv, Quantised)
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert part.values.untyped_storage().data_ptr() == qkv.values.untyped_storage().data_ptr()
        assert part.scale.untyped_storage().data_ptr() == qkv.scale.untyped_storage().data_ptr()


# --- products on a CPU ---


def test_digits_are_as_exact_as_float32() -> None:
    """Rows of any size; the largest number, which fills all digits; none; NaN stays."""
    draw = torch.Generator().manual_seed(0)
    weight = quantise(torch.randn(264, 96, generator=draw), "int8")
    x = torch.randn(300, 96, generator=draw) * torch.logspace(-15, 15, 300)[:, None]
    x[7], x[8, 1:], x[9], x[10] = 0, 0, 1, -1
    wanted = x.double() @ weight.dequantised(torch.float64).T
    made = _by_digits(x, weight)
    assert bool(((made - wanted).norm(dim=-1) <= 3e-7 * wanted.norm(dim=-1)).all()) and not made[7].any()
    assert all(torch.equal(_by_digits(x[n : n + 1], weight)[0], made[n]) for n in range(0, 300, 13))
    x[3, 5] = torch.nan
    again = _by_digits(x, weight)
    assert bool(again[3].isnan().all()) and torch.equal(again[4:], made[4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_without_exact_integers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors whose sums saturate multiply what the bytes stand for."""
    layer = QuantisedLinear(quantise(torch.randn(24, 32), "int8"), torch.nn.Parameter(torch.randn(24).to(dtype)))
    x = torch.randn(2, 5, 32).to(dtype)
    assert layer.bias is not None
    wanted = x.double() @ layer.weight.dequantised(torch.float64).T + layer.bias.double()
    bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]
    for whole in (_whole(), False):
        monkeypatch.setattr("tidar.quantised._whole", lambda whole=whole: whole)
        assert layer(x).dtype == dtype and layer(x).shape == (2, 5, 24)
        torch.testing.assert_close(layer(x).double(), wanted, rtol=bound, atol=bound)


def test_the_reference_checkpoint_stays_close() -> None:
    """Next tokens behind each place of held-out files."""
    path = Path(__file__).parent.parent / "results" / "holdout_prompts.jsonl.gz"
    with gzip.open(path, "rt") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(8), file, strict=False)]
    full, narrow = tidar.load(device="cpu").core, tidar.load(device="cpu", weights="int8").core
    same = []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([full.tokenizer(text)["input_ids"][:128]])
            plan = layout.causal([0], ids.shape[1])
            ours, theirs = (core.head(core.hidden(ids, plan)).argmax(-1) for core in (narrow, full))
            same.append(ours == theirs)
    assert float(torch.cat(same, 1).float().mean()) > 0.97


# --- what is told apart, and what is refused ---


def test_floors_and_latencies_know(converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = load_model(converted("qwen3"), dtype="float32", weights="int8")
    lean = Engine(narrow, plain=True).network.lean
    weights = [w for layer in lean.layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)] + [lean.head]
    whole = Engine(load_model(converted("qwen3"), dtype="float32"), plain=True).network.lean
    rate = Rates(bandwidth=4e12, matmul=8e14)
    one, other = (floor(each, Shape(1, 0, 1), 1, 10, rate) for each in (lean, whole))
    rows = sum(len(w) for w in weights)
    assert other.bytes - one.bytes == 3 * sum(w.numel() for w in weights) - 4 * rows and other.flops == one.flops
    assert Latency(narrow).path != Latency(whole.core).path

    monkeypatch.setattr(step, "obstacle", lambda _: None)
    monkeypatch.setattr(step, "Engine", lambda core, **options: Engine(core, plain=True, **options))
    monkeypatch.setattr(step, "rates", lambda _: rate)
    monkeypatch.setattr(step, "interleaved", lambda calls, **_: [1e-3] * len(calls))
    lines = [step.run(core, draft_lens=(2,), prefixes=(8,), rows=(1,))[0] for core in (narrow, whole.core)]
    assert [line["weights"] for line in lines] == ["int8", None]


def test_refusals(
    converted: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(TidarError, match="weights 'int4' are unknown: use int8 or fp8"):
        tidar.load(converted("llama"), device="cpu", weights="int4")
    assert (
        main(["generate", "--model", str(converted("llama")), "--device", "cpu", "--weights", "fp8", "--prompt", "x"])
        == 2
    )
    assert "fp8 weights need an NVIDIA GPU, and the model is for cpu: use int8" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    for capability, able in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert check_kind("int8", torch.device("cuda")) == "int8"
        if able:
            assert check_kind("fp8", torch.device("cuda")) == "fp8"
        else:
            with pytest.raises(TidarError, match=r"A100 has no fp8 \(compute capability 8.9 and up\): use int8"):
                check_kind("fp8", torch.device("cuda"))
    with pytest.raises(TidarError, match="'qwen3_moe' has experts"):
        load_model(converted("qwen3_moe"), weights="int8")
    core = load_model(converted("llama"), weights="int8")
    with pytest.raises(TidarError, match="int8 weights are for decoding"):
        save_model(core, tmp_path / "out")
