"""Adapters of masks: clean rows are the base's to the bit, masks are made of the base and its pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from picking import steered, subset
from test_exactness import run_injected
from torch import Tensor, nn
from train_data import pack
from transformers import AutoModelForCausalLM

from tidar import layout
from tidar.adapters import AdapterSpec, LowRank
from tidar.api import Method, Model
from tidar.attention import NAME
from tidar.cache import SlotCache
from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.errors import TidarError
from tidar.model import CausalLM
from tidar.train.inputs import Blocks, make_inputs
from tidar.train.rollout import roll_out

PROMPTS = [list(b"def add(a, b):\n    return"), list(b"x"), list(b"import os\n")]
SPEC = AdapterSpec(rank=3, alpha=6.0)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny plain checkpoint of a family, which has no mask token."""
    root, made = tmp_path_factory.mktemp("plain"), dict[str, Path]()

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tiny.save_plain(family, root / family)
        return made[family]

    return get


def adapted(folder: Path, dtype: str = "float64", **changes: Any) -> CausalLM:
    """A base with random adapters that matter."""
    model = load_model(folder, dtype=dtype)
    adapters = model.add_adapters(replace(SPEC, **changes))
    assert model.spec is not None
    model.spec = replace(model.spec, block_sizes=(16,))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in adapters.named_parameters():
            drawn = torch.randn(weight.shape, generator=draw) * (0.3 if "lora" in name else 1.0)
            weight.copy_(drawn)
    return model


def merged(folder: Path, model: CausalLM) -> CausalLM:
    """The base with all of ``model``'s pairs in its weights, where every token is a mask."""
    whole = load_model(folder, dtype="float64")
    assert model.adapters is not None
    count = 0
    with torch.no_grad():
        for name, part in whole.hf.named_modules():
            pair = model.adapters.beside(model.hf.get_submodule(name))
            if pair is not None:
                part.weight += 2.0 * pair.lora_B.weight @ pair.lora_A.weight
                count += 1
    assert count == sum(isinstance(part, LowRank) for part in model.adapters.modules()) >= 4
    embedding = model.adapters.mask_embedding.detach()
    whole.hf.get_input_embeddings().register_forward_hook(lambda _, __, out: out.copy_(embedding))
    return whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_causal_forward_is_the_base_to_the_bit(family: str, dtype: str, plain: Callable[[str], Path]) -> None:
    folder = plain(family)
    model, base = adapted(folder, dtype), load_model(folder, dtype=dtype)
    untouched: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype, attn_implementation=NAME).eval()
    text = torch.randint(200, (2, 19), generator=torch.Generator().manual_seed(0))
    wanted = untouched(text).logits
    with torch.inference_mode():
        plan = layout.prefill([7, 7], 4)
        model.hidden(plan.tokens(text[:, :7], 0), plan)  # nothing of it may stay behind
        assert torch.equal(model.hf(text).logits, wanted)
        plan = layout.causal([0, 0], 19)
        ours, theirs = (core.head(core.hidden(text, plan)) for core in (model, base))
    assert torch.equal(ours, theirs)
    named = dict(untouched.named_parameters())
    assert all(torch.equal(weight, named[name]) for name, weight in model.hf.named_parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_masks_are_what_merged_weights_make_of_them_behind_the_text_of_the_base(
    family: str, plain: Callable[[str], Path]
) -> None:
    folder, text, k = plain(family), torch.tensor([list(b"def add(a, b)")]), 5
    model, base = adapted(folder), load_model(folder, dtype="float64")
    whole, size = merged(folder, model), text.shape[1]
    plan = layout.prefill([size], k)
    cache = SlotCache(1)
    with torch.inference_mode():
        found = model.hidden(plan.tokens(text, 0), plan)
        clean = base.hidden(text, layout.causal([0], size), cache=cache)
        cache.commit([size])
        parts = {name: getattr(plan, name)[:, size:] for name in ("positions", "slots", "causal", "block")}
        alone = whole.hidden(torch.zeros(1, k, dtype=torch.long), replace(plan, **parts, clean=0), cache=cache)
        before = base.hidden(plan.tokens(text, 0), plan)
    torch.testing.assert_close(found[:, :size], clean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[:, size:], alone, rtol=1e-5, atol=1e-5)
    assert float((found - before)[:, size:].abs().mean()) > 0.1, "the pairs had no say"
    # The same shape, so the same bits.
    assert torch.equal(found[:, :size], before[:, :size])


def test_chosen_layers_only(plain: Callable[[str], Path]) -> None:
    model = adapted(plain("llama"), modules=("q_proj", "down_proj"))
    assert model.adapters is not None and model.adapters.spec.modules == ("down_proj", "q_proj")
    names = {name.rpartition(".lora")[0].rpartition(".")[2] for name, _ in model.adapters.named_parameters()}
    assert names == {"q_proj", "down_proj", ""}
    with pytest.raises(TidarError, match="no linear layer lm_head to adapt: choose among down_proj, gate_proj, k_proj"):
        adapted(plain("llama"), modules=("q_proj", "lm_head"))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=20, ignore_eos=True),
        SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=1.1, top_p=0.9, seed=3),
        SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=0.8, repetition_penalty=1.3, seed=4),
    ],
    ids=["greedy", "top-p", "penalty"],
)
def test_the_text_is_that_of_the_base(params: SamplingParams, plain: Callable[[str], Path]) -> None:
    folder = plain("qwen3")
    model, base = Model(adapted(folder)), Model(load_model(folder, dtype="float64"))
    alone = [base.generate([p], params, method="ar")[0].token_ids for p in PROMPTS]
    assert model.core.suppressed == base.core.suppressed, "no token is forbidden for the masks' sake"
    assert [c.token_ids for c in model.generate(PROMPTS, params, method="ar")] == alone
    methods: tuple[Method, ...] = ("tidar", "linear")
    for method in methods:
        for k, batch in ((1, 3), (3, 1), (8, 3)):
            found = model.generate(PROMPTS, params, method=method, draft_len=k, batch_size=batch)
            assert [c.token_ids for c in found] == alone, f"{method}, k = {k}, batch of {batch}"
    for levels in ((3,), (2, 4)):
        with steered(subset(*levels)):
            found = model.generate(PROMPTS, params, draft_len=4, proposals=len(levels))
        assert [c.token_ids for c in found] == alone, f"proposals {levels}"


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_neox"])
def test_every_number_of_accepted_drafts(family: str, plain: Callable[[str], Path]) -> None:
    """And what a proposal's masks are in a step is what they are behind the same text in a prompt."""
    run_injected(Model(adapted(plain(family))), PROMPTS, 40, 4, None)


