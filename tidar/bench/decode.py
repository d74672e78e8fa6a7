"""Tokens a second of whole decoding, by method: prompts in turn, all methods on each, the same tokens asked of all.

Time begins when the prompt has been computed and ends with the last token's arrival on the host; prefill is the same
for every method and is told apart. Baselines get what ours get: warmed, the same prompts, the same sampling.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tidar.config import SamplingParams
from tidar.decode.base import Decoder
from tidar.decode.plan import Plan, Shape, drafted, few
from tidar.decode.planner import Acceptance
from tidar.decode.policy import TOGETHER, Alternating, Autoregressive, Fixed, Planning, Policy
from tidar.errors import TidarError
from tidar.fast import obstacle
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import Engine
from tidar.model import CausalLM

__all__ = ["Outcome", "methods", "run"]


OTHERS = 2
"""Batches that other decoders are timed on."""


@dataclass
class Outcome:
    """What one method did."""

    seconds: list[float] = field(default_factory=list)
    """Of each batch."""
    tokens: list[int] = field(default_factory=list)
    """Of each batch, behind the first token of each row."""
    steps: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    accepted: Counter[int] = field(default_factory=Counter)
    """How many steps made so many tokens of a row certain."""
    taken: Counter[Shape] = field(default_factory=Counter)
    """How many steps had which shape, if the decoder tells."""


def methods(draft_len: int) -> dict[str, Callable[[], Policy]]:
    """Policies to compare: the autoregressive one first, the planner last, fixed choices between, the paper's own
    among them: the longest draft with all proposals."""
    k = draft_len
    found: dict[str, Callable[[], Policy]] = {"ar": Autoregressive}
    for plan in [Plan("tidar", k, k), *list(few(k))[1:]]:
        if plan.method == "linear":
            found[f"linear k={plan.draft_len}"] = lambda n=plan.draft_len: Alternating(n)  # type: ignore[misc]
        else:
            sizes = plan.draft_len, plan.proposals, plan.alternates
            found[f"tidar k={plan.draft_len}, {drafted(*sizes[1:])}"] = lambda sizes=sizes: Fixed(*sizes)  # type: ignore[misc]
    seen = Acceptance()  # as decoders of one model share it
    found["auto"] = lambda: Planning(k, list(few(k)), seen, every=TOGETHER)
    return found


def decode(
    decoder: Decoder, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], outcome: Outcome
) -> None:
    """One batch, to each row's last token; rows that are done leave it, as in `tidar.decode.generation`."""
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    with torch.inference_mode():
        new = decoder.prefill(prompts, params)
        torch.cuda.synchronize()
        begin, before = time.perf_counter(), decoder.forwards
        while True:
            for row, tokens in zip(going, new, strict=True):
                answers[row] += tokens
            left = [i for i, row in enumerate(going) if len(answers[row]) < params[row].max_new_tokens]
            if not left:
                break
            if len(left) < len(going):
                going = [going[i] for i in left]
                decoder.select(left)
            new = decoder.step()
            outcome.accepted.update(map(len, new))
        outcome.seconds.append(time.perf_counter() - begin)
        torch.cuda.synchronize()  # steps launched in vain must not run into the next one's time
        decoder.close()
    outcome.taken.update(getattr(decoder, "taken", {}))
    room = [each.max_new_tokens for each in params]
    outcome.steps.append(decoder.forwards - before)
    outcome.tokens.append(sum(room) - len(room))
    outcome.answers += [answer[:most] for answer, most in zip(answers, room, strict=True)]


