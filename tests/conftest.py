from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import interpreter  # noqa: F401
import pytest
import tiny
import torch

from tidar.api import Model
from tidar.checkpoint import load_model
from tidar.convert import convert


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny converted checkpoint of a family."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            plain = tiny.save_plain(family, root / "plain")
            convert(plain, root / "converted")
            config = root / "converted" / "config.json"
            kept = json.loads(config.read_text())
            kept["tidar"]["block_sizes"] = [1, 16]  # no warning that nothing was trained
            config.write_text(json.dumps(kept))
            made[family] = root / "converted"
        return made[family]

    return get


@pytest.fixture(scope="session")
def qwen3(converted: Callable[[str], Path]) -> Model:
    """A tiny converted Qwen3 in fp64, one layer with a sliding window."""
    return Model(load_model(converted("qwen3"), dtype="float64"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
