"""The demo: its numbers are those of the runs it made, and it takes the quickest setting."""

from __future__ import annotations

import json

import pytest

from tidar import demo
from tidar.api import Model
from tidar.config import SamplingParams
from tidar.decode.generation import Completion


def test_numbers(qwen3: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "PARAMS", SamplingParams(max_new_tokens=8))
    monkeypatch.setattr(demo, "HEATS", (4,))
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:2])
    demo.run(qwen3, as_json=True)
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["identical"] is True
    assert 1 <= numbers["tokens_per_forward"] <= numbers["draft_len"]
    assert numbers["speedup"] == pytest.approx(numbers["tidar_tokens_per_second"] / numbers["ar_tokens_per_second"])
    demo.run(qwen3)
    shown = capsys.readouterr().out
    assert "same tokens: yes (2 of 2 prompts)" in shown
    assert "speed-up" in shown


def test_takes_the_fastest_and_counts_the_median(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def timed(
        model: Model, prompt: str, params: SamplingParams, method: str, drafting: demo.Drafting
    ) -> tuple[Completion, float]:
        calls.append(method)
        answer = Completion(prompt_tokens=1, token_ids=[1] * 10, forwards=10 if method == "ar" else 4)
        best = drafting == demo.Drafting(draft_len=6, proposals=3)
        outlier = 100.0 if len(calls) == 5 else 0.0
        return answer, (1.0 if method == "ar" else 0.5 if best else 0.8) + outlier

    monkeypatch.setattr(demo, "_timed", timed)
    best = demo.fastest(qwen3)
    assert best == demo.Drafting(draft_len=6, proposals=3)
    calls.clear()
    ar, fast = demo.compare(qwen3, ["p", "q"], best)
    assert len(calls) == 2 * 2 * (1 + demo.REPEATS)
    assert calls.count("ar") == calls.count("tidar")
    assert (ar.tokens_per_second, fast.tokens_per_second) == (10.0, 20.0), "the one slow run does not count"
    assert (ar.tokens_per_forward, fast.tokens_per_forward) == (1.0, 2.5)


def test_where_steps_are_captured_each_is_compiled_first(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def timed(*args: object) -> tuple[Completion, float]:
        assert isinstance(args[2], SamplingParams)
        lengths.append(args[2].max_new_tokens)
        return Completion(prompt_tokens=1, token_ids=[1]), 1.0

    monkeypatch.setattr(demo, "_timed", timed)
    monkeypatch.setattr(Model, "fast", True)
    demo.fastest(qwen3)
    few = len(list(demo.candidates(16, captured=True)))
    assert lengths[: few + 1] == [2] * few + [demo.HEATS[0]]


@pytest.mark.parametrize("captured", [False, True])
def test_candidates_stay_within_what_was_trained(captured: bool) -> None:
    for longest in (1, 2, 5, 8, 16, 20)[captured:]:
        found = list(demo.candidates(longest, captured=captured))
        assert len(found) <= (14 if captured else 30)
        assert len(set(found)) == len(found)
        assert max(d.draft_len for d in found) == longest
        assert all(1 <= d.proposals <= d.draft_len for d in found)
