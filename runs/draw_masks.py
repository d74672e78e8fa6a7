"""Draw the masks of the documentation from the layouts that the code runs on.

python runs/draw_masks.py [--out docs/figures]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import torch

# Runs from a checkout that is not installed, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tidar import layout
from tidar.mask import picture

K = 3
CELL = 0.24  # inches


def pictures() -> dict[str, tuple[layout.Layout, list[str]]]:
    """Layouts by name, and a label for each of their key slots; a mask is named by what it predicts."""
    documents = ("ABCDE", "PQRS")
    lengths = torch.tensor([len(d) for d in documents])
    ends = lengths.cumsum(0)
    starts, ends = ((ends - lengths).repeat_interleave(lengths), ends.repeat_interleave(lengths))
    text = list("".join(documents))
    steps = [f"{p}?" for n in range(1, K + 1) for p in range(3 + n, 3 + n + K)]
    return {
        "training": (layout.training(starts[None], ends[None], K), text + [f"{c}?" for c in text]),
        "prefill": (layout.prefill([3], K), ["A", "B", "C", *(f"{3 + i}?" for i in range(K))]),
        "step": (layout.step([3], K), [*"ABCDEF", *steps]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "docs" / "figures")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    # The same bytes every time, and text as text.
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "tidar", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib import pyplot

    for name, (plan, labels) in pictures().items():
        size = (CELL * (len(labels) + 2), CELL * (plan.queries + 2))
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        picture(plan, labels, axes)
        for side in axes.spines.values():
            side.set_visible(False)
        figure.savefig(out / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


if __name__ == "__main__":
    main()
