"""The loss against one written from the paper, document by document and block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from train_data import gradients, pack, plain_logits

from tidar import layout
from tidar.checkpoint import load_model
from tidar.data.config import DataConfig
from tidar.data.packing import PackedBatch
from tidar.model import CausalLM
from tidar.train.config import TrainConfig
from tidar.train.inputs import Blocks, make_inputs
from tidar.train.loss import Targets, count, train_loss

CPU = torch.device("cpu")
ROWS = [[1, 7, 12, 4], [13, 1, 1, 9]]  # documents of one token, blocks cut short by ends and phases


@pytest.fixture(scope="module")
def model(converted: Callable[[str], Path]) -> CausalLM:
    return load_model(converted("llama"), dtype="float64")


def paper_loss(
    model: CausalLM, rows: list[list[int]], batch: PackedBatch, blocks: Blocks | None, alpha: float, kl_weight: float
) -> Tensor:
    """Section 3.1: every document alone, every block in a forward of its own."""
    ar, draft = [], []
    for row, lengths in enumerate(rows):
        documents = torch.split(batch.tokens[row], lengths)
        for document in documents:
            ids = document.tolist()
            logits = plain_logits(model, ids, 0)
            ar += [cross_entropy(logits[i - 1], document[i]) for i in range(1, len(ids))]
            if blocks is None:
                continue
            begin = 0
            while begin < len(ids):
                end = min(len(ids), (begin + blocks.phase) // blocks.k * blocks.k + blocks.k - blocks.phase)
                drafted = plain_logits(model, ids[:begin], end - begin)[begin:]
                for i in range(begin, end):
                    own = cross_entropy(drafted[i - begin], document[i])
                    if i > 0 and kl_weight:
                        p = logits[i - 1].detach().softmax(-1)
                        q = drafted[i - begin].softmax(-1)
                        own = (1 - kl_weight) * own + kl_weight * (p * (p / q).log()).sum()
                    draft.append(own)
                begin = end
    mean_ar = torch.stack(ar).mean()
    if blocks is None:
        return mean_ar
    return (alpha * mean_ar + torch.stack(draft).mean()) / (1 + alpha)


def ours(
    model: CausalLM,
    batch: PackedBatch,
    blocks: Blocks | None,
    alpha: float,
    kl_weight: float | Tensor,
    elements: int = 2**28,
) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = make_inputs(batch, blocks, mask_id=model.mask_id, device=CPU)
    hidden = model.hidden(inputs.tokens, inputs.layout)
    values = train_loss(
        model.head,
        hidden,
        inputs.targets,
        count([inputs.targets]),
        vocab=model.vocab_size,
        alpha=alpha,
        kl_weight=kl_weight,
        chunk_elements=elements,
    )
    return values, gradients(model)


@pytest.mark.parametrize(
    ("blocks", "alpha", "kl_weight"),
    [
        (None, 1.0, 0.0),
        (Blocks(1, 0), 1.0, 0.0),
        (Blocks(4, 0), 1.0, 0.0),
        (Blocks(4, 3), 0.3, 0.5),
        (Blocks(5, 2), 1.2, 1.0),
        (Blocks(16, 7), 1.0, 0.5),
    ],
)
def test_loss_and_gradient_are_the_papers(
    model: CausalLM, blocks: Blocks | None, alpha: float, kl_weight: float
) -> None:
    batch = pack(ROWS)
    wanted = paper_loss(model, ROWS, batch, blocks, alpha, kl_weight)
    wanted.backward()  # type: ignore[no-untyped-call]
    expected = gradients(model)
    values, found = ours(model, batch, blocks, alpha, kl_weight)
    torch.testing.assert_close(values[0].double(), wanted.detach(), rtol=1e-5, atol=0)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        # The scales are fp32; everything else is fp64.
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_token_0_and_the_last_token_have_a_loss(model: CausalLM) -> None:
    """Faults that others have had: id 0 taken for "ignore", the text shifted by one, end-of-text taken for padding."""
    for token in (0, 256):
        batch = pack([[1, 23]])
        batch = batch._replace(tokens=torch.full_like(batch.tokens, token))
        values, _ = ours(model, batch, Blocks(4, 1), 1.0, 0.0)
        expected = paper_loss(model, [[1, 23]], batch, Blocks(4, 1), 1.0, 0.0)
        torch.testing.assert_close(values[0].double(), expected.detach(), rtol=1e-5, atol=0)
        assert float(values[0]) > 0.1
        inputs = make_inputs(batch, Blocks(4, 1), mask_id=model.mask_id, device=CPU)
        assert (int(inputs.targets.has_ar.sum()), inputs.targets.labels.numel()) == (22, 24)


def test_parts_of_the_loss_add_up(model: CausalLM) -> None:
    loss, ar, draft, kl = ours(model, pack([[24], [24]]), Blocks(4, 1), 0.7, 0.25)[0].tolist()
    first = 1 / 24  # share of tokens without a teacher; the rest mixes
    assert loss < (0.7 * ar + draft) / 1.7  # KL is smaller than cross-entropy here, by the teacher's entropy
    labelled = (loss * 1.7 - 0.7 * ar - 0.25 * kl) / draft
    assert 0.75 < labelled < 0.75 + 3 * first


@pytest.mark.parametrize("elements", [1, 264 * 2 * 5, 264 * 2 * 47])
def test_chunks_change_nothing(model: CausalLM, elements: int) -> None:
    whole, gradient = ours(model, pack(ROWS), Blocks(4, 1), 1.0, 0.5)
    cut, parts = ours(model, pack(ROWS), Blocks(4, 1), 1.0, 0.5, elements)
    torch.testing.assert_close(cut, whole)
    for name, value in gradient.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12)


def test_kl_teaches_the_draft_and_not_the_teacher() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, dtype=torch.float64)
    hidden = torch.randn(1, 16, 6, dtype=torch.float64, requires_grad=True)
    batch = pack([[8]], vocab=11)
    inputs = make_inputs(batch, Blocks(4, 0), mask_id=0, device=CPU)
    train_loss(head, hidden, inputs.targets, count([inputs.targets]), vocab=11, alpha=0.0, kl_weight=1.0)
    assert hidden.grad is not None
    assert bool((hidden.grad[:, :8] == 0).all())
    assert bool((hidden.grad[:, 8:].abs().sum(-1) > 0).all())


def test_a_documents_first_token_has_cross_entropy_under_kl() -> None:
    """Where there is no teacher, the label must teach: without it that mask row would have no gradient at all."""
    head = torch.nn.Linear(6, 11, dtype=torch.float64)
    hidden = torch.randn(1, 8, 6, dtype=torch.float64, requires_grad=True)
    batch = pack([[1, 1, 2]], vocab=11)
    inputs = make_inputs(batch, Blocks(2, 0), mask_id=0, device=CPU)
    values = train_loss(head, hidden, inputs.targets, count([inputs.targets]), vocab=11, alpha=0.0, kl_weight=1.0)
    logp = head(hidden.detach())[0].log_softmax(-1)
    first = -sum(logp[4 + i, batch.tokens[0, i]] for i in (0, 1, 2))
    teacher = logp[2].exp()
    kl = (teacher * (logp[2] - logp[7])).sum()
    torch.testing.assert_close(values[0].double(), (first + kl).detach() / 4, rtol=1e-6, atol=0)


def test_no_label_reaches_its_own_block(model: CausalLM) -> None:
    """Through the real model: another token at i changes no mask row whose block contains or precedes i."""
    batch, blocks = pack(ROWS), Blocks(4, 3)
    inputs = make_inputs(batch, blocks, mask_id=model.mask_id, device=CPU)
    size = inputs.layout.clean
    with torch.no_grad():
        before = model.hidden(inputs.tokens, inputs.layout)[:, size:]
        reached = 0
        for i in range(size):
            changed = inputs.tokens.clone()
            changed[:, i] = (changed[:, i] + 1) % 256
            after = model.hidden(changed, inputs.layout)[:, size:]
            differs = (after != before).any(-1)
            own_block_ends = inputs.layout.block[:, size + i, 1] - size
            document_ends = batch.ends[:, i]
            for row in range(len(ROWS)):
                allowed = torch.zeros(size, dtype=torch.bool)
                allowed[own_block_ends[row] : document_ends[row]] = True
                assert not bool((differs[row] & ~allowed).any()), (row, i)
                assert bool(differs[row][allowed].all()), (row, i)
                reached += int(allowed.sum())
    assert reached > 100  # the test saw something that may change


def test_random_masking_weighs_masks_by_the_inverse_of_their_share(model: CausalLM) -> None:
    batch, mask_id = pack([[100] * 40] * 8), model.mask_id
    inputs = make_inputs(batch, Blocks(5, 2), mask_id=mask_id, device=CPU, noise=3)
    size = batch.tokens.shape[1]
    ids, weight = inputs.tokens[:, size:], inputs.targets.draft
    assert weight is not None
    masked = ids == mask_id
    assert torch.equal(inputs.tokens[:, :size], batch.tokens)
    assert torch.equal(torch.where(masked, batch.tokens, ids), batch.tokens)
    assert bool((weight[~masked] == 0).all())
    assert bool((weight[masked] >= 1).all())
    first = inputs.layout.block[:, size:, 0]
    for row in range(8):  # one share a block
        for begin in torch.unique(first[row]).tolist():
            assert torch.unique(weight[row][(first[row] == begin) & masked[row]]).numel() <= 1
    # A block of 5 with t uniform: half of all positions are masked, and the weights average to 1.
    assert abs(float(masked.double().mean()) - 0.5) < 0.02
    assert abs(float(weight.clamp(max=50).double().mean()) - 1) < 0.06
    again = make_inputs(batch, Blocks(5, 2), mask_id=mask_id, device=CPU, noise=3)
    assert torch.equal(again.tokens, inputs.tokens)
    other = make_inputs(batch, Blocks(5, 2), mask_id=mask_id, device=CPU, noise=4)
    assert not torch.equal(other.tokens, inputs.tokens)


def test_ar_training_is_the_clean_half_of_the_doubled_forward(model: CausalLM) -> None:
    batch = pack(ROWS)
    size = batch.tokens.shape[1]
    alone = make_inputs(batch, None, mask_id=model.mask_id, device=CPU)
    doubled = make_inputs(batch, Blocks(4, 1), mask_id=model.mask_id, device=CPU)
    for name in ("positions", "slots", "causal", "block"):
        assert torch.equal(getattr(alone.layout, name), getattr(doubled.layout, name)[:, :size]), name
    with torch.no_grad():
        torch.testing.assert_close(
            model.hidden(alone.tokens, alone.layout), model.hidden(doubled.tokens, doubled.layout)[:, :size]
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("blocks", [None, Blocks(4, 3)])
def test_flex_attention_agrees_with_dense(converted: Callable[[str], Path], family: str, blocks: Blocks | None) -> None:
    """What runs on a GPU against what runs on a CPU; two tiles of FlexAttention and a sliding window (qwen3)."""
    tiny = load_model(converted(family), dtype="float64")
    inputs = make_inputs(pack([[90, 1, 60, 9], [160]]), blocks, mask_id=tiny.mask_id, device=CPU)
    with torch.no_grad():
        dense = tiny.hidden(inputs.tokens, inputs.layout, kind="dense")
        flex = tiny.hidden(inputs.tokens, inputs.layout, kind="block")
    torch.testing.assert_close(flex, dense, rtol=1e-9, atol=1e-9)


def test_counts_span_micro_batches() -> None:
    one, two = (make_inputs(pack([row]), Blocks(4, 0), mask_id=0, device=CPU).targets for row in ROWS)
    counts = count([one, two])
    assert (int(counts.ar), int(counts.draft)) == (48 - 8, 48)
    nothing = Targets(labels=torch.zeros(1, 1), has_ar=torch.zeros(1, 1), draft=None)
    assert int(count([nothing]).ar) == 1  # a mean over nothing is 0, not NaN


def test_packed_layout_is_causal_within_documents() -> None:
    batch = pack([[2, 3]])
    plan = layout.packed(batch.starts)
    assert plan.causal[0].tolist() == [[0, 1], [0, 2], [2, 3], [2, 4], [2, 5]]
    assert plan.positions[0].tolist() == [0, 1, 0, 1, 2]


def test_kl_moves_from_one_share_to_another(model: CausalLM) -> None:
    plan = TrainConfig(data=DataConfig(sources=("x",)), tokens=1000, kl_from=0.2, kl_weight=0.6)
    assert [plan.kl_at(tokens) for tokens in (0, 500, 1000, 2000)] == pytest.approx([0.2, 0.4, 0.6, 0.6])
    assert replace(plan, kl_from=None).kl_at(0) == replace(plan, kl_from=None).kl_at(999) == 0.6
    assert replace(plan, kl_from=None, kl_weight=0.0).kl_at(5) is None
    assert replace(plan, kl_from=1.0, kl_weight=0.0).kl_at(750) == pytest.approx(0.25)
    batch = pack(ROWS)
    for share in (0.0, 0.25, 1.0):  # as a tensor the same as a number; of 0 too, where KL is computed for the record
        by_number, wanted = ours(model, batch, Blocks(4, 1), 1.0, share)
        by_tensor, found = ours(model, batch, Blocks(4, 1), 1.0, torch.tensor(share))
        assert torch.equal(by_number[:3], by_tensor[:3]) and by_tensor[3] > 0
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
