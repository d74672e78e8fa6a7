"""The learning rate over a run, what decays, and the blocks drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from train_data import config

from tidar.checkpoint import load_model
from tidar.train.inputs import draw_blocks
from tidar.train.optimizer import learning_rate, make_optimizer


def test_learning_rate_rises_then_falls_as_a_cosine() -> None:
    plan = config(Path(), Path(), tokens=100_800, batch_tokens=96, warmup=0.1, lr=1.0, min_lr=0.2)
    rates = [learning_rate(plan, tokens) for tokens in range(0, 100_800, 96)]
    rise = 105  # steps
    assert rates[0] == pytest.approx(1 / rise)
    assert rates[52] == pytest.approx(53 / rise)
    assert max(rates) == rates[rise] == pytest.approx(1.0)
    assert rates[: rise - 1] == sorted(rates[: rise - 1])
    assert rates[rise:] == sorted(rates[rise:], reverse=True)
    assert rates[rise + (1050 - rise) // 2] == pytest.approx(0.6, abs=1e-3)
    assert learning_rate(plan, 100_800) == pytest.approx(0.2)
    assert learning_rate(plan, 10**9) == pytest.approx(0.2)


def test_an_empty_optimizer_warms_up_again_onto_the_same_cosine() -> None:
    plan = config(Path(), Path(), tokens=96_000, batch_tokens=96, warmup=0.1, lr=1.0, min_lr=0.0)
    since = 48_000
    assert learning_rate(plan, since, since) == pytest.approx(learning_rate(plan, since) / 100)
    assert learning_rate(plan, since + 9_600, since) == learning_rate(plan, since + 9_600)


def test_no_warm_up() -> None:
    assert learning_rate(config(Path(), Path(), warmup=0.0, lr=0.5), 0) == pytest.approx(0.5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_matrices_decay_and_embeddings_heads_norms_biases_do_not(converted: Callable[[str], Path], family: str) -> None:
    model = load_model(converted(family))
    groups = make_optimizer(config(Path(), Path(), weight_decay=0.3), model).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, weight in model.hf.named_parameters():
        matrix = weight.ndim == 2 and not any(table in name for table in ("embed", "lm_head"))
        assert decay[id(weight)] == (0.3 if matrix else 0.0), name


def test_blocks_are_drawn_by_seed_and_step_alone() -> None:
    plan = config(Path(), Path(), block_sizes=(4, 8, 8))
    drawn = [draw_blocks(plan, step) for step in range(3000)]
    assert drawn == [draw_blocks(plan, step) for step in range(3000)]
    sizes = Counter(b.k for b in drawn)
    assert sizes[8] / 3000 == pytest.approx(2 / 3, abs=0.04)
    assert {(b.k, b.phase) for b in drawn} == {(k, p) for k in (4, 8) for p in range(k)}
    other = config(Path(), Path(), block_sizes=(4, 8, 8), seed=1)
    assert [draw_blocks(other, step) for step in range(100)] != drawn[:100]
    still = config(Path(), Path(), block_sizes=(4,), random_phase=False)
    assert {draw_blocks(still, step).phase for step in range(50)} == {0}
