"""Documents packed end to end into rows of equal length, in an order that a seed fixes.

An endless stream of tokens is cut into rows: epoch after epoch, each a fresh permutation of the documents that
(seed, epoch) alone decides. So every token of every document occurs exactly once an epoch; an epoch's last row is
completed with the beginning of the next. A document that a row's end cuts goes on in the next row *as a new
document*: its positions restart, and it does not see its first part. The stream's position is one number, which is
all there is to resume.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tidar.data.cache import open_cache
from tidar.errors import TidarError

__all__ = ["PackedBatch", "PackedData"]

Ints = NDArray[np.int64]


class PackedBatch(NamedTuple):
    """B rows of S tokens, all int64 on the CPU.

    Attributes:
        tokens: (B, S) token ids; no padding.
        starts: (B, S) slot in the row of the first token of each token's document.
        ends: (B, S) one past the slot of its last token.
    """

    tokens: Tensor
    starts: Tensor
    ends: Tensor


class PackedData:
    """The packed stream of one cache folder; `next` takes the next batch off it.

    Args:
        cache_dir: a folder that `tidar.data.cache.CacheWriter` filled.
        seq_len: tokens of a row, S.
        batch_size: rows of a batch, B.
        seed: key of the documents' order.

    Raises:
        TidarError: no whole cache in the folder, or a size below 1.
    """

    def __init__(self, cache_dir: Path, *, seq_len: int, batch_size: int, seed: int) -> None:
        if seq_len < 1 or batch_size < 1:
            raise TidarError(f"seq_len and batch_size must be at least 1, not {seq_len} and {batch_size}")
        cache = open_cache(Path(cache_dir))
        self.meta = cache.meta
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self._tokens = cache.tokens
        self._offsets = cache.offsets
        self._position = 0  # tokens taken off the stream
        self._epoch = -1
        self._order: Ints = np.empty(0, np.int64)  # documents in this epoch's order
        self._ends: Ints = np.empty(0, np.int64)  # the epoch's stream position after each of them

    @property
    def tokens_per_epoch(self) -> int:
        return len(self._tokens)

    @property
    def epoch(self) -> float:
        """Epochs taken so far."""
        return self._position / len(self._tokens)

    def next(self) -> PackedBatch:
        """The next ``batch_size`` rows."""
        size = self.batch_size * self.seq_len
        sources, lengths = [], []
        wanted = size
        while wanted:
            source, length = self._pieces(self._position, wanted)
            sources.append(source)
            lengths.append(length)
            taken = int(length.sum())
            self._position += taken
            wanted -= taken
        source, length = np.concatenate(sources), np.concatenate(lengths)
        begin = np.cumsum(length) - length  # each piece's place in the batch
        tokens = self._tokens[np.repeat(source - begin, length) + np.arange(size)].astype(np.int64)
        cuts = np.union1d(begin, np.arange(0, size, self.seq_len))
        run = np.diff(cuts, append=size)
        starts = np.repeat(cuts % self.seq_len, run)
        ends = np.repeat(cuts % self.seq_len + run, run)
        shape = (self.batch_size, self.seq_len)
        return PackedBatch(*(torch.from_numpy(a.reshape(shape)) for a in (tokens, starts, ends)))

    def _pieces(self, position: int, wanted: int) -> tuple[Ints, Ints]:
        """Documents, the first and last perhaps in part, that follow ``position`` in its epoch: offsets, lengths."""
        epoch, place = divmod(position, len(self._tokens))
        if epoch != self._epoch:
            self._epoch = epoch
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch))))
            self._order = random.permutation(len(self._offsets) - 1)
            self._ends = np.cumsum(self._offsets[self._order + 1] - self._offsets[self._order])
        stop = min(place + wanted, len(self._tokens))
        first = int(np.searchsorted(self._ends, place, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        ends = self._ends[first : last + 1]
        document = self._order[first : last + 1]
        begins = ends - (self._offsets[document + 1] - self._offsets[document])
        skipped = np.maximum(place - begins, 0)
        return self._offsets[document] + skipped, np.minimum(ends, stop) - begins - skipped

    def state_dict(self) -> dict[str, int]:
        """The stream's position, in tokens; batches may be cut differently after a resume."""
        return {"position": self._position, "seed": self.seed, "tokens": len(self._tokens)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where the state was taken.

        Raises:
            TidarError: the state is of another seed or of other data.
        """
        mine = self.state_dict()
        if state["seed"] != mine["seed"] or state["tokens"] != mine["tokens"]:
            raise TidarError(
                f"cannot resume: the checkpoint's data had seed {state['seed']} and {state['tokens']} tokens, these "
                f"have seed {mine['seed']} and {mine['tokens']}; resume with the data and seed of the first run"
            )
        self._position = state["position"]
