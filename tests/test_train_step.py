"""One optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from train_data import config, pack

from tidar.checkpoint import load_model
from tidar.train import parallel
from tidar.train.optimizer import Optimizer
from tidar.train.step import Stepper
from tidar.train.world import ALONE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def base(converted: Callable[[str], Path]) -> Path:
    return converted("llama")


def test_micro_batches_add_up_to_the_batch(base: Path, root: Path) -> None:
    """Also where they have different numbers of labels."""
    rows = [[24], [1] * 20 + [4], [12, 12], [3, 21]]
    results = []
    for size in (4, 2, 1):
        plan = config(root, base, micro_batch=size, batch_tokens=96, block_sizes=(4,), clip=1e9)
        stepper = Stepper(load_model(base, dtype="float64"), plan)
        batches = [pack(rows[i : i + size], seed=0) for i in range(0, 4, size)]
        tokens = torch.split(pack(rows, seed=0).tokens, size)
        batches = [batch._replace(tokens=part) for batch, part in zip(batches, tokens, strict=True)]
        values = stepper(batches, 0, 1e-3)
        results.append((values, {n: p.detach().clone() for n, p in stepper.model.hf.named_parameters()}))
    for values, parameters in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=1e-5, atol=1e-6)
        for name, value in parameters.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_clipping_bounds_the_gradient(base: Path, root: Path) -> None:
    moved = []
    for clip in (1e9, 1e-3):
        stepper = Stepper(load_model(base), config(root, base, clip=clip, weight_decay=0.0))
        stepper.optimizer = Optimizer([torch.optim.SGD(stepper.parameters, lr=1.0)])
        before = [p.detach().clone() for p in stepper.parameters]
        norm = float(stepper([pack([[24]])], 0, 1.0)[4])
        change = [(p.detach() - b).square().sum() for p, b in zip(stepper.parameters, before, strict=True)]
        moved.append((norm, float(torch.stack(change).sum().sqrt())))
    assert moved[0][0] == pytest.approx(moved[1][0])  # the norm reported is the one before clipping
    assert moved[0][1] == pytest.approx(moved[0][0], rel=1e-3)
    assert moved[1][1] == pytest.approx(1e-3, rel=1e-2)


def test_activations_computed_again_are_the_same(base: Path, root: Path) -> None:
    kept, again = (config(root, base, activation_checkpointing=on) for on in (False, True))
    results = []
    for plan in (kept, again):
        model, calls = load_model(base), 0
        layer = model.hf.base_model.layers[0].self_attn  # type: ignore[union-attr, index]

        def counted(*_: object) -> None:
            nonlocal calls
            calls += 1

        layer.register_forward_hook(counted)
        parallel.apply(model, plan, ALONE)
        stepper = Stepper(model, plan)
        values = stepper([pack([[24]])], 0, 1e-3)
        results.append((calls, values, [p.detach().clone() for p in stepper.parameters]))
    assert [calls for calls, *_ in results] == [1, 2]
    assert torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(one, two) for one, two in zip(results[0][2], results[1][2], strict=True))


def test_bf16_keeps_weights_and_optimizer_in_fp32(base: Path, root: Path) -> None:
    stepper = Stepper(load_model(base, dtype="float32"), config(root, base, dtype="bf16"))
    values = stepper([pack([[24]])], 0, 1e-3)
    exact = Stepper(load_model(base, dtype="float32"), config(root, base))([pack([[24]])], 0, 1e-3)
    assert {p.dtype for p in stepper.parameters} == {torch.float32}
    moments = {v.dtype for part in stepper.optimizer.parts for s in part.state.values() for v in s.values()}
    assert moments == {torch.float32}
    assert float(values[0]) == pytest.approx(float(exact[0]), rel=0.02)
    assert float(values[0]) != float(exact[0])


def test_the_share_of_kl_moves_with_the_steps(base: Path, root: Path) -> None:
    """12 steps: half way between both shares after 6."""
    moving = config(root, base, kl_from=0.2, kl_weight=1.0)
    for step, share in ((0, 0.2), (6, 0.6)):
        values = [
            Stepper(load_model(base), plan)([pack([[24]])], step, 1e-3)
            for plan in (moving, config(root, base, kl_weight=share))
        ]
        torch.testing.assert_close(values[0], values[1])
