"""Streamed data: one order whatever the ranks, workers and interruptions, nothing lost or twice, weights kept."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from stream_data import EOS, config, opened, same, steps, stream, tokenizer, write

from tidar.data import reader
from tidar.data.cache import open_cache
from tidar.data.config import DataConfig
from tidar.data.lanes import Lane, Lanes
from tidar.data.packing import PackedBatch
from tidar.data.reader import Share, open_stream
from tidar.data.streaming import StreamedData, beginnings, hold_out
from tidar.errors import TidarError

pytestmark = pytest.mark.filterwarnings("default")  # those of the datasets package are not ours to mend

LANES = st.integers(1, 9)


@pytest.fixture(scope="module", autouse=True)
def small_tables() -> Iterator[None]:
    """Files are read in several pieces, as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "TABLE", 7)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two streams: seven files of long documents, one of short ones."""
    folder = tmp_path_factory.mktemp("streams")
    write(folder / "long", [9, 30, 21, 5, 14, 40, 16], longest=60)
    write(folder / "short", [150], first=20_000, longest=8)
    return folder


@pytest.fixture(scope="module")
def mixed(root: Path) -> DataConfig:
    return config(stream(root / "long", weight=3), stream(root / "short"))


@pytest.fixture(scope="module")
def wanted(mixed: DataConfig) -> list[Any]:
    """Several epochs of both, read without interruption by one process."""
    return steps(opened(mixed), 60)


@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_ranks_changes_nothing(mixed: DataConfig, wanted: list[Any], size: int) -> None:
    ranks = [steps(opened(mixed, rank=rank, size=size), 60, rank=rank, size=size) for rank in range(size)]
    together = [[ranks[i % size][step][i // size] for i in range(4)] for step in range(60)]
    assert same(together, wanted)


def test_a_rank_reads_no_lanes_but_its_own(mixed: DataConfig) -> None:
    places = [opened(mixed, rank=rank, size=4).state_dict() for rank in range(4)]
    lanes = [sorted(name for name in place if name.startswith("lane ")) for place in places]
    assert lanes == [[f"lane {2 * rank}", f"lane {2 * rank + 1}"] for rank in range(4)]


def test_smaller_micro_batches_change_nothing(mixed: DataConfig, wanted: list[Any]) -> None:
    data = opened(mixed, batch_size=8, accumulate=2)
    for step in wanted[:20]:
        halves = [data.next().tokens, data.next().tokens]
        assert torch.equal(torch.cat(halves), torch.cat([batch.tokens for batch in step]))


def test_workers_change_nothing(mixed: DataConfig, wanted: list[Any]) -> None:
    data = opened(replace(mixed, workers=2))
    try:
        assert same(steps(data, 30), wanted[:30])
        place = json.loads(json.dumps(data.state_dict()))
    finally:
        data.close()
    alone = opened(mixed)
    alone.load_state_dict(place)
    assert same(steps(alone, 3), wanted[30:33]), "the place is not where the workers are by now"


def test_goes_on_after_every_step(mixed: DataConfig, wanted: list[Any]) -> None:
    data = opened(mixed)
    blocks = set()
    for done in range(30):
        place = json.dumps(data.state_dict())  # as a checkpoint keeps it
        again = opened(mixed)
        again.load_state_dict(json.loads(place))
        assert same(steps(again, 2), wanted[done : done + 2])
        assert same(steps(data, 1), wanted[done : done + 1])
        blocks |= {(state["block"], state["row"]) for state in map(json.loads(place).get, ["lane 0", "lane 5"])}
    assert len({block for block, _ in blocks}) > 5 and len({row for _, row in blocks}) > 3


def test_two_ranks_then_one_then_four(mixed: DataConfig, wanted: list[Any]) -> None:
    def go_on(place: dict[str, Any], size: int, first: int, last: int) -> dict[str, Any]:
        ranks = [opened(mixed, rank=rank, size=size) for rank in range(size)]
        for rank, data in enumerate(ranks):
            if place:
                data.load_state_dict(place)
            given = steps(data, last - first, rank=rank, size=size)
            assert same(given, [step[rank::size] for step in wanted[first:last]])
        return {name: value for data in ranks for name, value in data.state_dict().items()}

    place: dict[str, Any] = {}
    for size, first, last in ((2, 0, 13), (1, 13, 26), (4, 26, 41)):
        place = json.loads(json.dumps(go_on(place, size, first, last)))


@settings(deadline=None, max_examples=15)
@given(files=st.lists(st.integers(9, 15), min_size=1, max_size=6), lanes=LANES, seed=st.integers(0, 2**40))
def test_every_document_in_one_lane_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, files: list[int], lanes: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("once")
    documents = Counter(tuple(words[:-1]) for words in write(folder / "text", files))
    plan = config(stream(folder / "text"))
    opened = open_stream(plan.streams[0], 0)
    assert opened.count == len(files)
    shares = [Share(opened, plan, seed=seed, number=0, lane=lane, lanes=lanes) for lane in range(lanes)]
    for _ in range(3):
        texts = [text for share in shares for text in share.epoch()]
        assert Counter(tuple(int(word[1:]) for word in text.split()) for text in texts) == documents


def test_shares_are_alike_and_epochs_are_not(tmp_path: Path) -> None:
    write(tmp_path / "text", [60] * 10)
    plan = config(stream(tmp_path / "text"))
    files = open_stream(plan.streams[0], 0)
    for lanes in (1, 3, 8, 16, 20):
        shares = [Share(files, plan, seed=1, number=0, lane=lane, lanes=lanes) for lane in range(lanes)]
        counts = [len(list(share.epoch())) for share in shares]
        assert sum(counts) == 600
        assert max(counts) <= 1.2 * min(counts)
    share = Share(files, plan, seed=1, number=0)
    first, second = list(share.epoch()), list(share.epoch())
    assert first != second and sorted(first) == sorted(second)
    assert first != list(Share(files, plan, seed=2, number=0).epoch())


@settings(deadline=None, max_examples=15)
@given(
    seq_len=st.integers(1, 40), shuffle=st.integers(1, 120), rows=st.integers(1, 4), longest=st.sampled_from([3, 90])
)
def test_no_token_is_lost(
    tmp_path_factory: pytest.TempPathFactory, seq_len: int, shuffle: int, rows: int, longest: int
) -> None:
    """A lane's rows are those of its documents end to end, epoch after epoch, shuffled within blocks."""
    folder = tmp_path_factory.mktemp("lost")
    write(folder / "text", [6, 3, 8], longest=longest)
    plan = config(stream(folder / "text"), shuffle=shuffle)
    files = open_stream(plan.streams[0], 0)
    lanes = Lanes(
        files=(files,),
        config=plan,
        tokenizer=tokenizer().backend_tokenizer.to_str(),
        eos_id=EOS,
        seed=3,
        count=2,
        rows=rows,
        seq_len=seq_len,
    )
    lane = Lane(lanes, 1, lanes.encoder(), lanes.begin())
    texts = islice(Share(files, plan, seed=3, number=0, lane=1, lanes=2).endless(), 150)
    tokens = [token for text in texts for token in [*(int(word[1:]) for word in text.split()), EOS]]
    straight = [tuple(tokens[i : i + seq_len]) for i in range(0, len(tokens) - seq_len, seq_len)]
    given: list[tuple[int, ...]] = []
    compared = 0
    while len(given) + rows <= len(straight):
        piece = lane.next()
        given += map(tuple, piece.tokens.reshape(rows, seq_len).tolist())
        if piece.state["row"] == 0:  # at the end of a block
            assert Counter(given) == Counter(straight[: len(given)])
            compared += 1
    assert compared > 2 or rows > 1
    if len(given) > 200:
        assert given != straight[: len(given)]


