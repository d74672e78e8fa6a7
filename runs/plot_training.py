"""Draw the training curves: quality, tokens per forward, and one against the other.

    python runs/plot_training.py [--base FILE] [--tidar FILE ...] [--control FILE] [--out docs/figures/curves.svg]

The files are metrics.jsonl of the autoregressive base, of TiDAR's runs from it, each going on from the one before, and
of the control that went on autoregressively. Tokens are clean tokens after the base, which is drawn up to 0. Tokens per
forward are those that validation estimates on held-out text.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs.script import run, save_figure
from tidar.errors import TidarError

ROOT = Path(__file__).resolve().parent.parent
GREY, BLUE, ORANGE = "#8c8c8c", "#1f5fa8", "#d9822b"
RATE = "tokens_per_forward_"


def validations(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that validation wrote.

    Raises:
        TidarError: no such file, or no such line in it.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise TidarError(f"cannot read {path} ({error}): name the metrics.jsonl of a run") from error
    found = [line for line in lines if "bits_per_byte" in line]
    if not found:
        raise TidarError(f"{path} has no validation: train with a hold-out and eval_every > 0")
    return found


def one_after_another(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The validations of runs that went on from each other, their tokens counted from the first."""
    joined: list[dict[str, Any]] = []
    for path in paths:
        before = joined[-1]["tokens"] if joined else 0
        joined += [{**line, "tokens": line["tokens"] + before} for line in validations(path)]
    return joined


def draw(base: list[dict[str, Any]], tidar: list[dict[str, Any]], control: list[dict[str, Any]], out: Path) -> None:
    from matplotlib import pyplot

    figure, (quality, speed, trade) = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    end = base[-1]["tokens"]
    curves = [("AR base", base, GREY, end), ("AR control", control, ORANGE, 0), ("TiDAR", tidar, BLUE, 0)]
    for label, lines, colour, shift in curves:
        millions = [(line["tokens"] - shift) / 1e6 for line in lines]
        quality.plot(millions, [line["bits_per_byte"] for line in lines], color=colour, label=label, marker=".")
    after = [line["bits_per_byte"] for line in [*tidar, *control, base[-1]]]
    room = max(after) - min(after) or 0.1 * max(after)
    quality.set_ylim(min(after) - 0.1 * room, max(after) + 0.5 * room)  # the base began far above
    quality.set(xlabel="clean tokens after the base (millions)", ylabel="AR bits per byte, held-out")

    sizes = sorted(int(key.removeprefix(RATE)) for key in tidar[-1] if key.startswith(RATE))
    for place, k in enumerate(sizes, 1):
        shade = pyplot.get_cmap("Blues")(0.3 + 0.7 * place / len(sizes))
        rates = [line[f"{RATE}{k}"] for line in tidar]
        speed.plot([line["tokens"] / 1e6 for line in tidar], rates, color=shade, label=f"k = {k}", marker=".")
        trade.plot([line["bits_per_byte"] for line in tidar], rates, color=shade, label=f"k = {k}", marker=".")
    speed.set(xlabel="clean tokens (millions)", ylabel="tokens per forward (estimate)")
    trade.axvline(control[-1]["bits_per_byte"], color=ORANGE, linestyle="--", label="AR control at its end")
    trade.set(xlabel="AR bits per byte, held-out", ylabel="tokens per forward (estimate)")
    for axes in (quality, speed, trade):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = ROOT / "results"
    for name in ("base", "control"):
        parser.add_argument(f"--{name}", type=Path, default=results / f"metrics_{name}.jsonl")
    runs = [results / f"metrics_{name}.jsonl" for name in ("tidar", "rollout")]
    parser.add_argument("--tidar", type=Path, nargs="+", default=runs)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "curves.svg")
    args = parser.parse_args(argv)
    # The same bytes every time, and text as text.
    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "tidar", "svg.fonttype": "none", "font.family": "sans-serif"})
    draw(validations(args.base), one_after_another(args.tidar), validations(args.control), args.out)
    print(f"{args.out}, {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run(main)
