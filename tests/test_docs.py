"""Tables of the documentation that are computed stand there as they come out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs import count_step

PAGE = Path(__file__).resolve().parent.parent / "docs" / "step-kernel.md"


def test_what_a_step_counts(capsys: pytest.CaptureFixture[str]) -> None:
    count_step.main([])
    assert capsys.readouterr().out in PAGE.read_text(encoding="utf-8")
