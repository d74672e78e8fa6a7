"""Drafts chosen from shortlists: the kernels against their plain twin, the twin against the transition and by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transition import PROMPTS, with_transition
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from tidar.config import SamplingParams
from tidar.decode.tidar import TidarDecoder
from tidar.kernels import reference_chain as twin
from tidar.noise import gumbel

triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
from test_kernels import _bfloat16_in_the_interpreter  # noqa: E402, F401

from tidar.kernels import chain  # noqa: E402
from tidar.kernels.reference_chain import Blocks  # noqa: E402
from tidar.kernels.shortlists import Shortlists  # noqa: E402
from tidar.proposals import KNOWN  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """A block of drafts to choose."""

    rows: int = 2
    places: int = 3
    vocab: int = 300
    width: int = 24
    temperature: tuple[float, ...] = (0.0,)
    dtype: torch.dtype = torch.float32

    def tensors(self, seed: int = 0) -> dict[str, Any]:
        """Arguments of `chain`; logits and states are views of wider tensors, with garbage around them."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        def within(values: Tensor) -> Tensor:
            wide = torch.full((values.shape[0], values.shape[1] + 2, values.shape[2] + 3), torch.nan)
            wide[:, 1:-1, : values.shape[2]] = values
            return wide.to(DEVICE)[:, 1:-1, : values.shape[2]]

        heats = [self.temperature[row % len(self.temperature)] for row in range(self.rows)]
        count = torch.randint(self.places + 1, (self.rows, 1), generator=draw)
        made = {
            "first": torch.randint(self.vocab, (self.rows,), generator=draw),
            "made": torch.arange(self.places) <= count,  # one at least
            "token_table": normal(self.vocab, self.width).to(self.dtype),
            "mix": (normal(self.vocab, self.width) * self.width**-0.5 * 2).to(self.dtype),
            "suppressed": torch.rand(self.vocab, generator=draw) < 0.2,
            "temperature": torch.tensor(heats, dtype=torch.float64),
            "seed": torch.randint(2**62, (self.rows,), generator=draw),
            "lengths": torch.randint(5000, (self.rows,), generator=draw).int(),
        }
        placed: dict[str, Any] = {name: tensor.to(DEVICE) for name, tensor in made.items()}
        placed |= {"base": within(2 * normal(self.rows, self.places, self.vocab))}
        placed |= {"state": within(normal(self.rows, self.places, self.width))}
        return placed | {"offset": 1 + seed, "sampling": any(heat > 0 for heat in heats)}

    def shortlists(self) -> Shortlists:
        """Full of what no launch may take for its own."""
        lists = Shortlists.for_step(self.rows, self.places, device=DEVICE)
        for tensor in (lists.tokens, lists.following):
            tensor.fill_(self.vocab - 1)
        lists.scores.fill_(99.0)
        lists.noise.fill_(99.0)
        return lists


def computed(case: Case, given: dict[str, Any], shortlists: Shortlists | None = None) -> Tensor:
    """Written where the decoder wants it, beside the certain tokens; every element, and nothing else."""
    return judged(case, given, shortlists)[0]


def judged(case: Case, given: dict[str, Any], shortlists: Shortlists | None = None) -> tuple[Tensor, Tensor]:
    """And the drafts' chances."""
    lists = shortlists or case.shortlists()
    drafts = torch.full((case.rows, case.places + 2), -7, device=DEVICE)
    drafts[:, 0] = given["first"]
    out, beside = drafts[:, 1:-1], torch.full((case.places + 2, case.rows), -7.0, device=DEVICE)
    chances = beside[1:-1].T
    done = chain.chain(**{**given, "first": drafts[:, 0]}, out=out, chances=chances, shortlists=lists)
    assert done is out and not lists.arrived.any()
    assert torch.equal(drafts[:, 0], given["first"]) and (drafts[:, -1] == -7).all()
    assert (beside[[0, -1]] == -7).all() and not (chances == -7).any()
    return out, chances


