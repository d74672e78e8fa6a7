"""Loading, converting and saving checkpoints, and every way in which they can be wrong."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tidar import checkpoint
from tidar.api import Model
from tidar.attention import NAME
from tidar.checkpoint import load_model, save_model
from tidar.config import SamplingParams
from tidar.convert import convert
from tidar.errors import TidarError
from tidar.families import SUPPORTED, check_config, position_limit
from tidar.model import CausalLM

PROMPT = list(b"def add(a, b):\n")


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return tiny.save_plain("llama", tmp_path / "plain")


def test_the_tests_cover_every_supported_family() -> None:
    assert sorted(tiny.FAMILIES) == sorted(SUPPORTED)


def test_a_converted_checkpoint_is_a_plain_one(plain: Path, tmp_path: Path) -> None:
    before: Any = AutoModelForCausalLM.from_pretrained(plain)
    ours = convert(plain, tmp_path / "out")
    after: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(after) is type(before) and after.config.model_type == before.config.model_type
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    mask = tokenizer.mask_token_id
    assert ours.spec is not None and mask == ours.spec.mask_token_id == len(tokenizer) - 1
    assert after.config.tidar == {"mask_token_id": mask, "block_sizes": [], "transition": 0}
    assert mask in after.generation_config.suppress_tokens
    changed = [n for n, p in after.state_dict().items() if not torch.equal(p, before.state_dict()[n])]
    assert set(changed) <= {"model.embed_tokens.weight", "lm_head.weight"}
    table, old = after.get_input_embeddings().weight, before.get_input_embeddings().weight
    assert table.shape == old.shape, "an unused row was there, so nothing is resized"
    assert (table != old).any(1).nonzero()[:, 0].tolist() == [mask]
    text = torch.tensor([PROMPT])
    got = after.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=20, do_sample=False)[
        0, len(PROMPT) :
    ]
    mine = Model(ours).generate(PROMPT, SamplingParams(max_new_tokens=20), method="ar")[0].token_ids
    assert got.tolist() == mine


def test_conversion_adds_a_row_where_none_is_spare(tmp_path: Path) -> None:
    full = tiny.save_plain("llama", tmp_path / "full", vocab_size=257)
    ours = convert(full, tmp_path / "out")
    assert ours.mask_id == 257 and ours.vocab_size == 320
    assert ours.suppressed == tuple(range(257, 320))
    before = Model(load_model(full)).generate(PROMPT, method="ar")[0].token_ids
    assert Model(ours).generate(PROMPT, method="ar")[0].token_ids == before


def test_an_existing_mask_token_is_kept(plain: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain)
    tokenizer.add_special_tokens({"mask_token": "<own>"})
    tokenizer.save_pretrained(plain)
    assert convert(plain, tmp_path / "out").tokenizer.mask_token == "<own>"


def test_generate_stays_ordinary_under_our_attention(plain: Path) -> None:
    """Registered, without a layout: left padding, softcap and sinks included."""
    for family in ("llama", "gemma2", "gpt_oss"):
        folder = plain if family == "llama" else tiny.save_plain(family, plain.parent / family)
        texts = [PROMPT, PROMPT[:5]]
        width = max(map(len, texts))
        ids = torch.tensor([[tiny.EOS] * (width - len(t)) + t for t in texts])
        seen = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
        outs = []
        # transformers' eager attention makes NaN of padding in fp64
        for name in ("sdpa" if family == "llama" else "eager", NAME):
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=name, experts_implementation="eager"
            )
            outs.append(model.generate(ids, attention_mask=seen, max_new_tokens=12, do_sample=False))
        assert torch.equal(*outs), family


def test_not_converted(plain: Path) -> None:
    model = Model(load_model(plain))
    assert len(model.generate(PROMPT, SamplingParams(max_new_tokens=3, ignore_eos=True), method="ar")[0].token_ids) == 3
    with pytest.raises(TidarError, match="tidar convert .* OUT.*--method ar"):
        model.generate(PROMPT)


def test_converted_but_not_trained_warns(plain: Path, tmp_path: Path) -> None:
    model = Model(convert(plain, tmp_path / "out"))
    with pytest.warns(UserWarning, match="not trained"):
        model.generate(PROMPT, SamplingParams(max_new_tokens=2))


def test_saved_and_loaded_again(qwen3: Model, tmp_path: Path) -> None:
    save_model(qwen3.core, tmp_path / "copy")
    again = load_model(tmp_path / "copy", dtype="auto")
    assert again.spec == qwen3.core.spec and again.dtype == torch.float64
    for name, value in qwen3.core.hf.state_dict().items():
        assert torch.equal(again.hf.state_dict()[name], value), name
    save_model(qwen3.core, tmp_path / "half", dtype="bfloat16")
    assert load_model(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("copy", "half")]
    assert sizes[1] < sizes[0] / 3, "tied weights were written twice"


@pytest.mark.parametrize(
    ("message", "family"),
    [
        ("'nemotron' is not supported: its layers drop", "nemotron"),
        ("'falcon' is not supported: its attention cannot", "falcon"),
        ("'gpt2' is not supported: it has not been shown", "gpt2"),
        ("'gemma3' is not supported: this is the multimodal", "gemma3"),
    ],
)
def test_unsupported_families_are_named(tmp_path: Path, message: str, family: str) -> None:
    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    with pytest.raises(TidarError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"attention_chunk_size": 64}, "chunks"),
        ({"num_kv_shared_layers": 1}, "shares keys"),
    ],
)
def test_unsupported_variants_are_named(changes: dict[str, object], message: str) -> None:
    config = tiny.tiny_config("qwen3")
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    with pytest.raises(TidarError, match=message):
        check_config(config)


def test_scaled_positions_are_kept_within_the_original_length() -> None:
    scaling = {
        "rope_type": "longrope",
        "long_factor": [2.0] * 4,
        "short_factor": [1.0] * 4,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    }
    config = tiny.tiny_config(
        "phi3", rope_parameters=scaling, max_position_embeddings=512, original_max_position_embeddings=64
    )
    assert position_limit(config) == (64, True)
    assert position_limit(tiny.tiny_config("phi3")) == (512, False)


def test_a_model_that_ignores_the_layout_is_refused(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(tokens: torch.Tensor, positions: torch.Tensor, masks: object, cache: object = None) -> torch.Tensor:
        out: torch.Tensor = qwen3.core.hf.base_model(
            input_ids=tokens, position_ids=positions, use_cache=False
        ).last_hidden_state
        return out

    monkeypatch.setattr(qwen3.core, "backbone", deaf)
    with pytest.raises(TidarError, match="0 of 2 layers read the layout"):
        qwen3.core.probe()


def test_a_head_that_is_not_understood_is_refused(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen3.core, "_transform", lambda logits: logits * 3)
    with pytest.raises(TidarError, match="logits change"):
        qwen3.core.probe()


def damage(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "not json":
        (folder / "config.json").write_text("{")
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif kind == "missing tensor":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "wrong shape":
        edit(folder, intermediate_size=64)


@pytest.mark.parametrize(
    "kind", ["no weights", "truncated", "not json", "no config", "no tokenizer", "missing tensor", "wrong shape"]
)
def test_damaged_checkpoints(plain: Path, kind: str) -> None:
    damage(plain, kind)
    with pytest.raises(TidarError, match="missing|damaged") as caught:
        load_model(plain)
    assert "\n" not in str(caught.value) and str(plain) in str(caught.value)


def test_missing_folder_hub_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TidarError, match="no checkpoint at ./nowhere"):
        load_model("./nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TidarError, match="cannot fetch 'nobody/nothing' from the hub.*check the name and the network"):
        load_model("nobody/nothing")
    with pytest.raises(TidarError, match="device 'cuda:99' is not available"):
        checkpoint.check_device("cuda:99")
    with pytest.raises(TidarError, match="dtype 'int3' is unknown"):
        checkpoint._dtype("int3", torch.device("cpu"))


def test_an_interrupted_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("connection reset\nby peer, and a page of traceback")

    monkeypatch.setattr(AutoConfig, "from_pretrained", broken)
    with pytest.raises(TidarError, match="check the name and the network: connection reset$"):
        load_model("some/model")


def test_convert_refuses(plain: Path, tmp_path: Path, converted: Callable[[str], Path]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(TidarError, match="exists already"):
        convert(plain, tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    with pytest.raises(TidarError, match="converted already"):
        convert(converted("llama"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_full_disk_leaves_nothing_half_written(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model: CausalLM = load_model(plain)
    monkeypatch.setattr(model.hf, "save_pretrained", full)
    with pytest.raises(TidarError, match="No space left.*free some space"):
        save_model(model, tmp_path / "room" / "out")
    assert list((tmp_path / "room").iterdir()) == []
    shutil.rmtree(tmp_path / "room")


def test_too_large_a_model_is_told_what_fits(converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted("llama")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("transformers.PreTrainedModel.to", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (22_000_000_000, 0))
    with pytest.raises(TidarError, match=r"has 20.5 GiB free: in bfloat16 its 0.0 GiB would fit"):
        load_model(folder, dtype="float32")
    with pytest.raises(TidarError, match=r"in bfloat16 about 10.0 billion parameters would fit"):
        load_model(folder, dtype="bfloat16")
