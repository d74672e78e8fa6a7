from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet

from tidar.data.config import DataConfig
from tidar.data.sources import documents
from tidar.errors import TidarError


def read(source: object, **options: Any) -> list[str]:
    config = DataConfig(sources=(str(source),), **options)
    return [document.text for document in documents(str(source), config)]


def refused(source: object, message: str, **options: Any) -> None:
    with pytest.raises(TidarError, match=message) as caught:
        read(source, **options)
    assert "\n" not in str(caught.value)


def test_folder(tmp_path: Path) -> None:
    for name in ("b.py", "a.txt", "sub/c.py", "d.bin", ".hidden.py", ".git/e.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name} é\r\n", newline="")
    assert read(tmp_path) == ["# a.txt é\r\n", "# b.py é\r\n", "# sub/c.py é\r\n"]
    assert read(tmp_path, max_documents=2) == ["# a.txt é\r\n", "# b.py é\r\n"]
    assert read(tmp_path, extensions=(".bin",)) == ["# d.bin é\r\n"]
    assert read(tmp_path / "d.bin") == ["# d.bin é\r\n"]
    refused(tmp_path, "has no file ending in .rs: set extensions", extensions=(".rs",))


def test_missing_source(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no data source .*nowhere: name a folder, a file or hf:OWNER/NAME")


def test_invalid_utf8_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_bytes(b"name = '\xff'\n")
    refused(tmp_path, r"bad.py is not UTF-8 \(byte 8\)")


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    (tmp_path / "good.txt").write_text("x")
    assert read(tmp_path) == ["x"]  # a broken link is no file
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:40])
    refused(tmp_path / "bad.jsonl.gz", "cannot read .*bad.jsonl.gz")


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "one é", "n": 1}, {"text": "two"}]
    plain = "\n\n".join(json.dumps(row) for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(plain)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "b.jsonl.gz") == ["one é", "two"]
    assert len(read(tmp_path, extensions=(".jsonl", ".gz"))) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut o', "a.jsonl line 2 is not JSON .*perhaps truncated"),
        (b'{"body": "x", "id": 3}', "a.jsonl line 2 has no field 'text': set text_field to one of 'body', 'id'"),
        (b'{"text": null}', "a.jsonl line 2: field 'text' holds NoneType, not text"),
        (b'"text"', "a.jsonl line 2 is no JSON object"),
        (b'{"text": "\xff"}', r"a.jsonl line 2 is not UTF-8 \(byte 10\)"),
        (b'{"text": "\\ud800"}', "a.jsonl line 2 has half a surrogate pair"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line)
    refused(tmp_path / "a.jsonl", message)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"code": [f"text {i}" for i in range(3000)], "n": range(3000)}), path)
    assert read(path, text_field="code") == [f"text {i}" for i in range(3000)]
    refused(path, "a.parquet has no field 'text': set text_field to one of 'code', 'n'")
    refused(path, "a.parquet row 1: field 'n' holds int", text_field="n")
    path.write_bytes(path.read_bytes()[:-20])
    refused(path, "cannot read .*a.parquet", text_field="code")
    path.write_bytes(b"no parquet at all")
    refused(path, "cannot read .*a.parquet")


class Hub:
    """Stands for the `datasets` package: 10 documents whose download breaks off where told, and comes back."""

    def __init__(self, breaks: list[int], error: Exception) -> None:
        self.breaks = breaks
        self.error = error
        self.asked: list[tuple[Any, ...]] = []

    def load_dataset(self, name: str, subset: str | None, *, split: str, streaming: bool) -> Any:
        assert streaming
        self.asked.append((name, subset, split))

        def rows(first: int) -> Iterator[dict[str, str]]:
            for i in range(first, 10):
                if self.breaks and self.breaks[0] == i:
                    self.breaks.pop(0)
                    raise self.error
                yield {"text": f"document {i}"}

        return SimpleNamespace(skip=rows)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(time, "sleep", taken.append)
    return taken


def plug(monkeypatch: pytest.MonkeyPatch, breaks: list[int], error: Exception) -> Hub:
    hub = Hub(breaks, error)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    return hub


def test_interrupted_download_goes_on_where_it_broke_off(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    plug(monkeypatch, [0, 3, 3, 3, 7, 7, 7], ConnectionError("connection reset"))
    assert read("hf:me/code") == [f"document {i}" for i in range(10)]
    assert pauses == [2, 2, 4, 8, 2, 4, 8]


def test_download_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    hub = plug(monkeypatch, [3] * 100, RuntimeError("peer closed\nmore"))
    refused("hf:me/code", r"hf:me/code broke off after 3 documents \(peer closed\): try again later")
    assert len(hub.asked) == 4
    assert pauses == [2, 4, 8]


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = plug(monkeypatch, [], RuntimeError())
    for source in ("hf:me/code", "hf:me/code:test", "hf:me/code/python", "hf:me/code/python:valid", "hf:squad"):
        assert read(source, max_documents=1) == ["document 0"]
    assert hub.asked == [
        *(("me/code", None, "train"), ("me/code", None, "test"), ("me/code", "python", "train")),
        *(("me/code", "python", "valid"), ("squad", None, "train")),
    ]
    for source in ("hf:", "hf:a/b/c/d", "hf:/b"):
        refused(source, r"is no data set: write hf:OWNER/NAME")
    refused(
        "hf:me/code", "hf:me/code document 1 has no field 'body': set text_field to one of 'text'", text_field="body"
    )


def test_unknown_data_set_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    plug(monkeypatch, [0], ValueError("Bad split: tset. Available splits: ['train']"))
    refused("hf:me/code:tset", "cannot read hf:me/code:tset .*Available splits.*check its name and split")
    assert not pauses


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("hf:me/code", r"needs the datasets package: pip install 'tidar\[train\]'")


@pytest.mark.filterwarnings("default")  # those of the datasets package are not ours to mend
def test_the_datasets_package_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "code").mkdir(parents=True)
    lines = [json.dumps({"text": f"document {i}"}) for i in range(5)]
    (tmp_path / "me" / "code" / "train.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # a folder of that name is taken before the hub is asked
    assert read("hf:me/code") == [f"document {i}" for i in range(5)]
    refused("hf:me/code:tset", "cannot read hf:me/code:tset")
    assert os.listdir(tmp_path / "me" / "code") == ["train.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "no data sources"),
        ({"max_documents": 0}, "max_documents must be at least 1"),
        ({"min_bytes": 5, "max_bytes": 4}, "min_bytes must lie between 0 and max_bytes"),
        ({"similarity": 0.0}, r"similarity must lie in \(0, 1\]"),
        ({"holdout": 1.0}, r"holdout must lie in \[0, 1\)"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TidarError, match=message):
        DataConfig(**{"sources": ("x",), **options})
