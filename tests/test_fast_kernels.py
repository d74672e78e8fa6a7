"""Captured steps on a GPU, or the same kernels in Triton's interpreter without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tidar.api import Model
from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.policy import Alternating, Autoregressive, Fixed
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import Engine

pytest.importorskip("triton")

PROMPTS = [list(b"def add(a, b):"), list(b"x")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", [Autoregressive, lambda: Fixed(3, 2), lambda: Fixed(3, 2, 4), lambda: Alternating(3)]
)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_kernels_decode_what_their_twins_do(
    policy: Callable[[], Fixed], options: dict[str, float], converted: Callable[[str], Path]
) -> None:
    each = [SamplingParams(max_new_tokens=5, seed=n, **options) for n in range(2)]  # type: ignore[arg-type]
    expected = Model(load_model(converted("qwen3"), dtype="float32")).generate(PROMPTS, each, method="ar")
    engine = Engine(load_model(converted("qwen3"), device=DEVICE, dtype="float32"))
    found = generation.generate(engine.core, PROMPTS, each, lambda: FastDecoder(engine, policy()), 2)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