def run(
    core: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    draft_len: int,
    batch: int = 1,
    new_tokens: int = 256,
    sampling: dict[str, float] | None = None,
    others: dict[str, Callable[[], Decoder]] | None = None,
    deterministic: bool = False,
) -> list[dict[str, Any]]:
    """One line a method: tokens a second (all tokens over all seconds), the speed-up over AR, split into tokens a step
    and cost of a step, with a 95 % interval of the speed-up from resampled batches, how often a step made 1, 2, …
    tokens of a row certain, and how many steps had which `Shape`.

    Args:
        core: a trained checkpoint on a GPU.
        prompts: token ids.
        draft_len: the longest draft.
        batch: prompts decoded together.
        new_tokens: of each; end-of-text tokens are passed over, so that every method makes as many.
        sampling: temperature and filters; greedy without. The seed is the prompt's number.
        others: further decoders, by name.
        deterministic: of ours, all decode so, AR too.

    Raises:
        TidarError: no GPU, or a model that the fast path does not take.
    """
    if (why := obstacle(core)) is not None:
        raise TidarError(f"decoding cannot be timed: {why}")
    engine = Engine(core, deterministic=deterministic)
    makers: dict[str, Callable[[], Decoder]] = {
        name: lambda made=made: FastDecoder(engine, made())  # type: ignore[misc]
        for name, made in methods(draft_len).items()
    }
    makers |= others or {}
    outcomes = {name: Outcome() for name in makers}
    slow = set(others or ())  # of these a few prompts tell enough
    batches = [range(first, min(first + batch, len(prompts))) for first in range(0, len(prompts), batch)]
    batches = [each for each in batches if len(each) == batch]
    # Rows of a batch end at times of their own and move to smaller batches, each with graphs of its own: what was not
    # met before would be compiled within the time.
    warm = batches if batch > 1 else batches[:1]
    for turn, members in enumerate([*warm, *batches], 1 - len(warm)):
        params = [
            SamplingParams(max_new_tokens=new_tokens, ignore_eos=True, seed=n, **(sampling or {}))  # type: ignore[arg-type]
            for n in members
        ]
        for name, make in makers.items():
            if name in slow and (turn > OTHERS or turn < 0):
                continue
            decode(make(), [prompts[n] for n in members], params, outcomes[name] if turn > 0 else Outcome())
    told: dict[str, Any] = {
        "batch": batch,
        "sampling": sampling,
        "prompt_tokens": max(map(len, prompts)),
        "deterministic": deterministic,
    }
    return [_line(core, name, outcomes[name], outcomes["ar"], **told) for name in makers]


def _line(
    core: CausalLM,
    name: str,
    mine: Outcome,
    ar: Outcome,
    *,
    batch: int,
    sampling: dict[str, float] | None,
    prompt_tokens: int,
    deterministic: bool,
) -> dict[str, Any]:
    count = len(mine.seconds)
    ar = Outcome(ar.seconds[:count], ar.tokens[:count], ar.steps[:count], ar.answers[: len(mine.answers)])
    low, high = _interval(mine, ar)
    same = sum(a == b for a, b in zip(mine.answers, ar.answers, strict=True))
    per_step = sum(mine.tokens) / sum(mine.steps) / batch
    step, ar_step = (sum(o.seconds) / sum(o.steps) for o in (mine, ar))
    rate, ar_rate = (sum(o.tokens) / sum(o.seconds) for o in (mine, ar))
    return {
        "model": Path(core.path).name,
        "dtype": str(core.dtype).removeprefix("torch."),
        "weights": core.weights,
        "method": name,
        "batch": batch,
        "sampling": sampling or {},
        "prompts": len(mine.answers),
        "tokens_per_second": round(rate, 1),
        "speedup": round(rate / ar_rate, 4),
        "speedup_95": [round(low, 4), round(high, 4)],
        "tokens_per_step": round(per_step, 4),  # of a batch's step, for each row that began
        "milliseconds_per_step": round(step * 1e3, 5),
        "step_over_ar": round(step / ar_step, 4),
        "median_seconds": round(median(mine.seconds), 5),
        "identical_to_ar": f"{same}/{len(mine.answers)}",
        "prompt_tokens": prompt_tokens,  # of each, at most
        "deterministic": deterministic,
        "shapes": [[*shape, times] for shape, times in mine.taken.most_common()],
        "accepted": [mine.accepted[n] for n in range(1, max(mine.accepted, default=0) + 1)],
    }


def _interval(mine: Outcome, ar: Outcome, draws: int = 1000) -> tuple[float, float]:
    """The middle 95 % of the speed-up over resampled batches, each with all methods' times (a paired bootstrap)."""
    picks = torch.randint(len(mine.seconds), (draws, len(mine.seconds)), generator=torch.Generator().manual_seed(0))

    def rates(outcome: Outcome) -> torch.Tensor:
        tokens, seconds = (torch.tensor(v, dtype=torch.float64) for v in (outcome.tokens, outcome.seconds))
        return tokens[picks].sum(1) / seconds[picks].sum(1)

    low, high = torch.quantile(rates(mine) / rates(ar), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
