"""Checkpoints: plain Hugging Face folders, read and written whole or not at all.

A TiDAR checkpoint keeps its ``model_type``; a ``tidar`` key in config.json, a mask token in the tokenizer and perhaps a
file ``transition.safetensors`` are all that is added, so it still loads as an autoregressive model everywhere.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch as safetensors
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers import logging as hf_logging
from transformers.utils.hub import cached_file

from tidar import adapter_files, attention
from tidar.errors import TidarError
from tidar.families import check_config
from tidar.kernels.quantised import check_kind
from tidar.model import KEY, TRANSITION, CausalLM
from tidar.quantised import quantise_model

__all__ = [
    "check_device",
    "embedded_checkpoint",
    "load_model",
    "load_tokenizer",
    "read_config",
    "save_model",
    "write_folder",
]


TRANSITION_FILE = "transition.safetensors"


def embedded_checkpoint() -> Path:
    """Where the reference checkpoint that ships with the package lies."""
    return Path(__file__).parent / "assets" / "python-17m"


def load_model(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: str | None = None,
    weights: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> CausalLM:
    """Load a local folder or a hub id.

    Args:
        path: folder or hub id; a folder of adapters brings the base that it names.
        device: ``cpu``, ``cuda``, ``cuda:1`` …
        dtype: ``float32``, ``bfloat16``, ``float64``, ``float16``, or ``auto`` for the checkpoint's own. By default
            float32 on CPU (bf16 rounding makes ties, and ties break exactness) and ``auto`` elsewhere.
        weights: ``int8`` or ``fp8`` to hold projections and head so (`tidar.quantised`); in ``dtype`` by default.
        adapter: folder of adapters (`tidar.adapters`) for masks on top of this base.

    Raises:
        TidarError: missing, damaged or unsupported checkpoint; device, dtype or weights not available; adapters of
            another base.
    """
    name = os.fspath(path)
    if adapter is None and adapter_files.found(name):
        name, adapter = adapter_files.base_of(name), name
    local = Path(name).exists()
    target = check_device(device)
    wanted = _dtype(dtype, target)
    kind = None if weights is None else check_kind(weights, target)
    config = read_config(name)
    if wanted == torch.float64:
        config._experts_implementation = "eager"  # the grouped kernels of mixture-of-experts layers know no fp64
    tokenizer = _guarded(name, local, lambda: AutoTokenizer.from_pretrained(name))
    with _quiet():
        hf, report = _guarded(
            name,
            local,
            lambda: AutoModelForCausalLM.from_pretrained(
                name, config=config, dtype=wanted, attn_implementation=attention.NAME, output_loading_info=True
            ),
        )
    absent = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if absent:
        raise TidarError(f"checkpoint {name} is damaged: {len(absent)} weights missing or misshapen, first {absent[0]}")
    parameters = hf.num_parameters()
    if kind is not None:
        quantise_model(hf, kind)  # before it moves, so that the device need not hold it whole
    try:
        hf = hf.to(target).eval()
    except torch.OutOfMemoryError:
        raise TidarError(_what_fits(name, parameters, 1 if kind else hf.dtype.itemsize, target)) from None
    model = CausalLM(hf, tokenizer, name)
    model.weights = kind
    if model.spec is not None and model.spec.transition:
        _guarded(name, local, lambda: _load_transition(model, name))
    model.probe()
    if adapter is not None:
        adapter_files.attach(model, adapter)
    return model


def read_config(path: str | os.PathLike[str]) -> PretrainedConfig:
    """The config.json of a local folder or a hub id.

    Raises:
        TidarError: missing or damaged, or of a model that is not supported.
    """
    name = os.fspath(path)
    local = Path(name).exists()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise TidarError(f"no checkpoint at {name}: give a folder with config.json and *.safetensors, or a hub id")
    config: PretrainedConfig = _guarded(name, local, lambda: AutoConfig.from_pretrained(name))
    check_config(config)
    return config


def _what_fits(name: str, parameters: int, itemsize: int, device: torch.device) -> str:
    """What a model that was too large for ``device`` needs, and what there is."""
    free = torch.cuda.mem_get_info(device)[0]
    needs = f"{name} needs {parameters * itemsize / 2**30:.1f} GiB and {device} has {free / 2**30:.1f} GiB free: "
    if itemsize > 2 and 1.1 * parameters * 2 < free:
        return needs + f"in bfloat16 its {parameters * 2 / 2**30:.1f} GiB would fit"
    return needs + f"in bfloat16 about {free / 2.2e9:.1f} billion parameters would fit"


def _load_transition(model: CausalLM, name: str) -> None:
    """The transition's weights, from a file of their own: transformers would call them unexpected."""
    assert model.spec is not None
    path = cached_file(name, TRANSITION_FILE)
    assert path is not None  # it raises
    model.add_transition(model.spec.transition).load_state_dict(safetensors.load_file(path))


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder.

    Raises:
        TidarError: there is none.
    """
    name = os.fspath(folder)
    if not Path(name).is_dir():
        raise TidarError(f"no tokenizer in {name}: prepare the corpus first (runs/corpus.py), or name another folder")
    tokenizer: PreTrainedTokenizerBase = _guarded(name, True, lambda: AutoTokenizer.from_pretrained(name))
    return tokenizer


def save_model(
    model: CausalLM,
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a plain Hugging Face folder, or one of adapters if the model has them, whole or not at all.

    Args:
        model: what to save; its spec becomes the ``tidar`` key of config.json.
        out: folder that must not exist or be empty.
        dtype: dtype of the weights in the file; the model's own by default.
        weights: what to save, named as in ``model.state_dict()``; the model's own by default.

    Raises:
        TidarError: the folder is taken, the disk is full, or the weights are quantised.
    """
    if model.weights is not None:
        raise TidarError(f"{model.weights} weights are for decoding: load the checkpoint without them to save it")

    def fill(folder: Path) -> None:
        wanted = None if dtype is None else _dtype(dtype, torch.device("cpu"))
        state = {n: p.detach() for n, p in (model.state_dict() if weights is None else weights).items()}
        if wanted is not None:
            # Tied weights stay one tensor, or they would be written twice.
            cast: dict[int, torch.Tensor] = {}
            state = {n: cast.setdefault(p.data_ptr(), p.to(wanted)) for n, p in state.items()}
        if model.adapters is not None:
            adapter_files.write(model, folder, state)
            return
        if model.spec is not None:
            setattr(model.hf.config, KEY, asdict(model.spec))
        prefix = f"{TRANSITION}."
        transition = {n.removeprefix(prefix): state.pop(n).cpu() for n in list(state) if n.startswith(prefix)}
        with _quiet():
            model.hf.save_pretrained(folder, state_dict=state)
        if wanted is not None:  # save_pretrained notes the dtype of the model, not of what it was given
            path = folder / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            config["dtype"] = str(wanted).removeprefix("torch.")
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        model.tokenizer.save_pretrained(folder)
        if transition:
            safetensors.save_file(transition, folder / TRANSITION_FILE)

    write_folder(out, fill)