def test_rows_are_as_those_of_prepared_data(wanted: list[Any]) -> None:
    for step in wanted:
        for tokens, starts, ends in (batch[:3] for batch in step):
            assert tokens.shape == starts.shape == ends.shape == (4, 16)
            assert tokens.dtype == starts.dtype == ends.dtype == torch.int64
            for row, first, last in zip(tokens.tolist(), starts.tolist(), ends.tolist(), strict=True):
                begin = 0
                for i, token in enumerate(row):
                    if token == EOS or i == 15:
                        assert first[begin : i + 1] == [begin] * (i + 1 - begin)
                        assert last[begin : i + 1] == [i + 1] * (i + 1 - begin)
                        begin = i + 1


def test_weights_are_shares_of_the_tokens(root: Path) -> None:
    """At any moment, though the documents of one stream are many times as long."""
    for weight in (0.2, 1.0, 5.0):
        data = opened(config(stream(root / "long", weight=weight), stream(root / "short")))
        for count in (20, 40):
            steps(data, count)
            for name, state in data.state_dict().items():
                if name.startswith("lane "):
                    long, short = state["taken"]
                    assert abs(long - weight * short) <= 61 * max(1.0, weight)
    batches = [batch for step in steps(data, 60) for batch in step]
    tokens = torch.cat([batch.tokens for batch in batches])
    share = ((tokens > 0) & (tokens < 20_000)).sum().item() / (tokens > 0).sum().item()
    # The ends of texts go with their documents: of the short ones they are 1 in 5.5, of the long ones 1 in 31.5.
    assert share == pytest.approx(5 / (5 + 4.5 / 5.5 * 31.5 / 30.5), abs=0.03)


def tokens_of(given: list[list[PackedBatch]]) -> set[int]:
    return {token for step in given for batch in step for row in batch.tokens.tolist() for token in row}