def listed_by_hand(base: Tensor, suppressed: Tensor) -> list[int]:
    """The list of a place, from its logits (V,)."""
    lanes, count = 8, 32
    while lanes < 128 and count * lanes < len(base):
        lanes *= 2
    groups: list[dict[int, tuple[float, int]]] = [{} for _ in range(count)]
    scores = base.masked_fill(suppressed, -torch.inf).tolist()
    for token, score in enumerate(scores):
        turn, rest = divmod(token % (count * lanes), count * 8)
        group, lane = groups[rest // 8], turn * 8 + rest % 8
        group[lane] = min(group.get(lane, (torch.inf, len(base))), (-score, token))
    filler = [(torch.inf, len(base) - 1)] * 8
    return [token for group in groups for _, token in (sorted(group.values()) + filler)[:8]]


def follows(given: dict[str, Any], drafts: Tensor, *, everywhere: bool = False) -> bool:
    """Each draft is the best of its list behind the one before it, up to rounding: of the gate's, too, in 16 bits."""
    table, mix, suppressed = (given[name].double() for name in ("token_table", "mix", "suppressed"))
    for row in range(len(drafts)):
        before = given["first"][row]
        for place in range(drafts.shape[1]):
            if not given["made"][row, place]:
                if drafts[row, place:].any():
                    return False
                break
            base = given["base"][row, place].double()
            score = base + mix @ silu(given["state"][row, place].double() + table[before])
            position = given["lengths"][row].long() + given["offset"] + place
            noise = gumbel(given["seed"][row : row + 1], position.view(1, 1), len(base))[0, 0]
            score = score + given["temperature"][row] * noise
            listed = listed_by_hand(base, suppressed.bool())
            others = torch.ones_like(suppressed)
            others[listed] = 0
            score.masked_fill_((suppressed + (0 if everywhere else others)).bool(), -torch.inf)
            before = drafts[row, place]
            if not score[before] > score.max() - (1e-2 if given["mix"].itemsize == 2 else 1e-4):
                return False
    return True


def chances_by_hand(given: dict[str, Any], drafts: Tensor) -> Tensor:
    """The probability of each draft among its list, by the logits alone."""
    table, mix, suppressed = (given[name].double() for name in ("token_table", "mix", "suppressed"))
    found = torch.zeros(drafts.shape, dtype=torch.float64)
    for row in range(len(drafts)):
        before = given["first"][row]
        for place in range(drafts.shape[1]):
            if not given["made"][row, place]:
                break  # what stands here was not drawn, and chances behind it are not asked for
            base = given["base"][row, place].double()
            score = base + mix @ silu(given["state"][row, place].double() + table[before])
            score.masked_fill_(suppressed.bool(), -torch.inf)
            before = drafts[row, place]
            listed = sorted(set(listed_by_hand(base, suppressed.bool())))
            found[row, place] = (score[before] - score[listed].logsumexp(0)).exp()
    return found


# --- the twin ---


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}])
def test_twin_is_the_transition(
    options: dict[str, float], converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twin, "KEPT", 16)  # lists of all tokens
    model = with_transition(converted("llama"))
    parts = model.transition
    assert parts is not None
    params = [SamplingParams(seed=5, **options), SamplingParams(seed=6), SamplingParams(seed=7, **options)]  # type: ignore[arg-type]
    decoder = TidarDecoder(model, draft_len=8)
    with torch.inference_mode():
        first = torch.tensor(decoder.prefill(PROMPTS, params))
        hidden = torch.randn(3, 7, 32, dtype=torch.float64)
        made = torch.arange(7) < torch.tensor([[7], [3], [0]])
        embedding = model.embedding
        suppressed = torch.zeros(model.vocab_size, dtype=torch.bool)
        suppressed[list(model.suppressed)] = True
        found = twin.chain(
            model.head(hidden),
            parts.state(rms_norm(hidden, (32,))),
            first[:, 0],
            made,
            parts.token(rms_norm(embedding, embedding.shape[-1:])),
            model.hf.get_output_embeddings().weight @ parts.out.weight,
            suppressed,
            temperature=decoder.params.temperature,
            seed=decoder.params.seed,
            lengths=decoder.lengths.int(),
            offset=1,
            sampling=decoder.params.any_sampling,
        )
        assert torch.equal(found, decoder._next_drafts(first, hidden, made, False)[:, 1:])