def write_folder(out: str | os.PathLike[str], fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write into a folder beside ``out``, then rename: ``out`` is whole or absent.

    Raises:
        TidarError: ``out`` exists and is not empty, or it cannot be written (disk full, no permission).
    """
    final = Path(out)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise TidarError(f"{final} exists already: choose another folder, or remove it first")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise TidarError(f"cannot write {final}: {error.strerror or error}") from error
    try:
        fill(part)
        part.chmod(0o755)
        for path in part.rglob("*"):  # safetensors keeps its files from other users
            path.chmod(0o755 if path.is_dir() else 0o644)
        if final.exists():
            final.rmdir()
        os.replace(part, final)
    except Exception as error:
        # safetensors wraps the disk's errors in its own type
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise TidarError(f"cannot write {final}: {error}; free some space and try again") from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no table of missing weights on top of our one-line error."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def check_device(name: str) -> torch.device:
    """The device of this name; `TidarError` if it is not there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TidarError(f"device '{name}' is not available here: use --device cpu, or see `tidar info`") from error
    return device


def _dtype(name: str | None, device: torch.device) -> torch.dtype | str:
    if name is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if name == "auto":
        return name
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}.get(name, name)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if short not in known:
        raise TidarError(f"dtype '{name}' is unknown: use float32, bfloat16, float16 or float64")
    return known[short]


def _guarded(name: str, local: bool, load: Callable[[], Any]) -> Any:
    """Run a transformers loader; what goes wrong becomes one line with a remedy."""
    try:
        return load()
    except TidarError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if local:
            raise TidarError(f"cannot load the checkpoint in {name} (missing or damaged file): {first}") from error
        raise TidarError(
            f"cannot fetch '{name}' from the hub, and it is no local folder; check the name and the network: {first}"
        ) from error
