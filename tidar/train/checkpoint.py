"""A run's checkpoints: whole or absent, so that a kill or a full disk at any moment costs only the steps since.

``out/checkpoints/step-N/`` holds ``model/`` (a plain Hugging Face folder in the weights' own dtype), ``optimizer.pt``,
``progress.json`` and ``manifest.json`` (size and SHA-256 of every other file). It is written beside its place, synced
to the disk, and renamed into it. ``out/latest`` is a link to the newest one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tidar.checkpoint import save_model, write_folder
from tidar.errors import TidarError
from tidar.model import CausalLM

__all__ = [
    "Progress",
    "checkpoints",
    "load_optimizer",
    "newest_whole",
    "read_progress",
    "save_checkpoint",
    "save_weights",
]

OPTIMIZER, PROGRESS, MANIFEST = "optimizer.pt", "progress.json", "manifest.json"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        tokens: clean tokens done.
        since: tokens at which the optimizer was last empty; its learning rate warms up from there.
        data: position of the packed stream.
    """

    step: int
    tokens: int
    since: int
    data: dict[str, int]


def checkpoints(out: Path) -> list[Path]:
    """The run's checkpoints, newest first."""
    found = (out / "checkpoints").glob("step-*")
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")), reverse=True)


def save_checkpoint(
    out: Path, model: CausalLM, optimizer: torch.optim.Optimizer, progress: Progress, *, keep_last: int
) -> Path:
    """Write one checkpoint, then remove all but the newest ``keep_last``.

    Raises:
        TidarError: it cannot be written; the older ones are as they were.
    """
    final = out / "checkpoints" / f"step-{progress.step:08d}"

    def fill(folder: Path) -> None:
        save_model(model, folder / "model")
        _save_tensors({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, folder / OPTIMIZER)
        (folder / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
        (folder / MANIFEST).write_text(json.dumps(_digests(folder), indent=1), encoding="utf-8")
        for path in [*folder.rglob("*"), folder]:
            _sync(path)

    if final.exists():
        shutil.rmtree(final)  # a broken one, or the run would have gone on from it
    for leftover in final.parent.glob(".step-*"):  # of a run that was killed while saving
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        write_folder(final, fill)
    except TidarError as error:
        whole = next(iter(checkpoints(out)), None)
        rest = "there is no older one" if whole is None else f"the last whole one is {whole}; continue with --resume"
        raise TidarError(
            f"cannot save checkpoint {final.name}: {error.__cause__ or error}; free some space; {rest}"
        ) from error
    _sync(final.parent)
    _link(out / "latest", final)
    for old in checkpoints(out)[keep_last:]:
        shutil.rmtree(old)
    return final


def newest_whole(out: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are what was written; each broken one is reported to ``say``.

    Raises:
        TidarError: there are checkpoints, and all are broken.
    """
    found = checkpoints(out)
    for folder in found:
        fault = _fault(folder)
        if fault is None:
            return folder
        say(f"checkpoint {folder} is broken ({fault}); trying the one before it")
    if found:
        raise TidarError(f"every checkpoint in {out / 'checkpoints'} is broken: remove the folder and start again")
    return None


def read_progress(folder: Path) -> Progress:
    """How far the run had come that wrote ``folder``."""
    try:
        return Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise TidarError(f"cannot continue from {folder}: no {PROGRESS} of a training run in it ({error})") from error


def save_weights(final: Path, model: CausalLM, progress: Progress, *, dtype: str) -> None:
    """A Hugging Face folder that replaces ``final``; its progress lies in it, so that another run can go on from it."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    part = final.with_name(f".{final.name}.new")
    shutil.rmtree(part, ignore_errors=True)
    save_model(model, part, dtype=dtype)
    (part / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")
    if final.exists():
        os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> bool:
    """Restore optimizer and random state; False if ``folder`` holds weights alone."""
    if not (folder / OPTIMIZER).exists():
        return False
    state: dict[str, Any] = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return True


def _save_tensors(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's own words for a write that failed
        raise OSError(f"writing {path.name} failed ({str(error).splitlines()[0]})") from error


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(folder: Path) -> str | None:
    try:
        manifest: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, wanted in manifest.items():
            path = folder / name
            if path.stat().st_size != wanted["bytes"] or _digest(path) != wanted["sha256"]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return str(error)
    return None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(link: Path, target: Path) -> None:
    part = link.with_name(f".{link.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    part.symlink_to(os.path.relpath(target, link.parent))
    os.replace(part, link)
