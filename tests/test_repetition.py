"""What counts as an output that fell into repetition."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from runs.repetition import longest_loop, repeated_lines, repeats


def plainly_longest_loop(tokens: list[int]) -> int:
    longest = 0
    for period in range(4, 65):
        for start in range(len(tokens)):
            end = start + period
            while end < len(tokens) and tokens[end] == tokens[end - period]:
                end += 1
            if end - start >= 2 * period:
                longest = max(longest, end - start)
    return longest


def test_longest_loop_against_plain_search() -> None:
    draw = random.Random(0)
    found = set()
    for _ in range(300):
        tokens = [draw.randrange(3) for _ in range(draw.randrange(40))]
        assert longest_loop(tokens) == plainly_longest_loop(tokens)
        found.add(longest_loop(tokens))
    assert len(found) > 5


@pytest.mark.parametrize("period", [1, 2, 3, 4, 7, 16])
def test_a_loop_repeats_from_32_tokens_on(period: int) -> None:
    before = list(range(1000, 1100))
    loop = [i % period for i in range(40)]
    assert repeats(before + loop[:32] + before[:80], "")
    assert not repeats(before + loop[:31] + before[:80], "")


def test_an_n_gram_said_once_more_elsewhere_is_no_loop() -> None:
    assert not repeats([*range(40), 999, *range(40), *range(100, 200)], "")
    assert longest_loop(list(range(65)) * 3) == 0


def test_short_outputs_have_a_lower_bar() -> None:
    assert repeats([*range(100, 130), *[1, 2, 3, 4] * 5], "")
    assert not repeats([1, 2, 3, 4, 5] * 3, "")


def test_lines_that_count_up_repeat() -> None:
    counting = "".join(f"    assert value_{i} == {i * 7}\n" for i in range(12))
    tokens = list(counting.encode())
    assert repeated_lines(counting) == pytest.approx(11 / 12)
    assert repeats(tokens, counting)
    changing = "".join(f"    assert {a * 3} == {b * 5}\n" for a, b in zip("abcdefgh", "ijklmnop", strict=True))
    assert repeated_lines(changing) == 0  # the known limit: words that change


def test_lines_that_change_places_repeat() -> None:
    draw = random.Random(1)
    text = "\n".join(draw.choice(["first = one()", "second = two()", "third = three()"]) for _ in range(12))
    assert repeats(range(200), text)


def test_ordinary_code_does_not_repeat() -> None:
    text = Path(json.__file__).read_text()
    assert not repeats(list(text[8000:8800].encode()), text[8000:8800])
    assert not repeats([], "")
