"""Draw what `tidar bench` recorded: steps against their floors, and the speed-up of whole decoding by method.

    python runs/plot_bench.py [--step FILE] [--decode FILE] [--out docs/figures/bench.png] [--tables]

Of every configuration the newest line counts, and nothing that was measured before the AR line that it is compared
with: a new run takes the place of a whole old one. The left panel shows single rows, greedy, of all models; the right
one the reference checkpoint at batch 1, the methods that were timed on as many prompts as AR. With --tables the tables
of docs/benchmarks.md are printed as well, baselines and batches included. Quantised weights are not drawn, and have
tables of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs.script import run
from tidar.errors import TidarError

ROOT = Path(__file__).resolve().parent.parent
GREY, BLUE, ORANGE, GREEN = "#8c8c8c", "#1f5fa8", "#d9822b", "#3a7d44"
REFERENCE = "python-17m"
STEP = ("model", "dtype", "weights", "adapter_rank", "step", "draft_len", "batch", "prefix", "sampled", "deterministic")
DECODE = ("model", "dtype", "weights", "method", "batch", "sampling", "prompt_tokens", "deterministic")
FORMER = {"draft_len": 16, "prompt_tokens": 256, "deterministic": False, "weights": None, "adapter_rank": 0}
"""What lines do not tell that were recorded before these could be chosen."""

Line = dict[str, Any]


def newest(path: Path, keys: Sequence[str]) -> list[Line]:
    """The newest line of each configuration, in the order in which configurations first appear; see above.

    Args:
        path: a file that `tidar bench --record` wrote.
        keys: what tells configurations apart.

    Raises:
        TidarError: no such file, or lines in it that are something else.
    """
    found: dict[str, Line] = {}
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = FORMER | json.loads(text)
            key = json.dumps([line[each] for each in keys], sort_keys=True)
            if key not in found or line["provenance"]["date"] >= found[key]["provenance"]["date"]:
                found[key] = line
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TidarError(f"cannot read {path} ({error!r}): name a file that `tidar bench --record` wrote") from error
    if not found:
        raise TidarError(f"{path} is empty: measure with runs/bench.sh first")
    return _of_last_runs(list(found.values()), keys)


def _of_last_runs(lines: Sequence[Line], keys: Sequence[str]) -> list[Line]:
    """Without those that are older than the AR line of their configuration, and of as many prompts."""
    name = next(key for key in keys if key in ("step", "method"))

    def run_of(line: Line) -> str:
        return json.dumps([*(line[key] for key in keys if key != name), line.get("prompts")], sort_keys=True)

    began = {run_of(line): line["provenance"]["date"] for line in lines if line[name] == "ar"}
    return [line for line in lines if line["provenance"]["date"] >= began.get(run_of(line), "")]


def usual(line: Line) -> bool:
    """Of drafts and prompts as long as ever, without adapters, and as fast as can be; whatever its weights."""
    return all(line[key] == FORMER[key] for key in ("draft_len", "prompt_tokens", "deterministic", "adapter_rank"))


def held_in(lines: Sequence[Line], weights: str | None) -> list[Line]:
    """Those whose weights are ``int8`` or ``fp8``, or in the model's dtype."""
    return [line for line in lines if line["weights"] == weights]


def series(steps: Sequence[Line]) -> dict[str, list[Line]]:
    """Single greedy rows, by model and prefix, in the order of their queries; the slowest model first."""
    found: dict[str, list[Line]] = {}
    for line in sorted(steps, key=lambda line: line["queries"]):
        if line["batch"] == 1 and not line["sampled"] and usual(line):
            found.setdefault(f"{line['model']}, prefix {line['prefix']}", []).append(line)
    return dict(sorted(found.items(), key=lambda each: -each[1][-1]["milliseconds"]))


def by_sampling(decoding: Sequence[Line], batch: int) -> dict[str, list[Line]]:
    """Lines of the reference checkpoint at a batch, under ``greedy`` or the sampling's name."""
    found: dict[str, list[Line]] = {}
    for line in decoding:
        if usual(line) and line["model"] == REFERENCE and line["batch"] == batch:
            sampling = line["sampling"]
            name = f"T = {sampling['temperature']}, top-p {sampling['top_p']}" if sampling else "greedy"
            found.setdefault(name, []).append(line)
    return found


def against_ar(lines: Sequence[Line]) -> list[Line]:
    """The methods that were timed on as many prompts as AR, without AR itself, the best first."""
    prompts = {line["prompts"] for line in lines if line["method"] == "ar"}
    kept = [line for line in lines if line["method"] != "ar" and line["prompts"] in prompts]
    return sorted(kept, key=lambda line: -line["speedup"])


