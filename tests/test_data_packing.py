from __future__ import annotations

import errno
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar.data.cache import CacheWriter, fresh_folder, open_cache
from tidar.data.packing import PackedBatch, PackedData
from tidar.errors import TidarError

EOS = 0


def write(folder: Path, lengths: list[int], vocab_size: int = 1 << 16) -> list[tuple[int, ...]]:
    """Documents of these lengths in which every token but the end is unique."""
    first = np.cumsum([1, *lengths])
    documents = [(*range(begin, begin + n - 1), EOS) for begin, n in zip(first, lengths, strict=False)]
    folder.mkdir(parents=True, exist_ok=True)
    with CacheWriter(folder, vocab_size=vocab_size, eos_id=EOS) as cache:
        for document in documents:
            cache.add(np.array(document), 3 * len(document))
        cache.close()
    return documents


def split(stream: list[int]) -> list[tuple[int, ...]]:
    documents, start = [], 0
    for i, token in enumerate(stream):
        if token == EOS:
            documents.append(tuple(stream[start : i + 1]))
            start = i + 1
    return documents


def take(data: PackedData, batches: int) -> list[PackedBatch]:
    return [data.next() for _ in range(batches)]


def equal(left: list[PackedBatch], right: list[PackedBatch]) -> bool:
    pairs = [(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x[:3], y[:3], strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(deadline=None, max_examples=150)
@given(lengths=SIZES, seq_len=st.integers(1, 50), batch=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_every_document_once_an_epoch_and_whole(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, batch: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    documents = write(folder, lengths)
    data = PackedData(folder, seq_len=seq_len, batch_size=batch, seed=seed, window=1)
    size = sum(lengths)
    stream: list[int] = []
    while len(stream) < 3 * size:
        tokens, starts, ends = data.next()[:3]
        assert tokens.shape == starts.shape == ends.shape == (batch, seq_len)
        assert tokens.dtype == starts.dtype == ends.dtype == torch.int64
        stream += tokens.flatten().tolist()
        for row, first, last in zip(tokens.tolist(), starts.tolist(), ends.tolist(), strict=True):
            # Written down independently: a document begins at the row's start and after each end of text.
            begin = 0
            for i, token in enumerate(row):
                if token == EOS or i == seq_len - 1:
                    assert first[begin : i + 1] == [begin] * (i + 1 - begin)
                    assert last[begin : i + 1] == [i + 1] * (i + 1 - begin)
                    begin = i + 1
    assert data.epoch == pytest.approx(len(stream) / size)
    for epoch in range(3):
        assert Counter(split(stream[epoch * size : (epoch + 1) * size])) == Counter(documents)


@settings(deadline=None, max_examples=50)
@given(lengths=SIZES, seq_len=st.integers(1, 30), before=st.integers(0, 12), seed=st.integers(0, 9))
def test_resumes_anywhere(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, before: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    write(folder, lengths)
    data = PackedData(folder, seq_len=seq_len, batch_size=2, seed=seed)
    take(data, before)
    state = data.state_dict()
    expected = take(data, 5)
    resumed = PackedData(folder, seq_len=seq_len, batch_size=2, seed=seed)
    take(resumed, 3)  # whatever it did before
    resumed.load_state_dict(state)
    assert equal(take(resumed, 5), expected)
    single = PackedData(folder, seq_len=seq_len, batch_size=1, seed=seed)
    single.load_state_dict(state)
    rows = torch.cat([batch.tokens for batch in take(single, 10)])
    assert torch.equal(rows, torch.cat([batch.tokens for batch in expected]))


@settings(deadline=None, max_examples=50)
@given(lengths=SIZES, seq_len=st.integers(1, 20), window=st.integers(1, 30), seed=st.integers(0, 9))
def test_rows_are_shuffled_within_a_window_and_none_is_lost(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_len: int, window: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    write(folder, lengths)
    width = max(1, min(window, sum(lengths) // seq_len))
    plain = PackedData(folder, seq_len=seq_len, batch_size=width, seed=seed, window=1)
    mixed = PackedData(folder, seq_len=seq_len, batch_size=width, seed=seed, window=window)
    for one, other in zip(take(plain, 4), take(mixed, 4), strict=True):
        assert sorted(one.tokens.tolist()) == sorted(other.tokens.tolist())


def test_a_batch_holds_many_documents(tmp_path: Path) -> None:
    documents = write(tmp_path, [640] * 100)
    batch = PackedData(tmp_path, seq_len=32, batch_size=32, seed=0).next()
    owner = {token: i for i, document in enumerate(documents) for token in document if token != EOS}
    assert len({owner[t] for t in batch.tokens[:, 0].tolist()}) > 20  # in order it would be 2


def test_order_follows_seed_and_epoch(tmp_path: Path) -> None:
    write(tmp_path, [4] * 50)
    first, again, other = (PackedData(tmp_path, seq_len=200, batch_size=1, seed=s) for s in (1, 1, 2))
    one, two = take(first, 2)
    assert equal([one, two], take(again, 2))
    assert not torch.equal(one.tokens, two.tokens)
    assert not torch.equal(one.tokens, other.next().tokens)


def test_state_of_other_data_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [4] * 5)
    write(tmp_path / "b", [4] * 6)
    state = PackedData(tmp_path / "a", seq_len=4, batch_size=1, seed=1).state_dict()
    for folder, seed in (("a", 2), ("b", 1)):
        with pytest.raises(TidarError, match="resume with the data, row length and seed of the first run"):
            PackedData(tmp_path / folder, seq_len=4, batch_size=1, seed=seed).load_state_dict(state)


def test_keeps_up_with_a_gpu(tmp_path: Path) -> None:
    """More than 4 M tokens a second on one core, with documents of 20 tokens and of 2,000."""
    for size in (20, 2000):
        with CacheWriter(tmp_path, vocab_size=100, eos_id=EOS) as cache:
            for _ in range(2_000_000 // size):
                cache.add(np.zeros(size), size)
            cache.close()
        data = PackedData(tmp_path, seq_len=1024, batch_size=64, seed=0)
        start = time.process_time()
        take(data, 60)
        assert 60 * 1024 * 64 / (time.process_time() - start) > 4e6


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_token_width(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    with CacheWriter(tmp_path, vocab_size=vocab_size, eos_id=vocab_size - 1) as cache:
        cache.add(np.array([1, vocab_size - 1]), 1)
        cache.close({"note": "kept"})
    cache_read = open_cache(tmp_path)
    assert cache_read.tokens.dtype == dtype
    assert cache_read.tokens.tolist() == [1, vocab_size - 1]
    assert cache_read.offsets.tolist() == [0, 2]
    assert cache_read.meta["note"] == "kept"
    assert cache_read.meta["bytes"] == 1


def test_broken_caches_are_named(tmp_path: Path) -> None:
    with pytest.raises(TidarError, match=r"no prepared data in .*nowhere"):
        open_cache(tmp_path / "nowhere")
    for broken in ("tokens.bin", "docs.bin", "meta.json"):
        folder = tmp_path / broken
        write(folder, [5, 6])
        data = (folder / broken).read_bytes()
        (folder / broken).write_bytes(data[: len(data) // 4 * 2])  # whole tokens
        with pytest.raises(TidarError, match="prepare it again"):
            open_cache(folder)
        (folder / broken).unlink()
        with pytest.raises(TidarError, match="prepare"):
            open_cache(folder)


def test_sizes_must_be_positive(tmp_path: Path) -> None:
    write(tmp_path, [5])
    for seq_len, batch_size in ((0, 1), (1, 0)):
        with pytest.raises(TidarError, match="at least 1"):
            PackedData(tmp_path, seq_len=seq_len, batch_size=batch_size, seed=0)


def test_full_disk_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    out = tmp_path / "data"
    with fresh_folder(out) as folder:
        write(folder, [5, 6])
        (folder / "stats.json").write_text("{}")

    def overflow() -> None:
        with fresh_folder(out) as folder:
            (folder / "tokens.bin").symlink_to("/dev/full")  # every write to it fails with ENOSPC
            write(folder, [7] * 10_000)

    with pytest.raises(TidarError, match=r"disk full while writing .*data: free some space"):
        overflow()
    assert os.listdir(tmp_path) == ["data"]
    assert open_cache(out).meta["documents"] == 2


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(TidarError, match="holds something other than prepared data"), fresh_folder(tmp_path):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(TidarError, match=r"cannot write .* \(Permission denied\)"), fresh_folder(tmp_path / "data"):
        pass
