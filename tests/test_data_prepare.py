from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import PreTrainedTokenizerFast

from tidar.data import prepare as module
from tidar.data.cache import open_cache
from tidar.data.config import DataConfig
from tidar.data.packing import PackedData
from tidar.data.prepare import prepare
from tidar.data.sources import Document
from tidar.errors import TidarError


def text(seed: int, words: int = 120) -> str:
    draw = random.Random(seed)
    return " ".join(f"word{draw.randrange(2000)}" for _ in range(words))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.byte_tokenizer()


def make(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, content in enumerate(texts):
        (folder / f"{i:04}.txt").write_text(content, encoding="utf-8")
    return folder


def kept(folder: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    data = open_cache(folder)
    cuts = zip(data.offsets[:-1], data.offsets[1:], strict=True)
    documents = [data.tokens[a:b].tolist() for a, b in cuts]
    assert all(document[-1] == tiny.EOS for document in documents)
    return [str(tokenizer.decode(document[:-1])) for document in documents]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_everything_arrives_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [text(i) + " é" for i in range(100)]
    config = DataConfig(sources=(str(make(tmp_path / "in", texts)),), holdout=0.1)
    out = prepare(config, tokenizer, tmp_path / "out")
    train, held = kept(out / "train", tokenizer), kept(out / "holdout", tokenizer)
    assert sorted(train + held) == sorted(texts)
    assert len(held) == 10
    stats = json.loads((out / "stats.json").read_text())
    assert stats["train"]["bytes"] == sum(len(t.encode()) for t in train) == open_cache(out / "train").meta["bytes"]
    assert sorted(os.listdir(out)) == ["holdout", "stats.json", "train"]
    assert PackedData(out / "train", seq_len=64, batch_size=2, seed=0).next().tokens.shape == (2, 64)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = str(make(tmp_path / "in", [text(i) for i in range(30)]))
    config = DataConfig(sources=(source,))
    first, second = (contents(prepare(config, tokenizer, tmp_path / name)) for name in ("a", "b"))
    assert first == second


def test_made_anew_only_when_something_changed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "in", [text(i) for i in range(10)])
    config = DataConfig(sources=(str(source),), holdout=0)
    out = tmp_path / "out"
    runs = []
    fill = module._fill
    monkeypatch.setattr(module, "_fill", lambda *args: runs.append(1) or fill(*args))  # type: ignore[func-returns-value]
    prepare(config, tokenizer, out)
    prepare(config, tokenizer, out)
    assert len(runs) == 1
    (source / "0003.txt").write_text("something else")
    prepare(config, tokenizer, out)
    assert len(runs) == 2
    assert "something else" in kept(out / "train", tokenizer)
    prepare(DataConfig(sources=(str(source),), holdout=0, min_bytes=20), tokenizer, out)
    assert len(runs) == 3
    assert "something else" not in kept(out / "train", tokenizer)
    more = tiny.byte_tokenizer()
    more.add_special_tokens({"mask_token": "<|mask|>"})
    prepare(DataConfig(sources=(str(source),), holdout=0, min_bytes=20), more, out)
    assert open_cache(out / "train").meta["vocab_size"] == len(more)


def test_duplicates_and_leaks_are_removed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [text(i) for i in range(40)]
    near = [t + " and a few words more" for t in texts]
    source = str(make(tmp_path / "in", texts + texts + near))

    def run(duplicates: Any) -> tuple[list[str], list[str], dict[str, int]]:
        config = DataConfig(sources=(source,), holdout=0.2, duplicates=duplicates)
        out = prepare(config, tokenizer, tmp_path / duplicates)
        stats = json.loads((out / "stats.json").read_text())
        return kept(out / "train", tokenizer), kept(out / "holdout", tokenizer), stats["removed"]

    train, held, removed = run("near")
    stems = [t.removesuffix(" and a few words more") for t in train + held]
    assert sorted(stems) == sorted(texts)  # one of each pair, in one of the two parts
    assert removed["exact duplicate"] == 40
    assert removed["near duplicate of the hold-out"] + removed["near duplicate"] == 40
    assert removed["near duplicate of the hold-out"] > 5
    train, held, removed = run("exact")
    assert sorted(train + held) == sorted(texts + near)
    assert removed == {"exact duplicate": 40}
    train, held, removed = run("keep")
    assert sorted(train + held) == sorted(texts + texts + near)
    assert removed == {}


def test_sizes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = make(tmp_path / "in", ["", " \n", "ab", "abc", "ééé", "abcdefgh"])
    config = DataConfig(sources=(str(source),), min_bytes=3, max_bytes=6, holdout=0)
    out = prepare(config, tokenizer, tmp_path / "out")
    assert kept(out / "train", tokenizer) == ["abc", "ééé"]
    assert json.loads((out / "stats.json").read_text())["removed"] == {"large": 1, "small": 3}
    assert not (out / "holdout").exists()


def test_nothing_to_train_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = make(tmp_path / "in", ["", "  "])
    with pytest.raises(TidarError, match=r"no document is left to train on \(2 small\)"):
        prepare(DataConfig(sources=(str(source),)), tokenizer, tmp_path / "out")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(TidarError, match="the sources are empty"):
        prepare(DataConfig(sources=(str(empty),)), tokenizer, tmp_path / "out")
    one = make(tmp_path / "one", ["alone"])
    with pytest.raises(TidarError, match="one document alone cannot be split: set holdout to 0"):
        prepare(DataConfig(sources=(str(one),)), tokenizer, tmp_path / "out")
    alike = make(tmp_path / "alike", [text(0) + f" {i}" for i in range(4)])
    with pytest.raises(TidarError, match="every document resembles a held-out one"):
        prepare(DataConfig(sources=(str(alike),)), tokenizer, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["alike", "empty.jsonl", "in", "one"]


@pytest.mark.parametrize("where", ["download", "disk"])
def test_a_failure_leaves_the_old_data_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    source, out = make(tmp_path / "in", [text(i) for i in range(10)]), tmp_path / "out"
    config = DataConfig(sources=(str(source),))
    before = contents(prepare(config, tokenizer, out))
    (source / "0000.txt").write_text("changed")

    def broken(*_: object) -> Any:
        yield Document("one", "first document")
        raise TidarError("hf:x broke off after 1 documents")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "download":
            patch.setattr(module, "documents", broken)
        else:
            patch.setattr(os, "fsync", full)
        with pytest.raises(TidarError, match="broke off" if where == "download" else "disk full while writing"):
            prepare(config, tokenizer, out)
    assert contents(out) == before
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert "changed" in kept(prepare(config, tokenizer, out) / "train", tokenizer) + kept(out / "holdout", tokenizer)


def test_prepared_folder_as_source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = make(tmp_path / "in", [text(i) for i in range(10)])
    ready = prepare(DataConfig(sources=(str(source),)), tokenizer, tmp_path / "ready")
    again = DataConfig(sources=(str(ready),))
    assert prepare(again, tokenizer, tmp_path / "out") == ready
    assert not (tmp_path / "out").exists()
    with pytest.raises(TidarError, match="is already prepared: it must be the only source"):
        prepare(DataConfig(sources=(str(ready), str(source))), tokenizer, tmp_path / "out")
    other = tiny.byte_tokenizer()
    other.eos_token = "a"
    with pytest.raises(TidarError, match="was prepared with another tokenizer"):
        prepare(again, other, tmp_path / "out")
