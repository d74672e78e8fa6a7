"""What a measurement prints: a table to read, and a last line of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tidar.provenance import provenance

__all__ = ["decoding", "parts", "steps"]


def steps(lines: Sequence[dict[str, Any]], record: str | None) -> None:
    """Of `tidar.bench.step.run`."""
    rates = lines[0]["rates"]
    print(
        f"memory {rates['bandwidth'] / 1e12:.2f} TB/s, matrix products {rates['matmul'] / 1e12:.0f} TFLOP/s, measured"
    )
    print(
        f"{'batch':>5} {'prefix':>6} {'k':>3} {'step':20} {'queries':>7} {'ms':>9} {'floor ms':>9} {'share':>6} "
        f"{'over AR':>8}"
    )
    for line in lines:
        print(
            f"{line['batch']:5} {line['prefix']:6} {line['draft_len']:3} {line['step']:20} {line['queries']:7} "
            f"{line['milliseconds']:9.4f} "
            f"{line['floor_milliseconds']:9.4f} {line['share']:6.1%} {line['over_ar']:7.2f}x"
        )
    _end(lines, record)


def parts(lines: Sequence[dict[str, Any]], record: str | None) -> None:
    """Of `tidar.bench.parts.run`."""
    print(f"{'prefix':>6} {'queries':>7} {'total ms':>9} {'attention':>9} {'mlp':>9}")
    for line in lines:
        times = (line[f"{part}_milliseconds"] for part in ("total", "attention", "mlp"))
        print(f"{line['prefix']:6} {line['queries']:7} " + " ".join(f"{time:9.4f}" for time in times))
    _end(lines, record)


def decoding(lines: Sequence[dict[str, Any]], record: str | None) -> None:
    """Of `tidar.bench.decode.run`."""
    head = f"{'batch':>5} {'method':28} {'tokens/s':>9} {'speed-up':>8} {'95 %':>13}"
    print(f"{head} = {'tokens/step':>11} / {'step cost':>9}")
    for line in lines:
        low, high = line["speedup_95"]
        print(
            f"{line['batch']:5} {line['method']:28} {line['tokens_per_second']:9.0f} {line['speedup']:7.2f}x "
            f"{low:6.2f}-{high:6.2f} = {line['tokens_per_step']:11.2f} / {line['step_over_ar']:8.2f}x"
        )
    _end(lines, record)


def _end(lines: Sequence[dict[str, Any]], record: str | None) -> None:
    source = provenance()
    if record is not None:
        with Path(record).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**line, "provenance": source}) + "\n" for line in lines)
    sys.stdout.write(json.dumps({"lines": lines, "provenance": source}) + "\n")
