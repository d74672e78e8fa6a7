"""Every example runs as its docstring says, and stays short."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
SAYS = {
    "complete": "tokens,",
    "convert_and_train": "tokens a forward",
    "same_seed": "draft length 8, proposals 3: the same",
    "stream": "# ended by length",
}


def test_all_are_listed() -> None:
    assert {path.stem for path in EXAMPLES} == set(SAYS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(
    path: Path,
    converted: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = path.read_text()
    assert source.count("\n") <= 40
    words = [str(converted("llama"))]
    if "CHECKPOINT TEXT OUT" in source:
        text = tmp_path / "text"
        text.mkdir()
        for number in range(30):
            (text / f"{number}.py").write_text(f"import os\n\n\ndef f{number}(x):\n    return x + {number}\n" * 3)
        words = [str(tiny.save_plain("llama", tmp_path / "plain")), str(text), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    runpy.run_path(str(path), run_name="__main__")
    assert SAYS[path.stem] in capsys.readouterr().out
