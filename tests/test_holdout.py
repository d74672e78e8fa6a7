"""Prompts from held-out files."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parent.parent))

from runs import holdout
from tidar.errors import TidarError


def files(folder: Path, sizes: dict[str, int]) -> Path:
    """Held-out files of random letters, ``sizes`` of them a package, the first of each a token too short."""
    draw = random.Random(2)
    lines = []
    for package, count in sizes.items():
        for i in range(count):
            text = "".join(draw.choice("abcdef \n") for _ in range(600 if i else 511))
            lines.append({"package": package, "path": f"{package}/{i}.py", "tokens": len(text) + 1, "text": text})
    path = folder / "files.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_selection_takes_turns_and_ignores_the_order_of_the_file(tmp_path: Path) -> None:
    source = files(tmp_path, {"a": 9, "b": 9, "c": 3})
    tokenizer = tiny.byte_tokenizer()
    chosen = holdout.select(source, tokenizer, count=12, per_package=5)
    counts = {name: sum(p.package == name for p in chosen) for name in "abc"}
    assert counts == {"a": 5, "b": 5, "c": 2}
    lines = source.read_text().splitlines(keepends=True)
    random.Random(3).shuffle(lines)
    shuffled = tmp_path / "shuffled.jsonl.gz"
    shuffled.write_bytes(gzip.compress("".join(lines).encode()))
    assert holdout.select(shuffled, tokenizer, count=12, per_package=5) == chosen
    texts = {line["path"]: line["text"] for line in map(json.loads, lines)}
    for p in chosen:
        assert tokenizer.decode(p.ids) == texts[p.path][:256]
        assert tokenizer.decode(p.continuation) == texts[p.path][256:512]
    with pytest.raises(TidarError, match="12 prompts, not 13: lower --count or raise --per-package"):
        holdout.select(source, tokenizer, count=13, per_package=5)


def test_prompts_are_kept_and_read_again(tmp_path: Path) -> None:
    tokenizer = tiny.byte_tokenizer()
    chosen = holdout.select(files(tmp_path, {"a": 4}), tokenizer, count=3, per_package=9)
    for name in ("first.jsonl.gz", "second.jsonl.gz"):
        holdout.save(chosen, tmp_path / name)
    assert (tmp_path / "first.jsonl.gz").read_bytes() == (tmp_path / "second.jsonl.gz").read_bytes()
    assert holdout.load(tmp_path / "first.jsonl.gz", tokenizer) == chosen
    with pytest.raises(TidarError, match="cannot read"):
        holdout.load(tmp_path / "none.jsonl", tokenizer)
