"""The ``tidar`` command. Each subcommand is a dataclass; its docstrings are ``--help``.

torch and transformers are imported inside ``run``, so that ``--help`` and a mistyped flag answer at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

import tyro
from tyro.conf import OmitSubcommandPrefixes, Positional, arg

from tidar.bench.command import Bench
from tidar.config import SamplingParams
from tidar.errors import PeerError, TidarError
from tidar.prompts import read_prompts
from tidar.recipes import RECIPES, load_recipe
from tidar.train.config import Cluster, TrainConfig

if TYPE_CHECKING:
    from tidar.api import Model
    from tidar.decode.generation import Completion

__all__ = ["main"]

PATIENCE = 60
"""Seconds for which a rank that leaves the word to another waits: the first that ends is the end of all, and torchrun
would stop the other before it has spoken."""

T = TypeVar("T")
Flattened = Annotated[T, arg(name="")]


class Command(Protocol):
    def run(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Which model, and where it runs."""

    model: Annotated[str | None, arg(metavar="FOLDER|HUB-ID")] = None
    """Checkpoint; by default the adapter's base, or the one that comes with the package."""
    adapter: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Adapters that draft on top of the checkpoint, whose text they leave as it is."""
    device: Annotated[str | None, arg(metavar="cpu|cuda")] = None
    """By default cuda where there is one, else cpu."""
    dtype: Annotated[str | None, arg(metavar="float32|bfloat16|float16|float64")] = None
    """By default float32 on cpu and the checkpoint's own elsewhere."""
    weights: Annotated[str | None, arg(metavar="int8|fp8")] = None
    """Hold projections and head in one byte a number, fp8 on a GPU only: less memory, other text."""
    plain: bool = False
    """On a GPU, decode without captured steps: slower, the same text."""
    deterministic: bool = False
    """On a GPU, in bfloat16 too, the same text whatever the method, draft length and batch: slower."""

    def load(self) -> Model:
        from tidar.api import load

        _quiet()
        fast = False if self.plain else None
        kind: dict[str, Any] = {"fast": fast, "deterministic": self.deterministic, "weights": self.weights}
        return load(self.model, device=self.device, dtype=self.dtype, adapter=self.adapter, **kind)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How text is decoded. Nothing here but `acceptance` and `beta` changes the text."""

    method: Annotated[Literal["auto", "tidar", "linear", "ar"] | None, arg(metavar="auto|tidar|linear|ar")] = None
    """`ar` is one token a forward, `linear` drafts and verifies in turn, `auto` takes what is quickest here. By default
    `auto`, or `tidar` if one of the following is given."""
    draft_len: Annotated[int | None, arg(metavar="K")] = None
    """Drafts a step; by default the longest the model was trained for."""
    proposals: Annotated[int | None, arg(metavar="P")] = None
    """For how many numbers of accepted drafts to draft ahead, among 1 … K: the likeliest ones; all by default."""
    alternates: Annotated[int, arg(metavar="A")] = 0
    """How many other tokens to try behind drafts: the likeliest ones."""
    acceptance: Literal["gumbel", "ratio"] = "gumbel"
    """`ratio` is the min(1, p/q) rule: the same distribution, other tokens."""
    beta: float = 1.0
    """Below 1 trusts the drafts: LOSSY, the text is no longer that of the autoregressive model."""

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `Model.generate` and `Model.stream`."""
        return vars(self)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Complete real Python prompts with AR and with TiDAR, and compare tokens and speed."""

    checkpoint: Flattened[Checkpoint] = Checkpoint()
    json: bool = False
    """Print the numbers as one JSON object and nothing else."""

    def run(self) -> None:
        from tidar import demo

        # In bf16 near-ties would decide, on a GPU's default dtype too; the demo shows exactness.
        exact = replace(self.checkpoint, dtype=self.checkpoint.dtype or "float32")
        demo.run(exact.load(), as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Complete a prompt, or every prompt of a file."""

    prompt: Annotated[str | None, arg(metavar="TEXT")] = None
    """The text to go on from."""
    prompt_file: Annotated[str | None, arg(metavar="FILE")] = None
    """Prompts, one JSON string a line (- is standard input); prints one JSON answer a line."""
    checkpoint: Flattened[Checkpoint] = Checkpoint()
    decoding: Flattened[Decoding] = Decoding()
    sampling: Flattened[SamplingParams] = field(default_factory=SamplingParams)
    json: bool = False
    """Print a JSON object with text, token_ids, finish_reason, forwards, tokens_per_forward, prompt_tokens."""

    def run(self) -> None:
        if (self.prompt is None) == (self.prompt_file is None):
            raise TidarError("nothing to complete: give either --prompt TEXT or --prompt-file FILE")
        prompts = [self.prompt] if self.prompt is not None else list(read_prompts(self.prompt_file or ""))
        model = self.checkpoint.load()
        options = self.decoding.options()
        if self.prompt is not None and not self.json:
            for chunk in model.stream(self.prompt, self.sampling, **options):
                print(chunk.text, end="", flush=True)
            print()
            return
        for answer in model.generate(prompts, self.sampling, **options):
            print(json.dumps(_as_dict(answer), ensure_ascii=False))


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Complete text, or talk to an instruction-tuned model, in the terminal."""

    checkpoint: Flattened[Checkpoint] = Checkpoint()
    decoding: Flattened[Decoding] = Decoding()
    sampling: Flattened[SamplingParams] = field(default_factory=SamplingParams)

    def run(self) -> None:
        from tidar import chat

        chat.run(self.checkpoint.load(), self.sampling, self.decoding.options())


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Give an autoregressive checkpoint a mask token, so that it can be trained."""

    src: Annotated[Positional[str], arg(metavar="SRC")]
    """Local folder or hub id."""
    out: Annotated[Positional[str], arg(metavar="OUT")]
    """Folder to write; must not exist or be empty."""

    def run(self) -> None:
        from tidar.convert import convert

        _quiet()
        convert(self.src, self.out)
        print(f"wrote {self.out}")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model by a recipe: `tidar train RECIPE --help` shows its settings, each a flag that overrides it."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help=f"{', '.join(RECIPES)}, or a .toml file.")]

    def run(self) -> None:
        TrainRun(config=load_recipe(self.recipe)).run()


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """Train a model. What is not given is as in the recipe."""

    config: Flattened[TrainConfig]
    resume: bool = False
    """Go on from the newest whole checkpoint in `out`."""
    continue_from: Annotated[str, arg(metavar="FOLDER")] = ""
    """Go on from another run's checkpoint or final model: its weights, and its place in data and schedule."""
    plan: bool = False
    """Train nothing: print what the run needs on the cluster below."""
    cluster: Flattened[Cluster] = field(default_factory=Cluster)

    def run(self) -> None:
        if self.plan:
            from tidar.train.plan import describe, plan

            print(describe(self.config, self.cluster, plan(self.config, self.cluster)))
            return
        from tidar.train.trainer import train

        result = train(self.config, resume=self.resume, continue_from=self.continue_from)
        if result.model is not None and os.environ.get("RANK", "0") == "0":
            print(result.model)


