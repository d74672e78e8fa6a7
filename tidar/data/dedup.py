"""Exact and near duplicates among documents.

Exact: equal digests. Near: the Jaccard similarity of the documents' sets of 5 successive words (or signs), estimated
from 128 minima of random hashes (MinHash, Broder 1997; standard error 0.04 at 0.7), candidates found by 32 bands of 4
minima: a pair of similarity 0.7 is missed once in 5,000, one of 0.5 once in 8.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAK", "digest", "near_duplicates", "signature"]

PERMUTATIONS = 128
ROWS = 4  # minima of a band
SHINGLE = 5
LEAK = 0.5  # similarity from which a document is too close to a held-out one
CHUNK = 2048  # shingles hashed at once: 2 MB of intermediates stay in the cache

_WORD = re.compile(rb"\w+|[^\w\s]")
_random = np.random.Generator(np.random.Philox(20260101))
_MIX = _random.integers(0, 2**64, SHINGLE, dtype=np.uint64) | np.uint64(1)
_FACTOR = _random.integers(0, 2**64, PERMUTATIONS, dtype=np.uint64) | np.uint64(1)
_SHIFT = _random.integers(0, 2**64, PERMUTATIONS, dtype=np.uint64)


def digest(data: bytes) -> bytes:
    """16 bytes that only an equal document has."""
    return hashlib.blake2b(data, digest_size=16).digest()


def signature(data: bytes) -> NDArray[np.uint32]:
    """(128,) minima of a UTF-8 document; the share of equal ones estimates the similarity of two documents."""
    words = _WORD.findall(data)
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    hashes = np.pad(hashes, (0, max(0, SHINGLE - len(hashes))))
    count = len(hashes) - SHINGLE + 1
    shingles = np.zeros(count, np.uint64)
    for i in range(SHINGLE):
        shingles += hashes[i : i + count] * _MIX[i]
    shingles ^= shingles >> np.uint64(29)  # a multiplication alone leaves low bits unmixed
    lowest = np.full(PERMUTATIONS, 2**64 - 1, np.uint64)
    for i in range(0, count, CHUNK):
        hashed = shingles[i : i + CHUNK, None] * _FACTOR
        hashed += _SHIFT
        np.minimum(lowest, hashed.min(axis=0), out=lowest)
    return (lowest >> np.uint64(32)).astype(np.uint32)


def near_duplicates(signatures: NDArray[np.uint32], threshold: float, *, held: int = 0) -> NDArray[np.int64]:
    """For each document the earlier one that makes it superfluous, or -1 if it stays.

    Earlier documents win, so the hold-out comes first. A document is compared with those that stay only: likeness is
    not passed on along a chain.

    Args:
        signatures: (N, 128) uint32, of `signature`.
        threshold: similarity from which two documents are near duplicates.
        held: how many of the first documents are held out. Later ones resemble them from `LEAK` on: of a borrowed
            file that was worked over, too little is left for a duplicate and too much for an honest test.

    Returns:
        (N,) int64.
    """
    twin = np.full(len(signatures), -1, np.int64)
    bands: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(PERMUTATIONS // ROWS)]
    width = ROWS * signatures.itemsize
    for i, row in enumerate(signatures):
        raw = row.tobytes()
        hits = [band[raw[b * width : (b + 1) * width]] for b, band in enumerate(bands)]
        candidates = sorted({j for hit in hits for j in hit})
        if candidates:
            limits = [LEAK if j < held <= i else threshold for j in candidates]
            alike = (signatures[candidates] == row).mean(axis=1) >= np.minimum(limits, threshold)
            if alike.any():
                twin[i] = candidates[int(alike.argmax())]
                continue
        for hit in hits:
            hit.append(i)
    return twin
