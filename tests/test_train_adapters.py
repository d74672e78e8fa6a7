"""Training adapters: the base stays, the drafts learn, a run goes on to the bit; and then all the way to decoding."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapters import PROMPTS, SPEC, adapted, plain  # noqa: F401
from torch import Tensor
from train_data import config, pack, records, same_weights, weights, write_text
from transformers import AutoModelForCausalLM

import tidar
from tidar.attention import NAME
from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.errors import TidarError
from tidar.train import parallel, start
from tidar.train.config import TrainConfig
from tidar.train.inputs import Blocks, make_inputs
from tidar.train.loss import count, train_loss
from tidar.train.sizes import sizes
from tidar.train.sliced import Slices
from tidar.train.step import Stepper
from tidar.train.trainer import train
from tidar.train.world import ALONE

Folder = Callable[[str], Path]


@pytest.fixture
def base(plain: Folder) -> Path:  # noqa: F811
    return plain("llama")


def plan(root: Path, base: Path, **changes: Any) -> TrainConfig:
    if not (root / "text").exists():
        write_text(root / "text")
    return config(root, base, **{"adapter_rank": 4, "alpha": 0.0, "lr": 2e-2, "tokens": 24 * 96, **changes})


def test_from_a_base_to_its_text(base: Path, tmp_path: Path) -> None:
    result = train(plan(tmp_path, base, transition=4, tokens=48 * 96))
    assert result.model is not None
    drafts = [line["draft"] for line in records(tmp_path / "run") if "draft" in line]
    assert sum(drafts[-3:]) < 0.8 * sum(drafts[:3])
    shutil.copytree(base, tmp_path / "copy")
    text = torch.tensor(PROMPTS[:1])
    for dtype in ("bfloat16", "float32"):
        model = tidar.load(tmp_path / "copy", adapter=result.model, device="cpu", dtype=dtype)
        kind = model.core.dtype
        untouched: Any = AutoModelForCausalLM.from_pretrained(base, dtype=kind, attn_implementation=NAME).eval()
        assert torch.equal(model.core.hf(text).logits, untouched(text).logits)
    assert model.core.spec is not None and (model.core.spec.block_sizes, model.core.spec.transition) == ((3, 4), 4)
    alone = tidar.load(base, device="cpu")
    for params in (SamplingParams(max_new_tokens=30), SamplingParams(max_new_tokens=30, temperature=1.0, seed=5)):
        expected = alone.generate(PROMPTS, params, method="ar")
        for k in (2, 4):
            found = model.generate(PROMPTS, params, draft_len=k)
            assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_only_what_is_new_is_trained(base: Path, tmp_path: Path) -> None:
    made = plan(tmp_path, base, transition=4)
    model = start.model(made, None)
    named = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in named.items()}
    stepper = Stepper(model, made)
    for step in range(2):  # in the first, A learns nothing yet
        stepper([pack([[24], [9, 15]], seed=step)], step, 1e-2)
    moved = {name for name, weight in named.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in named if name.startswith(("adapters.", "transition."))}
    assert sum(p.numel() for p in stepper.parameters) == sum(named[name].numel() for name in moved)
    assert all(named[name].grad is None for name in named)

    made = replace(made, transition=0, adapter_embedding=False)
    model = start.model(made, None)
    assert model.adapters is not None
    kept = model.adapters.mask_embedding.detach().clone()
    stepper = Stepper(model, made)
    stepper([pack([[24]])], 0, 1e-2)
    assert torch.equal(model.adapters.mask_embedding, kept) and len(stepper.optimizer.parts) == 1


def test_resumed_it_is_the_same(base: Path, tmp_path: Path) -> None:
    made = plan(tmp_path, base, transition=4, tokens=12 * 96)
    train(made)
    (tmp_path / "run" / "model").rename(tmp_path / "wanted")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000012")
    kept = tmp_path / "run" / "checkpoints" / "step-00000008"
    assert {p.name for p in (kept / "model").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    train(made, resume=True)
    assert same_weights(tmp_path / "run" / "model", tmp_path / "wanted")
    assert not same_weights(tmp_path / "wanted", kept / "model")


def test_a_run_goes_on_from_adapters(base: Path, tmp_path: Path) -> None:
    first = train(plan(tmp_path, base, tokens=96)).model
    assert first is not None
    again = train(plan(tmp_path, first, adapter_rank=0, tokens=96, out=str(tmp_path / "again"))).model
    assert again is not None and not same_weights(first, again)
    assert weights(first).keys() == weights(again).keys()
    back = load_model(again)
    assert back.adapters is not None and back.adapters.spec.base == str(base)
    found = sizes(plan(tmp_path, first, adapter_rank=0))
    assert found.pairs == sum(weight.numel() for weight in back.adapters.parameters())
    assert found == replace(sizes(plan(tmp_path, base)), rest=found.rest)
    with pytest.raises(TidarError, match="are of .*q_proj.*: leave adapter_modules out"):
        train(plan(tmp_path, first, adapter_rank=0, adapter_modules=("q_proj",), out=str(tmp_path / "other")))
    whole = train(config(tmp_path, base, tokens=96, out=str(tmp_path / "whole")))
    assert whole.model is not None
    with pytest.raises(TidarError, match="has the optimizer of other weights: go on from its model/ folder"):
        train(
            plan(tmp_path, base, out=str(tmp_path / "more")),
            continue_from=str(tmp_path / "whole" / "checkpoints" / "step-00000001"),
        )
    refused: dict[str, dict[str, Any]] = {
        "have rank 4, not 8: leave adapter_rank at 0 to keep it": {"adapter_rank": 8},
        "are adapters, which act on masks": {"adapter_rank": 0, "objective": "ar"},
    }
    for message, changes in refused.items():
        with pytest.raises(TidarError, match=message):
            train(plan(tmp_path, first, out=str(tmp_path / "no"), **changes))


def test_another_base_cannot_go_on(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    made = plan(tmp_path, tmp_path / "base", tokens=4 * 96)
    train(made)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight[7, 3] += 1
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(TidarError, match="belong to other weights than those of"):
        train(made, resume=True)


def test_activations_computed_again_are_the_same(base: Path, tmp_path: Path) -> None:
    results = []
    for again in (False, True):
        made = plan(tmp_path, base, activation_checkpointing=again)
        model = start.model(made, None)
        assert model.adapters is not None
        for name, weight in model.adapters.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
        parallel.apply(model, made, ALONE)
        stepper = Stepper(model, made)
        values = stepper([pack([[24]])], 0, 1e-3)
        results.append((values, [p.detach().clone() for p in stepper.parameters]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(one, two) for one, two in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("kl_weight", [0.0, 0.75])
@pytest.mark.parametrize("mask_slice", [0, 12])
def test_the_clean_half_without_a_backward(base: Path, tmp_path: Path, kl_weight: float, mask_slice: int) -> None:
    """What is left out could reach no weight that is trained; the values reported stay."""
    model = adapted(base)
    assert model.adapters is not None
    for name, weight in model.adapters.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    inputs = make_inputs(pack([[24], [9, 15]]), Blocks(4, 1), mask_id=0, device=torch.device("cpu"))
    loss = partial(train_loss, model.head, counts=count([inputs.targets]), vocab=model.vocab_size, kl_weight=kl_weight)

    def gradients() -> dict[str, Tensor]:
        assert model.adapters is not None
        return {name: p.grad.clone() for name, p in model.adapters.named_parameters() if p.grad is not None}

    whole = loss(model.hidden(inputs.tokens, inputs.layout), inputs.targets)
    wanted = gradients()
    model.adapters.zero_grad()
    made = plan(tmp_path, base, mask_slice=mask_slice, block_sizes=(4,))
    values = Slices(model, made, kind="dense", autocast=nullcontext)(inputs, inputs.targets, loss)
    torch.testing.assert_close(values, whole)
    assert wanted.keys() == gradients().keys() == dict(model.adapters.named_parameters()).keys()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


def test_nothing_of_the_clean_half_is_kept_for_a_backward(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    inputs = make_inputs(pack([[24], [9, 15]]), Blocks(4, 1), mask_id=0, device=torch.device("cpu"))
    graphs: list[bool] = []
    hidden = model.hidden

    def noted(*words: Any, **options: Any) -> Tensor:
        out = hidden(*words, **options)
        graphs.append(out.requires_grad)
        return out

    model.hidden = noted  # type: ignore[method-assign]
    made = plan(tmp_path, base, block_sizes=(4,))
    loss = partial(train_loss, model.head, counts=count([inputs.targets]), vocab=model.vocab_size)
    Slices(model, made, kind="dense", autocast=nullcontext)(inputs, inputs.targets, loss)
    assert graphs == [False, True], "the text, then its masks"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_rank": -1}, "adapter_rank must be at least 0 and adapter_alpha above 0, not -1"),
        ({"adapter_alpha": 0.0}, "adapter_alpha above 0, not 4 and 0.0"),
        ({"objective": "ar"}, "adapters act on masks: they need objective tidar and masking full"),
        ({"masking": "random"}, "adapters act on masks"),
        ({"model": ""}, "adapters need a base: name one by model"),
    ],
)
def test_settings_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TidarError, match=message):
        replace(plan(tmp_path, tmp_path), **changes)


def test_the_scale_is_alpha_over_rank() -> None:
    assert replace(SPEC, rank=8, alpha=64.0).scale == 8
