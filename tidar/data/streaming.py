"""Streamed data as a training run takes them: micro-batches of rows, and a place to go on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tidar.data.cache import FORMAT, CacheWriter, fresh_folder, open_cache
from tidar.data.config import DataConfig
from tidar.data.lanes import Lanes
from tidar.data.packing import PackedBatch, pack
from tidar.data.reader import Files, Share, open_stream
from tidar.data.tokenizer import encode_documents, end_of_text, plain_encoder, vocabulary_digest
from tidar.data.workers import Alone, Workers
from tidar.errors import TidarError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["StreamedData", "beginnings", "hold_out"]


SAID = ("streams", "min_bytes", "max_bytes", "holdout")
"""Settings that say which documents there are."""


def _never() -> bool:
    return False


class StreamedData:
    """The rows of all lanes; `next` takes the next micro-batch, as `tidar.data.packing.PackedData` does.

    A step has as many rows of each lane, in the order of lanes, and is cut into micro-batches. A process reads the
    lanes of those micro-batches that fall to it, from the first call of `next` on.

    Args:
        config: the streams.
        tokenizer: of the model.
        seq_len: tokens of a row, S.
        batch_size: rows of a micro-batch, B.
        accumulate: micro-batches of a step.
        lanes: a multiple of ``accumulate`` that divides the rows of a step.
        seed: key of all orders.
        rank: of ``size`` processes; it reads the micro-batches rank, rank + size … of a step and skips the others.
        size: a divisor of ``accumulate``.

    Raises:
        TidarError: a stream cannot be opened, or the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        seq_len: int,
        batch_size: int,
        accumulate: int,
        lanes: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        assert lanes % accumulate == 0 and accumulate * batch_size % lanes == 0 and accumulate % size == 0
        self._lanes = Lanes(
            files=tuple(open_stream(stream, config.patience) for stream in config.streams),
            config=config,
            tokenizer=tokenizer.backend_tokenizer.to_str(),
            eos_id=end_of_text(tokenizer),
            seed=seed,
            count=lanes,
            rows=accumulate * batch_size // lanes,
            seq_len=seq_len,
        )
        self._width = lanes // accumulate  # lanes of a micro-batch
        self._accumulate = accumulate
        self._micro = 0  # micro-batch of the step that comes next
        mine = [lane for lane in range(lanes) if lane // self._width % size == rank]
        self._states = {lane: self._lanes.begin() for lane in mine}
        self._running: Alone | Workers | None = None
        self.interrupted: Callable[[], bool] = _never
        """Asked while nothing comes; once it holds, `next` raises `tidar.data.workers.Interrupted`."""

    def next(self) -> PackedBatch:
        """The next micro-batch.

        Raises:
            TidarError: a source was out of reach for too long, is broken or has no documents, or a worker died.
        """
        if self._running is None:
            workers = self._lanes.config.workers
            self._running = Workers(self._lanes, self._states, workers) if workers else Alone(self._lanes, self._states)
        first = self._micro * self._width
        tokens, begins = [], []
        for lane in range(first, first + self._width):
            piece = self._running.next(lane, self.interrupted)
            tokens.append(piece.tokens)
            begins.append(piece.begins)
            self._states[lane] = piece.state
        self.skip()
        return pack(np.concatenate(tokens), np.flatnonzero(np.concatenate(begins)), self._lanes.seq_len)

    def skip(self) -> None:
        """Leave the next micro-batch to another process."""
        self._micro = (self._micro + 1) % self._accumulate

    def close(self) -> None:
        """End the workers."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def state_dict(self) -> dict[str, Any]:
        """The place, of this process's lanes. Those of all processes together are a state for any number of them."""
        assert self._micro == 0, "a place is one between two steps"
        return {**self.key(), **{f"lane {lane}": state for lane, state in self._states.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken.

        Raises:
            TidarError: the state is of other data, lanes or seed.
        """
        for name, value in self.key().items():
            if state.get(name) != value:
                raise TidarError(
                    f"cannot resume: {name} of the checkpoint's data was {state.get(name)} and is now {value}; resume "
                    "with the streams, settings, row length and seed of the first run; pin a hub data set's revision"
                )
        self.close()
        self._micro = 0
        self._states = {lane: state[f"lane {lane}"] for lane in self._states}

    def key(self) -> dict[str, Any]:
        """What a place in the data depends on."""
        lanes = self._lanes
        files = [files.count for files in lanes.files]
        said = {name: value for name, value in asdict(lanes.config).items() if name in (*SAID, "shuffle")}
        settings = hashlib.blake2b(json.dumps(said).encode(), digest_size=8).hexdigest()
        key = {"streams": files, "lanes": lanes.count, "seq_len": lanes.seq_len, "seed": lanes.seed}
        return {**key, "settings": settings}


def hold_out(config: DataConfig, tokenizer: PreTrainedTokenizerFast, out: Path, *, tokens: int, seed: int) -> Path:
    """Writes the first held-out documents of each stream, ``tokens`` in all by weight, to ``out/holdout``, which
    `tidar.data.packing.PackedData` reads; it is taken as it is if the same call made it.

    Raises:
        TidarError: as `StreamedData`, or no document is held out, or the disk is full.
    """
    key = [FORMAT, {name: value for name, value in asdict(config).items() if name in SAID}, tokens, seed]
    fingerprint = hashlib.blake2b(json.dumps([*key, vocabulary_digest(tokenizer)]).encode(), digest_size=16).hexdigest()
    place = out / "holdout"
    if (place / "meta.json").is_file() and open_cache(place).meta.get("fingerprint") == fingerprint:
        return place
    encoder, eos_id = plain_encoder(tokenizer), end_of_text(tokenizer)
    whole = sum(stream.weight for stream in config.streams)
    with fresh_folder(out) as folder:
        (folder / "holdout").mkdir()
        with CacheWriter(folder / "holdout", vocab_size=len(tokenizer), eos_id=eos_id) as cache:
            for share in _shares(config, seed, held=True):
                missing = tokens * share.files.stream.weight / whole
                for text in share.epoch():
                    document = next(encode_documents(encoder, [text], eos_id))
                    cache.add(document, len(text.encode()))
                    missing -= len(document)
                    if missing <= 0:
                        break
            if not cache.lengths:
                raise TidarError(
                    f"no document of the streams is held out: raise holdout (now {config.holdout}) or set it to 0"
                )
            cache.close({"fingerprint": fingerprint})
        stats = {"holdout": {"documents": len(cache.lengths), "bytes": cache.text_bytes, "tokens": sum(cache.lengths)}}
        (folder / "stats.json").write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")
    return place


def beginnings(config: DataConfig, *, size: int, seed: int) -> Iterator[str]:
    """The first documents for training of each stream, about ``size`` characters in all by weight."""
    whole = sum(stream.weight for stream in config.streams)
    for share in _shares(config, seed):
        missing = size * share.files.stream.weight / whole
        for text in share.epoch():
            yield text
            missing -= len(text)
            if missing <= 0:
                break


def _shares(config: DataConfig, seed: int, held: bool = False) -> Iterator[Share]:
    """Each stream whole."""
    for number, stream in enumerate(config.streams):
        files: Files = open_stream(stream, config.patience)
        yield Share(files, config, seed=seed, number=number, held=held)
