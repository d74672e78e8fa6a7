"""How a run begins: from fresh weights, from a checkpoint, or from where an earlier run stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from tidar import adapter_files
from tidar.adapters import AdapterSpec
from tidar.checkpoint import check_device, load_model
from tidar.convert import add_mask
from tidar.data.cache import open_cache
from tidar.data.config import DataConfig
from tidar.data.packing import PackedData
from tidar.data.prepare import prepare
from tidar.data.sources import documents
from tidar.data.streaming import StreamedData, beginnings, hold_out
from tidar.data.tokenizer import train_tokenizer
from tidar.errors import TidarError
from tidar.fresh import create_model
from tidar.model import CausalLM
from tidar.train import checkpoint
from tidar.train.config import TrainConfig
from tidar.train.world import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["agreed", "data", "model", "note_job", "open_data", "place", "same_data", "same_job", "write_config"]

JOB = ".job"

# What may differ between a run and its continuation: none of it changes a weight but by rounding, and what a rollout or
# random masking draws for a micro-batch.
FREE = (
    *("out", "log_every", "eval_every", "eval_tokens", "save_every", "keep_last", "max_seconds", "stop_at"),
    *("micro_batch", "mask_slice", "activation_checkpointing"),
)
FREE_DATA = ("workers", "patience")

TOKENIZER_BYTES = 50_000_000  # of text; more changes the merges little


def agreed(config: TrainConfig, resume: bool, continue_from: str, world: World) -> None:
    """Check that all ranks were asked for the same run, and that they can share it.

    Raises:
        TidarError: they were not, or they cannot; on rank 0.
        PeerError: the same, on the others.
    """
    asked = asdict(config) | {"resume": resume, "continue_from": continue_from}
    everyone = world.gather(asked)

    def check() -> None:
        for rank, other in enumerate(everyone):
            for name, value in other.items():
                if value != asked[name]:
                    raise TidarError(
                        f"rank {rank} has another recipe than rank 0: {name} is {value} there and {asked[name]} here; "
                        "start every rank with the same command and the same files"
                    )
        if config.accumulate % world.size:
            raise TidarError(
                f"{world.size} ranks cannot share the {config.accumulate} micro-batches of a step: choose micro_batch "
                f"(now {config.micro_batch}) and batch_tokens (now {config.batch_tokens}) such that batch_tokens / "
                f"(micro_batch x seq_len) is a multiple of {world.size}, or start another number of ranks"
            )

    world.first(check)


def note_job(out: Path) -> None:
    """Remember which job of torchrun has the run in ``out``."""
    if _job():
        (out / JOB).write_text(_job(), encoding="utf-8")


def same_job(out: Path) -> bool:
    """Whether torchrun started this process again, to go on with the run in ``out`` that the job had before."""
    path = out / JOB
    return bool(_job()) and path.exists() and path.read_text(encoding="utf-8") == _job()


def _job() -> str:
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"of process {os.getppid()}" if job == "none" else job  # torchrun had no id to give; it is the parent


def place(config: TrainConfig, resume: bool, continue_from: str, say: Callable[[str], None]) -> Path | None:
    """The folder to go on from; None starts afresh.

    Raises:
        TidarError: ``out`` holds a run and ``resume`` is not set, or that run had other settings.
    """
    out = Path(config.out)
    there = checkpoint.checkpoints(out)
    if resume and there:
        _check_same(out, config)
        return checkpoint.newest_whole(out, say)
    if there:
        raise TidarError(f"{out} holds a run already: continue it with --resume, or choose another --out")
    return Path(continue_from) if continue_from else None


def model(config: TrainConfig, source: Path | None, world: World = ALONE) -> CausalLM:
    """The model in fp32, from ``source`` if there is one; on the run's device, or on the CPU if ranks will share it."""
    device = config.device if world.size == 1 else "cpu"
    if source is not None:
        folder = source / "model" if (source / "model").is_dir() else source
        found = load_model(folder, device=device, dtype="float32")
    elif config.model:
        found = load_model(config.model, device=device, dtype="float32")
    else:
        tokenizer = config.tokenizer or world.first(lambda: _tokenizer(config))
        found = create_model(config.arch, tokenizer, seed=config.seed)
        found.hf.to(check_device(device))  # type: ignore[arg-type]
    if config.data.chat_template:
        found.tokenizer.chat_template = _template(config.data.chat_template)
    if config.adapter_rank or found.adapters is not None:
        _adapt(found, config)
    elif found.spec is None and config.objective == "tidar":
        if source is not None:
            raise TidarError(f"{source} has no mask token, and its optimizer would not fit one: name it by --model")
        found = add_mask(found)
    if config.objective == "tidar":
        assert found.spec is not None
        found.spec = replace(found.spec, block_sizes=tuple(sorted(set(config.block_sizes))))
        if config.transition and found.transition is None:
            if source is not None and source != folder:
                raise TidarError(
                    f"{source} has no transition, and its optimizer would not fit one: go on with --transition 0, or "
                    f"name {folder} by --model"
                )
            found.add_transition(config.transition).initialise(config.seed)
    return found


def _template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TidarError(f"cannot read the chat template {path} ({error}): name a Jinja file") from error


