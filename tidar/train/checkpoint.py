"""A run's checkpoints: whole or absent, so that a kill or a full disk at any moment costs only the steps since.

``out/checkpoints/step-N/`` holds ``model/`` (a plain Hugging Face folder in the weights' own dtype), ``optimizer.pt``,
``progress.json`` and ``manifest.json`` (size and SHA-256 of every other file). It is written beside its place, synced
to the disk, and renamed into it. ``out/latest`` is a link to the newest one. Several ranks write another optimizer
state (`tidar.train.shards`), and any number of ranks reads both.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tidar.checkpoint import save_model, write_folder
from tidar.errors import TidarError
from tidar.model import CausalLM

__all__ = [
    "Progress",
    "cannot_save",
    "checkpoints",
    "digests",
    "load_optimizer",
    "make_room",
    "newest_whole",
    "place_of",
    "read_progress",
    "save_checkpoint",
    "save_weights",
    "settle",
    "sync",
    "write_manifest",
    "write_progress",
]

OPTIMIZER, PROGRESS, MANIFEST = "optimizer.pt", "progress.json", "manifest.json"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        tokens: clean tokens done.
        since: tokens at which the optimizer was last empty; its learning rate warms up from there.
        data: place in the data; of streams, while training, what this rank reads of them.
    """

    step: int
    tokens: int
    since: int
    data: dict[str, Any]


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
    final = place_of(out, progress)

    def fill(folder: Path) -> None:
        save_model(model, folder / "model")
        _save_tensors({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, folder / OPTIMIZER)
        write_progress(folder, progress)
        write_manifest(folder, digests(folder))
        for path in [*folder.rglob("*"), folder]:
            sync(path)

    make_room(final)
    try:
        write_folder(final, fill)
    except TidarError as error:
        raise cannot_save(out, final, error.__cause__ or error) from error
    settle(out, final, keep_last)
    return final


def place_of(out: Path, progress: Progress) -> Path:
    """Where the checkpoint of this progress belongs."""
    return out / "checkpoints" / f"step-{progress.step:08d}"


def make_room(final: Path) -> None:
    """Remove what is in the way of a new checkpoint ``final``, and what a killed run left of its own."""
    if final.exists():
        shutil.rmtree(final)  # a broken one, or the run would have gone on from it
    for leftover in final.parent.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def settle(out: Path, final: Path, keep_last: int) -> None:
    """``final`` is in its place: make it the latest, and remove all but the newest ``keep_last``."""
    sync(final.parent)
    _link(out / "latest", final)
    for old in checkpoints(out)[keep_last:]:
        shutil.rmtree(old)


def cannot_save(out: Path, final: Path, reason: BaseException) -> TidarError:
    """What to say when ``final`` cannot be written."""
    whole = next(iter(checkpoints(out)), None)
    rest = "there is no older one" if whole is None else f"the last whole one is {whole}; continue with --resume"
    return TidarError(f"cannot save checkpoint {final.name}: {reason}; free some space; {rest}")


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


def write_progress(folder: Path, progress: Progress) -> None:
    """What `read_progress` reads."""
    (folder / PROGRESS).write_text(json.dumps(asdict(progress)), encoding="utf-8")


def save_weights(
    final: Path, model: CausalLM, progress: Progress, *, dtype: str, weights: Mapping[str, Tensor] | None = None
) -> None:
    """A Hugging Face folder that replaces ``final``; its progress lies in it, so that another run can go on from it.

    ``weights`` as in `save_model`.
    """
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    part = final.with_name(f".{final.name}.new")
    shutil.rmtree(part, ignore_errors=True)
    save_model(model, part, dtype=dtype, weights=weights)
    write_progress(part, progress)
    if final.exists():
        os.replace(final, old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> bool:
    """Restore optimizer and random state; False if ``folder`` holds weights alone."""
    if not (folder / OPTIMIZER).exists():
        return False
    state: dict[str, Any] = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise TidarError(
            f"{folder} has the optimizer of other weights: go on from its model/ folder, which starts an empty one"
        ) from error
    torch.set_rng_state(state["rng"])
    return True


def _save_tensors(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's own words for a write that failed
        raise OSError(f"writing {path.name} failed ({str(error).splitlines()[0]})") from error


def write_manifest(folder: Path, digests: Mapping[str, Mapping[str, Any]]) -> None:
    """What the files of ``folder`` are to be."""
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")


def digests(folder: Path, rank: int = 0, size: int = 1) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file, of those that fall to ``rank`` of ``size`` who divide them."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)[rank::size]
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


def sync(path: Path) -> None:
    """Have ``path`` on the disk."""
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
