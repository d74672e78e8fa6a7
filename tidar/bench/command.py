"""`tidar bench`: its flags; what measures is imported when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg, subcommand

from tidar.errors import TidarError

__all__ = ["Bench", "BenchDecode", "BenchStep"]


@dataclass(frozen=True, kw_only=True)
class BenchStep:
    """Time single steps, by what they feed, behind a prefix, against the floors of this GPU."""

    model: Annotated[str | None, arg(metavar="FOLDER|HUB-ID")] = None
    """Checkpoint; by default the one that comes with the package."""
    size: Annotated[str | None, arg(metavar="NAME")] = None
    """Random weights instead: qwen2.5-1.5b, qwen3-8b or qwen3-32b."""
    layers: Annotated[int | None, arg(metavar="N")] = None
    """Of `size`, this many layers only."""
    dtype: Annotated[str, arg(metavar="bfloat16|float16|float32")] = "bfloat16"
    """Of the weights."""
    weights: Annotated[str | None, arg(metavar="int8|fp8")] = None
    """Hold projections and head in one byte a number, whatever `dtype`."""
    adapter_rank: int = 0
    """With random adapters of masks of this rank, beside every linear layer."""
    draft_len: tuple[int, ...] = (16,)
    """Drafts a step."""
    prefix: tuple[int, ...] = (1024,)
    """Committed tokens of each row."""
    batch: tuple[int, ...] = (1,)
    """Rows."""
    sampled: bool = False
    """With temperature and top-p, instead of greedy."""
    deterministic: bool = False
    """As in `tidar generate`."""
    parts: bool = False
    """Instead: layers alone, and their attention and MLPs, for 1 to 512 queries of one row (the paper's Figure 1)."""
    record: Annotated[str | None, arg(metavar="FILE")] = None
    """Append each line, with what it was measured with, to this .jsonl file."""

    def run(self) -> None:
        from tidar.bench import parts, report, step

        core = step.model_of(self.model, self.size, self.layers, self.dtype, self.weights)
        if self.adapter_rank:
            step.add_adapters(core, self.adapter_rank)
        if self.parts:
            report.parts(parts.run(core, prefixes=self.prefix), self.record)
            return
        lines = step.run(
            core,
            draft_lens=self.draft_len,
            prefixes=self.prefix,
            rows=self.batch,
            sampled=self.sampled,
            deterministic=self.deterministic,
        )
        report.steps(lines, self.record)


@dataclass(frozen=True, kw_only=True)
class BenchDecode:
    """Time whole decoding, by method, on real prompts, against autoregressive decoding."""

    model: Annotated[str | None, arg(metavar="FOLDER|HUB-ID")] = None
    """Checkpoint; by default the one that comes with the package."""
    prompts: Annotated[str | None, arg(metavar="FILE")] = None
    """Texts, one JSON string a line; by default those of the demo."""
    prompt_tokens: int = 256
    """Of each, at most."""
    count: int = 32
    """Prompts, at most."""
    new_tokens: int = 256
    """Of each answer."""
    dtype: Annotated[str, arg(metavar="bfloat16|float16|float32")] = "bfloat16"
    """Of the weights."""
    weights: Annotated[str | None, arg(metavar="int8|fp8")] = None
    """Hold projections and head in one byte a number, whatever `dtype`."""
    draft_len: Annotated[int | None, arg(metavar="K")] = None
    """Longest draft; by default the longest the model was trained for."""
    batch: tuple[int, ...] = (1,)
    """Prompts decoded together."""
    temperature: float = 0.0
    """As in `tidar generate`."""
    top_p: float = 1.0
    """As in `tidar generate`."""
    deterministic: bool = False
    """As in `tidar generate`."""
    baselines: bool = False
    """Also transformers' generate, alone and with prompt lookup, and FlexAttention with a mask sliced every step."""
    record: Annotated[str | None, arg(metavar="FILE")] = None
    """Append each line, with what it was measured with, to this .jsonl file."""

    def run(self) -> None:
        from tidar.bench import baselines, decode, report, step
        from tidar.demo import PROMPTS
        from tidar.prompts import read_prompts

        if self.baselines and self.weights is not None:
            raise TidarError("baselines have the checkpoint's own weights: leave out --weights, or --baselines")
        core = step.model_of(self.model, None, None, self.dtype, self.weights)
        texts = list(PROMPTS) if self.prompts is None else list(read_prompts(self.prompts))
        ids = [core.tokenizer(text)["input_ids"][: self.prompt_tokens] for text in texts[: self.count]]
        length = self.draft_len or max(core.spec.block_sizes if core.spec else (), default=8)
        sampling = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else None
        lines = []
        for rows in self.batch:
            others = baselines.decoders(core, length, sampling) if self.baselines and rows == 1 else None
            lines += decode.run(
                core,
                ids,
                draft_len=length,
                batch=rows,
                new_tokens=self.new_tokens,
                sampling=sampling,
                others=others,
                deterministic=self.deterministic,
            )
        report.decoding(lines, self.record)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed on a GPU; the last line printed is JSON."""

    what: Annotated[BenchStep, subcommand("step")] | Annotated[BenchDecode, subcommand("decode")]

    def run(self) -> None:
        self.what.run()
