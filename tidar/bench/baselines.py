"""What others do, on the same GPU: transformers' own generation, and the paper's step as libraries offer it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tidar import layout, mask
from tidar.cache import SlotCache
from tidar.config import SamplingParams
from tidar.decode.base import Decoder
from tidar.decode.tidar import TidarDecoder
from tidar.layout import Layout
from tidar.model import CausalLM

__all__ = ["FlexDecoder", "HuggingFace", "decoders"]


def decoders(core: CausalLM, draft_len: int, sampling: dict[str, float] | None) -> dict[str, Callable[[], Decoder]]:
    """Baselines by name. Prompt lookup is greedy only, FlexAttention for models without sliding windows."""
    stock: Any = AutoModelForCausalLM.from_pretrained(core.path, dtype=core.dtype, attn_implementation="sdpa")
    stock = stock.to(core.device).eval()
    found: dict[str, Callable[[], Decoder]] = {"transformers generate": lambda: HuggingFace(stock, {})}
    if core.windows == (None,):
        flex = _Flex(core, draft_len)
        found["FlexAttention, sliced mask, no graph"] = lambda: FlexDecoder(flex, draft_len)
    if not sampling:
        found["transformers prompt lookup"] = lambda: HuggingFace(stock, {"prompt_lookup_num_tokens": 10})
    return found


class HuggingFace:
    """`generate` of transformers as a decoder whose one step makes all tokens; it computes the prompt once more.

    Args:
        model: a stock model.
        options: for `generate`.
    """

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        self._model, self._options = model, options
        self.forwards = 0

    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        (self._prompt,), (self._params,) = prompts, params
        first = self._generate(list(self._prompt), 1)
        self._prompt = [*self._prompt, *first]
        return [first]

    def step(self) -> list[list[int]]:
        count = self._params.max_new_tokens - 1
        self.forwards += count  # as many as an autoregressive decoder; prompt lookup does not tell
        return [self._generate(list(self._prompt), count)]

    def select(self, rows: list[int]) -> None:
        assert list(rows) == [0], "one prompt at a time"

    def close(self) -> None:
        pass

    def _generate(self, prompt: list[int], count: int) -> list[int]:
        each = self._params
        sampled = {"do_sample": True, "temperature": each.temperature, "top_p": each.top_p, "top_k": 0}
        ids = torch.tensor([prompt], device=self._model.device)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            **(sampled if each.temperature > 0 else {"do_sample": False}),
            **self._options,
        )
        new: list[int] = out[0, len(prompt) :].tolist()
        return new


class FlexDecoder(TidarDecoder):
    """One-forward decoding through FlexAttention, with one mask built beforehand and cut to the prefix at each step, as
    the paper describes it (section 3.2); no graph. All proposals, greedy or sampled, one row."""

    def __init__(self, model: _Flex, draft_len: int) -> None:
        super().__init__(model, draft_len=draft_len)  # type: ignore[arg-type]


class _Flex:
    """The model with its steps' attention replaced; everything else is the model's own."""

    def __init__(self, core: CausalLM, draft_len: int) -> None:
        self._core = core
        device = core.device
        plan = layout.step([0], draft_len, device=device)
        self._queries = plan.queries
        self._structure = mask.dense(plan)[0, 0]
        # One capacity, so that nothing is compiled for every length.
        self._capacity = -(-(core.max_positions + self._queries) // mask.BLOCK) * mask.BLOCK
        self._length = torch.zeros((), dtype=torch.long, device=device)
        tiles = -(-self._queries // mask.BLOCK)
        self._columns = torch.arange(self._capacity // mask.BLOCK, dtype=torch.int32, device=device)
        self._columns = self._columns.expand(1, 1, tiles, -1).contiguous()
        self._tiles = torch.zeros(1, 1, tiles, dtype=torch.int32, device=device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def hidden(self, tokens: Tensor, plan: Layout, *, cache: SlotCache) -> Tensor:
        if plan.queries != self._queries:
            return self._core.hidden(tokens, plan, cache=cache)
        from torch.nn.attention.flex_attention import BlockMask

        self._length.fill_(cache.lengths[0])
        self._tiles.fill_(-(-(cache.lengths[0] + self._queries) // mask.BLOCK))
        cut = BlockMask.from_kv_blocks(
            self._tiles,
            self._columns,
            BLOCK_SIZE=mask.BLOCK,
            mask_mod=self._sees,
            seq_lengths=(self._queries, self._capacity),
        )
        cache.place(plan)
        cache._kv_len = self._capacity
        return self._core.backbone(tokens, plan.positions, {None: cut}, cache)

    def _sees(self, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        own = (kv - self._length).clamp(0, self._queries - 1)
        return (kv < self._length) | ((kv < self._length + self._queries) & self._structure[q, own])
