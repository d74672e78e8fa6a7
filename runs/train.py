"""Train a recipe without the command line's dependencies, as on a bare GPU machine.

    python runs/train.py RECIPE [--set name=value ...] [--resume] [--continue-from FOLDER]

Same as `tidar train`. A value is TOML: tokens=200_000_000, block_sizes=[4,8,16], data.sources=["corpus"], out=run/x (a
string needs no quotes).
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs.script import run
from tidar.provenance import record
from tidar.recipes import load_recipe


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], type=setting, metavar="NAME=VALUE", dest="changes")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--continue-from", default="", metavar="FOLDER")
    args = parser.parse_args()
    config = load_recipe(args.recipe, dict(args.changes))
    from tidar.train.trainer import train

    result = train(config, resume=args.resume, continue_from=args.continue_from)
    record(Path(config.out) / "runs.jsonl", {"recipe": args.recipe, "step": result.step, "config": asdict(config)})
    print(f"{result.tokens:,} tokens in {result.step:,} steps; model: {result.model or 'not finished'}")


if __name__ == "__main__":
    run(main)