@pytest.mark.parametrize("vocab", [1, 77, 300, 5000])
def test_lists(vocab: int) -> None:
    draw = torch.Generator().manual_seed(vocab)
    base = torch.randint(-9, 9, (2, 2, vocab), generator=draw).float()  # many are equal
    suppressed = torch.rand(vocab, generator=draw) < 0.2
    found = twin.shortlist(base, suppressed)
    assert found.shape == (2, 2, 256)
    for scores, listed in zip(base.flatten(0, 1), found.flatten(0, 1).tolist(), strict=True):
        assert listed == listed_by_hand(scores, suppressed)
        assert scores[listed].max() >= scores.masked_fill(suppressed, -torch.inf).max()
        assert len(set(listed)) == vocab or vocab > 256


def test_the_walk_is_the_chain_where_its_tokens_are_listed() -> None:
    """Over the whole vocabulary, that is; of a small one all are listed."""
    same = 0
    for seed in range(20):
        rows, vocab = (3, 200) if seed < 3 else (1 + seed % 2, 1500)
        given = Case(rows=rows, places=4, vocab=vocab, temperature=(0.7, 0.0)).tensors(seed)
        exact = follows(given, twin.chain(**given), everywhere=True)
        assert exact or seed >= 3
        same += exact
    assert 5 < same < 20


@pytest.mark.parametrize("temperature", [(0.0,), (0.9, 0.0)])
def test_chances_of_the_twin(temperature: tuple[float, ...]) -> None:
    """By hand; of every draft that was made, and 0 of others."""
    for seed in range(3):
        case = Case(vocab=700, places=4, temperature=temperature)
        given, chances = case.tensors(seed), torch.full((2, 4), -7.0, device=DEVICE)
        given["made"][1, 2:] = False
        drafts = twin.chain(**given, chances=chances)
        assert torch.equal(drafts, twin.chain(**given))
        expected = chances_by_hand(given, drafts)
        assert (expected > 0.01).any() and not expected[1, 2:].any()
        torch.testing.assert_close(chances.cpu().double(), expected, rtol=1e-4, atol=1e-6)


# --- the kernels against the twin ---


