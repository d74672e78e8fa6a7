"""The public face: ``tidar.load(...)`` and what it returns."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

from tidar import adapter_files, checkpoint
from tidar.config import SamplingParams
from tidar.decode import generation, plan, planner
from tidar.decode.ar import ArDecoder
from tidar.decode.base import Decoder
from tidar.decode.clock import Times
from tidar.decode.generation import Chunk, Completion
from tidar.decode.linear import LinearDecoder
from tidar.decode.planned import PlannedDecoder
from tidar.decode.policy import TOGETHER, Alternating, Autoregressive, Fixed, Planning
from tidar.decode.tidar import Acceptance, TidarDecoder
from tidar.errors import TidarError
from tidar.fast import obstacle
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import MOST, Engine
from tidar.model import CausalLM
from tidar.proposals import check_alternates, check_proposals

__all__ = ["Method", "Model", "load"]

Method = Literal["ar", "tidar", "linear", "auto"]
Prompt = str | Sequence[int]


class Model:
    """A loaded checkpoint that generates text.

    Attributes:
        core: the network and its tokenizer, for training and for decoders of one's own.
        deterministic: tokens are the same for all methods, draft lengths and batches in bf16 and float16 too.
    """

    def __init__(self, core: CausalLM, *, fast: bool | None = None, deterministic: bool = False) -> None:
        self.core = core
        self._times: dict[int, Times] = {}  # what steps take here, and what drafts are worth, learned by `auto`
        self._acceptance = planner.Acceptance()
        why = "it was not asked for" if fast is False else obstacle(core)
        if fast and why is not None:
            raise TidarError(f"no fast path: {why}; leave it to choose by itself")
        if deterministic and why is not None:
            raise TidarError(f"deterministic decoding takes the fast path, and {why}: use --dtype float32 instead")
        self._engine = Engine(core, deterministic=deterministic) if why is None else None
        self.deterministic = deterministic

    @property
    def fast(self) -> bool:
        """It decodes with captured steps (`tidar.fast`) where a request allows it."""
        return self._engine is not None

    @property
    def draft_len(self) -> int:
        """The draft length used when none is given: the longest trained."""
        trained = self.core.spec.block_sizes if self.core.spec else ()
        return max(trained, default=8)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        method: Method | None = None,
        draft_len: int | None = None,
        proposals: int | None = None,
        alternates: int = 0,
        acceptance: Acceptance = "gumbel",
        beta: float = 1.0,
        batch_size: int = 8,
    ) -> list[Completion]:
        """Complete prompts. The same seed gives the same tokens whatever the method, draft length, proposals and batch.

        Args:
            prompts: one prompt or several; text, or token ids.
            params: sampling parameters for all prompts or one for each; greedy by default.
            method: ``tidar``; ``linear``, which drafts and verifies in two forwards; ``ar``, one token a forward;
                ``auto`` chooses among them, and draft lengths and proposals, by what steps take on this machine. By
                default ``auto``, or ``tidar`` if one of the following is given.
            draft_len: drafts a step, or the most for ``auto``; by default the longest the model was trained for.
            proposals: for how many numbers of accepted drafts to draft ahead, among 1 … draft_len: the likeliest ones,
                picked anew in every step; all by default.
            alternates: how many other tokens to try behind drafts, the likeliest ones, at most
                `tidar.proposals.MOST_ALTERNATES`.
            acceptance: ``gumbel`` or ``ratio`` (the min(1, p/q) rule: the same distribution, other tokens).
            beta: below 1 trusts the drafts and is lossy.
            batch_size: prompts decoded at a time.

        Returns:
            One `Completion` a prompt, in order.

        Raises:
            TidarError: bad prompts or parameters, or a checkpoint without a mask token.
        """
        texts, each = self._requests(prompts, params)
        maker = self._maker(method, draft_len, proposals, alternates, acceptance, beta)
        return generation.generate(self.core, texts, each, maker, _positive(batch_size))

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        method: Method | None = None,
        draft_len: int | None = None,
        proposals: int | None = None,
        alternates: int = 0,
        acceptance: Acceptance = "gumbel",
        beta: float = 1.0,
        batch_size: int = 8,
    ) -> Iterator[Chunk]:
        """As `generate`, but yields a `Chunk` for every forward and prompt as soon as it is done."""
        texts, each = self._requests(prompts, params)
        maker = self._maker(method, draft_len, proposals, alternates, acceptance, beta)
        return generation.stream(self.core, texts, each, maker, _positive(batch_size))

    def _requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> tuple[list[Sequence[int]], list[SamplingParams]]:
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        many: Sequence[Prompt] = [prompts] if single else prompts  # type: ignore[list-item,assignment]
        texts = [self._ids(p, number) for number, p in enumerate(many, 1)]
        if params is None or isinstance(params, SamplingParams):
            return texts, [params or SamplingParams()] * len(texts)
        if len(params) != len(texts):
            raise TidarError(f"{len(params)} sampling parameters for {len(texts)} prompts: give one, or one each")
        return texts, list(params)

    def _ids(self, prompt: Prompt, number: int) -> Sequence[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise TidarError(
                f"prompt {number} is not valid text at character {error.start}: give it as UTF-8"
            ) from None
        ids: list[int] = self.core.tokenizer(prompt)["input_ids"]
        return ids

    def _maker(
        self,
        method: Method | None,
        draft_len: int | None,
        proposals: int | None,
        alternates: int,
        acceptance: Acceptance,
        beta: float,
    ) -> Callable[[], Decoder]:
        if method is None:
            drafting = draft_len is not None or proposals is not None or alternates != 0
            method = "tidar" if drafting or acceptance != "gumbel" or beta != 1 else "auto"
        if method == "ar":
            engine = self._engine
            return lambda: ArDecoder(self.core) if engine is None else FastDecoder(engine, Autoregressive())
        if method not in get_args(Method):
            raise TidarError(f"method '{method}' is unknown: use one of {', '.join(get_args(Method))}")
        if method in ("linear", "auto") and (proposals is not None or alternates != 0 or beta < 1):
            raise TidarError(
                f"method '{method}' takes no proposals, alternates or beta: leave them out, or use method 'tidar'"
            )
        if method == "auto" and acceptance != "gumbel":
            raise TidarError("method 'auto' keeps the tokens the same: leave acceptance out, or choose a method")
        if beta < 1:
            warnings.warn(f"beta = {beta} is lossy: the tokens are not those of autoregressive decoding", stacklevel=3)
        _ = self.core.mask_id  # refuses a checkpoint that was not converted
        length = self.draft_len if draft_len is None else draft_len
        trained = self.core.spec.block_sizes if self.core.spec else ()
        if not trained:
            warnings.warn(f"{self.core.path} is converted but not trained: drafts will be poor", stacklevel=3)
        elif length > max(trained):
            warnings.warn(
                f"draft length {length} is beyond the {max(trained)} the model was trained for: drafts will be poor",
                stacklevel=3,
            )
        if self._engine is not None and acceptance == "gumbel" and beta == 1 and length <= MOST:
            return self._fast_maker(self._engine, method, length, proposals, alternates)
        if self.deterministic:
            raise TidarError(f"deterministic decoding is by Gumbel noise, without beta, with drafts of at most {MOST}")
        if method == "auto":
            seen = self._acceptance
            return lambda: PlannedDecoder(self.core, draft_len=length, times=self._times, acceptance=seen)
        if method == "linear":
            return lambda: LinearDecoder(self.core, draft_len=length, acceptance=acceptance)
        return lambda: TidarDecoder(
            self.core, draft_len=length, proposals=proposals, alternates=alternates, acceptance=acceptance, beta=beta
        )

    def _fast_maker(
        self, engine: Engine, method: Method, length: int, proposals: int | None, alternates: int
    ) -> Callable[[], Decoder]:
        if method == "auto":
            return lambda: FastDecoder(
                engine, Planning(length, list(plan.few(length)), self._acceptance, every=TOGETHER)
            )
        if method == "linear":
            return lambda: FastDecoder(engine, Alternating(length))
        chosen, others = check_proposals(length, proposals), check_alternates(alternates)
        return lambda: FastDecoder(engine, Fixed(length, chosen if length > 1 else 0, others))


def load(
    path_or_hub_id: str | os.PathLike[str] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    fast: bool | None = None,
    deterministic: bool = False,
    weights: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Model:
    """Load a checkpoint.

    Args:
        path_or_hub_id: local folder or hub id; by default the adapter's base, or the reference checkpoint that ships
            with the package. A folder of adapters brings the base that it names.
        device: ``cuda`` where there is one, else ``cpu``.
        dtype: float32 on CPU and the checkpoint's own elsewhere by default.
        fast: decode with captured steps (`tidar.fast`), or never; by default where it is possible. The tokens are the
            same in float32.
        deterministic: the tokens are the same for all methods, draft lengths and batches in bf16 and float16 too, at
            some cost in speed (docs/benchmarks.md). Takes the fast path.
        weights: ``int8``, or on a GPU ``fp8``, to hold projections and head in one byte a number: less memory and
            other text, which is still the same for all methods (docs/fast-step.md). By default in ``dtype``.
        adapter: folder of adapters for masks (docs/adapters.md), which change no text; on any copy of their base.

    Raises:
        TidarError: missing, damaged or unsupported checkpoint; device, dtype or weights not available; no fast path
            though one was asked for; adapters of another base.
    """
    import torch

    path = path_or_hub_id
    if path is None:
        path = checkpoint.embedded_checkpoint() if adapter is None else adapter_files.base_of(adapter)
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    core = checkpoint.load_model(path, device=chosen, dtype=dtype, weights=weights, adapter=adapter)
    return Model(core, fast=fast, deterministic=deterministic)


def _positive(batch_size: int) -> int:
    if batch_size < 1:
        raise TidarError(f"batch_size must be at least 1, not {batch_size}")
    return batch_size
