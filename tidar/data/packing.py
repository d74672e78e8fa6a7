"""Documents packed end to end into rows of equal length, in an order that a seed fixes.

An endless stream of tokens is cut into rows: epoch after epoch, each a fresh permutation of the documents that
(seed, epoch) alone decides. So every token of every document occurs exactly once an epoch; an epoch's last row is
completed with the beginning of the next. A document that a row's end cuts goes on in the next row *as a new
document*: its positions restart, and it does not see its first part. Where documents are conversations, it is not
learnt either: it may be an answer without its question.

Rows are then shuffled among `WINDOW` neighbours (at most an epoch's rows), since a batch of neighbouring rows would
hold few documents. The number of rows taken is all there is to resume.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tidar.data.cache import open_cache
from tidar.errors import TidarError

__all__ = ["PackedBatch", "PackedData", "pack"]

Ints = NDArray[np.int64]

WINDOW = 4096


class PackedBatch(NamedTuple):
    """B rows of S tokens, all int64 on the CPU.

    Attributes:
        tokens: (B, S) token ids; no padding.
        starts: (B, S) slot in the row of the first token of each token's document.
        ends: (B, S) one past the slot of its last token.
        learned: (B, S) bool, the tokens that are to be predicted; None for all.
    """

    tokens: Tensor
    starts: Tensor
    ends: Tensor
    learned: Tensor | None = None


def pack(tokens: NDArray[Any], begin: Ints, seq_len: int) -> PackedBatch:
    """Rows from the tokens (B * S,) of a batch, in which documents begin at the places ``begin``."""
    size = len(tokens)
    cuts = np.union1d(begin, np.arange(0, size, seq_len))
    run = np.diff(cuts, append=size)
    starts = np.repeat(cuts % seq_len, run)
    parts = tokens.astype(np.int64), starts, starts + np.repeat(run, run)
    return PackedBatch(*(torch.from_numpy(part.reshape(-1, seq_len)) for part in parts))


class PackedData:
    """The packed stream of one cache folder; `next` takes the next batch off it.

    Args:
        cache_dir: a folder that `tidar.data.cache.CacheWriter` filled.
        seq_len: tokens of a row, S.
        batch_size: rows of a batch, B.
        seed: key of the documents' order and of the rows'.
        window: rows among which a row is shuffled; 1 leaves the stream in order.

    Raises:
        TidarError: no whole cache in the folder, or a size below 1.
    """

    def __init__(self, cache_dir: Path, *, seq_len: int, batch_size: int, seed: int, window: int = WINDOW) -> None:
        if seq_len < 1 or batch_size < 1:
            raise TidarError(f"seq_len and batch_size must be at least 1, not {seq_len} and {batch_size}")
        cache = open_cache(Path(cache_dir))
        self.meta = cache.meta
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self._tokens = cache.tokens
        self._offsets = cache.offsets
        self._learned = cache.learned
        self._window = max(1, min(window, len(self._tokens) // seq_len))
        self._row = 0  # rows taken
        self._orders: dict[int, tuple[Ints, Ints]] = {}
        self._shuffled: tuple[int, Ints] = (-1, np.empty(0, np.int64))

    @property
    def epoch(self) -> float:
        """Epochs taken so far."""
        return self._row * self.seq_len / len(self._tokens)

    def next(self) -> PackedBatch:
        """The next ``batch_size`` rows."""
        size = self.batch_size * self.seq_len
        sources, lengths, starting = [], [], []
        for row in range(self._row, self._row + self.batch_size):
            place, end = self._place(row) * self.seq_len, (self._place(row) + 1) * self.seq_len
            while place < end:
                source, length, begun = self._pieces(place, end - place)
                sources.append(source)
                lengths.append(length)
                starting.append(begun)
                place += int(length.sum())
        self._row += self.batch_size
        source, length = np.concatenate(sources), np.concatenate(lengths)
        begin = np.cumsum(length) - length  # each piece's place in the batch
        taken = np.repeat(source - begin, length) + np.arange(size)
        batch = pack(self._tokens[taken], begin, self.seq_len)
        if self._learned is None:
            return batch
        learned = self._learned[taken].astype(bool) & np.repeat(np.concatenate(starting), length)
        return batch._replace(learned=torch.from_numpy(learned.reshape(batch.tokens.shape)))

    def skip(self) -> None:
        """Leave the next ``batch_size`` rows to another process."""
        self._row += self.batch_size

    def close(self) -> None:
        """Nothing to end here."""

    def _pieces(self, position: int, wanted: int) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """Documents, the first and last perhaps in part, that follow ``position`` in its epoch: offsets, lengths, and
        whether the piece begins where its document does."""
        epoch, place = divmod(position, len(self._tokens))
        order, all_ends = self._order(epoch)
        stop = min(place + wanted, len(self._tokens))
        first = int(np.searchsorted(all_ends, place, side="right"))
        last = int(np.searchsorted(all_ends, stop, side="left"))
        ends = all_ends[first : last + 1]
        document = order[first : last + 1]
        begins = ends - (self._offsets[document + 1] - self._offsets[document])
        skipped = np.maximum(place - begins, 0)
        return self._offsets[document] + skipped, np.minimum(ends, stop) - begins - skipped, skipped == 0

    def _order(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's documents in order, and its stream position after each of them."""
        if epoch not in self._orders:
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch))))
            order = random.permutation(len(self._offsets) - 1)
            # A window reaches into two epochs, or three.
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) <= 2}
            self._orders[epoch] = order, np.cumsum(self._offsets[order + 1] - self._offsets[order])
        return self._orders[epoch]

    def _place(self, row: int) -> int:
        """The row of the stream that comes as the ``row``-th."""
        window, index = divmod(row, self._window)
        if self._shuffled[0] != window:
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, window, 1))))
            self._shuffled = window, random.permutation(self._window)
        return window * self._window + int(self._shuffled[1][index])

    def state_dict(self) -> dict[str, Any]:
        """How many rows were taken; batches may be cut differently after a resume."""
        return {"row": self._row, "seed": self.seed, "tokens": len(self._tokens), "seq_len": self.seq_len}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken.

        Raises:
            TidarError: the state is of another seed, row length or data.
        """
        mine = self.state_dict()
        for name, what in (("seed", "seed"), ("tokens", "number of tokens"), ("seq_len", "row length")):
            if state.get(name) != mine[name]:
                raise TidarError(
                    f"cannot resume: the checkpoint's data had the {what} {state.get(name)}, these have {mine[name]}; "
                    "resume with the data, row length and seed of the first run"
                )
        self._row = state["row"]
