"""Tokenised documents on disk: written once, memory-mapped ever after.

A cache folder holds ``tokens.bin`` (all documents end to end, uint16 if the vocabulary fits and uint32 otherwise),
``docs.bin`` (int64, N + 1 offsets into it) and ``meta.json``. Every document ends with the end-of-text token, which
is part of it. Where not every token is to be learnt, ``learned.bin`` has a byte for each, 1 or 0. A folder is whole or
absent: it is written beside its place and renamed into it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tidar.errors import TidarError

__all__ = ["CacheWriter", "TokenCache", "fresh_folder", "open_cache"]

FORMAT = 1


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that takes ``out``'s place when the block ends well, and vanishes when it does not.

    The block must write ``stats.json``: only a folder that has one is replaced, so that no other can get lost.

    Raises:
        TidarError: ``out`` holds something else, the disk is full or the folder cannot be written; ``out`` is as it
            was.
    """
    if out.exists() and not (out / "stats.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise TidarError(f"{out} holds something other than prepared data: choose another folder")
    temp = out.with_name(f".{out.name}.{os.getpid()}.partial")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        yield temp
        if out.exists():
            os.replace(out, old)
        os.replace(temp, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TidarError(f"disk full while writing {out}: free some space or choose another folder") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise TidarError(f"cannot write {out} ({error.strerror}): choose another folder") from error
        raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class CacheWriter:
    """Writes the files of a cache into ``folder``, document by document.

    Args:
        folder: an existing folder, normally one of `fresh_folder`.
        vocab_size: number of token ids; decides the width of a token on disk.
        eos_id: the id every document must end with.
        partly: whether documents say which of their tokens are learnt.
    """

    def __init__(self, folder: Path, *, vocab_size: int, eos_id: int, partly: bool = False) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.lengths: list[int] = []
        self.text_bytes = 0
        self._file = (folder / "tokens.bin").open("wb")
        self._learned = (folder / "learned.bin").open("wb") if partly else None

    def add(self, tokens: NDArray[Any], text_bytes: int, learned: NDArray[np.bool_] | None = None) -> None:
        """Appends one document: its ids, the end-of-text token last, the UTF-8 size of its text, and which tokens are
        learnt, if not all."""
        assert tokens[-1] == self.eos_id
        assert (learned is None) == (self._learned is None)
        self._file.write(tokens.astype(self.dtype, copy=False).tobytes())
        if self._learned is not None and learned is not None:
            assert len(learned) == len(tokens)
            self._learned.write(learned.astype(np.uint8).tobytes())
        self.lengths.append(len(tokens))
        self.text_bytes += text_bytes

    def close(self, extra: Mapping[str, Any] | None = None) -> None:
        """Writes offsets and meta.json, in which ``extra`` is kept too."""
        for file in filter(None, (self._file, self._learned)):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        offsets = np.cumsum([0, *self.lengths], dtype=np.int64)
        (self.folder / "docs.bin").write_bytes(offsets.tobytes())
        meta = {
            "format": FORMAT,
            "dtype": self.dtype.name,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "documents": len(self.lengths),
            "tokens": int(offsets[-1]),
            "bytes": self.text_bytes,
            "partly": self._learned is not None,
            **(extra or {}),
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in filter(None, (self._file, self._learned)):
            file.close()


@dataclass(frozen=True)
class TokenCache:
    """An open cache.

    Attributes:
        tokens: (T,) uint16 or uint32, memory-mapped.
        offsets: (N + 1,) int64; document i is ``tokens[offsets[i]:offsets[i + 1]]``.
        meta: meta.json; ``bytes`` is the UTF-8 size of the texts, without end-of-text tokens.
        learned: (T,) uint8, memory-mapped, 1 where a token is learnt; None where all are.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    meta: dict[str, Any]
    learned: NDArray[np.uint8] | None = None


def open_cache(folder: Path) -> TokenCache:
    """Maps a cache folder.

    Raises:
        TidarError: no cache there, or files of it are missing, truncated or of another format.
    """
    if not (folder / "meta.json").is_file():
        raise TidarError(f"no prepared data in {folder}: name a folder that holds meta.json, or prepare it first")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        offsets = np.fromfile(folder / "docs.bin", np.int64)
        tokens = np.memmap(folder / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r")
        learned = np.memmap(folder / "learned.bin", dtype=np.uint8, mode="r") if meta.get("partly") else None
        whole = meta["format"] == FORMAT and len(offsets) > 1 and offsets[-1] == len(tokens) == meta["tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TidarError(f"prepared data in {folder} is broken ({error}): delete it and prepare it again") from error
    if not whole or (learned is not None and len(learned) != len(tokens)):
        raise TidarError(f"prepared data in {folder} is incomplete or of another format: prepare it again")
    return TokenCache(tokens, offsets, meta, learned)
