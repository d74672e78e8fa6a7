"""``tidar demo``: the same text from AR and from TiDAR, side by side, timed on this machine.

Both methods run through the same code on the same prompts, one prompt at a time. Draft lengths are tried first, on
prompts of their own. The timed runs print nothing, take turns, and count by their median.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tidar.api import Method, Model
from tidar.config import SamplingParams
from tidar.decode.generation import Completion
from tidar.decode.plan import few
from tidar.terminal import Shown, show

__all__ = ["run"]

PARAMS = SamplingParams(max_new_tokens=96)
REPEATS = 3
HEATS = (32, 96)  # new tokens; the four best of a heat go on to the next
METHODS: tuple[Method, Method] = ("ar", "tidar")
NAMES = {"ar": "AR", "tidar": "TiDAR"}

# No prompt ends with a line end: the tokenizer joins one to the indentation behind it, which is the model's to choose.
TRIAL_PROMPTS = (
    '''def read_lines(path, encoding="utf-8"):
    """Return the lines of a text file without their line ends."""''',
    '''class Stack:
    """A last-in, first-out container."""

    def __init__(self):
        self._items = []''',
)

PROMPTS = (
    '''class Point:
    """A point in the plane."""

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __repr__(self):''',
    '''import os


def find_files(root, suffix):
    """Yield the path of every file below root whose name ends with suffix."""''',
    '''import argparse


def build_parser():
    """Return the command line parser of this script."""''',
    '''import json
from pathlib import Path


class Config:
    """Settings kept in a JSON file."""

    def __init__(self, path):''',
    """import asyncio


class Server:
    def __init__(self, host, port):
        self.host = host
        self.port = port

    async def start(self):""",
)


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """How TiDAR drafts; it changes the speed, never the text."""

    draft_len: int
    proposals: int
    alternates: int = 0

    def __str__(self) -> str:
        count = "all" if self.proposals == self.draft_len else self.proposals
        also = f", alternates {self.alternates}" if self.alternates else ""
        return f"draft length {self.draft_len}, proposals {count}{also}"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One method over all prompts: the answers, and the median seconds each took."""

    answers: list[Completion]
    seconds: list[float]

    @property
    def tokens_per_second(self) -> float:
        return sum(len(a.token_ids) for a in self.answers) / sum(self.seconds)

    @property
    def tokens_per_forward(self) -> float:
        return sum(len(a.token_ids) for a in self.answers) / sum(a.forwards for a in self.answers)


