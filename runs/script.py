"""What the scripts here have in common: a user's mistake is one line, a figure is whole or absent."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tidar.errors import TidarError

__all__ = ["run", "save_figure"]


def run(main: Callable[[], int | None]) -> None:
    """``main`` as a program: it ends with what ``main`` returns, or with 2 and the error's line."""
    try:
        sys.exit(main())
    except TidarError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def save_figure(figure: Any, out: Path) -> None:
    """Write a matplotlib figure in the format of ``out``'s suffix, the same bytes for the same figure, and close it."""
    from matplotlib import pyplot

    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    figure.savefig(part, format=out.suffix[1:], metadata={"Date": None} if out.suffix == ".svg" else None)
    pyplot.close(figure)
    os.replace(part, out)
