"""Run the demo; keep what it showed as the picture of the README, and its numbers in results/demo.jsonl.

python runs/draw_demo.py [--model FOLDER] [--out docs/figures/demo.svg]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from rich.console import Console

# Runs from a checkout that is not installed, too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tidar
from tidar import demo
from tidar.provenance import record

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "demo.svg")
    args = parser.parse_args()
    console = Console(record=True, width=100, highlight=False, force_terminal=True)
    numbers = demo.run(tidar.load(args.model, device="cpu"), shown=1, console=console)
    record(ROOT / "results" / "demo.jsonl", numbers)
    svg = console.export_svg(title="make demo", unique_id="demo").replace(f"{ROOT}/", "")
    # The default style loads its font from elsewhere; any monospace font will do.
    args.out.write_text(re.sub(r"@font-face \{.*?\}\n?", "", svg, flags=re.DOTALL))


if __name__ == "__main__":
    main()
