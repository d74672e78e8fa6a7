"""``tidar info``: what a bug report needs to say about the machine and the default checkpoint."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tidar import __version__
from tidar.checkpoint import embedded_checkpoint
from tidar.model import KEY

__all__ = ["collect", "show"]


def collect() -> dict[str, Any]:
    """Versions, devices, and the default checkpoint with its ``tidar`` key (None where it is missing or broken)."""
    import torch

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    checkpoint = embedded_checkpoint()
    config = checkpoint / "config.json"
    return {
        "tidar": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "tokenizers": version("tokenizers"),
        "devices": ["cpu", *(f"cuda:{i} {name}" for i, name in enumerate(cuda))],
        "cpu_threads": torch.get_num_threads(),
        "checkpoint": str(checkpoint),
        "checkpoint_spec": _spec(config),
    }


def _spec(config: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] | None = json.loads(config.read_text(encoding="utf-8")).get(KEY)
    except (OSError, ValueError, AttributeError):
        return None
    return found


def show(found: dict[str, Any]) -> None:
    """Print one aligned line a fact."""
    for name, value in found.items():
        text = ", ".join(value) if isinstance(value, list) else "missing" if value is None else value
        print(f"{name:16} {text}")
