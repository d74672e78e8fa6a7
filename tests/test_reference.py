"""The checkpoint that ships with the package: real weights, real prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import tidar
from tidar.checkpoint import embedded_checkpoint
from tidar.config import SamplingParams

HUMANEVAL = json.loads((Path(__file__).parent / "data" / "humaneval_8.json").read_text())["prompts"]
PROMPT = 'class Point:\n    """A point in the plane."""\n\n    def __init__(self, x, y):'


@pytest.fixture(scope="module")
def model() -> tidar.Model:
    return tidar.load(device="cpu")


def test_size_and_kind(model: tidar.Model) -> None:
    folder = embedded_checkpoint()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 36_000_000
    assert (folder / "README.md").is_file(), "no model card"
    assert model.core.hf.config.model_type == "qwen3" and model.core.hf.config.tie_word_embeddings
    assert model.core.spec is not None and max(model.core.spec.block_sizes) == 16
    text = PROMPT + "\n\tdéjà vu\r\n  你好 <|endoftext|>"
    tokenizer = model.core.tokenizer
    assert tokenizer.decode(tokenizer(PROMPT)["input_ids"]) == PROMPT
    assert "déjà vu" in tokenizer.decode(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("task", HUMANEVAL)
def test_humaneval_equals_transformers(model: tidar.Model, task: str) -> None:
    """256 greedy tokens, k = 16, fp32, against transformers' own attention and loop."""
    plain: Any = AutoModelForCausalLM.from_pretrained(embedded_checkpoint(), dtype=torch.float32).eval()
    ids = model.core.tokenizer(HUMANEVAL[task], return_tensors="pt")["input_ids"]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=256,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=list(model.core.suppressed),
    )
    plain.generation_config = config  # its own would supply the end-of-text token again
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :]
    got = model.generate(HUMANEVAL[task], SamplingParams(max_new_tokens=256, ignore_eos=True), draft_len=16)[0]
    assert got.token_ids == expected.tolist() and len(got.token_ids) == 256


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=64),
        SamplingParams(max_new_tokens=64, temperature=0.8, top_p=0.95, seed=1),
        SamplingParams(max_new_tokens=64, temperature=1.0, top_k=40, repetition_penalty=1.2, seed=2),
    ],
)
def test_same_tokens_in_fewer_forwards(model: tidar.Model, params: SamplingParams) -> None:
    ar = model.generate(PROMPT, params, method="ar")[0]
    for k in (4, 8):
        got = model.generate(PROMPT, params, draft_len=k)[0]
        assert got.token_ids == ar.token_ids and got.text == ar.text
        assert got.forwards < 0.8 * ar.forwards, "drafts of a trained model are of use"
