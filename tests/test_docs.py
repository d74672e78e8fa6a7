"""Tables of the documentation that are computed stand there as they come out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs import count_step
from tidar import cli
from tidar.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "step-kernel.md"


def test_what_a_step_counts(capsys: pytest.CaptureFixture[str]) -> None:
    count_step.main([])
    assert capsys.readouterr().out in PAGE.read_text(encoding="utf-8")


def test_the_plan_that_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (command,) = (line for line in page.splitlines() if line.endswith("--plan"))
    monkeypatch.chdir(ROOT)
    assert cli.main(command.split()[1:]) == 0
    assert f"```text\n{capsys.readouterr().out}```" in page


def test_every_recipe_is_named() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in RECIPES)
