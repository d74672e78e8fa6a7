"""Checkpoints of several ranks, written by a thread while training goes on.

They are those of `tidar.train.checkpoint` but for the optimizer, whose state is in ``optimizer/``: torch's distributed
checkpoint, to which each rank writes its own part. Weights are gathered on rank 0, so that ``model/`` is the same plain
folder whatever the number of ranks. Either kind is read by any number of ranks.
"""

from __future__ import annotations

import copy
import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from tidar.checkpoint import save_model
from tidar.errors import PeerError, TidarError
from tidar.model import CausalLM
from tidar.train import checkpoint
from tidar.train.checkpoint import OPTIMIZER, Progress
from tidar.train.optimizer import Optimizer
from tidar.train.parallel import whole_weights
from tidar.train.world import World

__all__ = ["Saver", "load_optimizer"]

SHARDS = "optimizer"


class Saver:
    """Writes one checkpoint at a time. Every rank calls the same methods in the same order.

    Args:
        out: the run's folder, which every rank sees.
        world: the ranks.
        keep_last: checkpoints to keep.
    """

    def __init__(self, out: Path, world: World, *, keep_last: int) -> None:
        self.out, self.world, self.keep_last = out, world, keep_last
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, model: CausalLM, optimizer: Optimizer, progress: Progress) -> None:
        """Copy what is to be saved and begin to write it, once the one before is written.

        Raises:
            TidarError: the one before could not be written.
        """
        self.wait()
        weights = whole_weights(model, self.world)
        state = {name: self._copied(value) for name, value in _named(optimizer, model).items()}
        work = (model, weights, state, copy.deepcopy(progress))
        # A daemon: a rank that loses the others must be able to end.
        self._thread = threading.Thread(target=self._run, args=work, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written any more. Raises as `save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def abandon(self) -> None:
        """Give what is being written a last minute, whatever comes of it."""
        if self._thread is not None:
            self._thread.join(timeout=60)

    def _copied(self, value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return value.detach().to("cpu", copy=True)
        return _like(value, value.to_local().detach().to("cpu", copy=True), self.world)

    def _run(self, model: CausalLM, weights: Mapping[str, Tensor], state: dict[str, Tensor], done: Progress) -> None:
        final = checkpoint.place_of(self.out, done)
        part = final.with_name(f".{final.name}.part")
        try:
            self._write(part, final, model, weights, state, done)
        except BaseException as error:
            self._failure = error
            if self.world.main:
                shutil.rmtree(part, ignore_errors=True)

    def _write(
        self,
        part: Path,
        final: Path,
        model: CausalLM,
        weights: Mapping[str, Tensor],
        state: dict[str, Tensor],
        done: Progress,
    ) -> None:
        world = self.world

        def begin() -> None:
            checkpoint.make_room(final)
            part.mkdir(parents=True)
            save_model(model, part / "model", weights=weights)
            checkpoint.write_progress(part, done)

        def shards() -> None:
            try:
                state_dict_saver.save(state, checkpoint_id=part / SHARDS, process_group=world.patient)
            except CheckpointException as error:
                cause = next(iter(error.failures.values()))[0]
                raise TidarError(f"{cause}") from error

        def finish() -> None:
            checkpoint.write_manifest(part, manifest)
            for path in [*part.rglob("*"), part]:
                checkpoint.sync(path)
            os.replace(part, final)
            checkpoint.settle(self.out, final, self.keep_last)

        try:
            world.first(begin)
            world.each(shards)
            # Each rank reads back a part of the files.
            found = world.each(lambda: checkpoint.digests(part, world.rank, world.size))
            manifest = {name: digest for part in world.gather(found) for name, digest in part.items()}
            world.first(finish)
        except PeerError:
            raise
        except (TidarError, OSError) as error:
            raise checkpoint.cannot_save(self.out, final, error.__cause__ or error) from error


def load_optimizer(folder: Path, model: CausalLM, optimizer: Optimizer, world: World) -> bool:
    """Restore the optimizer, whatever number of ranks wrote it; False if ``folder`` holds weights alone."""
    if (folder / SHARDS / ".metadata").exists():
        found = _read(folder / SHARDS, model, world)
    elif world.size == 1:
        return checkpoint.load_optimizer(folder, optimizer)
    elif (folder / OPTIMIZER).exists():
        parts = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)["optimizer"]["parts"]
        found = {
            f"{name}/{entry}": value
            for names, part in zip(_names(optimizer, model), parts, strict=True)
            for index, state in part["state"].items()
            for name, entry, value in ((names[index], entry, value) for entry, value in state.items())
        }
    else:
        return False
    _restore(optimizer, model, found)
    return True


def _names(optimizer: Optimizer, model: CausalLM) -> list[list[str]]:
    """For each part of ``optimizer`` the names of its weights, in its order."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return [[names[id(w)] for group in part.param_groups for w in group["params"]] for part in optimizer.parts]


def _named(optimizer: Optimizer, model: CausalLM) -> dict[str, Tensor]:
    """The optimizer's state; its keys are ``weight/entry``."""
    return {
        f"{names[index]}/{entry}": value
        for names, part in zip(_names(optimizer, model), optimizer.parts, strict=True)
        for index, state in part.state_dict()["state"].items()
        for entry, value in state.items()
    }


def _restore(optimizer: Optimizer, model: CausalLM, found: Mapping[str, Tensor]) -> None:
    """Give ``optimizer`` the state that `_named` returned, its tensors whole or shared in any way."""
    weights = dict(model.named_parameters())
    parts = []
    for names, part in zip(_names(optimizer, model), optimizer.parts, strict=True):
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in found.items():
            name, _, entry = key.rpartition("/")
            if name in names:
                states.setdefault(names.index(name), {})[entry] = _shared(value, weights[name])
        parts.append({"state": states, "param_groups": part.state_dict()["param_groups"]})
    optimizer.load_state_dict({"parts": parts})


def _read(folder: Path, model: CausalLM, world: World) -> dict[str, Tensor]:
    """The state in ``folder``, of each tensor what this rank holds of its weight."""
    weights = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for key, saved in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        weight = weights.get(key.rpartition("/")[0])
        if weight is None:
            raise TidarError(f"{folder} has the state of {key}, which this model has not: use the run's own settings")
        assert isinstance(saved, TensorStorageMetadata)
        size, dtype = saved.size, saved.properties.dtype
        if isinstance(weight, DTensor) and size == weight.shape:
            found[key] = _like(weight, torch.zeros(weight.to_local().shape, dtype=dtype), world)
        else:
            found[key] = torch.zeros(size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as one process wants it
        state_dict_loader.load(found, checkpoint_id=folder, process_group=world.patient, no_dist=world.size == 1)
    return found


def _like(weight: DTensor, rows: Tensor, world: World) -> DTensor:
    """``rows`` on the CPU as this rank's part of a tensor that is shared as ``weight`` is."""
    assert world.host is not None
    return DTensor.from_local(rows, world.host, weight.placements, shape=weight.shape, stride=weight.stride())


def _shared(value: Tensor, weight: nn.Parameter) -> Tensor:
    """``value`` shared as ``weight`` is, if it has its shape."""
    if not isinstance(weight, DTensor) or value.shape != weight.shape:
        return value
    mesh, placements = weight.device_mesh, weight.placements
    if isinstance(value, DTensor):
        rows = value.to_local().to(weight.to_local().device)
        return DTensor.from_local(rows, mesh, placements, shape=weight.shape, stride=weight.stride())
    return distribute_tensor(value.to(weight.device), mesh, placements, src_data_rank=None)
