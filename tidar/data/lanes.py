"""The lanes into which streamed data are divided, each a stream of rows of its own.

A lane has its share of every data set (`tidar.data.reader`). It takes the next document from the one that is furthest
behind its weight in tokens, so weights hold at any moment to within a document. It reads and tokenises blocks of
documents end to end and cuts the endless tokens into rows as `tidar.data.packing` does; those that begin in a block
come in an order which (seed, lane, block) decides. No token is lost or padded.

The number of lanes belongs to the recipe. Ranks and their workers each run some of them, and nobody tokenises what
another one needs: so neither number changes the data, and the state of a lane is all there is to go on from.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidar.data.config import DataConfig
from tidar.data.reader import Files, Share
from tidar.data.tokenizer import encode_documents, encoder_of
from tidar.errors import TidarError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Lane", "Lanes", "Piece"]

State = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """What all lanes have in common; it can be sent to another process.

    Attributes:
        files: the data sets, in the order of ``config.streams``.
        config: weights, and which documents to leave out.
        tokenizer: its JSON.
        eos_id: id that ends a document.
        seed: key of all orders.
        count: number of lanes.
        rows: rows of a piece, R.
        seq_len: tokens of a row, S.
    """

    files: tuple[Files, ...]
    config: DataConfig
    tokenizer: str
    eos_id: int
    seed: int
    count: int
    rows: int
    seq_len: int

    def begin(self) -> State:
        """The state of a lane that nothing was taken of."""
        none = [0] * len(self.files)
        return {"block": 0, "offset": 0, "row": 0, "taken": none, "places": [[0, 0, 0] for _ in none]}

    def encoder(self) -> Tokenizer:
        """What lanes of one process share."""
        return encoder_of(self.tokenizer)


class Piece(NamedTuple):
    """The next R rows of a lane.

    Attributes:
        tokens: (R * S,) uint32.
        begins: (R * S,) bool, where documents begin.
        state: the lane's, to go on behind them.
    """

    tokens: NDArray[Any]
    begins: NDArray[np.bool_]
    state: State


class _Block:
    """Documents that were read in a row, and the state of the mix before them."""

    def __init__(self, start: State) -> None:
        self.start = start
        self.documents: list[NDArray[Any]] = []
        self.size = 0  # tokens


class Lane:
    """One lane; `next` takes its next rows.

    Args:
        lanes: what it is one of.
        number: which, counted from 0.
        encoder: of `Lanes.encoder`.
        state: where to go on.
    """

    def __init__(self, lanes: Lanes, number: int, encoder: Tokenizer, state: State) -> None:
        self.lanes, self.number = lanes, number
        self._mix = _Mix(lanes, number, encoder, state)
        self._block, self._offset, self._row = state["block"], state["offset"], state["row"]
        self._read: deque[_Block] = deque()  # from the current block on
        self._rows: tuple[NDArray[Any], NDArray[np.bool_]] | None = None  # of the current block
        self._surplus = 0  # tokens that the last of them takes from the next

    def next(self) -> Piece:
        """Raises TidarError as `tidar.data.reader.Share.endless`."""
        tokens, begins, missing = [], [], self.lanes.rows
        while missing:
            rows, firsts = self._rows or self._cut()
            part = slice(self._row, self._row + missing)
            tokens.append(rows[part].ravel())
            begins.append(firsts[part].ravel())
            missing -= len(rows[part])
            self._row += len(rows[part])
            if self._row == len(rows):
                self._read.popleft()
                self._block, self._offset, self._row, self._rows = self._block + 1, self._surplus, 0, None
        start = self._read[0].start if self._read else self._mix.state()
        state = {"block": self._block, "offset": self._offset, "row": self._row, **start}
        return Piece(np.concatenate(tokens), np.concatenate(begins), state)

    def _cut(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """The rows that begin in the current block, (N, S), shuffled; N may be 0."""
        size = self.lanes.seq_len
        if not self._read:
            self._read.append(_Block(self._mix.state()))
        while self._read[0].size < self.lanes.config.shuffle:
            self._grow()
        own = self._read[0].size
        count = max(0, -(-(own - self._offset) // size))
        if self._row > count:
            raise TidarError(
                "cannot resume: the streams hold other documents than when the checkpoint was written; restore them or "
                "pin the revision of a hub data set"
            )
        end = self._offset + count * size
        while sum(block.size for block in self._read) < end:
            self._grow()
        documents = [document for block in self._read for document in block.documents]
        tokens = np.concatenate(documents)
        begins = np.zeros(len(tokens), np.bool_)
        begins[np.cumsum([0, *map(len, documents[:-1])])] = True
        rows, firsts = (part[self._offset : end].reshape(count, size) for part in (tokens, begins))
        key = np.random.SeedSequence((self.lanes.seed, self.number, self._block, 3))
        order = np.random.Generator(np.random.Philox(key)).permutation(count)
        self._surplus = end - own
        self._rows = rows[order], firsts[order]
        return self._rows

    def _grow(self) -> None:
        """Read one document more, into a new block if the last one is full."""
        if self._read[-1].size >= self.lanes.config.shuffle:
            self._read.append(_Block(self._mix.state()))
        document = self._mix.next()
        self._read[-1].documents.append(document)
        self._read[-1].size += len(document)


class _Mix:
    """The documents of all data sets in turn, tokenised."""

    def __init__(self, lanes: Lanes, number: int, encoder: Tokenizer, state: State) -> None:
        self._lanes, self._encoder = lanes, encoder
        self._weights = [stream.weight for stream in lanes.config.streams]
        self._taken = list(state["taken"])  # tokens of each data set
        self._shares = [
            Share(files, lanes.config, seed=lanes.seed, number=i, lane=number, lanes=lanes.count, place=place)
            for i, (files, place) in enumerate(zip(lanes.files, state["places"], strict=True))
        ]
        self._texts = [share.endless() for share in self._shares]

    def state(self) -> State:
        return {"taken": list(self._taken), "places": [share.place for share in self._shares]}

    def next(self) -> NDArray[Any]:
        """(n,) uint32, the end-of-text token last."""
        behind = min(range(len(self._taken)), key=lambda i: self._taken[i] / self._weights[i])
        tokens = next(encode_documents(self._encoder, [next(self._texts[behind])], self._lanes.eos_id))
        self._taken[behind] += len(tokens)
        return tokens
