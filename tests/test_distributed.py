"""Training on several ranks: the same numbers as on one, nothing lost or twice, and runs that go on after anything."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from train_data import records, same_weights, weights, write_text

from tidar.checkpoint import load_model
from tidar.data.cache import open_cache
from tidar.data.packing import PackedData
from tidar.train import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_text(folder / "text", documents=80)
    return folder


@pytest.fixture(scope="module")
def recipe(root: Path, converted: Callable[[str], Path]) -> Path:
    return ranks.write_recipe(root / "recipe.toml", converted("qwen3"), root / "text")


@pytest.fixture(scope="module")
def one(root: Path, recipe: Path) -> Path:
    """What one process makes of the recipe."""
    ranks.run(recipe, root / "one", ranks=1)
    return root / "one"


@pytest.fixture(scope="module")
def two(root: Path, recipe: Path) -> Path:
    """What two ranks make of it."""
    ranks.run(recipe, root / "two")
    return root / "two"


def curve(out: Path) -> list[list[float]]:
    """Step, losses and gradient norm of every step."""
    return [[r[n] for n in ("step", "loss", "ar", "draft", "kl", "grad_norm")] for r in records(out) if "loss" in r]


def same_curve(one: Path, two: Path, bound: float = 1e-5) -> None:
    first, second = torch.tensor(curve(one)), torch.tensor(curve(two))
    assert first[:, 0].tolist() == second[:, 0].tolist() == list(range(1, len(first) + 1))
    assert float((first - second).abs().max()) < bound


def close_weights(one: Path, two: Path) -> None:
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_two_ranks_learn_what_one_does(one: Path, two: Path) -> None:
    assert len(curve(one)) == 20
    same_curve(one, two)
    close_weights(one / "model", two / "model")
    for name in ("bits_per_byte", "draft_3", "rollout_tokens_per_forward_4"):
        found = [[r[name] for r in records(out) if name in r] for out in (one, two)]
        assert found[0] == pytest.approx(found[1], abs=1e-4), name
    assert load_model(two / "latest" / "model").transition is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"draft_text": "model", "rollout_sampled": 0.5, "offset_decay": 0.9, "activation_checkpointing": True},
        {"masking": "random", "transition": 0},
        {"objective": "ar", "transition": 0},
    ],
    ids=["rollout", "random", "ar"],
)
def test_other_objectives(
    root: Path, converted: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    plan = ranks.write_recipe(
        tmp_path / "recipe.toml", converted("qwen3"), root / "text", **{"tokens": 6 * 144, **changes}
    )
    ranks.run(plan, tmp_path / "one", ranks=1)
    ranks.run(plan, tmp_path / "two")
    names = ("step", "loss", "ar", "grad_norm")
    one, two = ([[r[n] for n in names] for r in records(tmp_path / o) if "loss" in r] for o in ("one", "two"))
    assert len(one) == 6
    assert torch.allclose(torch.tensor(one), torch.tensor(two), rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_kill_9_of_one_rank(recipe: Path, two: Path, tmp_path: Path, optimizer: str) -> None:
    """Torchrun starts all ranks again, and they go on by themselves."""
    if optimizer == "muon":
        two = tmp_path / "two"
        ranks.run(recipe, two, "--optimizer", optimizer)
    lines = ranks.run(recipe, tmp_path / "run", "--optimizer", optimizer, fault="kill:1:13", restarts=1)
    assert same_weights(tmp_path / "run" / "model", two / "model")
    assert curve(tmp_path / "run") == curve(two)
    assert sum("step 11 ·" in line for line in lines) == 2, "the steps since the checkpoint were done again"


def test_kill_9_of_one_rank_and_a_resume_by_hand(recipe: Path, two: Path, tmp_path: Path) -> None:
    for rank, step in ((0, 7), (1, 12)):
        lines = ranks.run(recipe, tmp_path / "run", "--resume", fault=f"kill:{rank}:{step}", ok=False)
        assert ranks.errors(lines) == [
            f"rank {1 - rank} has lost another rank, which was killed or says why it stopped; go on with --resume"
        ]
    ranks.run(recipe, tmp_path / "run", "--resume")
    assert same_weights(tmp_path / "run" / "model", two / "model")
    assert curve(tmp_path / "run") == curve(two)


def test_training_goes_on_while_a_checkpoint_is_written(recipe: Path, tmp_path: Path) -> None:
    out, short = tmp_path / "run", ("--tokens", str(9 * 144))
    lines = ranks.run(recipe, out, *short, fault="slow:0:0")
    done = [line for line in lines if " written when " in line]
    assert [line.split()[0] for line in done] == [".step-00000005.part", ".step-00000009.part"]
    assert int(done[0].split()[3]) > 5
    shutil.rmtree(checkpoint.checkpoints(out)[0])
    (out / "model").rename(tmp_path / "wanted")
    ranks.run(recipe, out, *short, "--resume")
    assert same_weights(out / "model", tmp_path / "wanted"), "what was written is a copy of step 5"


def test_kill_9_while_a_checkpoint_is_written(recipe: Path, two: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ranks.run(recipe, out, fault="slowkill:1:7", ok=False)
    assert [p.name for p in (out / "checkpoints").iterdir()] == [".step-00000005.part"]
    ranks.run(recipe, out, "--resume")
    assert same_weights(out / "model", two / "model")
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 2)])
def test_another_number_of_ranks_goes_on(recipe: Path, one: Path, tmp_path: Path, before: int, after: int) -> None:
    ranks.run(recipe, tmp_path / "run", ranks=before, fault="term:0:9")
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run")] == ["step-00000010", "step-00000005"]
    lines = ranks.run(recipe, tmp_path / "run", "--resume", ranks=after)
    assert not any("warms up again" in line for line in lines)
    same_curve(one, tmp_path / "run")
    close_weights(one / "model", tmp_path / "run" / "model")


@pytest.mark.parametrize("to", ["torchrun", "one rank"])
def test_sigterm(recipe: Path, two: Path, tmp_path: Path, to: str) -> None:
    if to == "one rank":
        lines = ranks.run(recipe, tmp_path / "run", fault="term:1:7")
    else:
        process = ranks.start(recipe, tmp_path / "run")
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        lines = process.communicate(timeout=ranks.TIMEOUT)[1].splitlines()
    said = [line for line in lines if line.startswith("stopped by SIGTERM at step")]
    assert len(said) == 1 and said[0].endswith("; go on with --resume")
    step = int(said[0].split("step ")[1].split(";")[0])
    assert 3 <= step < 20
    assert (tmp_path / "run" / "latest").resolve().name == f"step-{step:08d}"
    assert not ranks.errors(lines)
    ranks.run(recipe, tmp_path / "run", "--resume")
    assert same_weights(tmp_path / "run" / "model", two / "model")


def test_every_document_once_an_epoch(root: Path, converted: Callable[[str], Path], tmp_path: Path) -> None:
    """What the ranks were given, put together again: three epochs of the stream, in its order."""
    text = write_text(tmp_path / "text", documents=40)
    plan = ranks.write_recipe(tmp_path / "recipe.toml", converted("qwen3"), text, micro_batch=2, batch_tokens=8 * 24)
    ranks.run(plan, tmp_path / "probe", "--tokens", "192", ranks=1)
    folder = next((tmp_path / "probe" / "data").rglob("train"))
    cache = open_cache(folder)
    size = len(cache.tokens)
    steps = -(-3 * size // (8 * 24))
    ranks.run(plan, tmp_path / "run", "--tokens", str(steps * 8 * 24), fault="record:0:0")
    taken: dict[tuple[int, int], Any] = {}
    for rank in (0, 1):
        lines = (tmp_path / "run" / f"rank-{rank}.jsonl").read_text().splitlines()
        assert len(lines) == steps
        for step, batches in map(json.loads, lines):
            for number, batch in enumerate(batches):
                taken[step, number * 2 + rank] = batch
    assert sorted(taken) == [(step, number) for step in range(steps) for number in range(4)]
    stream = PackedData(folder, seq_len=24, batch_size=2, seed=0)
    assert [taken[key] for key in sorted(taken)] == [
        [part.tolist() for part in stream.next()[:3]] for _ in range(4 * steps)
    ], "same rows in the same order as one process takes"
    # Without the shuffle of rows: every document whole, once an epoch.
    plain = PackedData(folder, seq_len=24, batch_size=1, seed=0, window=1)
    rows = Counter(tuple(row) for batch in taken.values() for row in batch[0])
    assert sum(rows.values()) == steps * 8
    flat = [token for _ in range(steps * 8) for token in plain.next().tokens[0].tolist()]
    documents = Counter(
        tuple(cache.tokens[a:b].tolist()) for a, b in zip(cache.offsets[:-1], cache.offsets[1:], strict=True)
    )
    for epoch in range(3):
        assert _split(flat[epoch * size : (epoch + 1) * size], cache.meta["eos_id"]) == documents
    window = min(4096, size // 24)
    whole = steps * 8 // window * window  # rows of windows that were taken to their end
    ordered = [tuple(flat[i * 24 : (i + 1) * 24]) for i in range(whole)]
    given = [tuple(row) for key in sorted(taken) for row in taken[key][0]][:whole]
    assert Counter(given) == Counter(ordered)


def _split(tokens: list[int], end: int) -> Counter[tuple[int, ...]]:
    documents, begin = [], 0
    for place, token in enumerate(tokens):
        if token == end:
            documents.append(tuple(tokens[begin : place + 1]))
            begin = place + 1
    assert begin == len(tokens)
    return Counter(documents)
