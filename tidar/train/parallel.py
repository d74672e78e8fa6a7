"""A model made ready to be trained by one process or by many, from outside: its own code knows nothing of it.

Several ranks share the weights (FSDP2): each layer is gathered for its forward and again for its backward, and its
gradient is summed over ranks where it is shared. Embeddings, head, last norm, transition and adapters form one more
group, gathered from the forward of a micro-batch to the end of its backward, since the loss reads them in between.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from tidar.model import CausalLM
from tidar.train.config import TrainConfig
from tidar.train.world import World

__all__ = ["apply", "whole_weights"]


def apply(model: CausalLM, config: TrainConfig, world: World) -> None:
    """Recompute activations if ``config`` says so; for several ranks also compile layer by layer, and shard."""
    many = world.size > 1
    compiled = many and config.compile and world.mesh is not None and world.mesh.device_type == "cuda"
    for layer in model.hf.base_model.layers:  # type: ignore[union-attr]
        if config.activation_checkpointing:
            # Nothing random is in a layer; its state need not be kept.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        if compiled:
            # Not the layer itself: the hooks that gather and share weights stay outside.
            layer.forward = torch.compile(layer.forward, dynamic=False)
    if compiled:
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    if many:
        _shard(model, config, world)


class _Root(nn.Module):
    """All weights of a model, and its backbone's forward."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.hf, self.transition, self.adapters = model.hf, model.transition, model.adapters

    def forward(self, **inputs: Any) -> Any:
        if inputs.get("past_key_values") is None:
            return self.hf.base_model(**inputs)
        with torch.compiler.set_stance("force_eager"):  # shapes change with every forward
            return self.hf.base_model(**inputs)


def _shard(model: CausalLM, config: TrainConfig, world: World) -> None:
    root = _Root(model)
    # Inputs keep their dtype: activations between layers are fp32 under autocast, as with one process.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    low = policy
    if config.dtype == "bf16":
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.hf.base_model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=world.mesh, mp_policy=low)
    # In fp32: the head's logits must not tie.
    fully_shard(root, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)
    for module in _sharded(root):
        # The loss is divided by the labels of all ranks already, so gradients are added, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model.run_by(root)


def _sharded(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def whole_weights(model: CausalLM, world: World) -> dict[str, Tensor]:
    """Copies of all weights by name, the transition's with its prefix, on the CPU of rank 0; empty elsewhere.

    Every rank must call it. Tied weights stay one tensor.
    """
    if isinstance(model.runner, FSDPModule):
        model.runner.reshard()  # a forward without backward leaves its group gathered
    found: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for name, weight in model.state_dict().items():
        if id(weight) not in made:
            full = weight.full_tensor() if isinstance(weight, DTensor) else weight
            made[id(weight)] = full.detach().to("cpu", copy=True) if world.main else full.new_empty(0)
        found[name] = made[id(weight)]
    return found if world.main else {}
