"""Recorded acceptance joined with measured steps (`runs/replay.py`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs import replay
from runs.plot_bench import REFERENCE
from tidar.decode.plan import Plan
from tidar.decode.planner import TAIL
from tidar.errors import TidarError


def test_rates_are_those_that_made_the_counts() -> None:
    rng, rates = np.random.default_rng(0), np.array([1.0, 0.9, 0.5, 0.8])
    made = [1 + int(np.argmin([*(rng.random(3) < rates[1:]), False])) for _ in range(100_000)]
    line = {"accepted": [made.count(n) for n in range(1, 5)]}
    assert replay.recorded(line) == pytest.approx(np.stack([rates, rates, np.append(1.0, TAIL * rates[1:])]), abs=0.01)
    assert replay.computed(Plan("tidar", 4, 4), replay.recorded(line)) == pytest.approx(np.mean(made), 0.01)


def test_one_rate_for_the_papers_tokens() -> None:
    rates = replay.constant(7.45, 16)
    assert replay.computed(Plan("tidar", 16, 16), rates) == pytest.approx(7.45)
    assert len(set(rates[1, 1:])) == 1


def step(model: str, k: int, name: str, milliseconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {"model": model, "dtype": "bfloat16", "step": name, "draft_len": k, "batch": 1}
    return found | {"prefix": 1024, "sampled": False, "milliseconds": milliseconds, "provenance": {"date": "2026"}}


def lines(model: str) -> Iterator[dict[str, Any]]:
    for k, full in ((4, 1.1), (16, 2.0)):
        yield step(model, k, "ar", 1.0)
        yield step(model, k, "verify", 1.0)
        yield step(model, k, "draft", 1.4)
        yield step(model, k, "tidar", full)
        yield step(model, k, f"tidar, {k // 2} proposals", full)


def test_the_best_plan_follows_from_both() -> None:
    flat = np.ones((3, 16))
    plan, tokens, cost, gain = replay.best(list(lines("m")), flat)
    # All is accepted: 16 tokens for 2, against 4 for 1.1 and (16 + 1) / 2 for (1 + 1.4) / 2.
    assert plan == Plan("tidar", 16, 16) and tokens == pytest.approx(16) and cost == 2
    assert gain == pytest.approx(8)
    plan, *_, gain = replay.best(list(lines("m")), np.array([[1.0] + [0.0] * 15] * 3))
    assert plan.method == "ar" and gain == 1


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, decode = tmp_path / "step.jsonl", tmp_path / "decode.jsonl"
    text = "".join(json.dumps(line) + "\n" for model in replay.PAPER for line in lines(model))
    steps.write_text(text)
    told = {"model": REFERENCE, "dtype": "bfloat16", "batch": 1, "sampling": {}, "tokens_per_step": 4.0}
    full = told | {"method": "tidar k=16, 16 proposals", "accepted": [4] * 16, "provenance": {"date": "2026"}}
    decode.write_text(json.dumps(full) + "\n")
    replay.main(["--step", str(steps), "--decode", str(decode)])
    shown = capsys.readouterr().out
    assert "| greedy | tidar k=16, 16 proposals | 4.00 | 8.50 |" in shown
    assert shown.count("| qwen3-8b | ") == 2
    decode.write_text(json.dumps({**full, "accepted": []}) + "\n")
    with pytest.raises(TidarError, match="records no acceptance"):
        replay.main(["--step", str(steps), "--decode", str(decode)])