def run(
    model: Model, *, as_json: bool = False, shown: int = len(PROMPTS), console: Console | None = None
) -> dict[str, Any]:
    """Show, measure and compare; print the numbers as a table or as one JSON object.

    Args:
        model: what to compare on.
        as_json: print nothing but the numbers.
        shown: how many of the prompts to stream; all are measured.
        console: where to print.

    Returns:
        What ``tidar demo --json`` prints.
    """
    console = console or Console(quiet=as_json, highlight=False)
    name = Path(model.core.path).name
    console.print(f"{name} on {model.core.device}; trying draft lengths …", style="dim", markup=False)
    drafting = fastest(model)
    console.print(f"fastest here: {drafting}\n", style="dim")
    if not as_json:
        for prompt in PROMPTS[:shown]:
            _show(console, model, prompt, drafting)
        console.print("timing both, without printing …", style="dim")
    ar, tidar = compare(model, PROMPTS, drafting)
    same = [a.token_ids == t.token_ids for a, t in zip(ar.answers, tidar.answers, strict=True)]
    numbers = {
        "identical": all(same),
        "tokens_per_forward": tidar.tokens_per_forward,
        "ar_tokens_per_second": ar.tokens_per_second,
        "tidar_tokens_per_second": tidar.tokens_per_second,
        "speedup": tidar.tokens_per_second / ar.tokens_per_second,
        "draft_len": drafting.draft_len,
        "proposals": drafting.proposals,
        "alternates": drafting.alternates,
    }
    if as_json:
        print(json.dumps(numbers))
        return numbers
    table = Table(title=f"{len(PROMPTS)} prompts, greedy, batch 1, median of {REPEATS} runs")
    for heading in ("", "tokens per forward", "tokens/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, timing in (("AR", ar), (f"TiDAR, {drafting}", tidar)):
        table.add_row(name, f"{timing.tokens_per_forward:.2f}", f"{timing.tokens_per_second:.1f}")
    console.print(table)
    console.print(f"same tokens: [bold]{'yes' if all(same) else 'no'}[/] ({sum(same)} of {len(same)} prompts)")
    console.print(f"speed-up:    [bold]{numbers['speedup']:.2f}x[/]")
    return numbers


def candidates(longest: int, *, captured: bool = False) -> Iterator[Drafting]:
    """Draft lengths up to ``longest``, each with few proposals, or with all, and with alternates.

    Every proposal costs k queries: nearly free on a GPU, dear on a CPU. Where steps are captured each kind of step has
    to be compiled first, so there are few.
    """
    if captured:
        for plan in few(longest):
            if plan.method == "tidar":
                yield Drafting(draft_len=plan.draft_len, proposals=plan.proposals, alternates=plan.alternates)
        return
    for k in sorted({k for k in (2, 3, 4, 6, 8, 12, 16) if k <= longest} | {longest}):
        for count in sorted({1, 2, 3, k} if k <= 8 else {1, 2, 3}):
            if count <= k:
                yield Drafting(draft_len=k, proposals=count)
        if 4 <= k <= 8:
            yield Drafting(draft_len=k, proposals=2, alternates=4)


def fastest(model: Model) -> Drafting:
    """The candidate with the most tokens a second on the trial prompts."""
    for method in METHODS:  # warms up
        model.generate(TRIAL_PROMPTS[0], SamplingParams(max_new_tokens=16), method=method)
    field = list(candidates(model.draft_len, captured=model.fast))
    if model.fast:
        for drafting in field:
            _timed(model, TRIAL_PROMPTS[0], SamplingParams(max_new_tokens=2), "tidar", drafting)  # compiles
    for tokens in HEATS:
        params = SamplingParams(max_new_tokens=tokens)

        def seconds_per_token(drafting: Drafting, params: SamplingParams = params) -> float:
            runs = [_timed(model, prompt, params, "tidar", drafting) for prompt in TRIAL_PROMPTS]
            return sum(seconds for _, seconds in runs) / sum(len(answer.token_ids) for answer, _ in runs)

        field = sorted(field, key=seconds_per_token)[:4]
    return field[0]


def compare(model: Model, prompts: Sequence[str], drafting: Drafting) -> tuple[Timing, Timing]:
    """AR and TiDAR over ``prompts``, taking turns, so that a machine that slows down slows both."""
    answers: dict[str, list[Completion]] = {}
    seconds: dict[str, list[list[float]]] = {m: [[] for _ in prompts] for m in METHODS}
    for method in METHODS:  # also warms up
        answers[method] = [_timed(model, p, PARAMS, method, drafting)[0] for p in prompts]
    for turn in range(REPEATS):
        for number, prompt in enumerate(prompts):
            for method in METHODS if turn % 2 == 0 else METHODS[::-1]:
                seconds[method][number].append(_timed(model, prompt, PARAMS, method, drafting)[1])
    ar, tidar = (Timing(answers=answers[m], seconds=[median(s) for s in seconds[m]]) for m in METHODS)
    return ar, tidar


def _timed(
    model: Model, prompt: str, params: SamplingParams, method: Method, drafting: Drafting
) -> tuple[Completion, float]:
    # Answers are lists on the host, so the device has finished when `generate` returns.
    begin = time.perf_counter()
    [answer] = model.generate(prompt, params, method=method, **_options(method, drafting))
    return answer, time.perf_counter() - begin


def _options(method: Method, drafting: Drafting) -> dict[str, Any]:
    return vars(drafting) if method == "tidar" else {}


def _show(console: Console, model: Model, prompt: str, drafting: Drafting) -> None:
    """Stream both answers; the tokens that one forward committed share a colour."""
    for method in METHODS:
        console.rule(f"[bold]{NAMES[method]}", align="left", style="dim")
        console.print(Text(prompt, style="dim"), end="")
        shown = Shown()
        show(console, model.stream(prompt, PARAMS, method=method, **_options(method, drafting)), shown)
        console.print(f"{shown}\n", style="dim")