def _adapt(model: CausalLM, config: TrainConfig) -> None:
    """Adapters for a model that has none; either way only they are trained, and a transition."""
    if model.adapters is None:
        spec = AdapterSpec(
            rank=config.adapter_rank,
            alpha=config.adapter_alpha,
            modules=config.adapter_modules,
            base=model.path,
            digest=adapter_files.digest(model.path),
        )
        # A mask begins as the base's own, or as its mean token where it has none.
        used = range(min(len(model.tokenizer), len(model.embedding)))
        like = torch.tensor([model.mask_id] if model.spec is not None else used, device=model.device)
        model.add_adapters(spec).initialise(model.hf.get_input_embeddings(), like, config.seed)
    assert model.adapters is not None
    rank = model.adapters.spec.rank
    if config.objective == "ar" or config.masking == "random":
        raise TidarError(f"{model.path} are adapters, which act on masks: they need objective tidar and masking full")
    if config.adapter_rank not in (0, rank):
        raise TidarError(
            f"the adapters in {model.path} have rank {rank}, not {config.adapter_rank}: leave adapter_rank at 0 to "
            "keep it"
        )
    modules = model.adapters.spec.modules
    if config.adapter_modules and set(config.adapter_modules) != set(modules):
        raise TidarError(
            f"the adapters in {model.path} are of {', '.join(modules)}: leave adapter_modules out to keep them"
        )
    model.adapters.mask_embedding.requires_grad_(config.adapter_embedding)


def data(config: TrainConfig, model: CausalLM) -> tuple[Path | None, Path | None]:
    """Folders of the prepared training data, unless they are streamed, and of the hold-out, if there is one.

    Raises:
        TidarError: a source is missing or broken, or prepared for a larger vocabulary than the model's.
    """
    tokenizer, out = cast("PreTrainedTokenizerFast", model.tokenizer), Path(config.out) / "data"
    if config.data.streams:
        tokens = max(config.eval_tokens, config.micro_batch * config.seq_len)
        return None, hold_out(
            config.data, tokenizer, out, tokens=tokens, seed=config.seed
        ) if config.data.holdout else None
    folder = prepare(config.data, tokenizer, out)
    ids = open_cache(folder / "train").meta["vocab_size"]
    if ids > model.vocab_size:
        raise TidarError(
            f"the data in {folder} has {ids} token ids, the model {model.vocab_size}: prepare it with its tokenizer"
        )
    held_out = folder / "holdout"
    return folder / "train", held_out if held_out.is_dir() else None


def open_data(
    config: TrainConfig, model: CausalLM, folder: Path | None, place: dict[str, Any], rank: int = 0, size: int = 1
) -> PackedData | StreamedData:
    """The training data from ``place`` on, for one of ``size`` ranks; ``folder`` as `data` returned it."""
    shape: dict[str, Any] = {"seq_len": config.seq_len, "batch_size": config.micro_batch, "seed": config.seed}
    found: PackedData | StreamedData
    if folder is None:
        tokenizer = cast("PreTrainedTokenizerFast", model.tokenizer)
        shape |= {"accumulate": config.accumulate, "lanes": config.lanes, "rank": rank, "size": size}
        found = StreamedData(config.data, tokenizer, **shape)
    else:
        found = PackedData(folder, **shape)
    if place:
        found.load_state_dict(place)
    return found


def same_data(data: PackedData | StreamedData, world: World) -> None:
    """Check that all ranks opened the same streams: each asks the hub by itself.

    Raises:
        TidarError: they did not; on rank 0. PeerError on the others.
    """
    if isinstance(data, PackedData):
        return
    keys = world.gather(data.key())

    def check() -> None:
        for rank, key in enumerate(keys):
            if key != keys[0]:
                raise TidarError(f"rank {rank} found other streams than rank 0: {key}, not {keys[0]}; pin a revision")

    world.first(check)


def write_config(out: Path, config: TrainConfig) -> None:
    """Keep what the run was, for its continuation and for whoever reads its results."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        part = out / ".config.json.part"
        part.write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")
        os.replace(part, out / "config.json")
    except OSError as error:
        raise TidarError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def _check_same(out: Path, config: TrainConfig) -> None:
    try:
        before = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TidarError(
            f"cannot read {out / 'config.json'} ({error}): restore it, or start again elsewhere"
        ) from error
    now = json.loads(json.dumps(asdict(config)))
    for name in FREE_DATA:
        now["data"].pop(name), before.get("data", {}).pop(name, None)
    for name in now:
        if name not in FREE and before.get(name) != now[name]:
            raise TidarError(
                f"cannot resume: {name} was {before.get(name)} and is now {now[name]}; use the first run's value, or "
                "another --out"
            )


def _tokenizer(config: TrainConfig) -> Path:
    folder = Path(config.out) / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    texts = _texts(config.data)
    if config.data.streams:
        texts = beginnings(config.data, size=TOKENIZER_BYTES, seed=config.seed)
    train_tokenizer(texts, vocab_size=config.vocab_size, out=folder)
    return folder


def _texts(config: DataConfig) -> Iterator[str]:
    size = 0
    for source in config.sources:
        for document in documents(source, config):
            yield document.text
            size += len(document.text)
            if size > TOKENIZER_BYTES:
                return
