"""Folders of adapters: on any copy of their base and on no other model, and never taken for LoRA of every token."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_adapters import PROMPTS, adapted, merged, plain  # noqa: F401
from test_holdout import files
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

import tidar
from runs import adapters_exact, tokens_per_forward
from tidar import adapter_files
from tidar.checkpoint import load_model, save_model
from tidar.cli import main
from tidar.config import SamplingParams
from tidar.errors import TidarError
from tidar.model import CausalLM

Folder = Callable[[str], Path]


@pytest.fixture
def base(plain: Folder) -> Path:  # noqa: F811
    return plain("llama")


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    """Adapters of that base, in bf16."""
    save_model(known(base), tmp_path / "adapters", dtype="bf16")
    return tmp_path / "adapters"


def known(base: Path, **changes: Any) -> CausalLM:
    """Random adapters that know their base."""
    return adapted(base, base=str(base), digest=adapter_files.digest(base), **changes)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_script_that_compares_them_with_their_base(base: Path, saved: Path, tmp_path: Path) -> None:
    source, prompts = files(tmp_path, {"a": 2, "b": 2}), tmp_path / "prompts.jsonl.gz"
    chosen = ["--select", str(source), "--write", str(prompts), "--checkpoint", str(base), "--count", "2"]
    tokens_per_forward.main(chosen)
    words = [
        str(base),
        str(saved),
        "--prompts",
        str(prompts),
        "--new-tokens",
        "5",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    adapters_exact.main([*words, "--general", "--out", str(tmp_path / "lines.jsonl")])
    line = json.loads((tmp_path / "lines.jsonl").read_text())
    assert line["logits as transformers"] == line["logits as tidar.load(base)"] == "2/2"
    assert all(line[f"{how} k={k} as base's AR"] == "2/2" for how in ("greedy", "sampled") for k in (4, 16))
    other = load_model(base, dtype="float32")
    other.embedding.data.mul_(1.5)
    model = tidar.load(str(saved), device="cpu", dtype="float32")
    assert adapters_exact.same_logits(model, {"another": other.hf}, [[1, 2, 3]]) == {"logits as another": "0/1"}


def test_round_trip(base: Path, tmp_path: Path) -> None:
    model = known(base, modules=("q_proj", "up_proj"))
    model.add_transition(4).initialise(3)
    save_model(model, tmp_path / "adapters")
    assert sorted(p.name for p in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    back = load_model(tmp_path / "adapters", dtype="float64")
    assert (back.spec, back.path) == (model.spec, str(tmp_path / "adapters"))
    assert back.adapters is not None and model.adapters is not None and back.adapters.spec == model.adapters.spec
    ours, theirs = model.state_dict(), back.state_dict()
    assert list(ours) == list(theirs) and any("transition" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(TidarError, match="exists already"):
        save_model(model, tmp_path / "adapters")


def test_on_a_copy_elsewhere(base: Path, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut into other files, and named by `adapter`; the text is the base's."""
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "copy")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    params = SamplingParams(max_new_tokens=12, temperature=0.7, seed=2)
    expected = tidar.load(base, device="cpu", dtype="float64").generate(PROMPTS, params, method="ar")
    for given in (
        {"path_or_hub_id": tmp_path / "copy", "adapter": saved},
        {"adapter": saved},
        {"path_or_hub_id": saved},
    ):
        model = tidar.load(**given, device="cpu", dtype="float64")  # type: ignore[arg-type]
        assert model.core.adapters is not None and model.draft_len == 16
        found = model.generate(PROMPTS, params, draft_len=4)
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    words = ["generate", "--prompt", "x = ", "--max-new-tokens", "9", "--device", "cpu"]
    assert main([*words, "--model", str(base), "--method", "ar"]) == 0
    alone = capsys.readouterr().out
    assert main([*words, "--model", str(tmp_path / "copy"), "--adapter", str(saved), "--draft-len", "3"]) == 0
    assert capsys.readouterr().out == alone


def test_on_quantised_weights(base: Path, saved: Path) -> None:
    params = SamplingParams(max_new_tokens=12)
    model, alone = (tidar.load(f, device="cpu", weights="int8") for f in (saved, base))
    assert model.core.adapters is not None
    assert sum(model.core.adapters.beside(part) is not None for part in model.core.hf.modules()) == 14
    found, expected = model.generate(PROMPTS, params, draft_len=4), alone.generate(PROMPTS, params, method="ar")
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def _flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _narrow(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)


@pytest.mark.parametrize(
    "change", [_flip, _narrow, lambda f: tiny.save_plain("qwen3", f)], ids=["bit", "bf16", "other"]
)
def test_another_base_is_refused(base: Path, saved: Path, tmp_path: Path, change: Callable[[Path], object]) -> None:
    shutil.copytree(base, tmp_path / "other")
    assert adapter_files.digest(base) == adapter_files.digest(tmp_path / "other")
    change(tmp_path / "other")
    with pytest.raises(TidarError, match="belong to other weights than those of .*other: give a copy of their base"):
        tidar.load(tmp_path / "other", adapter=saved, device="cpu")


def _absent(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_config.json").write_text("{"), "is damaged"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "is damaged"),
        (lambda f: edit(f, tidar={}), "is damaged .*base_sha256"),
        (lambda f: edit(f, r=4), "are damaged: .*restore adapter_model"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "are damaged: "),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "are damaged: "),
        (_absent, "are damaged: .*restore adapter_model"),
        (lambda f: edit(f, peft_type="LORA"), "holds LORA adapters, which act on every token: merge them"),
        (
            lambda f: edit(f, base_model_name_or_path="gone/far/away"),
            "was gone/far/away, which is not there: name a copy",
        ),
        (lambda f: shutil.rmtree(f) or f.mkdir(), "no adapters in"),  # type: ignore[func-returns-value]
    ],
)
def test_what_is_wrong_with_a_folder_is_said(saved: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(saved)
    with pytest.raises(TidarError, match=message) as caught:
        tidar.load(adapter=saved, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_base_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(TidarError, match=r"has no model.safetensors: save it with save_pretrained"):
        adapter_files.digest(tmp_path)


def test_peft_refuses(base: Path, saved: Path) -> None:
    """By all its doors, and so does transformers, which has one to it."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor(PROMPTS[:1])
    before = model(ids).logits
    doors: list[Callable[[], Any]] = [
        lambda: peft.PeftConfig.from_pretrained(str(saved)),
        lambda: peft.LoraConfig.from_pretrained(str(saved)),
        lambda: peft.PeftModel.from_pretrained(model, str(saved)),
        lambda: peft.AutoPeftModelForCausalLM.from_pretrained(str(saved)),
        lambda: model.load_adapter(str(saved)),
        lambda: AutoModelForCausalLM.from_pretrained(saved),
    ]
    for door in doors:
        with pytest.raises((KeyError, ValueError), match="TIDAR_MASK_LORA"):
            door()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own
def test_the_format_is_pefts(base: Path, saved: Path, tmp_path: Path) -> None:
    """Under another type and without the masks' embedding PEFT reads all tensors, and makes of every token a mask."""
    shutil.copytree(saved, tmp_path / "lora")
    edit(tmp_path / "lora", peft_type="LORA")
    tensors = load_file(saved / "adapter_model.safetensors")
    del tensors["base_model.model.mask_embedding"]
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['tidar'\]"):
        theirs: Any = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base).double(), str(tmp_path / "lora")
        )
    whole = merged(base, load_model(saved, dtype="float64"))
    whole.hf.get_input_embeddings()._forward_hooks.clear()
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, whole.hf(ids).logits, rtol=1e-5, atol=1e-5)
