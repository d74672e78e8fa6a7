"""What goes wrong with streams: one clear line each, a checkpoint where there is something to keep, no process left."""

from __future__ import annotations

import gzip
import json
import lzma
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from stream_data import config, opened, same, steps, stream, write
from train_data import config as run_config
from train_data import records, same_weights, write_text

from tidar.data.config import DataConfig, Stream
from tidar.data.reader import Files, Share, open_stream
from tidar.data.streaming import hold_out
from tidar.data.workers import Interrupted
from tidar.errors import TidarError
from tidar.train import checkpoint
from tidar.train.step import Stepper
from tidar.train.trainer import train

pytestmark = pytest.mark.filterwarnings("default")  # those of the datasets package are not ours to mend


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    import datasets  # type: ignore[import-untyped]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("faults")
    write(folder / "text", [20, 30, 25])
    return config(stream(folder / "text"), patience=100.0)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time passes only while something pauses."""
    taken: list[float] = []
    monkeypatch.setattr(time, "sleep", taken.append)
    monkeypatch.setattr(time, "monotonic", lambda: 1000 + sum(taken))
    return taken


def breaking(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """Let the n-th opening of a file break off after two documents where ``fails(n)``."""
    real, opened = Files.columns, [0]

    def columns(self: Files, file: int, first: int) -> Iterator[Any]:
        opened[0] += 1
        broken = fails(opened[0])
        for column in real(self, file, first):
            if broken:
                yield column[:2]
                raise ConnectionError("peer closed\nmore")
            yield column

    monkeypatch.setattr(Files, "columns", columns)


def test_a_broken_connection_changes_nothing(
    plan: DataConfig, monkeypatch: pytest.MonkeyPatch, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = steps(opened(plan), 10)
    breaking(monkeypatch, lambda opening: opening % 3 == 1)
    assert same(steps(opened(plan), 10), wanted)
    assert len(pauses) > 5 and set(pauses) == {1.0}, "documents came in between"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(pauses)
    assert all(line.endswith("out of reach (peer closed); trying again in 1 s") for line in said)


def test_pauses_grow_until_patience_ends(
    plan: DataConfig, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    def never(*_: Any) -> Iterator[Any]:
        raise ConnectionError("no route")

    monkeypatch.setattr(Files, "columns", never)
    with pytest.raises(TidarError, match=r"jsonl was out of reach for 100 s \(no route\)") as caught:
        opened(plan).next()
    assert pauses == [1, 2, 4, 8, 16, 32, 37]
    assert "\n" not in str(caught.value)


def test_a_hub_that_comes_back(pauses: list[float], monkeypatch: pytest.MonkeyPatch, plan: DataConfig) -> None:
    import datasets

    real, calls = datasets.load_dataset, [0]

    def load(*words: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] < 4:
            raise ConnectionError("no route")
        return real(*words, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_stream(plan.streams[0], 60.0).count == 3
    assert pauses == [1, 2, 4]


def refused(message: str, tmp_path: Path, text: str = '{"text": "x"}', **changes: Any) -> None:
    """What is wrong is said when the data are opened or first read."""
    (tmp_path / "a.jsonl").write_text(text)
    plan = config(Stream(**{"path": str(tmp_path / "a.jsonl"), **changes}))
    with pytest.raises(TidarError, match=message) as caught:
        next(Share(open_stream(plan.streams[0], 0), plan, seed=0, number=0).endless())
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_a_stream_is_said(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(
        "has no field 'body': set text_field to one of 'text', 'n'",
        tmp_path,
        '{"text": "x", "n": 1}',
        text_field="body",
    )
    refused("column 'n' holds int, not text; set text_field", tmp_path, '{"text": "x", "n": 1}', text_field="n")
    refused("cannot read .*(Bad split|Unknown split).*tset", tmp_path, split="tset")
    refused("has no documents: check the path", tmp_path, "")
    refused("has no document for lane 0 of 1: lower lanes", tmp_path, '{"text": " "}')
    refused("nowhere.*jsonl", tmp_path, path=str(tmp_path / "nowhere.jsonl"))
    refused("folder", tmp_path, path=str(tmp_path / "folder"))
    refused("nobody/nothing was out of reach for 0 s", tmp_path, path="nobody/nothing")
    refused("cannot read .*a.jsonl", tmp_path, '{"text": "x"}\n{"text": "cut o')


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz"])
@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_a_broken_file_is_not_asked_for_again(tmp_path: Path, pauses: list[float], name: str, damage: str) -> None:
    lines = "\n".join(json.dumps({"text": f"{n} " + "word " * 50}) for n in range(400)).encode()
    packed = gzip.compress(lines) if name.endswith("gz") else lzma.compress(lines)
    half = len(packed) // 2
    changed = packed[:half] + bytes(byte ^ 0x55 for byte in packed[half : half + 8]) + packed[half + 8 :]
    (tmp_path / name).write_bytes(packed[:half] if damage == "cut off" else changed)
    refused("cannot read .*a.jsonl", tmp_path, path=str(tmp_path / name))
    assert pauses == []


def test_more_lanes_than_documents(tmp_path: Path) -> None:
    write(tmp_path / "text", [3])
    with pytest.raises(TidarError, match=r"no document for lane 3 of 8: lower lanes"):
        steps(opened(config(stream(tmp_path / "text"))), 1)


def test_documents_that_changed_since_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "text", [30], longest=2000)
    plan = config(stream(tmp_path / "text"), shuffle=100)
    data = opened(plan, batch_size=2, accumulate=1, lanes=1)
    for _ in range(5):  # ten rows of a block that is one long document
        data.next()
    place = data.state_dict()
    write(tmp_path / "fewer", [30], longest=2)
    (tmp_path / "fewer" / "000.jsonl").replace(tmp_path / "text" / "000.jsonl")
    again = opened(plan, batch_size=2, accumulate=1, lanes=1)
    again.load_state_dict(place)
    with pytest.raises(TidarError, match="cannot resume: the streams hold other documents"):
        again.next()


def test_nothing_held_out(tmp_path: Path, plan: DataConfig) -> None:
    with pytest.raises(TidarError, match="no document of the streams is held out: raise holdout"):
        hold_out(replace(plan, holdout=1e-9), tiny.byte_tokenizer(), tmp_path / "data", tokens=10, seed=0)
    assert not (tmp_path / "data").exists()


def test_without_datasets(plan: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TidarError, match=r"needs the datasets package: pip install 'tidar\[train\]'"):
        open_stream(plan.streams[0], 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stream(path="x", weight=0.0), "the weight of stream x must be above 0"),
        (lambda: Stream(path="x", weight=-1.0), "the weight of stream x must be above 0"),
        (lambda: Stream(path="x", weight=float("inf")), "the weight of stream x must be above 0"),
        (lambda: Stream(path=""), "a stream needs a path"),
        (lambda: DataConfig(), "no data sources"),
        (lambda: config(Stream(path="x"), sources=("y",)), "both sources and streams"),
        (lambda: config(Stream(path="x"), max_documents=3), "max_documents is for sources"),
        (lambda: config(Stream(path="x"), lanes=0), "lanes must be at least 1"),
        (lambda: config(Stream(path="x"), shuffle=0), "shuffle must be at least 1"),
        (lambda: config(Stream(path="x"), workers=-1), "workers must be at least 0"),
        (lambda: config(Stream(path="x"), patience=500.0), "patience must lie between 0 and 480"),
    ],
)
def test_settings_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TidarError, match=message):
        make()


def alive(process: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_that_are_asked_to_end_and_one_that_is_killed(plan: DataConfig) -> None:
    wanted = steps(opened(plan), 12)
    data = opened(replace(plan, workers=2))
    try:
        assert same(steps(data, 3), wanted[:3])
        assert data._running is not None
        processes = [process.pid for process, _ in data._running._workers]  # type: ignore[union-attr]
        for process in processes:
            os.kill(process, signal.SIGTERM)  # as a scheduler sends it to all processes of a job
            os.kill(process, signal.SIGINT)
        assert same(steps(data, 3), wanted[3:6])
        assert all(map(alive, processes))
        os.kill(processes[1], signal.SIGKILL)
        with pytest.raises(TidarError, match=rf"tidar data 1 \(process {processes[1]}\) was killed by signal 9: lower"):
            steps(data, 100_000)
    finally:
        data.close()
    assert not any(map(alive, processes))


def test_workers_that_are_asked_to_end_as_they_start(plan: DataConfig) -> None:
    """A signal to all processes of a job may come before a worker has begun to run."""
    data = opened(replace(plan, workers=2))
    asked: list[int] = []
    start = multiprocessing.process.BaseProcess.start

    def started(process: Any) -> None:
        start(process)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(process.pid, number)
        asked.append(process.pid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "start", started)
        try:
            assert same(steps(data, 2), steps(opened(plan), 2)) and len(asked) == 2
        finally:
            data.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), "the trainer still hears them"


def test_a_lack_is_heard_of_in_its_turn_and_a_wait_can_be_ended(plan: DataConfig, tmp_path: Path) -> None:
    """Lane 0 has a document, so its piece comes before the error of lane 3."""
    write(tmp_path / "text", [3], longest=900)
    data = opened(config(stream(tmp_path / "text"), workers=1, shuffle=1))
    data.interrupted = lambda: True
    with pytest.raises(Interrupted):
        data.next()
    data.interrupted = lambda: False
    try:
        data.load_state_dict(data.state_dict())
        data.next()
        with pytest.raises(TidarError, match="no document for lane 3 of 8"):
            data.next()
    finally:
        data.close()


ORPHANS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may ignore it, and it would be inherited
from stream_data import config, opened, steps
from pathlib import Path
from tidar.data.config import Stream
from tidar.data.workers import Interrupted

if __name__ == "__main__":
    data = opened(config(Stream(path=sys.argv[1]), workers=2, patience=400.0))
    if sys.argv[2] == "SIGKILL":
        Path(sys.argv[1]).unlink()  # its workers ask for it again and again
        data.interrupted = lambda: True
        try:
            data.next()
        except Interrupted:
            pass
    else:
        steps(data, 1)
    print(*[process.pid for process, _ in data._running._workers], flush=True)
    if sys.argv[2] != "end":
        time.sleep(1000)
"""