def draw(steps: Sequence[Line], decoding: Sequence[Line], out: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained", width_ratios=(1.25, 1))
    curves = series(steps)
    for colour, (label, lines) in zip((GREEN, ORANGE, BLUE, GREY) * len(curves), curves.items(), strict=False):
        whole = [line for line in lines if line["step"] != "draft"]
        for drawn, key, style in ((whole, "milliseconds", "-"), (lines, "floor_milliseconds", ":")):
            left.plot([line["queries"] for line in drawn], [line[key] for line in drawn], color=colour, linestyle=style)
        for line in lines:
            face = "white" if line["step"] == "draft" else colour
            left.plot(line["queries"], line["milliseconds"], marker="o", markersize=5, color=colour, mfc=face)
        end = whole[-1]["queries"], whole[-1]["milliseconds"]
        left.annotate(
            label.replace(", ", "\n"), end, (8, 0), textcoords="offset points", color=colour, fontsize=9, va="center"
        )
    left.set_yscale("log")
    left.set(
        xlabel="queries of the step",
        ylabel="milliseconds",
        title="One step of one row, bf16",
        xlim=(-6, 1.3 * left.get_xlim()[1]),
    )
    longest = max((lines[-1]["queries"] for lines in curves.values()), default=1)
    left.set_xticks([1, *range(64, longest + 1, 64)])
    left.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    legend: tuple[dict[str, Any], ...] = (
        {"marker": "o", "label": "AR (1 query), check (16), check and draft (more)"},
        {"marker": "o", "linestyle": "", "mfc": "white", "label": "drafting step of two-forward decoding"},
        {"linestyle": ":", "label": "floor: bytes or operations at this GPU's measured rates"},
    )
    marks = [Line2D([], [], color=GREY, markersize=5, **each) for each in legend]
    left.legend(handles=marks, frameon=False, fontsize=8, loc=(0.02, 0.14))

    groups = {name: against_ar(lines) for name, lines in by_sampling(decoding, 1).items()}
    order = list(dict.fromkeys(line["method"] for lines in groups.values() for line in lines))
    for place, (colour, (name, lines)) in enumerate(zip((BLUE, ORANGE, GREEN) * 3, groups.items(), strict=False)):
        for line in lines:
            height = order.index(line["method"]) + (place - (len(groups) - 1) / 2) * 0.3
            low, high = line["speedup_95"]
            right.plot([low, high], [height, height], color=colour, linewidth=2, alpha=0.6, solid_capstyle="butt")
            right.plot(line["speedup"], height, marker="o", markersize=5, color=colour)
        right.plot([], [], color=colour, marker="o", markersize=5, label=name)
    right.axvline(1, color=GREY, linestyle="--", linewidth=1)
    right.set_yticks(range(len(order)), order)
    right.invert_yaxis()
    right.set_xlim(0, None)
    right.set(xlabel="tokens/s over AR's, with 95 % intervals", title=f"Decoding, {REFERENCE}, batch 1, bf16")
    right.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    figure.savefig(part, format="png", dpi=120, metadata={"Software": None}, pil_kwargs={"optimize": True})
    pyplot.close(figure)
    os.replace(part, out)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def speedup(line: Line) -> tuple[str, str]:
    """Speed-up and its interval; three digits where it is tiny."""
    digits = 3 if line["speedup"] < 0.1 else 2
    return f"{line['speedup']:.{digits}f}x", "–".join(f"{end:.{digits}f}" for end in line["speedup_95"])


def _cell(line: Line) -> str:
    over, interval = speedup(line)
    return f"{line['tokens_per_second']:,.0f}, {over} ({interval})"


def tables(steps: Sequence[Line], decoding: Sequence[Line]) -> Iterator[str]:
    """Markdown, each table behind a line that names it: steps, with adapters too, decoding at batch 1, greedy decoding
    in batches, and what the planner makes of each batch."""
    rows: list[tuple[Any, ...]]
    for name, lines in reversed(series(steps).items()):
        rows = [
            (
                line["step"],
                line["queries"],
                f"{line['milliseconds']:.3f}",
                f"{line['floor_milliseconds']:.3f}, {line['floor']['bound']}",
                f"{100 * line['share']:.1f} %",
                f"{line['over_ar']:.2f}",
            )
            for line in lines
        ]
        yield f"{name}\n\n" + table(("step", "queries", "ms", "floor, ms", "floor / time", "over AR"), rows)
    yield from adapters(steps)
    for name, lines in by_sampling(decoding, 1).items():
        rows = []
        for line in lines:
            # transformers does not tell how many forwards prompt lookup took
            told = "lookup" not in line["method"]
            per_step = f"{line['tokens_per_step']:.2f}", f"{line['milliseconds_per_step']:.3f}"
            rate = f"{line['tokens_per_second']:,.0f}"
            rows.append(
                (line["method"], rate, *speedup(line), *(per_step if told else ("", "")), line["identical_to_ar"])
            )
        head = ("method", "tokens/s", "over AR", "95 %", "tokens a step", "ms a step", "same as AR")
        yield f"batch 1, {name}\n\n" + table(head, rows)
    batches = sorted({line["batch"] for line in decoding} - {1})
    columns = {b: {line["method"]: line for line in by_sampling(decoding, b).get("greedy", [])} for b in batches}
    methods = list(dict.fromkeys(method for found in columns.values() for method in found))
    if methods:
        rows = []
        for method in methods:
            cells = [_cell(found[method]) if method in found else "" for found in columns.values()]
            rows.append((method, *cells))
        columns_of = [f"batch {b}: tokens/s, over AR (95 %)" for b in batches]
        yield "batches, greedy\n\n" + table(["method", *columns_of], rows)
    yield from planner(decoding)


def adapters(steps: Sequence[Line]) -> Iterator[str]:
    """Steps of each model with adapters beside those without."""
    found: dict[tuple[str, int], dict[int, dict[str, Line]]] = {}
    for line in steps:
        if line["batch"] == 1 and not line["sampled"] and usual({**line, "adapter_rank": 0}):
            of_model = found.setdefault((line["model"], line["prefix"]), {})
            of_model.setdefault(line["adapter_rank"], {})[line["step"]] = line
    for (model, prefix), by_rank in found.items():
        ranks = sorted(set(by_rank) - {0})
        if not ranks:
            continue
        rows = []
        for step, plain in sorted(by_rank.get(0, {}).items(), key=lambda each: each[1]["queries"]):
            if all(step in by_rank[rank] for rank in ranks):
                times = [f"{by_rank[rank][step]['milliseconds']:.3f}" for rank in ranks]
                rows.append((step, plain["queries"], f"{plain['milliseconds']:.3f}", *times))
        head = ("step", "queries", "ms without", *(f"ms, rank {rank}" for rank in ranks))
        yield f"adapters, {model}, prefix {prefix}\n\n" + table(head, rows)


def planner(decoding: Sequence[Line]) -> Iterator[str]:
    """The planner beside the best of the methods that were timed with it, for each sampling, prompt and batch."""
    found: dict[tuple[str, int, int], dict[str, Line]] = {}
    for line in decoding:
        if line["model"] == REFERENCE and usual({**line, "prompt_tokens": FORMER["prompt_tokens"]}):
            name = f"T = {line['sampling']['temperature']}" if line["sampling"] else "greedy"
            found.setdefault((name, line["prompt_tokens"], line["batch"]), {})[line["method"]] = line
    rows = []
    for (name, prompt, batch), methods in sorted(found.items()):
        if "auto" not in methods:
            continue
        auto = methods.pop("auto")
        timed = [line for line in methods.values() if line["provenance"]["command"] == auto["provenance"]["command"]]
        if not timed:
            continue
        fixed = max(timed, key=lambda line: line["tokens_per_second"])
        share = auto["tokens_per_second"] / fixed["tokens_per_second"]
        over, interval = speedup(auto)
        best = f"{fixed['method']}, {speedup(fixed)[0]}"
        rows.append((name, prompt, batch, best, f"{over} ({interval})", f"{share:.2f}"))
    if rows:
        head = ("sampling", "prompt", "batch", "best fixed, over AR", "auto over AR (95 %)", "auto / best fixed")
        yield "the planner\n\n" + table(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("step", "decode"):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / "results" / f"bench_{name}.jsonl")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "bench.png")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args(argv)
    matplotlib.use("agg")
    matplotlib.rcParams.update({"font.family": "sans-serif"})
    steps, decoding = newest(args.step, STEP), newest(args.decode, DECODE)
    draw(held_in(steps, None), held_in(decoding, None), args.out)
    if args.tables:
        for kind in [None, *sorted({line["weights"] for line in steps + decoding} - {None})]:
            found = tables(held_in(steps, kind), held_in(decoding, kind))
            print("\n".join(found if kind is None else (f"{kind} weights, {each}" for each in found)))
    print(f"{args.out}, {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    run(main)