@dataclass(frozen=True, kw_only=True)
class Info:
    """Versions, devices and the default checkpoint: what a bug report needs."""

    json: bool = False
    """Print one JSON object."""

    def run(self) -> None:
        from tidar import info

        found = info.collect()
        if self.json:
            print(json.dumps(found))
        else:
            info.show(found)


def _quiet() -> None:
    """One line of ours says what went wrong; the hub's client would precede it with a line for every retry."""
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def _as_dict(answer: Completion) -> dict[str, Any]:
    return {**vars(answer), "tokens_per_forward": answer.tokens_per_forward}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, 2 for a user's mistake, 130 for Ctrl-C, 141 for a closed pipe."""
    warnings.showwarning = _show_warning
    command: Command | None = None
    try:
        try:
            command = _parse(argv)
            command.run()
        finally:
            sys.stdout.flush()
    except TidarError as error:
        # Of ranks, the one that knows speaks; a command that is wrong is so for all of a machine.
        if isinstance(error, PeerError) or (command is None and os.environ.get("LOCAL_RANK", "0") != "0"):
            time.sleep(PATIENCE)
        else:
            print(f"tidar: error: {_one_line(error)}", file=sys.stderr, flush=True)
        return _ended(2)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # What is still buffered has nowhere to go, and Python would complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return _ended(0)


def _ended(code: int) -> int:
    """``code``; one of several ranks ends here, since torch's own end may abort, or wait for ranks that are gone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stderr.flush()
        os._exit(code)
    return code


def _parse(argv: Sequence[str] | None) -> Command:
    config = (tyro.conf.FlagCreatePairsOff, OmitSubcommandPrefixes)
    match list(sys.argv[1:] if argv is None else argv):
        case ["train", recipe, *overrides] if not recipe.startswith("-"):
            # The recipe decides what the flags' defaults are, so it is read before them.
            default = TrainRun(config=load_recipe(recipe))
            return tyro.cli(TrainRun, prog=f"tidar train {recipe}", default=default, args=overrides, config=config)
        case words:
            # A union is what tyro makes subcommands of; its type cannot be spelled as `type[T]`.
            commands: Any = Demo | Generate | Chat | Convert | Train | Bench | Info
            description = "TiDAR language models: think in diffusion, talk in autoregression."
            command: Command = tyro.cli(commands, prog="tidar", description=description, args=words, config=config)
            return command


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    """Ours in one line; what libraries warn their developers of is not for users."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        print(f"tidar: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
