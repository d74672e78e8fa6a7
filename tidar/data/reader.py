"""Documents of a streamed data set: the share of one lane, in an order that a seed fixes, resumable anywhere.

A data set is taken as its files, each read from its beginning by `datasets`. Of that package's own order, shuffling
and state nothing is used: its shuffle buffer is lost on resume and a row may come twice (huggingface/datasets issue
7901). A place here is three numbers (epoch, unit, document), and to go on means to skip documents of one file.
"""

from __future__ import annotations

import gzip
import lzma
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tidar.data.config import DataConfig, Stream
from tidar.data.dedup import digest
from tidar.data.sources import first_line, no_field
from tidar.errors import TidarError

__all__ = ["Files", "Share", "open_stream"]

KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
TABLE = 256  # documents asked for at once
LONGEST_PAUSE = 60.0
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
"""What a file that is cut off or damaged raises; no network does."""


@dataclass(frozen=True)
class Files:
    """A data set that is open.

    Attributes:
        stream: what the recipe says of it.
        dataset: a `datasets.IterableDataset`; it can be sent to another process.
        count: number of its files.
    """

    stream: Stream
    dataset: Any
    count: int

    def columns(self, file: int, first: int) -> Iterator[Any]:
        """The texts of ``file`` from document ``first`` on, in pyarrow columns of some hundreds."""
        _datasets(self.stream)
        part = self.dataset.shard(num_shards=self.count, index=file).skip(first).with_format("arrow")
        field = self.stream.text_field
        for table in part.iter(batch_size=TABLE):
            if field not in table.column_names:
                raise TidarError(no_field(f"{self.stream.path} file {file}", field, table.column_names))
            yield table.column(field)

    def parts(self, lanes: int) -> int:
        """Into how many parts each file is divided, document by document, so that ``lanes`` have like shares.

        One where there are many files. The fewer there are, the more lanes read the same file, which costs little
        beside tokenising. Shares then differ by an eighth at most.
        """
        exact = lanes // gcd(lanes, self.count)
        return min(exact, -(-8 * lanes // self.count))


def open_stream(stream: Stream, patience: float) -> Files:
    """Finds the files of a data set.

    Raises:
        TidarError: it does not exist, is empty or has no such split or column, or was out of reach for ``patience``
            seconds.
    """
    load_dataset = _datasets(stream).load_dataset
    retries = _Patience(stream.path, patience)
    words, options = _arguments(stream)
    while True:
        try:
            dataset = load_dataset(*words, **options)
            break
        except StopIteration as error:
            raise TidarError(f"{stream.path} has no documents: check the path") from error
        except (FileNotFoundError, ValueError, *BROKEN) as error:
            raise TidarError(f"cannot read {stream.path} ({first_line(error)}): check path, name and split") from error
        except ImportError as error:  # of what reads http:// or a kind of compression
            raise TidarError(f"{stream.path} needs more packages ({first_line(error)}): install them") from error
        except Exception as error:  # whatever the network libraries underneath raise
            retries.wait(error)
    if dataset.features is not None and stream.text_field not in dataset.features:
        raise TidarError(no_field(stream.path, stream.text_field, list(dataset.features)))
    return Files(stream, dataset, dataset.num_shards)


def _datasets(stream: Stream) -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise TidarError(f"{stream.path} needs the datasets package: pip install 'tidar[train]'") from error
    # What goes wrong is tried again and said here, once.
    settings = datasets.config
    settings.STREAMING_READ_MAX_RETRIES = settings.STREAMING_OPEN_MAX_RETRIES = 1
    settings.STREAMING_READ_RETRY_INTERVAL = settings.STREAMING_OPEN_RETRY_INTERVAL = 0
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets


def _arguments(stream: Stream) -> tuple[list[str], dict[str, Any]]:
    """What to call `load_dataset` with."""
    options: dict[str, Any] = {"split": stream.split, "streaming": True}
    path = Path(stream.path)
    kind = KINDS.get(Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix)
    if kind is None:
        options |= {"data_files": list(stream.data_files) or None, "revision": stream.revision or None}
        return [str(path.expanduser()), *([stream.name] if stream.name else [])], options
    if kind == "text":
        options["sample_by"] = "document"
    local = "://" not in stream.path
    return [kind], {**options, "data_files": str(path.expanduser()) if local else stream.path}


class _Patience:
    """Pauses between attempts to reach ``what``, each twice as long as the one before, ``seconds`` in all."""

    def __init__(self, what: str, seconds: float) -> None:
        self.what, self.seconds = what, seconds
        self.reset()

    def reset(self) -> None:
        """It was reached."""
        self._begun, self._pause = 0.0, 1.0

    def wait(self, error: Exception) -> None:
        """Pause after ``error``, or raise TidarError if the time is up."""
        now = time.monotonic()
        self._begun = self._begun or now
        left = self._begun + self.seconds - now
        why = first_line(error)
        if left <= 0:
            raise TidarError(f"{self.what} was out of reach for {self.seconds:.0f} s ({why}): see that it can be read")
        pause = min(self._pause, left)
        print(f"{self.what} is out of reach ({why}); trying again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)


class Share:
    """The documents of one data set that fall to one of ``lanes``; `epoch` reads them.

    An epoch takes the files in an order that (seed, number, epoch) decides and deals their parts to the lanes in
    turn, so that all lanes together have each document once.

    Args:
        files: the data set.
        config: which documents to leave out.
        seed: key of the order.
        number: the data set's among the streams.
        lane: which of the ``lanes``.
        held: read the documents that are held out, and not the others.
        place: epoch, unit in it and document of its file to go on from.
    """

    def __init__(
        self,
        files: Files,
        config: DataConfig,
        *,
        seed: int,
        number: int,
        lane: int = 0,
        lanes: int = 1,
        held: bool = False,
        place: Sequence[int] = (0, 0, 0),
    ) -> None:
        self.files, self.config = files, config
        self.number, self.seed = number, seed
        self.lane, self.lanes, self.held = lane, lanes, held
        self._epoch, self._unit, self._document = place

    @property
    def place(self) -> list[int]:
        """Where the next document is looked for."""
        return [self._epoch, self._unit, self._document]

    def endless(self) -> Iterator[str]:
        """The documents of this epoch from the place on, and of all that follow.

        Raises:
            TidarError: an epoch has none, a file is broken or without text, or out of reach for too long.
        """
        while True:
            yield from self.epoch()

    def epoch(self) -> Iterator[str]:
        """The documents from the place to the end of its epoch. Raises as `endless`."""
        found = self.place[1:] != [0, 0]
        parts = self.files.parts(self.lanes)
        order = _random(self.seed, self.number, self._epoch).permutation(self.files.count)
        units = range(self.lane, len(order) * parts, self.lanes)
        while self._unit < len(units):
            file, part = divmod(units[self._unit], parts)
            for text in self._texts(int(order[file]), part, parts):
                if self._wanted(text):
                    found = True
                    yield text
            self._unit, self._document = self._unit + 1, 0
        if not found and not self.held:
            raise TidarError(
                f"{self.files.stream.path} has no document for lane {self.lane} of {self.lanes}: lower lanes, or check "
                "min_bytes, max_bytes and holdout"
            )
        self._epoch, self._unit = self._epoch + 1, 0

    def _texts(self, file: int, part: int, parts: int) -> Iterator[Any]:
        """The values of those documents of ``file`` from the place on whose number is ``part`` modulo ``parts``."""
        path = self.files.stream.path
        retries = _Patience(path, self.config.patience)
        while True:
            try:
                for column in self.files.columns(file, self._document):
                    retries.reset()
                    first = self._document
                    begin = (part - first) % parts
                    for index, text in enumerate(column[begin::parts].to_pylist()):
                        self._document = first + begin + index * parts + 1
                        yield text
                    self._document = first + len(column)
                return
            except TidarError:
                raise
            except (ValueError, *BROKEN) as error:  # pyarrow's is a ValueError
                raise TidarError(f"cannot read {path} file {file} ({first_line(error)}): mend it") from error
            except Exception as error:  # whatever the network libraries underneath raise
                retries.wait(error)

    def _wanted(self, text: Any) -> bool:
        """Whether to keep a document; absent and blank ones never."""
        if text is None:
            return False
        if not isinstance(text, str):
            self._no_text(text)
        data = text.encode("utf-8")
        if not self.config.min_bytes <= len(data) <= self.config.max_bytes or not text.strip():
            return False
        return (int.from_bytes(digest(data)[:8], "big") < self.config.holdout * 2**64) == self.held

    def _no_text(self, value: Any) -> NoReturn:
        field, kind = self.files.stream.text_field, type(value).__name__
        raise TidarError(f"{self.files.stream.path}: column {field!r} holds {kind}, not text; set text_field")


def _random(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((*key, 2))))