@pytest.mark.parametrize(
    "how", ["SIGKILL", "SIGINT", *(pytest.param(how, marks=pytest.mark.slow) for how in ("SIGTERM", "end"))]
)
def test_no_worker_outlives_its_trainer(tmp_path: Path, how: str) -> None:
    write(tmp_path / "text", [60])
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    places = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(script), str(tmp_path / "text" / "000.jsonl"), how]
    said = tmp_path / "said"
    with said.open("w") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
    assert process.stdout is not None
    workers = [int(word) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    if how == "end":
        assert process.wait(60) == 0
    elif how == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C sends
    else:
        if how == "SIGKILL":
            until(lambda: said.read_text().count("trying again in 4 s") == 2)
        process.send_signal(signal.Signals[how])
    process.wait(60)
    process.stdout.close()
    until(lambda: not any(map(alive, workers)), 20)


@pytest.fixture(scope="module")
def base(converted: Callable[[str], Path]) -> Path:
    return converted("llama")


def streamed(root: Path, base: Path, **changes: Any) -> Any:
    """Twelve steps on a stream of text."""
    if not (root / "text").exists():
        write_text(root / "text")
    data = DataConfig(
        streams=(Stream(path=str(root / "text" / "*.txt")),), lanes=4, shuffle=60, workers=0, patience=0.0, holdout=0.2
    )
    return run_config(root, base, **{"data": data, **changes})


def test_a_run_that_loses_its_data_keeps_what_it_learnt(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = streamed(tmp_path, base, out=str(tmp_path / "whole"))
    assert train(whole).step == 12
    lines = [record for record in records(tmp_path / "whole") if "loss" in record]
    assert all(0 <= record["data_wait"] <= 1 for record in lines)
    assert "% waiting for data" in capsys.readouterr().err
    assert any("bits_per_byte" in record for record in records(tmp_path / "whole"))
    mine, real = replace(whole, out=str(tmp_path / "run")), Stepper.__call__
    gone = [False]

    def call(self: Stepper, batches: Any, step: int, lr: float) -> Any:
        gone[0] = step >= 6
        return real(self, batches, step, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__call__", call)
        columns = Files.columns

        def failing(self: Files, file: int, first: int) -> Iterator[Any]:
            if gone[0]:
                raise ConnectionError("no route")
            return columns(self, file, first)

        patch.setattr(Files, "columns", failing)
        with pytest.raises(
            TidarError, match=r"out of reach for 0 s \(no route\).*; step (\d+) is saved, go on"
        ) as caught:
            train(mine)
    newest = checkpoint.checkpoints(tmp_path / "run")[0]
    saved = int(newest.name.removeprefix("step-"))
    assert f"step {saved} is saved" in str(caught.value)
    assert 6 < saved < 12 and saved % 4, "a checkpoint of its own"
    assert train(replace(mine, data=replace(mine.data, workers=2, patience=9.0)), resume=True).step == 12
    assert same_weights(tmp_path / "run" / "model", tmp_path / "whole" / "model")


def test_a_run_that_never_had_data_keeps_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = streamed(tmp_path, base)
    plan = replace(plan, data=replace(plan.data, holdout=0.0, lanes=4, max_bytes=1))
    with pytest.raises(TidarError, match=r"no document for lane 0 of 4: lower lanes, or check .*holdout$"):
        train(plan)
    assert not (tmp_path / "run" / "checkpoints").exists()
