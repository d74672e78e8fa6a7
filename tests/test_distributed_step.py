"""One step on two ranks against one step on one: every family, products in bf16, and Muon to the bit.

As a program, this is one rank of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from ranks import ended
from torch import Tensor, nn
from train_data import config, pack

from tidar.checkpoint import load_model
from tidar.train import parallel, start
from tidar.train.muon import SharedMuon
from tidar.train.optimizer import Optimizer
from tidar.train.step import Stepper
from tidar.train.world import ALONE, World, join

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Micro-batches with different numbers of labels, so that a mean of means would be another loss.
ROWS = [[24], [1] * 20 + [4], [12, 12], [3, 21]]


def stepped(
    folder: Path, world: World, compiled: bool = False, descent: bool = False, **changes: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Values of two steps, and the weights after them, on rank 0. Plain ``descent`` moves weights by their gradients,
    where Adam would follow the sign of what is nearly 0."""
    plan = config(folder, folder, micro_batch=1, batch_tokens=96, block_sizes=(4,), clip=0.5, **changes)
    model = start.model(plan, None, world)
    if compiled:  # as on a GPU, but without a code generator
        for layer in model.hf.base_model.layers:  # type: ignore[union-attr]
            layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    parallel.apply(model, plan, world)
    stepper = Stepper(model, plan, world)
    if descent:
        stepper.optimizer = Optimizer([torch.optim.SGD(stepper.parameters)])
    batches = [pack([row], seed=seed) for seed, row in enumerate(ROWS)]
    lr = 1.0 if descent else 1e-3
    values = [stepper(batches[world.rank :: world.size], step, lr)[:5] for step in (0, 1)]
    return torch.stack(values), parallel.whole_weights(model, world)


def several(ranks: int, task: str, *words: object) -> None:
    """Run ``task`` of `main` on ranks of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command += [task, *map(str, words)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    text = ended(process)
    assert process.returncode == 0, text


# Without a phase the second of `ROWS` has no block to continue, on one of the ranks.
ROLLOUT: dict[str, Any] = {"draft_text": "model", "kl_weight": 0.5, "random_phase": False}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"transition": 8, "kl_weight": 0.5},
    "qwen2": {"transition": 8, "adapter_rank": 4, "alpha": 0.0},
    "phi3": {"adapter_rank": 4, "activation_checkpointing": True},
    "gpt_neox": {"transition": 8, "activation_checkpointing": True},  # head and embedding are not tied
}


def test_every_family(converted: Callable[[str], Path], tmp_path: Path) -> None:
    folders = {family: str(converted(family)) for family in tiny.FAMILIES}
    several(2, "families", tmp_path, json.dumps(folders))
    for family, folder in folders.items():
        values, weights = torch.load(tmp_path / f"{family}.pt")
        wanted, wanted_weights = stepped(Path(folder), ALONE, optimizer="adamw", **CASES.get(family, {}))
        assert torch.allclose(values, wanted, rtol=1e-5, atol=1e-5), (family, values, wanted)
        assert weights.keys() == wanted_weights.keys()
        # AdamW's first steps follow the gradient's sign: where it is nearly 0, rounding may turn a weight's step.
        moved = [(weights[n] - w).abs() > 1e-5 for n, w in wanted_weights.items()]
        assert sum(int(m.sum()) for m in moved) <= 1e-3 * sum(m.numel() for m in moved), family


def test_compiled_layers(converted: Callable[[str], Path], tmp_path: Path) -> None:
    """One graph for all layers of a kind, none for the rollouts, whose shapes change with every forward."""
    several(2, "compiled", tmp_path, converted("llama"))
    values, _ = torch.load(tmp_path / "compiled.pt")
    wanted, _ = stepped(converted("llama"), ALONE, optimizer="adamw", **ROLLOUT)
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)


SLICED: dict[str, Any] = {"transition": 8, "kl_weight": 0.5, "activation_checkpointing": True}


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])  # layers of two kinds; head and embedding not tied
def test_slices(converted: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Several forwards and backwards a micro-batch, the first of them ended last, against the whole forward alone."""
    folder = converted(family)
    several(2, "slices", tmp_path, folder)
    wanted = stepped(folder, ALONE, descent=True, **SLICED)
    for kind in ("eager", "compiled"):
        torch.testing.assert_close(torch.load(tmp_path / f"{kind}.pt"), wanted, rtol=1e-5, atol=1e-5)