def test_what_is_held_out_is_never_trained_on(root: Path, tmp_path: Path) -> None:
    plan = config(stream(root / "long", weight=3), stream(root / "short"), holdout=0.2)
    place = hold_out(plan, tokenizer(), tmp_path / "data", tokens=400, seed=7)
    cache = open_cache(place)
    held = set(cache.tokens.tolist()) - {EOS}
    assert len(cache.tokens) >= 400
    shares = Counter(token < 20_000 for token in held)
    assert shares[True] > shares[False] > 20
    data = opened(plan)
    seen = tokens_of(steps(data, 150))
    assert all(data.state_dict()[f"lane {lane}"]["places"][0][0] > 1 for lane in range(8)), "epochs went by"
    assert not seen & held
    everything = config(stream(root / "long", weight=3), stream(root / "short"))
    whole = tokens_of(steps(opened(everything), 150))
    assert held < whole
    assert 0.1 < 1 - len(seen) / len(whole) < 0.3
    before = (place / "tokens.bin").stat().st_mtime_ns
    assert hold_out(plan, tokenizer(), tmp_path / "data", tokens=400, seed=7) == place
    assert (place / "tokens.bin").stat().st_mtime_ns == before, "made once"
    hold_out(plan, tokenizer(), tmp_path / "data", tokens=100, seed=7)
    assert len(open_cache(place).tokens) < len(cache.tokens)


def test_beginnings_follow_the_weights_too(root: Path) -> None:
    plan = config(stream(root / "long", weight=3), stream(root / "short"))
    texts = list(beginnings(plan, size=4000, seed=0))
    sizes = [sum(len(t) for t in texts if (int(t.split()[0][1:]) < 20_000) == long) for long in (True, False)]
    assert 3000 <= sizes[0] < 3400 and 1000 <= sizes[1] < 1100


def test_other_kinds_of_files(tmp_path: Path) -> None:
    texts = [f"w{i}" for i in range(1, 60)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    for name in ("parquet", "gz", "txt", "folder", "blank"):
        (tmp_path / name).mkdir()
    parquet.write_table(pa.table({"code": texts, "n": range(59)}), tmp_path / "parquet" / "a.parquet", row_group_size=9)
    (tmp_path / "gz" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "folder" / "train.jsonl").write_text(lines)
    for text in texts:
        (tmp_path / "txt" / f"{text}.txt").write_text(text)
    (tmp_path / "blank" / "a.jsonl").write_text(lines + '\n{"text": " \\n"}\n{"text": null}\n{"text": ""}\n')
    for path, field in (
        ("parquet/*.parquet", "code"),
        ("gz/a.jsonl.gz", "text"),
        ("folder", "text"),
        ("txt/*.txt", "text"),
        ("blank/a.jsonl", "text"),
    ):
        plan = config(stream(tmp_path, path=str(tmp_path / path), text_field=field))
        share = Share(open_stream(plan.streams[0], 0), plan, seed=0, number=0)
        assert Counter(share.epoch()) == Counter(texts), path


def test_a_place_of_other_data_is_refused(root: Path, mixed: DataConfig) -> None:
    data = opened(mixed)
    place = data.state_dict()
    for change, name in (
        ({"seed": 8}, "seed"),
        ({"seq_len": 8}, "seq_len"),
        ({"lanes": 16}, "lanes"),
    ):
        with pytest.raises(TidarError, match=f"cannot resume: {name} of the checkpoint's data was"):
            opened(mixed, **change).load_state_dict(place)
    others: list[dict[str, Any]] = [{"shuffle": 240}, {"min_bytes": 5}, {"holdout": 0.1}]
    for other in others:
        with pytest.raises(TidarError, match="cannot resume: settings of the checkpoint's data"):
            opened(replace(mixed, **other)).load_state_dict(place)
    opened(replace(mixed, workers=1, patience=9.0)).load_state_dict(place)
    with pytest.raises(TidarError, match=r"streams of the checkpoint's data was \[7, 1\] and is now \[7\]"):
        opened(config(stream(root / "long"))).load_state_dict(place)
    with pytest.raises(TidarError, match="streams of the checkpoint's data was None"):
        data.load_state_dict({"row": 3, "seed": 7, "tokens": 9, "seq_len": 16})


def test_long_documents_fill_many_rows(tmp_path: Path) -> None:
    write(tmp_path / "text", [9], longest=900)
    data = StreamedData(
        config(stream(tmp_path / "text")), tokenizer(), seq_len=16, batch_size=4, accumulate=1, lanes=1, seed=0
    )
    rows = torch.cat([data.next().tokens for _ in range(10)])
    inside = rows[:, 1:] - rows[:, :-1]
    assert ((inside == 1) | (rows[:, 1:] == EOS) | (rows[:, :-1] == EOS)).all()
    assert np.abs(np.diff(rows[:, 0].numpy())).max() > 32, "neighbours are parted"
