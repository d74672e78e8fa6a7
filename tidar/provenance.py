"""Where a number comes from: what ran, on which machine, from which revision. Stands beside every published result."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["provenance", "record", "versions"]


def provenance() -> dict[str, Any]:
    """Revision, versions, device, command, date.

    The revision is that of TIDAR_REVISION, for a copy of the tree on a machine whose repository, if any, is older;
    else that of the git repository, and ends in ``+changes`` if files differ.
    """
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "revision": _revision(),
        "python": platform.python_version(),
        **versions(),
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "cpu_threads": torch.get_num_threads(),
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str | None]:
    """Of what speed and results may hang on."""
    return {name: _version(name) for name in ("tidar", "torch", "transformers", "triton")}


def record(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Append ``result`` and its provenance to a ``.jsonl`` file, print the line, and return it."""
    line = {**result, "provenance": provenance()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    return line


def _command() -> str:
    """As it was typed, but for the folder of a program that ran as a module."""
    program, *words = sys.argv
    ran = ["-m", Path(program).parent.name] if Path(program).name == "__main__.py" else [program]
    return shlex.join([Path(sys.executable).name, *ran, *words])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    if given := os.environ.get("TIDAR_REVISION"):
        return given

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        return revision + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
