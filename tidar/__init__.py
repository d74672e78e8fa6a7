"""TiDAR: think in diffusion, talk in autoregression.

    import tidar

    model = tidar.load()
    [done] = model.generate("def fibonacci(n):", tidar.SamplingParams(max_new_tokens=64))
    print(done.text, done.tokens_per_forward)

Names are looked up on first use, so that ``import tidar`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tidar.api import Model, load
    from tidar.config import SamplingParams
    from tidar.decode.generation import Chunk, Completion
    from tidar.errors import TidarError

__all__ = ["Chunk", "Completion", "Model", "SamplingParams", "TidarError", "load"]

_HOME = {
    "Chunk": "tidar.decode.generation",
    "Completion": "tidar.decode.generation",
    "Model": "tidar.api",
    "SamplingParams": "tidar.config",
    "TidarError": "tidar.errors",
    "load": "tidar.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
