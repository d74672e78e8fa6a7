"""Processes killed while they write: what they leave is the old or the new, never a part."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from tidar.checkpoint import load_model
from tidar.convert import convert
from tidar.data.config import DataConfig
from tidar.data.prepare import prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PREPARE = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from transformers import AutoTokenizer
from tidar.data.config import DataConfig
from tidar.data.prepare import prepare
prepare(DataConfig(sources=(sys.argv[2],)), AutoTokenizer.from_pretrained(sys.argv[1]), Path(sys.argv[3]))
"""
CONVERT = "import sys; from tidar.convert import convert; convert(*sys.argv[1:])"


def killed(script: str, *words: Path, after: float) -> bool:
    """Run, and kill ``after`` seconds from when the process begins to write beside its last argument."""
    out = words[-1]
    before = set(out.parent.iterdir())
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, words)], stderr=subprocess.DEVNULL)
    while process.poll() is None and set(out.parent.iterdir()) == before:
        time.sleep(0.0005)
    time.sleep(after)
    running = process.poll() is None
    if running:
        os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == (-signal.SIGKILL if running else 0)
    return running


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_while_preparing_data(tmp_path: Path) -> None:
    tiny.byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    draw = random.Random(0)
    source = tmp_path / "text"
    source.mkdir()
    for i in range(200):
        (source / f"{i:03}.txt").write_text(" ".join(f"word{draw.randrange(5000)}" for _ in range(150)))
    (tmp_path / "made").mkdir()
    out = tmp_path / "made" / "out"
    old = prepare(DataConfig(sources=(str(source),), max_documents=20), tiny.byte_tokenizer(), out)
    before = contents(old)
    wanted = contents(prepare(DataConfig(sources=(str(source),)), tiny.byte_tokenizer(), tmp_path / "wanted"))
    assert before != wanted
    kills = 0
    for attempt in range(8):
        stopped = killed(PREPARE, tmp_path / "tokenizer", source, out, after=0.05 * attempt)
        kills += stopped
        assert contents(out) in ([before, wanted] if stopped else [wanted])
        if contents(out) == wanted:
            break
    assert kills >= 3
    assert not killed(PREPARE, tmp_path / "tokenizer", source, out, after=60)
    assert contents(out) == wanted


def test_while_converting(tmp_path: Path) -> None:
    plain = tiny.save_plain("llama", tmp_path / "plain")
    convert(plain, tmp_path / "wanted")
    wanted = contents(tmp_path / "wanted")
    (tmp_path / "made").mkdir()
    kills = 0
    for attempt in range(6):
        out = tmp_path / "made" / f"out{attempt}"
        kills += killed(CONVERT, plain, out, after=0.004 * attempt)
        assert not out.exists() or contents(out) == wanted
        if not out.exists():
            convert(plain, out)  # what the killed process left is not in the way
        assert contents(out) == wanted
    assert kills >= 1
    assert load_model(out).spec is not None
