"""Random requests against autoregressive decoding, and random bytes against the readers of data."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from picking import anything, steer
from pyarrow import parquet
from tiny import FAMILIES

from tidar.api import Model
from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.data.config import DataConfig
from tidar.data.sources import documents
from tidar.decode import generation
from tidar.decode.generation import Completion
from tidar.decode.plan import Shape
from tidar.decode.policy import Fixed
from tidar.decode.tidar import TidarDecoder, _Picked
from tidar.errors import TidarError

pytestmark = pytest.mark.slow

Prompt = tuple[int, ...]
Request = tuple[Prompt, SamplingParams]


class Guided(TidarDecoder):
    """Drafts are the coming text, or the model's own with a given probability: a step commits any number of tokens.

    And what it drafts for is anything.
    """

    def __init__(
        self, *args: object, truth: Mapping[Request, Sequence[int]], own: float, counts: set[int], **kwargs: object
    ) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.truth = truth
        self.own = own
        self.counts = counts
        self.random = random.Random(0)
        self.wish = anything()

    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        self.ahead = [[*p, *self.truth[tuple(p), q]] for p, q in zip(prompts, params, strict=True)]
        return super().prefill(prompts, params)

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.ahead = [self.ahead[r] for r in rows]

    def _pick(self, shape: Shape) -> _Picked:
        steer(self, self.wish, shape)
        return super()._pick(shape)

    def _verify(self, hidden: torch.Tensor, shape: Shape, picked: _Picked) -> tuple[torch.Tensor, torch.Tensor]:
        accepted, follow = super()._verify(hidden, shape, picked)
        self.counts.update(accepted.tolist())
        return accepted, follow

    def _next_drafts(self, first: torch.Tensor, hidden: torch.Tensor, made: torch.Tensor, *rest: Any) -> torch.Tensor:
        drafts = super()._next_drafts(first, hidden, made, *rest)
        drafts = torch.nn.functional.pad(drafts, (0, self.draft_len - drafts.shape[1]))  # without proposals too
        for row, length in enumerate(self.cache.lengths):
            for place in range(1, self.draft_len):
                if self.random.random() >= self.own:
                    drafts[row, place] = self.ahead[row][length + place]
        return drafts


def guided(
    model: Model,
    requests: Sequence[Request],
    k: int,
    proposals: int | None,
    batch: int,
    own: float,
    alternates: int = 0,
) -> tuple[list[Completion], set[int]]:
    """The answers, and the numbers of accepted drafts that occurred; proposals may be 0."""
    prompts, params = [list(p) for p, _ in requests], [q for _, q in requests]
    endless = [SamplingParams(**{**q.__dict__, "stop": (), "ignore_eos": True}) for q in params]
    ahead = model.generate(prompts, endless, method="ar")
    # The last step looks past the end.
    truth = {request: [*answer.token_ids, *[0] * 2 * k] for request, answer in zip(requests, ahead, strict=True)}
    counts: set[int] = set()

    def make() -> Guided:
        sizes = {"draft_len": k, "proposals": proposals or None, "alternates": alternates}
        decoder = Guided(model.core, **sizes, truth=truth, own=own, counts=counts)
        if proposals == 0:
            decoder.policy = Fixed(k, 0)
        return decoder

    return generation.generate(model.core, prompts, params, make, batch), counts


def said(answers: Sequence[Completion]) -> list[tuple[list[int], str, str]]:
    return [(a.token_ids, a.text, a.finish_reason) for a in answers]


@cache
def fp64(folder: Path) -> Model:
    return Model(load_model(folder, dtype="float64"))


def ending_at(model: Model, tokens: frozenset[int]) -> Model:
    """The same model with other end-of-text tokens: its own would hardly come."""
    other = object.__new__(type(model.core))
    other.__dict__ = {**model.core.__dict__, "eos_ids": tokens}
    return Model(other)


SAMPLING = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.8]) | st.floats(0.01, 5),
    top_k=st.sampled_from([0, 0, 1, 300]) | st.integers(2, 60),
    top_p=st.just(1.0) | st.floats(0.02, 1),
    repetition_penalty=st.just(1.0) | st.floats(0.5, 2),
    seed=st.integers(0, 2**63 - 1),
    stop=st.lists(st.text("aeiou 0_(", min_size=1, max_size=2), max_size=2).map(tuple),
    ignore_eos=st.booleans(),
)
REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, 255), min_size=1, max_size=40).map(tuple), SAMPLING), min_size=1, max_size=5
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_request_of_any_family(family: str, converted: Callable[[str], Path]) -> None:
    """Rows of one batch with parameters of their own, ends anywhere, drafts from useless to perfect."""
    model = fp64(converted(family))
    occurred: set[int] = set()

    long = SamplingParams(max_new_tokens=40, ignore_eos=True)

    # Chance alone may leave a number of accepted drafts out; this one does not.
    @example(
        requests=[((n, 98, 99), long) for n in range(4)],
        k=4,
        every=True,
        some=0,
        alternates=2,
        batch=4,
        own=0.4,
        eos=frozenset(),
    )
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        requests=REQUESTS,
        k=st.sampled_from([4, 16, 1, 2, 3, 5, 8]),
        every=st.booleans(),
        some=st.integers(0, 16),
        alternates=st.integers(0, 3),
        batch=st.integers(1, 5),
        own=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
        eos=st.frozensets(st.integers(0, 255), max_size=12),
    )
    def check(
        requests: list[Request],
        k: int,
        every: bool,
        some: int,
        alternates: int,
        batch: int,
        own: float,
        eos: frozenset[int],
    ) -> None:
        ending = ending_at(model, eos)
        expected = [ending.generate([list(p)], q, method="ar")[0] for p, q in requests]
        proposals = None if every else min(some, k)
        got, counts = guided(ending, requests, k, proposals, batch, own, alternates)
        assert said(got) == said(expected)
        assert all(new.forwards <= old.forwards for new, old in zip(got, expected, strict=True))
        occurred.update(counts)

    check()
    assert occurred >= {1, 2, 3, 4}, "the drafts were never accepted: nothing was tested"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, top_p=0.95),
        SamplingParams(temperature=1.5, top_k=50, top_p=0.9, repetition_penalty=1.2),
        SamplingParams(repetition_penalty=1.3),
    ],
    ids=["nucleus", "all", "greedy with penalty"],
)
def test_long_samples(qwen3: Model, k: int, params: SamplingParams) -> None:
    """As much text as the model has positions for, in rows that end at different times."""
    requests = [
        (tuple(prompt), SamplingParams(**{**params.__dict__, "max_new_tokens": new, "seed": new, "ignore_eos": True}))
        for prompt, new in (
            (b"def f(x):\n    return x", 440),
            (b"a", 300),
            (b"class A:\n", 480),
            (b"0123456789" * 9, 390),
        )
    ]
    alone = [qwen3.generate([list(p)], q, method="ar")[0] for p, q in requests]
    assert [len(a.token_ids) for a in alone] == [q.max_new_tokens for _, q in requests]
    assert said(qwen3.generate([list(p) for p, _ in requests], [q for _, q in requests], draft_len=k)) == said(alone)
    got, counts = guided(qwen3, requests, k, None, 4, 0.1)
    assert said(got) == said(alone)
    assert counts == set(range(1, k + 1))


def read(path: Path) -> list[str]:
    """The texts of a file; an error must be one line that names it."""
    texts: list[str] = []
    refused: TidarError | None = None
    try:
        texts.extend(document.text for document in documents(str(path), DataConfig(sources=(str(path),))))
    except TidarError as error:
        refused = error
    assert refused is None or (path.name in str(refused) and "\n" not in str(refused)), str(refused)
    return texts


@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=80), name=st.sampled_from(["x.txt", "x.jsonl", "x.jsonl.gz", "x.parquet"]))
def test_any_bytes_as_data(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    for text in read(path):
        assert text.encode() in data or name != "x.txt"


@settings(max_examples=4000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["jsonl", "jsonl.gz", "parquet"]),
    at=st.floats(0, 1),
    value=st.integers(0, 255),
    cut=st.booleans(),
)
def test_any_damage_to_data(
    intact: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, kind: str, at: float, value: int, cut: bool
) -> None:
    data = bytearray(intact[kind])
    place = min(int(at * len(data)), len(data) - 1)
    data[place] = value
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(data[:place] if cut else data)
    for text in read(path):
        text.encode()


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    rows = [{"text": f"déf f{i}(x):\n    return {i}"} for i in range(30)]
    lines = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    path = tmp_path_factory.mktemp("intact") / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "parquet": path.read_bytes()}
