"""What a run will need, before anything is loaded: memory of each GPU, speed, time.

Memory is counted, tensor by tensor, at the moment when a micro-batch's loss is computed: that is when most is held.
Speed is the recipe's arithmetic over a share of the GPU's rate of matrix products (its MFU), which is measured for some
widths by ``runs/train_speed.py`` and interpolated between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

from tidar.errors import TidarError
from tidar.train.config import Cluster, TrainConfig
from tidar.train.loss import CHUNK_ELEMENTS
from tidar.train.sizes import Sizes, Work, sizes, work

__all__ = ["Memory", "Plan", "describe", "memory", "plan"]

GIB = 2**30
MEASURED = {384: 0.19, 1536: 0.61, 4096: 0.66}
"""Width of the model: share of an NVIDIA H200's matrix rate that TiDAR training reaches, operations that activation
checkpointing repeats included (`results/metrics_tidar.jsonl`, `results/train_speed.jsonl`)."""
ROOM = 0.92
"""Share of a GPU's memory that a plan may fill; the rest is the driver's, the libraries' and fragments."""
ROLLOUT = 3.1
"""Time of a rollout's operation over one of training, there: its forwards hold one token of each block."""
RECOMPUTED = 4 / 3
"""Time of a step with activation checkpointing over one without: a second forward beside forward and backward."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        weights: in fp32, its share.
        gradients: in fp32, its share.
        optimizer: its share.
        gathered: layers whole, of several ranks; the weights as bf16 of one.
        activations: what the backward will read.
        logits: of a chunk of the loss, with their gradient, and the hidden states' gradients.
        rollout: keys, values and logits of the model's own continuations.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    rollout: float

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run on a cluster comes to.

    Attributes:
        sizes: of the model.
        memory: of one GPU.
        work: operations for one clean token.
        mfu: share of the GPU's rate.
        tokens_per_second: clean tokens, of all GPUs.
        seconds: of the whole run.
    """

    sizes: Sizes
    memory: Memory
    work: Work
    mfu: float
    tokens_per_second: float
    seconds: float


def memory(size: Sizes, config: TrainConfig, gpus: int) -> Memory:
    """Of one of ``gpus`` that share the run, when it holds most: at a micro-batch's loss."""
    low = 2 if config.dtype == "bf16" else 4
    halves = 2 if config.objective == "tidar" else 1
    text = config.micro_batch * config.seq_len
    pairs = size.pairs
    matrices = size.layer * size.layers
    rest = size.total - matrices
    trained = pairs or size.total
    momenta = 4 if config.optimizer == "muon" else 8
    optimizer = momenta * pairs / gpus if pairs else (momenta * matrices + 8 * rest) / gpus
    if gpus > 1 and config.optimizer == "muon":
        optimizer += 4 * (pairs or matrices) / gpus  # the whole copies that their owners step
    if gpus > 1:
        # The last group in fp32, adapters in it, with its gradient, and two layers: one at work, one on its way.
        gathered = (4.0 * rest + 8.0 * pairs if pairs else 8.0 * rest) + 2 * low * size.layer
    else:
        gathered = float(low * size.total) if low < 4 else 0.0
    each, keys = _layer(size, low), 2 * size.keys * size.layers
    masks = 0 if halves == 1 else text
    apart = halves == 2 and (config.mask_slice or pairs)
    if apart and config.mask_slice:
        masks = config.micro_batch * min(config.mask_slice, config.seq_len)
    rows = masks if pairs else text + masks  # that have a backward
    if config.activation_checkpointing:
        activations = rows * 4.0 * size.width * size.layers + max(text, masks) * each
    else:
        activations = 1.0 * rows * each * size.layers
    if apart:
        activations += low * keys * text + (0 if pairs else 4 * keys * text)  # as leaves, and their gradients
        copies = 1 if config.activation_checkpointing else size.layers
        activations += low * keys / size.layers * copies * (text + masks)  # before a slice's own
    seen = text + masks if not apart else max(text, masks)
    chunk = min(CHUNK_ELEMENTS, seen * size.vocab)
    # Logits in fp32 and their gradient as the products want it; hidden states, pairs and their gradients in fp32.
    logits = (4.0 + low) * chunk + 3 * 4.0 * seen * size.width
    rollout = 0.0
    if config.draft_text == "model" and halves == 2:
        blocks = text / min(config.block_sizes)
        kept = 2 * low * keys * text + 12.0 * blocks * size.vocab  # keys of text and drafts; logits, less bans, noise
        rollout = 4.0 * text * size.width  # the teacher's states stay, the rest is gone when the forward begins
        rollout += max(0.0, kept - activations - logits)
    return Memory(
        weights=4.0 * (size.total + pairs) / gpus,
        gradients=4.0 * trained / gpus,
        optimizer=optimizer,
        gathered=gathered,
        activations=activations,
        logits=logits,
        rollout=rollout,
    )


def _layer(size: Sizes, low: int) -> int:
    """Bytes of a row that a layer keeps for its backward, ``low`` of them a number in the products' dtype."""
    return (
        8 * size.width  # the residual stream twice, in fp32
        + 2 * low * size.width  # both norms' outputs
        + low * (size.queries + 2 * size.keys + size.queries + size.keys)  # projections, then rotated ones
        + low * size.queries  # what attention returned
        + 4 * size.heads  # its normalisers
        + 3 * low * size.inner  # gate, up and their product
    )


