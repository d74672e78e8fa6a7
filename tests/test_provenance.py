from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tidar.provenance import provenance, record


def test_a_result_is_appended_with_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.jsonl"
    first = record(path, {"speed": 1.5})
    record(path, {"speed": 2.5})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == first
    assert [line["speed"] for line in lines] == [1.5, 2.5]
    assert lines[0]["provenance"]["torch"] == torch.__version__
    assert {"revision", "transformers", "gpu", "command", "date", "python"} <= provenance().keys()


def test_a_revision_that_is_given_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDAR_REVISION", "abc123")
    assert provenance()["revision"] == "abc123"
