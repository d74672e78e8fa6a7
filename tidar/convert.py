"""``tidar convert``: give an autoregressive checkpoint a mask token, and nothing else."""

from __future__ import annotations

import os

import torch
from transformers import AddedToken

from tidar.checkpoint import load_model, save_model
from tidar.errors import TidarError
from tidar.model import CausalLM, Spec

__all__ = ["add_mask", "convert"]

MASK_TOKEN = "<|mask|>"


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> CausalLM:
    """Write a copy of ``source`` that has a mask token and a ``tidar`` key; its text stays the same.

    Args:
        source: local folder or hub id of a supported family.
        out: folder to write; must not exist or be empty.

    Returns:
        The converted model, as saved. It drafts badly until it is trained.

    Raises:
        TidarError: unsupported source, already converted, or ``out`` cannot be written.
    """
    model = load_model(source, dtype="auto")
    if model.spec is not None:
        raise TidarError(f"{source} is converted already: train it with `tidar train`, or use it as it is")
    save_model(add_mask(model), out)
    return load_model(out, dtype="auto")


def add_mask(model: CausalLM) -> CausalLM:
    """``model``, which has no mask token, with one; its weights are the same objects.

    A tokenizer's own mask token is kept. Otherwise the mask takes an unused row of the embedding where there is one
    (Qwen has hundreds) and a new row where there is none; the row starts as the mean of the used ones. The mask is
    written to ``suppress_tokens``, so that plain transformers never produces it either.
    """
    tokenizer, hf = model.tokenizer, model.hf
    used, rows = len(tokenizer), model.embedding.shape[0]
    own = tokenizer.mask_token_id is not None
    if not own:
        tokenizer.add_special_tokens({"mask_token": AddedToken(MASK_TOKEN, special=True)})
    if len(tokenizer) > rows:
        hf.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        table = model.embedding
        mean = table[: min(used, rows)].float().mean(0).to(table.dtype)
        table[rows:] = mean
        if not own:
            table[tokenizer.mask_token_id] = mean
        head = hf.get_output_embeddings()
        if head.weight is not table:  # its new rows were drawn
            head.weight[rows:] = head.weight[: min(used, rows)].float().mean(0).to(head.weight.dtype)
            if head.bias is not None:
                head.bias[rows:] = head.bias[: min(used, rows)].float().mean().to(head.bias.dtype)
    fresh = CausalLM(hf, tokenizer, model.path)
    fresh.windows = model.windows
    fresh.spec = Spec(mask_token_id=int(tokenizer.mask_token_id))
    fresh.suppressed = tuple(sorted({*fresh.suppressed, fresh.spec.mask_token_id}))
    hf.generation_config.suppress_tokens = list(fresh.suppressed)
    return fresh
