"""Draw what `tidar bench step --parts` recorded, after Figure 1 of the paper (arXiv 2511.08923): how many tokens can a
forward compute before it takes notably longer than one?

    python runs/plot_parts.py [--parts FILE] [--out docs/figures/parts.png]

A panel each for all layers, their attention and their MLPs, by the time of one layer; a line for each length of the
cached prefix. The newest line of a prefix and number of queries counts.
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
COLOURS = "#9fc3e7", "#4b8bc8", "#1f5fa8", "#12365f"
PANELS = {"total": "all layers", "attention": "attention, with its projections", "mlp": "MLP"}

Line = dict[str, Any]


def curves(path: Path) -> tuple[Line, dict[int, list[Line]]]:
    """A line that says what was measured, and the newest lines by prefix, in the order of their queries.

    Raises:
        TidarError: no such file, lines that are something else, or of several models.
    """
    found: dict[tuple[int, int], Line] = {}
    try:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            assert all(f"{panel}_milliseconds" in line for panel in PANELS)
            found[line["prefix"], line["queries"]] = line
        [_] = {(line["model"], line["layers"]) for line in found.values()}
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise TidarError(
            f"cannot draw {path} ({error!r}): name a file that `tidar bench step --parts --record` wrote of one model"
        ) from error
    kept: dict[int, list[Line]] = {}
    for (prefix, _), line in sorted(found.items()):
        kept.setdefault(prefix, []).append(line)
    return line, kept


def draw(about: Line, lines: dict[int, list[Line]], out: Path) -> None:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(PANELS), figsize=(11, 3.6), layout="constrained", sharex=True)
    for panel, (part, title) in zip(panels, PANELS.items(), strict=True):
        for colour, (prefix, each) in zip(COLOURS * len(lines), lines.items(), strict=False):
            times = [line[f"{part}_milliseconds"] / line["layers"] for line in each]
            queries = [line["queries"] for line in each]
            panel.plot(queries, times, marker="o", markersize=3, color=colour, label=f"prefix {prefix}")
        panel.set(title=title, xlabel="queries of the forward", ylim=(0, None))
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("milliseconds a layer")
    panels[0].legend(frameon=False)
    what = f"{about['model']}'s shape, {about['layers']} layers, {about['dtype']}, one row"
    figure.suptitle(f"{what}, one {about['provenance']['gpu']}", size=10)
    save_figure(figure, out)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=Path, default=ROOT / "results" / "bench_parts.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "parts.png")
    args = parser.parse_args(argv)
    matplotlib.use("Agg")
    draw(*curves(args.parts), args.out)


if __name__ == "__main__":
    run(main)
