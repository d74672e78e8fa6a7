"""The terminal loop: what is sent to the model, what is kept, and that mistakes do not end it."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tidar import chat
from tidar.api import Model
from tidar.config import SamplingParams
from tidar.decode.generation import Chunk

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Recorder:
    """A model that answers every prompt with "!" and remembers what it was asked."""

    def __init__(self, model: Model, template: str | None = None) -> None:
        self.core = copy.copy(model.core)
        self.core.tokenizer = copy.deepcopy(model.core.tokenizer)
        self.core.tokenizer.chat_template = template
        self.asked: list[tuple[str, SamplingParams]] = []
        self.interrupt = False

    def stream(self, prompt: Any, params: SamplingParams, **_: Any) -> Iterator[Chunk]:
        text = prompt if isinstance(prompt, str) else str(self.core.tokenizer.decode(prompt))
        self.asked.append((text, params))
        yield Chunk(index=0, token_ids=[33], text="!", forwards=1, finish_reason=None)
        if self.interrupt:
            raise KeyboardInterrupt
        yield Chunk(index=0, token_ids=[33, 33], text="?", forwards=1, finish_reason="length")


def talk(model: Any, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    chat.run(model, SamplingParams(), {})


def test_a_base_model_completes(
    qwen3: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Recorder(qwen3)
    talk(model, monkeypatch, "one", "", "two \\", "lines", "/reset", "", "/exit", "never read")
    assert [text for text, _ in model.asked] == ["one", "one!?", "two \nlines", ""]
    assert "3 tokens, 2 forwards: 1.50 a forward" in capsys.readouterr().out


def test_a_template_makes_a_conversation(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recorder(qwen3, TEMPLATE)
    talk(model, monkeypatch, "hi", "so", "/reset", "again")
    assert [text for text, _ in model.asked] == [
        "<user>hi<assistant>",
        "<user>hi<assistant>!?<user>so<assistant>",
        "<user>again<assistant>",
    ]


def test_parameters_change_and_mistakes_do_not_end_it(
    qwen3: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Recorder(qwen3)
    changes = "/params temperature=0.5 seed=3"
    talk(model, monkeypatch, changes, "/params top_p=7", "/params nose=1", "/params seed=", "/fly", "go")
    assert model.asked == [("go", SamplingParams(temperature=0.5, seed=3))]
    out = " ".join(capsys.readouterr().out.split())
    for said in ("top_p must lie in", "cannot set 'nose=1'", "cannot set 'seed='", "unknown command /fly"):
        assert said in out


def test_interrupt_ends_the_answer_and_keeps_it(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recorder(qwen3)
    model.interrupt = True
    talk(model, monkeypatch, "a", "")
    assert [text for text, _ in model.asked] == ["a", "a!"]


def test_it_runs_on_a_model(qwen3: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    talk(qwen3, monkeypatch, "", "/params max_new_tokens=4", "def f")
    out = capsys.readouterr().out
    assert "the prompt is empty" in out
    assert "4 tokens" in out
