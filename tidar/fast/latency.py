"""What steps take on this GPU: measured once, then read from a file."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from tidar.decode import plan
from tidar.decode.plan import Shape
from tidar.fast import timing
from tidar.kernels import hopper_tiles, product_tiles, workspace
from tidar.model import CausalLM
from tidar.provenance import versions

__all__ = ["Latency", "folder"]

RULES = hashlib.sha256(
    "".join(map(inspect.getsource, (hopper_tiles, product_tiles, workspace, timing, plan))).encode()
).hexdigest()[:16]
"""Of what chooses the kernels' tiles, of how time is taken, and of what a shape means."""


def folder() -> Path:
    """Where tables are kept: TIDAR_CACHE, or ``tidar`` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TIDAR_CACHE") or Path(home) / "tidar")


class Latency:
    """Seconds of steps by shape, for each kind of batch; a file for each GPU, model size, dtype and set of versions.

    A file that cannot be read or written is done without: then steps are measured once in each process. Other rules for
    the kernels' tiles are another version.
    """

    def __init__(self, core: CausalLM) -> None:
        config = core.hf.config.to_dict()
        sizes = {k: v for k, v in sorted(config.items()) if isinstance(v, int | bool)}
        gpu = torch.cuda.get_device_name(core.device) if core.device.type == "cuda" else platform.processor()
        identity = [gpu, config["model_type"], sizes, str(core.dtype), core.weights, versions(), RULES]
        if core.transition is not None:
            identity.append(core.transition.state.out_features)
        if core.adapters is not None:
            spec = core.adapters.spec
            identity.append([spec.rank, *spec.modules])
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.path = folder() / f"latency-{name}.json"
        self._identity = identity
        self._table: dict[str, dict[Shape, float]] | None = None

    def get(self, key: str) -> dict[Shape, float]:
        """What is known of this kind of batch."""
        if self._table is None:
            try:
                kept = json.loads(self.path.read_text())["steps"]
                self._table = {k: {_shape(*shape): float(s) for *shape, s in each} for k, each in kept.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                self._table = {}
        return self._table.get(key, {})

    def keep(self, key: str, seconds: Mapping[Shape, float]) -> None:
        """Note it, here and in the file."""
        table = {**(self._table or {}), key: {**self.get(key), **seconds}}
        self._table = table
        steps = {k: [[*shape, s] for shape, s in each.items()] for k, each in table.items()}
        text = json.dumps({"measured": self._identity, "steps": steps})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, self.path)
        except OSError:
            pass


def _shape(drafts: int, proposals: int, masks: int, alternates: int) -> Shape:
    return Shape(int(drafts), int(proposals), int(masks), int(alternates))
