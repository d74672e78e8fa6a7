"""The processes that train together, as torchrun started them: how they agree, and how they stop together.

A process that torchrun did not start is a world of one, which communicates with nobody.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tidar.errors import PeerError, TidarError

__all__ = ["ALONE", "World", "join", "lost"]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""Of one exchange while training. A process that dies is noticed at once; this is for one that hangs."""
PATIENCE = timedelta(days=1)
"""Of one exchange while a rank prepares data or writes a checkpoint."""


@dataclass(frozen=True, eq=False)
class World:
    """This process among the ``size`` that train together.

    Attributes:
        rank: its number; rank 0 writes files and speaks.
        size: how many there are.
        mesh: all of them, on the device they train on; None for one alone.
        host: the same on the CPU, for what goes to files.
        patient: the group for what may take long. One thread at a time may use it.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    host: DeviceMesh | None = None
    patient: Any = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """``values`` summed over all ranks, in place; the host does not wait for a GPU."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def most(self, value: float) -> float:
        """The largest ``value`` of any rank."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.item()

    def gather(self, value: T) -> list[T]:
        """Every rank's ``value``, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, value, group=self.patient)
        return cast("list[T]", found)

    def each(self, work: Callable[[], T]) -> T:
        """What ``work`` returns here.

        Raises:
            TidarError, OSError: it failed here, and on no rank before this one.
            PeerError: it failed on another rank, which says why.
        """
        if self.size == 1:
            return work()
        failure: TidarError | OSError | None = None
        try:
            result = work()
        except (TidarError, OSError) as error:
            failure = error
        failures = self.gather(None if failure is None else str(failure))
        known = [rank for rank, text in enumerate(failures) if text is not None]
        if not known:
            return result
        if failure is not None and known[0] == self.rank:
            raise failure
        raise PeerError(f"rank {known[0]} stopped: {failures[known[0]]}")

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on rank 0, where alone it runs. Raises as `each`."""
        done = self.each(lambda: [work()] if self.main else [])
        return self.gather(done)[0][0]

    def leave(self) -> None:
        """Part from the others, who leave too."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = World()


def join(device: str) -> World:
    """Meet the processes that torchrun started with this one.

    Args:
        device: ``cpu`` or ``cuda``; each process takes the GPU of its local rank.

    Raises:
        TidarError: no GPU for this rank, or the others do not come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    kind = torch.device(device)
    if kind.index is not None:
        raise TidarError(f"device {device} names one GPU for {size} ranks: use --device {kind.type}")
    if kind.type == "cuda":
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= here:
            raise TidarError(f"no GPU for local rank {local}, this machine has {here}: start --nproc-per-node {here}")
        torch.cuda.set_device(local)
    try:
        # Torchrun may keep its store over restarts: what an earlier attempt left in it must not be found.
        store, rank, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TidarError(f"the {size} ranks did not meet: {first}; start all of them with torchrun") from error
    mesh = init_device_mesh(kind.type, (size,))
    host = mesh if kind.type == "cpu" else init_device_mesh("cpu", (size,))
    return World(rank, size, mesh, host, dist.new_group(backend="gloo", timeout=PATIENCE))


def lost(error: BaseException) -> bool:
    """Whether ``error`` is what torch raises when another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(name in str(error) for name in ("gloo", "NCCL", "Connection "))