def expected_mfu(width: int) -> float:
    """Share of the matrix units' rate at a model of ``width``: as measured, between two widths in proportion to their
    logarithms, beyond them as at the last."""
    known = sorted(MEASURED.items())
    for (low, first), (high, second) in pairwise(known):
        if low <= width <= high:
            share = math.log(width / low) / math.log(high / low)
            return first + share * (second - first)
    return known[0][1] if width < known[0][0] else known[-1][1]


def plan(config: TrainConfig, cluster: Cluster) -> Plan:
    """What ``config`` needs on ``cluster``.

    Raises:
        TidarError: the model's config.json cannot be read, or the GPUs cannot share a step.
    """
    if config.accumulate % cluster.gpus:
        raise TidarError(
            f"{cluster.gpus} GPUs cannot share the {config.accumulate} micro-batches of a step: change micro_batch "
            f"(now {config.micro_batch}) or batch_tokens (now {config.batch_tokens})"
        )
    size = sizes(config)
    todo = work(size, config)
    mfu = cluster.mfu or expected_mfu(size.width)
    time = todo.training * (RECOMPUTED if config.activation_checkpointing else 1) + todo.rollout * ROLLOUT
    rate = cluster.gpus * cluster.tflops * 1e12 * mfu / time
    return Plan(
        sizes=size,
        memory=memory(size, config, cluster.gpus),
        work=todo,
        mfu=mfu,
        tokens_per_second=rate,
        seconds=config.tokens / rate,
    )


def describe(config: TrainConfig, cluster: Cluster, found: Plan) -> str:
    """``found`` in words, a remedy included if the memory does not suffice."""
    size, part = found.sizes, found.memory
    each = config.accumulate // cluster.gpus
    held = {
        "weights, gradients, optimizer": part.weights + part.gradients + part.optimizer,
        "gathered weights": part.gathered,
        "activations": part.activations,
        "logits": part.logits,
        "rollout": part.rollout,
    }
    parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in held.items() if value)
    measured = "as given" if cluster.mfu else _measured(size.width)
    hours = found.seconds / 3600 * cluster.gpus
    flops = found.work.training + found.work.rollout
    lines = [
        f"model      {size.total / 1e9:.3g} B parameters: {size.layers} layers of {size.layer / 1e6:.1f} M, embedding "
        f"and head {size.tables / 1e6:.1f} M",
        f"step       {config.batch_tokens:,} clean tokens = {cluster.gpus} GPUs x {each} micro-batches x "
        f"{config.micro_batch} rows x {config.seq_len} tokens",
        f"memory     {part.total / GIB:.1f} of {cluster.gpu_gib:.0f} GiB a GPU: {parts}",
        f"speed      {found.tokens_per_second:,.0f} clean tokens/s: {flops / 1e9:.3g} GFLOP a token at "
        f"{found.mfu:.0%} ({measured}) of {cluster.tflops:.0f} TFLOP/s",
        f"time       {config.tokens / 1e9:.3g} B tokens in {_time(found.seconds)}: {hours:,.1f} GPU-hours",
    ]
    if part.total > ROOM * cluster.gpu_gib * GIB:
        lines.append(f"too large  {_remedy(config, cluster)}")
    return "\n".join(lines)


def _measured(width: int) -> str:
    nearest = min(MEASURED, key=lambda known: abs(math.log(known / width)))
    if 0.5 <= nearest / width <= 2:
        return f"as measured at width {nearest}"
    return f"as measured at width {nearest}, which is far from {width}: give --mfu"


def _time(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:.1f} days"
    return f"{seconds / 3600:.1f} hours" if seconds >= 2 * 3600 else f"{seconds / 60:.0f} minutes"


def _remedy(config: TrainConfig, cluster: Cluster) -> str:
    """The first change, of those that change no result, with which it would fit."""
    size = sizes(config)

    def fits(gpus: int, rows: int, recompute: bool) -> bool:
        changed = replace(config, micro_batch=rows, activation_checkpointing=recompute)
        return memory(size, changed, gpus).total <= ROOM * cluster.gpu_gib * GIB

    # Fewer rows that divide these make more micro-batches of the same step, which as many GPUs can share.
    fewer = [rows for rows in range(config.micro_batch, 0, -1) if config.micro_batch % rows == 0]
    for recompute in dict.fromkeys((config.activation_checkpointing, True)):
        for rows in fewer:
            if fits(cluster.gpus, rows, recompute):
                extra = "" if recompute == config.activation_checkpointing else " --activation-checkpointing"
                return f"--micro-batch {rows}{extra} would fit"
    step = config.batch_tokens // config.seq_len
    for gpus in range(cluster.gpus + 1, step + 1):
        if step % gpus == 0 and fits(gpus, 1, True):
            return f"{gpus} GPUs with --micro-batch 1 --activation-checkpointing would hold it"
    return "no number of these GPUs would hold it: shorten --seq-len, cut --mask-slice, or take larger ones"