CASES = {
    "one row, one place": Case(rows=1, places=1),
    "three rows": Case(rows=3),
    "9 places": Case(rows=1, places=9),
    "few tokens": Case(vocab=3),
    "all lanes full": Case(rows=1, vocab=1024, width=32),
    "a token more": Case(vocab=513),
    "lanes with several tokens": Case(rows=1, vocab=2 * 8192 + 5),
    "a narrow gate": Case(rows=1, width=3),
    "a wide gate": Case(rows=1, vocab=40, width=130),
    "sampled": Case(rows=1, temperature=(0.7,)),
    "sampled and greedy": Case(rows=3, temperature=(0.7, 0.0, 1.3)),
    "next to no temperature": Case(temperature=(1e-30, 1e-320)),
    "float16": Case(temperature=(0.7, 0.0), dtype=torch.float16),
    "bfloat16": Case(temperature=(0.7, 0.0), dtype=torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernel_is_the_twin(case: Case) -> None:
    """One memory for launch after launch."""
    lists = case.shortlists()
    for seed in range(2):
        given = case.tensors(seed)
        drafts, chances = judged(case, given, lists)
        assert follows(given, drafts)
        bound = 2e-2 if case.dtype.itemsize == 2 else 1e-4
        torch.testing.assert_close(chances.cpu().double(), chances_by_hand(given, drafts), rtol=bound, atol=1e-6)
        if DEVICE == "cpu":  # where no other order of sums, nor another exponential, decides near ties
            wanted = torch.full_like(chances, -7)
            assert torch.equal(drafts, twin.chain(**given, chances=wanted))
            torch.testing.assert_close(chances, wanted, rtol=1e-5, atol=1e-7)
            assert torch.equal(chain.chain(**given, shortlists=lists), drafts), "nobody asks for chances"
            assert torch.equal(lists.tokens.long(), twin.shortlist(given["base"], given["suppressed"]).flatten(0, 1))


@pytest.mark.parametrize("known", [None, (0, 1), (2, 4)])
@pytest.mark.parametrize(("block", "behind"), [(0, 0), (1, 0), (1, 1), (0, 3)])
@pytest.mark.parametrize("temperature", [(0.0,), (0.9, 0.0)])
def test_blocks_of_a_step(
    temperature: tuple[float, ...], block: int, behind: int, known: tuple[int, int] | None
) -> None:
    """Listed for all masks before it is known which draft; the twin is told which, and nothing before."""
    first, masks, levels = 6, 5, torch.tensor([[1, 3], [2, 3]], device=DEVICE)
    queries = first + 2 * masks
    given = Case(places=queries, temperature=temperature, vocab=700).tensors(block + behind)
    given["base"][:, :first] = torch.nan  # nobody drafts from these
    base, state = given.pop("base").flatten(0, 1), given.pop("state").flatten(0, 1)
    place = torch.arange(1, masks, device=DEVICE) + behind
    states = first + block * masks + place.clamp(max=masks - 1).repeat(2, 1)
    states += queries * torch.arange(2, device=DEVICE)[:, None]
    names = "temperature", "seed", "sampling"
    noise = {name: given[name] for name in names}
    drafting = {"made": (place < masks).repeat(2, 1), "lengths": given["lengths"] + levels[:, block].int() + behind}
    drafting |= {"rows": states.int(), "offset": 1}
    if known is not None:
        drafting["given"] = torch.tensor(known, dtype=torch.int32, device=DEVICE)
    found = []
    for module, lists in (
        (twin, twin.PlainLists.of(2, masks - 1, ranked=False, device=DEVICE)),
        (chain, Shortlists.for_step(2, masks - 1, states=len(base), device=DEVICE)),
    ):
        blocks, options = Blocks(queries, first, masks, levels), {"lengths": given["lengths"], "offset": 0}
        module.prepare(base.unflatten(0, (2, -1)), given["suppressed"], lists, blocks, **noise, **options, beside=True)
        out = torch.full((2, masks + 1), 33, device=DEVICE)
        chances = torch.full((2, masks - 1), -7.0, device=DEVICE)
        results = {"out": out[:, 1:-1], "chances": chances, "shortlists": lists}
        module.chain(base, state, **(given | drafting), **results)
        found.append((out, chances))
    (plain, wanted), (drafts, chances) = found
    assert torch.equal(drafts, plain) and bool((drafts[:, [0, -1]] == 33).all())
    torch.testing.assert_close(chances, wanted, rtol=1e-2, atol=1e-4)
    for row, count in enumerate(known or (0, 0)):
        assert (drafts[row, 1 : 1 + count] == 33).all() and (chances[row, :count] == KNOWN).all()
        assert not drafts[row, 1 + max(count, masks - 1 - behind) : -1].any()


@pytest.mark.slow
def test_a_large_vocabulary() -> None:
    case = Case(rows=1, vocab=50_257, width=64, temperature=(0.8,))
    given = case.tensors()
    given["made"].fill_(True)
    drafts = computed(case, given)
    assert follows(given, drafts)
    assert DEVICE == "cuda" or torch.equal(drafts, twin.chain(**given))