def test_bf16_products_and_fp32_sums(converted: Callable[[str], Path], tmp_path: Path) -> None:
    folder = converted("llama")
    several(2, "bf16", tmp_path, folder)
    values, weights = torch.load(tmp_path / "bf16.pt")
    wanted, _ = stepped(folder, ALONE, dtype="bf16")
    exact, _ = stepped(folder, ALONE)
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert float((values - exact).abs().max()) > 1e-4, "products are in bf16"
    torch.testing.assert_close(values, wanted, rtol=0.02, atol=0.01)


def test_muon_to_the_bit(tmp_path: Path) -> None:
    several(3, "muon", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


SHAPES = [(8, 6), (6, 8), (7, 5), (1, 4), (2, 9), (5, 5), (4, 3)]
UNUSED = 4  # a matrix that has no gradient


def muon(world: World) -> None:
    """`SharedMuon` against torch's, saved and restored between two steps."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def shared(tensor: Tensor) -> Tensor:
        assert world.mesh is not None
        return distribute_tensor(tensor, world.mesh, [Shard(0)])

    torch.manual_seed(0)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    whole = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    parts = [nn.Parameter(shared(matrix.detach().clone())) for matrix in whole]
    plain, ours = torch.optim.Muon(whole, **options), SharedMuon(parts, **options)
    for step in range(4):
        for number, (matrix, part) in enumerate(zip(whole, parts, strict=True)):
            if number != UNUSED:
                matrix.grad = torch.randn(matrix.shape)
                part.grad = shared(matrix.grad.clone())
        for optimizer in (plain, ours):
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
        for matrix, part in zip(whole, parts, strict=True):
            assert torch.equal(part.full_tensor(), matrix)  # type: ignore[attr-defined]
        if step == 1:
            state = ours.state_dict()
            assert sorted(state["state"]) == [n for n in range(len(SHAPES)) if n != UNUSED]
            ours = SharedMuon(parts, **options)
            ours.load_state_dict(state)


def main(task: str, out: Path, *words: str) -> None:
    torch.set_num_threads(1)
    world = join("cpu")
    if task == "families":
        for family, folder in json.loads(words[0]).items():
            found = stepped(Path(folder), world, optimizer="adamw", **CASES.get(family, {}))
            if world.main:
                torch.save(found, out / f"{family}.pt")
    elif task == "compiled":
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        found = stepped(Path(words[0]), world, compiled=True, optimizer="adamw", **ROLLOUT)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        if world.main:
            torch.save(found, out / "compiled.pt")
    elif task == "slices":
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for kind in ("eager", "compiled"):
            found = stepped(Path(words[0]), world, kind == "compiled", descent=True, mask_slice=9, **SLICED)
            if world.main:
                torch.save(found, out / f"{kind}.pt")
    elif task == "bf16":
        clip_grad_norm_ = torch.nn.utils.clip_grad_norm_

        def clipped(parameters: list[Any], clip: float) -> Tensor:
            gradients = [p.grad.to_local() for p in parameters]
            assert {g.dtype for g in gradients} == {torch.float32}
            assert all(bool((g != g.bfloat16()).any()) for g in gradients if g.numel() > 100), "a sum in bf16"
            return clip_grad_norm_(parameters, clip)

        torch.nn.utils.clip_grad_norm_ = clipped  # type: ignore[assignment]
        once = config(out, out, micro_batch=1, batch_tokens=48, dtype="bf16")  # one micro-batch a rank: one sum
        model = load_model(words[0])
        parallel.apply(model, once, world)
        Stepper(model, once, world)([pack([ROWS[world.rank]], seed=world.rank)], 0, 1e-3)
        torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
        found = stepped(Path(words[0]), world, dtype="bf16")
        if world.main:
            torch.save(found, out / "bf16.pt")
    else:
        muon(world)
        (out / str(world.rank)).touch()
    world.leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