def test_a_mask_that_is_given_away_shows(plain: Callable[[str], Path]) -> None:
    """Pairs that act from one row too early change the text."""
    model = Model(adapted(plain("qwen3")))
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    alone = [c.token_ids for c in model.generate(PROMPTS, params, method="ar")]
    adapters: Any = model.core.adapters

    def early(*given: Any) -> None:
        if adapters._first is not None:
            adapters._first -= 1
            adapters._adapt(*given)
            adapters._first += 1

    for part in model.core.hf.modules():
        if adapters.beside(part) is not None:
            part._forward_hooks.clear()
            part.register_forward_hook(early)
    wrong = model.generate(PROMPTS, params, draft_len=4)
    assert [c.token_ids for c in wrong] != alone


def test_rollouts_are_the_text_of_the_base(plain: Callable[[str], Path]) -> None:
    folder, batch = plain("llama"), pack([[9, 15], [24]])
    ours, theirs = (
        roll_out(core, batch, Blocks(4, 1)) for core in (adapted(folder), load_model(folder, dtype="float64"))
    )
    assert torch.equal(ours.tokens, theirs.tokens) and bool(ours.own.any())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at every input's
def test_compiled_it_is_the_same(tmp_path: Path) -> None:
    """Layer by layer, as for several ranks, and with one graph for all layers, more of them than Dynamo's limit."""
    model = adapted(tiny.save_plain("llama", tmp_path / "deep", num_hidden_layers=10), "float32")
    inputs = make_inputs(pack([[9, 15], [24]]), Blocks(4, 1), mask_id=0, device=torch.device("cpu"))
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        if compiled:
            for layer in model.hf.base_model.layers:  # type: ignore[union-attr]
                layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
        hidden = model.hidden(inputs.tokens, inputs.layout)
        assert model.adapters is not None
        model.adapters.zero_grad()
        hidden.square().mean().backward()  # type: ignore[no-untyped-call]
        gradients = {n: w.grad.clone() for n, w in model.adapters.named_parameters() if w.grad is not None}
        results.append((hidden.detach(), gradients))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    (wanted, gradients), (found, own) = results
    torch.testing.assert_close(found, wanted)
    assert gradients.keys() == own.keys() == dict(model.adapters.named_parameters()).keys()  # type: ignore[union-attr]
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_fresh_ones_change_nothing(plain: Callable[[str], Path]) -> None:
    """Also where the embedding's output is scaled: a mask begins as the mean of what tokens are."""
    for family in ("gemma3_text", "llama"):
        model = load_model(plain(family), dtype="float64")
        table: nn.Module = model.hf.get_input_embeddings()
        like = torch.arange(257)
        mean = table(like).mean(0)
        adapters = model.add_adapters(SPEC)
        adapters.initialise(table, like, 0)
        torch.testing.assert_close(adapters.mask_embedding.detach(), mean)
        pairs = [part for part in adapters.modules() if isinstance(part, LowRank)]
        assert not any(pair.lora_B.weight.any() for pair in pairs) and all(pair.lora_A.weight.any() for pair in pairs)
