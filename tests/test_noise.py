"""The noise: published Philox vectors, the right distributions, and no dependence on what else is computed."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from tidar import noise

# Random123's kat_vectors for philox4x32-10: counter and key, then the output.
KNOWN = [
    ("00000000 00000000 00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
STREAMS = (noise.SAMPLE, noise.DRAFT, noise.ACCEPT, noise.RESIDUAL)


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    x, k = list(counter), list(key)
    for _ in range(10):
        a, b = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [b >> 32 ^ x[1] ^ k[0], b % 2**32, a >> 32 ^ x[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def kolmogorov_smirnov(cumulative: Tensor) -> float:
    """p-value of the hypothesis that these values of the supposed distribution function are uniform."""
    ordered = cumulative.double().flatten().sort().values
    n = len(ordered)
    rank = torch.arange(n, dtype=torch.float64)
    distance = max(float((ordered - rank / n).max()), float(((rank + 1) / n - ordered).max()))
    return min(1.0, 2 * math.exp(-2 * n * distance**2))


@pytest.mark.parametrize(("given", "expected"), KNOWN)
def test_known_answers(given: str, expected: str) -> None:
    w = [torch.tensor([int(word, 16)]) for word in given.split()]
    out = noise.philox((w[0], w[1], w[2], w[3]), (w[4], w[5]))
    assert " ".join(f"{int(word):08x}" for word in out) == expected


def test_philox_broadcasts() -> None:
    rng = random.Random(0)
    draw = [[rng.randrange(2**32) for _ in range(3)] for _ in range(6)]
    shapes = [(3, 1, 1), (1, 3, 1), (1, 1, 3), (3, 1, 1), (1, 3, 1), (1, 1, 3)]
    w = [torch.tensor(d).view(s) for d, s in zip(draw, shapes, strict=True)]
    out = noise.philox((w[0], w[1], w[2], w[3]), (w[4], w[5]))
    full = torch.broadcast_tensors(*w)  # type: ignore[no-untyped-call]
    for i in range(27):
        words = [int(t.flatten()[i]) for t in full]
        assert [int(o.flatten()[i]) for o in out] == plain_philox(words[:4], words[4:])
    assert w[0].flatten().tolist() == draw[0]  # inputs are left alone


def test_gumbel_of_every_cell_written_down() -> None:
    seeds = torch.tensor([0, 2**63 - 1, 0x1234_5678_9ABC])
    positions = torch.tensor([[0, 7], [2**32 - 1, 2**32], [5, 2**40 + 3]])
    for stream in STREAMS:
        got = noise.gumbel(seeds, positions, 11, stream=stream)
        assert got.shape == (3, 2, 11)
        assert got.dtype == torch.float32
        for b, seed in enumerate(seeds.tolist()):
            for r, position in enumerate(positions[b].tolist()):
                for token in range(11):
                    counter = [token // 4, position % 2**32, position >> 32, stream]
                    word = plain_philox(counter, [seed % 2**32, seed >> 32])[token % 4]
                    expected = -math.log(-math.log1p(-(word + 0.5) / 2**32))
                    assert float(got[b, r, token]) == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_a_value_depends_on_its_own_key_only() -> None:
    """Bit for bit: any batch, any rows, any vocabulary, any place in the vectorised loops."""
    seeds, positions = torch.arange(5) * 977, torch.randint(0, 2**35, (5, 7))
    whole = noise.gumbel(seeds, positions, 1027)
    for vocab in [*range(1, 40), 511, 1026]:
        assert torch.equal(noise.gumbel(seeds, positions, vocab), whole[..., :vocab])
    for row in range(5):
        for place in range(7):
            alone = noise.gumbel(seeds[row : row + 1], positions[row : row + 1, place : place + 1], 1027)
            assert torch.equal(alone[0, 0], whole[row, place])
    shuffled = torch.tensor([3, 1, 4])
    assert torch.equal(noise.gumbel(seeds[shuffled], positions[shuffled], 1027), whole[shuffled])
    accepts = noise.uniform(seeds, positions, stream=noise.ACCEPT)
    assert torch.equal(noise.uniform(seeds[2:3], positions[2:3, 3:5], stream=noise.ACCEPT), accepts[2:3, 3:5])


def test_threads_do_not_matter() -> None:
    seeds, positions = torch.tensor([1, 2]), torch.arange(40).view(2, 20)
    one = noise.gumbel(seeds, positions, 5003)
    try:
        torch.set_num_threads(2)
        assert torch.equal(noise.gumbel(seeds, positions, 5003), one)
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_makes_the_same_noise() -> None:
    seeds, positions = torch.arange(4) * 977, torch.randint(0, 2**35, (4, 16))
    there = noise.gumbel(seeds.cuda(), positions.cuda(), 8192).cpu()
    torch.testing.assert_close(there, noise.gumbel(seeds, positions, 8192), rtol=2e-7, atol=1e-10)
    units = noise.uniform(seeds.cuda(), positions.cuda(), stream=noise.ACCEPT).cpu()
    assert torch.equal(units, noise.uniform(seeds, positions, stream=noise.ACCEPT))


def test_extreme_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [0, 1, 2, 2**32 - 3, 2**32 - 2, 2**32 - 1]

    def extremes(*_: object) -> tuple[Tensor, ...]:
        return tuple(torch.tensor(words).view(1, 1, -1) for _ in range(4))

    monkeypatch.setattr(noise, "philox", extremes)
    values = noise.gumbel(torch.tensor([0]), torch.tensor([[0]]), 24)[0, 0, ::4]
    assert values.isfinite().all()
    assert values[0] == pytest.approx(33 * math.log(2))  # the largest: v = 2^-33
    assert (values.diff() < 0).all()  # the tail that wins the argmax keeps all 32 bits, and so does the other
    monkeypatch.setattr(noise, "philox", lambda *_: (torch.tensor(words).view(1, -1, 1),) * 4)
    units = noise.uniform(torch.tensor([0]), torch.tensor([[0] * 6]), stream=0)
    assert 0 < units.min() < units.max() < 1


def test_distributions() -> None:
    seeds, positions = torch.arange(50), torch.arange(40).expand(50, 40)
    g = noise.gumbel(seeds, positions, 500).double()  # a million
    assert g.mean() == pytest.approx(0.5772156649, abs=5 * 1.2825 / 1e3)
    assert g.var() == pytest.approx(math.pi**2 / 6, abs=5 * 3.45 / 1e3)
    assert kolmogorov_smirnov((-(-g).exp()).exp()) > 1e-4
    assert kolmogorov_smirnov((-(-g).exp()).exp() * 0.99) < 1e-4  # the test can tell
    units = noise.uniform(torch.arange(500), torch.arange(400).expand(500, 400), stream=noise.ACCEPT)
    assert kolmogorov_smirnov(units) > 1e-4


def test_neighbouring_keys_are_independent() -> None:
    seeds, positions = torch.arange(101), torch.arange(31).expand(101, 31)
    of = {s: noise.gumbel(seeds, positions, 100, stream=s).double() for s in STREAMS}
    g = of[noise.SAMPLE]
    pairs = {
        "seed": (g[1:], g[:-1]),
        "position": (g[:, 1:], g[:, :-1]),
        "token": (g[..., 1:], g[..., :-1]),
        "lane": (g[..., 4:], g[..., :-4]),
        "seed + position": (g[1:, :-1], g[:-1, 1:]),
    } | {f"streams {a} {b}": (of[a], of[b]) for a in STREAMS for b in STREAMS if a < b}
    for name, (x, y) in pairs.items():
        r = float(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1])
        assert abs(r) * math.sqrt(x.numel()) < 5, name
        assert not (x == y).float().mean() > 1e-4, name
