from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar.data.dedup import PERMUTATIONS, digest, near_duplicates, signature


def text(seed: int, words: int = 400) -> list[str]:
    """Words as in a program: a few hundred different ones, signs between them."""
    draw = random.Random(seed)
    return [draw.choice([f"name{draw.randrange(300)}", "(", ")", "=", ".", "return"]) for _ in range(words)]


def code(words: list[str]) -> bytes:
    return " ".join(words).encode()


def jaccard(left: list[str], right: list[str]) -> float:
    """Written down independently of the module: over sets of five successive words."""
    a, b = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (left, right))
    return len(a & b) / len(a | b)


def changed(words: list[str], share: float, seed: int) -> list[str]:
    """A run of the words replaced."""
    count = round(share * len(words))
    return text(seed + 10_000, count) + words[count:]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.2, 0.4, 0.7, 1.0])
def test_signatures_estimate_the_similarity(share: float) -> None:
    errors = []
    for seed in range(20):
        words = text(seed)
        other = changed(words, share, seed)
        estimate = (signature(code(words)) == signature(code(other))).mean()
        errors.append(float(estimate) - jaccard(words, other))
    sigma = 0.5 / PERMUTATIONS**0.5  # at most, of one estimate
    assert max(map(abs, errors)) < 4 * sigma
    assert abs(np.mean(errors)) < 4 * sigma / 20**0.5


def test_planted_near_duplicates_are_found_and_others_stay() -> None:
    originals = [text(seed) for seed in range(150)]
    similar = [changed(words, 0.1, seed) for seed, words in enumerate(originals)]  # similarity about 0.8
    related = [changed(words, 0.45, seed) for seed, words in enumerate(originals)]  # about 0.38
    assert min(jaccard(a, b) for a, b in zip(originals, similar, strict=True)) > 0.78
    assert max(jaccard(a, b) for a, b in zip(originals, related, strict=True)) < 0.5
    twin = near_duplicates(np.stack([signature(code(w)) for w in originals + similar + related]), 0.65)
    assert twin[:150].tolist() == [-1] * 150
    assert twin[150:300].tolist() == list(range(150))
    assert twin[300:].tolist() == [-1] * 150


def test_the_earlier_document_stays_and_likeness_is_not_passed_on() -> None:
    a = text(1)
    b = changed(a, 0.12, 2)
    c = b[:340] + text(3, 60)  # like b, but too far from a
    signatures = np.stack([signature(code(w)) for w in (a, b, c)])
    assert jaccard(a, b) > 0.75
    assert jaccard(a, c) < 0.6
    assert near_duplicates(signatures, 0.65).tolist() == [-1, 0, -1]
    assert jaccard(b, c) > 0.7
    assert near_duplicates(signatures[::-1], 0.65).tolist() == [-1, 0, -1]  # c stays, b resembles it, a does not


def test_what_resembles_the_hold_out_by_half_goes() -> None:
    held, other = text(1), text(2)
    documents = [held, other, changed(held, 0.25, 3), changed(other, 0.25, 4), changed(held, 0.6, 5)]
    assert 0.55 < jaccard(held, documents[2]) < 0.65
    assert 0.55 < jaccard(other, documents[3]) < 0.65
    signatures = np.stack([signature(code(words)) for words in documents])
    assert near_duplicates(signatures, 0.75).tolist() == [-1] * 5
    assert near_duplicates(signatures, 0.75, held=1).tolist() == [-1, -1, 0, -1, -1]
    assert near_duplicates(signatures, 0.75, held=5).tolist() == [-1] * 5  # within the hold-out as elsewhere


def test_layout_does_not_count() -> None:
    assert (signature(b"def f(x):\n    return x + 1\n") == signature(b"def f( x ) :\n\treturn x+1")).all()


@settings(deadline=None, max_examples=100)
@given(data=st.binary(max_size=200))
def test_any_bytes_have_a_signature(data: bytes) -> None:
    row = signature(data)
    assert row.shape == (PERMUTATIONS,)
    assert row.dtype == np.uint32
    assert near_duplicates(np.stack([row, row]), 1.0).tolist() == [-1, 0]


def test_signatures_are_the_same_everywhere() -> None:
    """What is held out and removed must not depend on the machine or the process."""
    assert digest(signature(b"import this\n\nprint(this.s)\n").tobytes()).hex() == "c99aad91ab98a31866cef2b24afda075"


def test_no_documents() -> None:
    assert near_duplicates(np.empty((0, PERMUTATIONS), np.uint32), 0.7).tolist() == []
