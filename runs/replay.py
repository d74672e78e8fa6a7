"""What random-weight shapes would gain, by recorded acceptance: the best draft length and proposals for each.

    python runs/replay.py [--step FILE] [--decode FILE]

A model of random weights accepts nothing, but its steps take the time that trained ones would. So the times of
`tidar bench step` are joined with acceptance recorded elsewhere: how often the draft at each offset stood when the
reference checkpoint decoded held-out files with all proposals (``accepted`` in `tidar bench decode`'s lines), or one
constant rate that gives the tokens per forward that the paper reports for its own model of that size. The tokens a step
then commits follow by the planner's arithmetic (`tidar.decode.planner.tokens_per_step`), which decoding itself is
checked against here: both stand side by side for the reference checkpoint. How often fewer proposals cover what comes
is not recorded: what the planner supposes stands for it. One row; the newest lines count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runs.plot_bench import DECODE, FORMER, REFERENCE, ROOT, STEP, held_in, newest, table
from runs.script import run
from tidar.decode.plan import AR, Plan
from tidar.decode.planner import TAIL, Acceptance, Rates, tokens_per_step
from tidar.errors import TidarError

PAPER = {"qwen2.5-1.5b": 7.45, "qwen3-8b": 8.25}
"""Tokens per forward that the paper reports for its models of these sizes (arXiv 2511.08923, table 2), drafts of 16."""

Line = dict[str, Any]


def computed(plan: Plan, rates: Rates) -> float:
    """Tokens a step."""
    return float(tokens_per_step((plan,), rates, Acceptance().cover((plan,)))[0])


def recorded(line: Line) -> Rates:
    """Acceptance of a line of decoding with all proposals, whose drafts are fresh in nearly all steps; tails are taken
    to be worth what the planner supposes before it has seen any."""
    counts = np.array(line["accepted"], dtype=np.float64)
    reached = counts[::-1].cumsum()[::-1]  # steps that accepted the draft at each offset
    return _rates(reached[1:] / reached[:-1])


def constant(tokens: float, draft_len: int) -> Rates:
    """The one rate at all offsets that commits so many tokens a step with all proposals."""
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        made = computed(Plan("tidar", draft_len, draft_len), _flat(middle, draft_len))
        low, high = (middle, high) if made < tokens else (low, middle)
    return _flat(low, draft_len)


def _flat(rate: float, draft_len: int) -> Rates:
    return _rates(np.full(draft_len - 1, rate))


def _rates(fresh: NDArray[np.float64]) -> Rates:
    return np.insert(np.stack([fresh, fresh, TAIL * fresh]), 0, 1.0, axis=1)


def plans(lines: Sequence[Line]) -> Iterator[tuple[Plan, float]]:
    """What the steps of one model can be put together to, and milliseconds of a step on average."""
    times = {(line["draft_len"], line["step"]): line["milliseconds"] for line in lines}
    for (k, step), milliseconds in times.items():
        if step == "ar":
            yield AR, milliseconds
        elif step == "verify":
            yield Plan("linear", k), (milliseconds + times[k, "draft"]) / 2
        elif step.startswith("tidar") and "alternate" not in step:  # what they are worth is not recorded
            count = int(step.split()[1]) if "," in step else k
            yield Plan("tidar", k, count), milliseconds


def best(lines: Sequence[Line], rates: Rates) -> tuple[Plan, float, float, float]:
    """The plan with the most tokens a second: it, tokens a step, its step over AR's, and its speed-up over AR."""
    ar = min(line["milliseconds"] for line in lines if line["step"] == "ar")
    found = ((plan, computed(plan, rates), time / ar) for plan, time in plans(lines))
    plan, tokens, cost = max(found, key=lambda each: each[1] / each[2])
    return plan, tokens, cost, tokens / cost


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("step", "decode"):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / "results" / f"bench_{name}.jsonl")
    args = parser.parse_args(argv)
    steps = [
        line
        for line in newest(args.step, STEP)
        if line["batch"] == 1 and not line["sampled"] and not line["adapter_rank"]
    ]
    decoded = [line for line in newest(args.decode, DECODE) if line["model"] == REFERENCE and line["batch"] == 1]
    decoded = [line for line in decoded if line["prompt_tokens"] == FORMER["prompt_tokens"] and line.get("accepted")]
    steps, decoded = ([n for n in held_in(lines, None) if not n["deterministic"]] for lines in (steps, decoded))
    full = [line for line in decoded if line["method"] == "tidar k=16, 16 proposals"]
    if not full:
        raise TidarError(f"{args.decode} records no acceptance: run `tidar bench decode --record` first")

    rows = []
    for line in full:
        name, rates = "greedy" if not line["sampling"] else f"T = {line['sampling']['temperature']}", recorded(line)
        for other in decoded:
            method = other["method"].replace(",", "").split()
            told = method[0] in ("tidar", "linear") and "alternate" not in other["method"]
            if other["sampling"] == line["sampling"] and told:
                k = int(method[1].removeprefix("k="))
                plan = Plan(method[0], k, int(method[2]) if method[0] == "tidar" else 0)
                made = f"{computed(plan, rates):.2f}"
                rows.append((name, other["method"], f"{other['tokens_per_step']:.2f}", made))
    print("the arithmetic against decoding\n\n" + table(("sampling", "method", "decoded", "computed"), rows))

    found: list[tuple[str, ...]] = []
    for model in PAPER:
        lines = [line for line in steps if line["model"] == model]
        if not lines:
            raise TidarError(f"{args.step} has no steps of {model}: run `tidar bench step --size {model} --record`")
        sources = [
            (f"recorded, {'greedy' if not each['sampling'] else 'T = 0.8, top-p 0.95'}", recorded(each))
            for each in full
        ]
        sources.append((f"{PAPER[model]} tokens per forward, as the paper's", constant(PAPER[model], 16)))
        for source, rates in sources:
            plan, tokens, cost, gain = best(lines, rates)
            what = f"{plan.method}, k = {plan.draft_len}" + f", {plan.proposals} proposals" * bool(plan.proposals)
            found.append((model, source, what, f"{tokens:.2f}", f"{cost:.2f}", f"{gain:.2f}x"))
    print(
        "\nthe best of each\n\n"
        + table(("model", "acceptance", "best", "tokens a step", "step over AR", "over AR"), found)
    )


if __name__ == "__main__":
    run(main)
