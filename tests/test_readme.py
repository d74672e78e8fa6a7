"""What the README and the documentation claim about this repository."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import tidar.api
from tidar import cli
from tidar.api import Model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/how-it-works.md", "docs/adapters.md"]


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found
    return found


def commands(program: str) -> list[list[str]]:
    lines = "".join(blocks("sh")).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert commands("make") == [["demo"], ["test"]]
    named = re.findall(r"make (test-all|demo|test|lint|setup)", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert set(named) <= set(targets)


@pytest.mark.parametrize("words", commands("tidar"), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    assert type(cli._parse(words)).__name__.lower().removesuffix("run") == words[0]


def test_python_runs(qwen3: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tidar.api, "load", lambda: qwen3)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_map_is_complete() -> None:
    [block] = blocks("text")
    listed = [line.split()[0] for line in block.splitlines()]
    for path in listed:
        assert (ROOT / path).exists(), path
        assert (ROOT / path).is_dir() == path.endswith("/")
    modules = {f"tidar/{p.name}" for p in (ROOT / "tidar").glob("*.py") if not p.name.startswith("__")}
    packages = {f"tidar/{p.parent.name}/" for p in (ROOT / "tidar").glob("*/__init__.py")}
    assert modules | packages <= set(listed)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_names_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    shown = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", shown):
        assert ((ROOT / document).parent / target).exists(), target
    for path in re.findall(r"`((?:tidar|runs|tests|docs)/[\w/.-]+)`", shown):
        assert (ROOT / path).exists(), path


def test_masks_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["draw_masks.py", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "runs" / "draw_masks.py"), run_name="__main__")
    for name in ("prefill", "step", "training"):
        drawn, kept = ((folder / f"{name}.svg").read_text() for folder in (tmp_path, ROOT / "docs" / "figures"))
        words = [re.findall(r"<text[^>]*>([^<]*)</text>", svg) for svg in (drawn, kept)]
        assert words[0] == words[1]
        assert words[0]
