"""Adapters of masks on disk: PEFT's two files for LoRA, under a type that PEFT does not know.

``adapter_config.json`` and ``adapter_model.safetensors`` have the keys and tensor names of PEFT's LoRA, but loaded as
one they would act on every token. So ``peft_type`` is `TYPE`, which PEFT refuses, and one tensor, the masks' embedding,
is none that LoRA has. The ``tidar`` key holds the `Spec`; a transition lies in the same file.

On another base their drafts would be poor without a word. So the digest of the base's weights is kept and checked: of
all their bytes, since a model tuned a little further may differ in a few rows or in the last bits, which a sample would
miss. It is of tensors, not of files: a copy may be cut into files elsewhere, but not be in another dtype.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import safetensors.torch as safetensors
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from tidar.adapters import AdapterSpec
from tidar.errors import TidarError
from tidar.model import ADAPTERS, KEY, TRANSITION, CausalLM, Spec

__all__ = ["TYPE", "attach", "base_of", "digest", "found", "read", "write"]

TYPE = "TIDAR_MASK_LORA"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
THREADS = 8


def found(path: str | os.PathLike[str]) -> bool:
    """Whether this local folder holds adapters instead of a model."""
    return (Path(path) / CONFIG).exists()


def read(folder: str | os.PathLike[str]) -> tuple[AdapterSpec, Spec]:
    """What the adapters in ``folder`` are, and what they make of their base.

    Raises:
        TidarError: no adapters, or those of another kind.
    """
    path = Path(folder) / CONFIG
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kind = kept.get("peft_type")
        if kind != TYPE:
            raise TidarError(
                f"{folder} holds {kind} adapters, which act on every token: merge them into their base with PEFT, and "
                "load that"
            )
        spec = AdapterSpec(
            rank=int(kept["r"]),
            alpha=float(kept["lora_alpha"]),
            modules=tuple(kept["target_modules"]),
            base=str(kept["base_model_name_or_path"]),
            digest=str(kept[KEY]["base_sha256"]),
        )
        return spec, Spec(**{n: v for n, v in kept[KEY].items() if n != "base_sha256"})
    except FileNotFoundError as error:
        raise TidarError(f"no adapters in {folder}: give a folder with {CONFIG} and {WEIGHTS}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, TidarError):
            raise
        raise TidarError(f"{path} is damaged ({error}): restore it, or train the adapters again") from error


def base_of(folder: str | os.PathLike[str]) -> str:
    """Folder or hub id of the base that the adapters in ``folder`` name.

    Raises:
        TidarError: as `read`, or the folder is gone.
    """
    base = read(folder)[0].base
    if not Path(base).exists() and base.count("/") != 1:
        raise TidarError(
            f"the base of the adapters in {folder} was {base}, which is not there: name a copy (--model COPY --adapter "
            f"{folder})"
        )
    return base


def attach(model: CausalLM, folder: str | os.PathLike[str]) -> None:
    """Give a base the adapters in ``folder``.

    Raises:
        TidarError: they belong to another base, or they are damaged.
    """
    spec, own = read(folder)
    if digest(model.path) != spec.digest:
        raise TidarError(
            f"the adapters in {folder} belong to other weights than those of {model.path}: give a copy of their base, "
            f"{spec.base}"
        )
    model.spec = replace(own, block_sizes=tuple(own.block_sizes))
    adapters = model.add_adapters(replace(spec, base=model.path))
    model.transition = None if not own.transition else model.add_transition(own.transition)
    try:
        state = safetensors.load_file(Path(folder) / WEIGHTS)
        state = {name.removeprefix(PREFIX): weight for name, weight in state.items()}
        if model.transition is not None:
            inner = f"{TRANSITION}."
            names = [name for name in state if name.startswith(inner)]
            model.transition.load_state_dict({name.removeprefix(inner): state.pop(name) for name in names})
        adapters.load_state_dict(state)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise TidarError(f"the adapters in {folder} are damaged: {first}; restore {WEIGHTS}") from error
    model.path = str(folder)


def write(model: CausalLM, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write a model's adapters into ``folder``; ``state`` as in `CausalLM.state_dict`."""
    assert model.adapters is not None and model.spec is not None
    spec = model.adapters.spec
    kept = {
        "peft_type": TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "target_modules": list(spec.modules),
        KEY: {**asdict(model.spec), "base_sha256": spec.digest},
    }
    (folder / CONFIG).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    named = {f"{PREFIX}{name.removeprefix(f'{ADAPTERS}.')}": weight.cpu() for name, weight in state.items()}
    safetensors.save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


def digest(name: str | os.PathLike[str]) -> str:
    """SHA-256 of the names, types, shapes and bytes of all tensors of a checkpoint, a folder or a hub id; however they
    are cut into files.

    Raises:
        TidarError: its weights are not in ``*.safetensors``.
    """
    base = os.fspath(name)
    index = cached_file(base, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = [SAFE_WEIGHTS_NAME]
    if index is not None:
        files = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    paths = [cached_file(base, file, _raise_exceptions_for_missing_entries=False) for file in files]
    parts: list[tuple[str, str]] = []
    for file, path in zip(files, paths, strict=True):
        if path is None:
            raise TidarError(f"{base} has no {file}: save it with save_pretrained, which writes safetensors")
        with safe_open(path, framework="pt") as tensors, ThreadPoolExecutor(THREADS) as threads:
            keys = list(tensors.keys())
            parts += zip(keys, threads.map(lambda key: _digest(tensors.get_tensor(key)), keys), strict=True)
    return hashlib.sha256("\n".join(f"{key} {part}" for key, part in sorted(parts)).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"
