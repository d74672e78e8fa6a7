"""Drafts that lean on the token before them: chosen in turn, learned from a plain loss, kept beside the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from picking import steered, subset
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, rms_norm, silu
from train_data import config, gradients, pack, plain_logits, write_text
from transformers import AutoModelForCausalLM

from tidar.api import Model
from tidar.checkpoint import load_model, save_model
from tidar.config import SamplingParams
from tidar.decode.tidar import TidarDecoder
from tidar.errors import TidarError
from tidar.model import CausalLM
from tidar.train.inputs import Blocks, make_inputs, preceding
from tidar.train.loss import count, train_loss
from tidar.train.trainer import train

ROWS = [[1, 7, 12, 4], [13, 1, 1, 9]]
CPU = torch.device("cpu")
PROMPTS = [list(b"def add(a, b):\n    return"), list(b"x"), list(b"import os\n")]


def with_transition(
    folder: Path, *, seed: int = 0, strength: float = 1.0, dtype: str = "float64", device: str = "cpu"
) -> CausalLM:
    """One that bends every draft."""
    model = load_model(folder, dtype=dtype, device=device)
    model.add_transition(12).initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weight = model.transition.out.weight  # type: ignore[union-attr]
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * strength)
    return model


@pytest.fixture(scope="module")
def model(converted: Callable[[str], Path]) -> CausalLM:
    return with_transition(converted("llama"))


def bent(model: CausalLM, hidden: Tensor, before: Tensor) -> Tensor:
    """The formula, written out."""
    parts = model.transition
    assert parts is not None
    embedding = model.hf.get_input_embeddings()(before).detach()
    gate = rms_norm(hidden, hidden.shape[-1:]) @ parts.state.weight.T
    gate = gate + rms_norm(embedding, embedding.shape[-1:]) @ parts.token.weight.T
    return hidden + silu(gate) @ parts.out.weight.T


def test_untrained_it_changes_nothing(converted: Callable[[str], Path]) -> None:
    model = load_model(converted("llama"), dtype="float64")
    hidden, before = torch.randn(3, 32, dtype=torch.float64), torch.tensor([1, 2, 3])
    assert torch.equal(model.drafted(hidden, before), hidden)
    model.add_transition(12).initialise(5)
    assert torch.equal(model.drafted(hidden, before), hidden)


def test_its_formula(model: CausalLM) -> None:
    hidden, before = torch.randn(2, 5, 32, dtype=torch.float64), torch.randint(200, (2, 5))
    torch.testing.assert_close(model.drafted(hidden, before), bent(model, hidden, before))
    assert not torch.allclose(model.drafted(hidden, before), model.drafted(hidden, before + 1))


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "cohere2", "gpt_neox"]
)  # scaled embeddings, capped logits, biases
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.3}])
def test_the_text_does_not_change(family: str, options: dict[str, float], converted: Callable[[str], Path]) -> None:
    model = Model(with_transition(converted(family)))
    params = [SamplingParams(max_new_tokens=16, seed=seed, **options) for seed in range(3)]  # type: ignore[arg-type]
    expected = [c.token_ids for c in model.generate(PROMPTS, params, method="ar")]
    for k in (1, 2, 3, 8):
        two = model.generate(PROMPTS, params, draft_len=k, method="linear")
        assert [c.token_ids for c in two] == expected, f"linear, k = {k}"
        for proposals in sorted({1, (k + 1) // 2, k}):
            found = model.generate(PROMPTS, params, draft_len=k, proposals=proposals)
            assert [c.token_ids for c in found] == expected, f"k = {k}, {proposals} proposals"
        for level in (1, k):
            with steered(subset(level)):
                found = model.generate(PROMPTS, params, draft_len=k, proposals=1)
            assert [c.token_ids for c in found] == expected, f"k = {k}, proposal {level}"


def test_each_draft_knows_the_one_before(model: CausalLM) -> None:
    decoder = TidarDecoder(model, draft_len=6)
    with torch.inference_mode():
        [[first]] = decoder.prefill([PROMPTS[0]], [SamplingParams()])
        drafts = decoder._drafts[0].tolist()
    assert drafts[0] == first
    # The prefill's masks, from a plain forward; the first of them is not read.
    size = len(PROMPTS[0])
    tokens = torch.tensor([PROMPTS[0] + [model.mask_id] * 6])
    sees = torch.ones(size + 6, size + 6).tril().bool()
    sees[size:, size:] = True
    out = model.hf.base_model(tokens, position_ids=torch.arange(size + 6)[None], attention_mask=sees[None, None])
    states, expected = out.last_hidden_state[0, size:], [first]
    for place in range(1, 6):
        logits = model.head(bent(model, states[place], torch.tensor(expected[-1])))
        logits[list(model.suppressed)] = -torch.inf
        expected.append(int(logits.argmax()))
    assert drafts == expected
    without = model.head(states).index_fill(-1, torch.tensor(model.suppressed), -torch.inf).argmax(-1)
    assert drafts[1:] != without[1:].tolist(), "the transition had no say"


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_loss_and_gradient(model: CausalLM, decay: float) -> None:
    batch, blocks, kl_weight = pack(ROWS), Blocks(4, 3), 0.75
    ar, draft, weight = [], [], []
    mean = sum(decay**j for j in range(4)) / 4
    for row, lengths in enumerate(ROWS):
        for document in torch.split(batch.tokens[row], lengths):
            ids = document.tolist()
            logits = plain_logits(model, ids, 0)
            ar += [cross_entropy(logits[i - 1], document[i]) for i in range(1, len(ids))]
            cuts = [0, *range(blocks.k - blocks.phase, len(ids), blocks.k), len(ids)]
            for begin, end in pairwise(cuts):
                states = plain_hidden(model, ids[:begin], end - begin)
                for i in range(begin, end):
                    before = torch.tensor(ids[i - 1] if i else model.mask_id)
                    drafted = model.head(bent(model, states[i - begin], before))
                    own = cross_entropy(drafted, document[i])
                    if i > 0:
                        p, q = logits[i - 1].detach().log_softmax(-1), drafted.log_softmax(-1)
                        own = (1 - kl_weight) * own + kl_weight * kl_div(q, p, log_target=True, reduction="sum")
                    draft.append(own)
                    weight.append(decay ** (i - begin) / mean)
    expected = (torch.stack(ar).mean() + (torch.stack(draft) * torch.tensor(weight)).mean()) / 2
    expected.backward()  # type: ignore[no-untyped-call]
    wanted, own_wanted = gradients(model), own_gradients(model)

    inputs = make_inputs(batch, blocks, mask_id=model.mask_id, device=CPU, decay=decay)
    hidden = model.hidden(inputs.tokens, inputs.layout)
    values = train_loss(
        model.head,
        hidden,
        inputs.targets,
        count([inputs.targets]),
        vocab=model.vocab_size,
        kl_weight=kl_weight,
        bend=model.drafted,
        chunk_elements=264 * 2 * 7,
    )
    torch.testing.assert_close(values[0].double(), expected.detach(), rtol=1e-5, atol=0)
    for found, right in ((gradients(model), wanted), (own_gradients(model), own_wanted)):
        assert found.keys() == right.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, right[name], rtol=1e-5, atol=1e-7, msg=name)


def plain_hidden(model: CausalLM, ids: list[int], masks: int) -> Tensor:
    """(masks, D), hidden states of a block of masks after ``ids``."""
    size = len(ids) + masks
    sees = torch.ones(size, size).tril().bool()
    sees[len(ids) :, len(ids) :] = True
    tokens = torch.tensor([ids + [model.mask_id] * masks])
    out = model.hf.base_model(tokens, position_ids=torch.arange(size)[None], attention_mask=sees[None, None])
    hidden: Tensor = out.last_hidden_state[0, len(ids) :]
    return hidden


def own_gradients(model: CausalLM) -> dict[str, Tensor]:
    assert model.transition is not None
    found = {name: p.grad.clone() for name, p in model.transition.named_parameters() if p.grad is not None}
    model.transition.zero_grad()
    assert len(found) == 3
    return found


def test_what_stands_before_a_draft() -> None:
    inputs = make_inputs(pack([[1, 9]]), Blocks(4, 2), mask_id=0, device=CPU)
    text = inputs.targets.labels[0].tolist()
    assert inputs.targets.before is not None
    assert inputs.targets.before[0].tolist() == [0, 0, *text[1:-1]]
    assert inputs.offset[0].tolist() == [0, 0, 1, 0, 1, 2, 3, 0, 1, 2]
    drafted = torch.arange(100, 110)[None]
    assert preceding(inputs, drafted)[0].tolist() == [0, 0, 101, text[2], 103, 104, 105, text[6], 107, 108]


def test_a_run_makes_and_keeps_it(converted: Callable[[str], Path], tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    plan = config(tmp_path, converted("llama"), transition=8, draft_text="model", offset_decay=0.9)
    first = train(plan)
    assert first.model is not None
    trained = load_model(first.model)
    assert trained.spec is not None and trained.spec.transition == 8
    assert trained.transition is not None and float(trained.transition.out.weight.detach().abs().max()) > 0
    again = train(replace(plan, model=str(first.model), out=str(tmp_path / "again"), transition=0, tokens=96))
    assert again.model is not None and load_model(again.model).transition is not None
    other = train(replace(plan, model=str(first.model), out=str(tmp_path / "other"), transition=4, tokens=96))
    kept = load_model(other.model).spec if other.model is not None else None
    assert kept is not None and kept.transition == 8, "only a model without one is given one"


def test_an_optimizer_without_it_is_not_gone_on_with(converted: Callable[[str], Path], tmp_path: Path) -> None:
    write_text(tmp_path / "text")
    plain = config(tmp_path, converted("llama"), transition=0, tokens=96)
    train(plain)
    (place,) = (Path(plain.out) / "checkpoints").iterdir()
    bent = replace(plain, out=str(tmp_path / "bent"), transition=8)
    with pytest.raises(TidarError, match="has no transition, and its optimizer would not fit one: go on with --trans"):
        train(bent, continue_from=str(place))
    assert train(replace(bent, model=str(place / "model"))).model is not None
    assert train(replace(plain, out=str(tmp_path / "plain")), continue_from=str(place)).model is not None


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_it_lies_beside_a_plain_checkpoint(model: CausalLM, tmp_path: Path, dtype: str | None) -> None:
    save_model(model, tmp_path / "saved", dtype=dtype)
    back = load_model(tmp_path / "saved", dtype="float64")
    assert back.transition is not None and model.transition is not None
    for name, weight in model.transition.state_dict().items():
        kept = weight if dtype is None else weight.bfloat16().double()
        assert torch.equal(back.transition.state_dict()[name], kept)
    plain: Any
    report: Any
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)  # type: ignore[misc]
    assert not any(report.values()), report
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.hf.parameters())


def _cut(folder: Path) -> None:
    path = folder / "transition.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def _wider(folder: Path) -> None:
    path = folder / "config.json"
    kept: dict[str, Any] = json.loads(path.read_text())
    kept["tidar"]["transition"] = 13
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize("damage", [lambda f: (f / "transition.safetensors").unlink(), _cut, _wider])
def test_a_damaged_one_is_one_line(model: CausalLM, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save_model(model, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    damage(tmp_path / "broken")
    with pytest.raises(TidarError, match="missing or damaged") as caught:
        load_model(tmp_path / "broken")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transition": -1}, "transition must be a width of at least 0"),
        ({"offset_decay": 0.0}, "offset_decay must lie in"),
        ({"offset_decay": 1.1}, "offset_decay must lie in"),
    ],
)
def test_settings_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TidarError, match=message):
        config(tmp_path, tmp_path, **changes)
