"""The comparison of ways to teach drafts, end to end on a tiny base."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_holdout import files
from test_runs import jsonl, script
from train_data import write_text

sys.path.insert(0, str(Path(__file__).parent.parent))

from runs import compare_drafts
from tidar.recipes import load_recipe


def test_every_way_is_a_recipe() -> None:
    plain = load_recipe("python-17m")
    recipes = [load_recipe("python-17m", changes) for changes in compare_drafts.WAYS.values()]
    assert sum(recipe == plain for recipe in recipes) == 1, "one of them is the recipe itself"
    assert len({str(recipe) for recipe in recipes}) == len(recipes)


def test_the_table_has_the_newest_line_of_each_way_the_best_first(tmp_path: Path) -> None:
    def line(way: str, rate: float) -> str:
        parts = {"all": {"tokens_per_forward": rate}, "not_repeating": {"outputs": 0}}
        numbers = {"validation": {"bits_per_byte": 0.7}, "tokens_per_forward": {"greedy": parts, "sampled": parts}}
        return json.dumps({"way": way, **numbers}) + "\n"

    (tmp_path / "ways.jsonl").write_text(line("ce", 3.0) + line("kl", 2.0) + line("ce", 1.5))
    done = script("compare_drafts.py", "--table", "--out", str(tmp_path / "ways.jsonl"))
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[2:]
    assert rows == ["| kl | 2.00 | nan | 2.00 | nan | 0.700 |", "| ce | 1.50 | nan | 1.50 | nan | 0.700 |"]
    assert script("compare_drafts.py", "--table", "--out", str(tmp_path / "absent")).returncode == 2


@pytest.mark.slow
def test_ways_are_trained_and_decoded(tmp_path: Path, converted: Callable[[str], Path]) -> None:
    write_text(tmp_path / "text")
    source, prompts = files(tmp_path, {"a": 3, "b": 3}), tmp_path / "prompts.jsonl.gz"
    folder = str(converted("qwen3"))
    chosen = ["--select", str(source), "--write", str(prompts), "--checkpoint", folder, "--count", "3"]
    assert script("tokens_per_forward.py", *chosen).returncode == 0
    ways = ["ce", "own text and transition"]
    small = [
        "seq_len=24",
        "micro_batch=2",
        "batch_tokens=96",
        "dtype=fp32",
        "eval_tokens=96",
        "log_every=1",
        "lr=0.004",
    ]
    words = ["--base", folder, "--work", str(tmp_path / "work"), "--corpus", str(tmp_path / "text"), "--tokens", "384"]
    words += ["--device", "cpu", "--prompts", str(prompts), "--new-tokens", "8", "--out", str(tmp_path / "out.jsonl")]
    words += [word for value in [*small, "data.holdout=0.2", "data.duplicates=keep"] for word in ("--set", value)]
    for _ in range(2):
        done = script("compare_drafts.py", *words, "--ways", *ways)
        assert done.returncode == 0, done.stderr
    lines = jsonl(tmp_path / "out.jsonl")
    assert [line["way"] for line in lines] == ways * 2
    first, again = lines[1], lines[3]
    assert first["changes"]["transition"] == 256 and first["provenance"]["revision"]
    assert first["validation"]["bits_per_byte"] > 0 and first["validation"]["step"] == 4
    assert set(first["tokens_per_forward"]) == {"greedy", "sampled"}
    assert first["tokens_per_forward"]["sampled"]["all"]["tokens_per_forward"] >= 0.5
    assert {k: again[k] for k in ("validation", "tokens_per_forward")} == {
        k: first[k] for k in ("validation", "tokens_per_forward")
    }, "a run that is whole is not run again"
