"""The model's own continuations against plain decoding, and what is learned from them against a plain loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, pad
from train_data import config, gradients, pack, plain_logits, records, same_weights, write_text

from tidar import layout
from tidar.cache import SlotCache
from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.data.packing import PackedBatch, PackedData
from tidar.data.prepare import prepare
from tidar.decode.ar import ArDecoder
from tidar.model import CausalLM
from tidar.train.inputs import Blocks, make_inputs
from tidar.train.loss import count, train_loss
from tidar.train.rollout import Sampling, roll_out
from tidar.train.step import Stepper
from tidar.train.trainer import train
from tidar.train.validate import Validation

ROWS = [[1, 7, 12, 4, 6], [13, 1, 1, 9, 6], [30]]  # documents of one token, blocks cut short by ends and phases
BLOCKS = [Blocks(1, 0), Blocks(3, 0), Blocks(4, 3), Blocks(5, 2), Blocks(16, 7), Blocks(40, 0)]


@pytest.fixture(scope="module")
def model(converted: Callable[[str], Path]) -> CausalLM:
    return load_model(converted("llama"), dtype="float64")


def spans(lengths: list[int], blocks: Blocks) -> list[tuple[int, int, int]]:
    """Document's begin, block's first token, block's end, of every block of a row."""
    found, at = [], 0
    for length in lengths:
        cuts = [0, *range(blocks.k - blocks.phase, length, blocks.k), length]
        found += [(at, at + a, at + b) for a, b in pairwise(cuts)]
        at += length
    return found


def decoded(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    """What one-token-at-a-time decoding writes."""
    decoder = ArDecoder(model)
    with torch.inference_mode():
        written = decoder.prefill([prompt], [SamplingParams()])[0]
        while len(written) < count:
            written += decoder.step()[0]
    return written


def by_hand(model: CausalLM, batch: PackedBatch, rows: list[list[int]], blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Tokens, and which are the model's, decoded block by block."""
    tokens, own = batch.tokens.clone(), torch.zeros_like(batch.tokens, dtype=torch.bool)
    for row, lengths in enumerate(rows):
        for begin, first, end in spans(lengths, blocks):
            if first > begin:
                prompt = batch.tokens[row, begin:first].tolist()
                tokens[row, first:end] = torch.tensor(decoded(model, prompt, end - first))
                own[row, first:end] = True
    return tokens, own


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # the second with a sliding window
def test_every_block_goes_on_as_decoding_would(converted: Callable[[str], Path], family: str, blocks: Blocks) -> None:
    tiny, batch = load_model(converted(family), dtype="float64"), pack(ROWS)
    found = roll_out(tiny, batch, blocks)
    tokens, own = by_hand(tiny, batch, ROWS, blocks)
    assert torch.equal(found.tokens, tokens)
    assert torch.equal(found.own, own)
    predicted = tiny.head(found.hidden).index_fill(-1, torch.tensor(tiny.suppressed), -torch.inf).argmax(-1)
    assert torch.equal(predicted[own], tokens[own])
    if blocks.k < 30:
        assert bool((tokens != batch.tokens)[own].double().mean() > 0.5)  # the model does not write the corpus


def test_rows_without_continuations(model: CausalLM) -> None:
    batch = pack([[3, 1, 4], [8]])
    assert torch.equal(roll_out(model, batch, Blocks(4, 0)).tokens[0], batch.tokens[0])
    short = pack([[3, 1, 4]])
    found = roll_out(model, short, Blocks(4, 0))
    assert torch.equal(found.tokens, short.tokens)
    assert not bool(found.own.any())


def test_suppressed_tokens_are_never_written(converted: Callable[[str], Path]) -> None:
    tiny, batch = load_model(converted("llama"), dtype="float64"), pack(ROWS)
    before = roll_out(tiny, batch, Blocks(4, 1))
    tiny.suppressed = tuple(sorted({*tiny.suppressed, *before.tokens[before.own].tolist()}))
    for sampling in (None, Sampling(0.5, 5.0, 0)):
        after = roll_out(tiny, batch, Blocks(4, 1), sampling=sampling)
        assert not {*after.tokens[after.own].tolist()} & {*tiny.suppressed}
    assert torch.equal(roll_out(tiny, batch, Blocks(4, 1)).tokens, by_hand(tiny, batch, ROWS, Blocks(4, 1))[0])


def test_only_the_text_before_a_block_reaches_it(model: CausalLM) -> None:
    batch, blocks = pack(ROWS), Blocks(4, 3)
    before = roll_out(model, batch, blocks)
    reached = 0
    for row, lengths in enumerate(ROWS):
        cut = spans(lengths, blocks)
        for i in range(30):
            changed = batch.tokens.clone()
            changed[row, i] = (changed[row, i] + 1) % 256
            after = roll_out(model, batch._replace(tokens=changed), blocks)
            differs = ((after.hidden != before.hidden).any(-1) | (after.tokens != before.tokens)) & before.own
            assert not bool(differs[torch.arange(3) != row].any())
            for begin, first, end in cut:
                if begin <= i < first:
                    assert bool(differs[row, first]), (row, i, first)
                    reached += 1
                else:
                    assert not bool(differs[row, first:end].any()), (row, i, first)
    assert reached > 50


def test_sampled_blocks_follow_the_models_distribution(converted: Callable[[str], Path]) -> None:
    tiny, documents, share, temperature = load_model(converted("llama"), dtype="float64"), 4000, 0.6, 2.0
    batch = pack([[3] * documents])
    batch = batch._replace(tokens=torch.tensor([5, 77, 9]).repeat(documents)[None])
    batch = PackedBatch(*(part.view(40, -1) for part in batch[:3]))
    batch = batch._replace(starts=batch.starts % 300, ends=(batch.ends - 1) % 300 + 1)
    sampling = Sampling(share, temperature, 11)
    written = roll_out(tiny, batch, Blocks(2, 0), sampling=sampling).tokens.view(-1, 3)[:, 2]
    with torch.no_grad():
        logits = tiny.hf(input_ids=torch.tensor([[5, 77]])).logits[0, -1]
    logits[list(tiny.suppressed)] = -torch.inf
    expected = share * (logits / temperature).softmax(-1)
    expected[logits.argmax()] += 1 - share
    found = torch.bincount(written, minlength=len(logits)) / documents
    deviation = (expected * (1 - expected) / documents).sqrt()
    assert bool(((found - expected).abs() <= 5 * deviation).all())
    assert float(expected.max()) < 0.9


def test_sampling_is_a_function_of_its_seed(model: CausalLM) -> None:
    batch, blocks = pack(ROWS), Blocks(5, 2)
    one, again, other = (roll_out(model, batch, blocks, sampling=Sampling(1.0, 1.0, s)).tokens for s in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    greedy = roll_out(model, batch, blocks).tokens
    assert not torch.equal(one, greedy)
    assert torch.equal(roll_out(model, batch, blocks, sampling=Sampling(0.0, 1.0, 3)).tokens, greedy)
    assert torch.equal(roll_out(model, batch, blocks, sampling=Sampling(1.0, 1e-9, 3)).tokens, greedy)


def test_an_uncompiled_model_runs_on_a_cache(converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = load_model(converted("llama"))

    def compiled(**_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(tiny, "_backbone", compiled)
    plan = layout.causal([0], 3)
    assert tiny.hidden(torch.tensor([[1, 2, 3]]), plan, cache=SlotCache(1)).shape == (1, 3, 32)
    with pytest.raises(AssertionError):
        tiny.hidden(torch.tensor([[1, 2, 3]]), plan)


@pytest.mark.parametrize(
    ("blocks", "alpha", "kl_weight"),
    [(Blocks(1, 0), 1.0, 0.5), (Blocks(4, 3), 0.3, 0.0), (Blocks(5, 2), 1.2, 1.0), (Blocks(16, 7), 1.0, 0.75)],
)
def test_loss_and_gradient(model: CausalLM, blocks: Blocks, alpha: float, kl_weight: float) -> None:
    """Every document alone, every block in forwards of its own."""
    batch, ar, draft = pack(ROWS), [], []
    labels, _ = by_hand(model, batch, ROWS, blocks)
    for row, lengths in enumerate(ROWS):
        at = 0
        for length in lengths:
            document = batch.tokens[row, at : at + length]
            logits = plain_logits(model, document.tolist(), 0)
            ar += [cross_entropy(logits[i - 1], document[i]) for i in range(1, length)]
            at += length
        for begin, first, end in spans(lengths, blocks):
            prefix, wanted = batch.tokens[row, begin:first].tolist(), labels[row, first:end]
            drafted = plain_logits(model, prefix, end - first)[first - begin :]
            taught = plain_logits(model, prefix + wanted.tolist(), 0).detach()
            for i in range(first, end):
                own = cross_entropy(drafted[i - first], wanted[i - first])
                if i > begin:
                    p, q = taught[i - begin - 1].log_softmax(-1), drafted[i - first].log_softmax(-1)
                    own = (1 - kl_weight) * own + kl_weight * kl_div(q, p, log_target=True, reduction="sum")
                draft.append(own)
    expected = (alpha * torch.stack(ar).mean() + torch.stack(draft).mean()) / (1 + alpha)
    expected.backward()  # type: ignore[no-untyped-call]
    wanted_gradients = gradients(model)

    inputs = make_inputs(batch, blocks, mask_id=model.mask_id, device=torch.device("cpu"))
    written = roll_out(model, batch, blocks)
    targets = replace(inputs.targets, drafted=written.tokens, teacher=written.hidden)
    hidden = model.hidden(inputs.tokens, inputs.layout)
    options: dict[str, Any] = {"vocab": model.vocab_size, "alpha": alpha, "kl_weight": kl_weight}
    values = train_loss(model.head, hidden, targets, count([targets]), chunk_elements=264 * 3 * 17, **options)
    torch.testing.assert_close(values[0].double(), expected.detach(), rtol=1e-5, atol=0)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_text_as_its_own_continuation_is_the_loss_on_text(model: CausalLM) -> None:
    batch = pack(ROWS)
    inputs = make_inputs(batch, Blocks(4, 1), mask_id=model.mask_id, device=torch.device("cpu"))
    found = []
    for separate in (False, True):
        hidden, targets = model.hidden(inputs.tokens, inputs.layout), inputs.targets
        if separate:
            teacher = pad(hidden.detach()[:, :29], (0, 0, 1, 0))
            targets = replace(targets, drafted=targets.labels, teacher=teacher)
        values = train_loss(model.head, hidden, targets, count([targets]), vocab=model.vocab_size, kl_weight=0.5)
        found.append((values, gradients(model)))
    torch.testing.assert_close(found[0], found[1])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollout")
    write_text(folder / "text")
    return folder


def test_micro_batches_add_up(converted: Callable[[str], Path], root: Path) -> None:
    rows, results = [[30], [1] * 20 + [10], [12, 18], [3, 27]], []
    whole = pack(rows)
    for size in (4, 1):
        plan = config(root, converted("llama"), micro_batch=size, seq_len=30, batch_tokens=120, draft_text="model")
        stepper = Stepper(load_model(converted("llama"), dtype="float64"), replace(plan, clip=1e9))
        cut = zip(*(torch.split(part, size) for part in whole[:3]), strict=True)
        values = stepper([PackedBatch(*parts) for parts in cut], 0, 1e-3)
        results.append((values, {n: p.detach() for n, p in stepper.model.hf.named_parameters()}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_run_on_its_own_text_learns_and_goes_on_exactly(converted: Callable[[str], Path], root: Path) -> None:
    plan = config(root, converted("llama"), draft_text="model", rollout_sampled=0.5, log_every=1, tokens=24 * 96)
    whole, parts = replace(plan, out=str(root / "whole")), replace(plan, out=str(root / "parts"))
    train(whole)
    for _ in range(3):
        assert train(replace(parts, max_seconds=1e-6), resume=True).model is None
        torch.manual_seed(1)
    assert train(parts, resume=True).step == 24
    assert same_weights(root / "whole" / "model", root / "parts" / "model")
    lines = [r for r in records(root / "whole") if "loss" in r]
    assert lines[-1]["draft"] < lines[0]["draft"] - 0.5
    assert lines[-1]["kl"] < lines[0]["kl"]
    assert lines[-1]["ar"] < lines[0]["ar"] - 0.5
    train(replace(plan, out=str(root / "greedy"), rollout_sampled=0.0))
    assert not same_weights(root / "whole" / "model", root / "greedy" / "model")


def test_mixed_precision_runs(converted: Callable[[str], Path], root: Path) -> None:
    stepper = Stepper(
        load_model(converted("llama")), config(root, converted("llama"), dtype="bf16", draft_text="model")
    )
    assert bool(stepper([pack(ROWS)], 0, 1e-3).isfinite().all())


def test_validation_on_the_models_own_text(converted: Callable[[str], Path], root: Path) -> None:
    plan = config(root, converted("llama"), block_sizes=(1, 3, 5), eval_tokens=150)
    tiny = load_model(converted("llama"))
    folder = prepare(plan.data, tiny.tokenizer, root / "data") / "holdout"  # type: ignore[arg-type]
    found = Validation(plan, tiny, folder).run(Stepper(tiny, plan))
    data = PackedData(folder, seq_len=24, batch_size=2, seed=0)
    batches = [data.next() for _ in range(3)]
    for k in (1, 3, 5):
        hits, seen, steps = [0] * k, [0] * k, []
        for batch in batches:
            for tokens, starts in zip(batch.tokens, batch.starts, strict=True):
                lengths = starts.unique_consecutive(return_counts=True)[1].tolist()
                for begin, first, end in spans(lengths, Blocks(k, 0)):
                    if first == begin:
                        continue
                    prefix = tokens[begin:first].tolist()
                    with torch.no_grad():
                        drafts = plain_logits(tiny, prefix, end - first)[first - begin :].argmax(-1).tolist()
                    agree = [d == a for d, a in zip(drafts, decoded(tiny, prefix, end - first), strict=True)]
                    for offset, same in enumerate(agree):
                        hits[offset] += same
                        seen[offset] += 1
                    if end - first == k:
                        steps.append([*agree[1:], False].index(False) + 1)
        assert found[f"rollout_match_{k}"] == [pytest.approx(h / s, abs=1e-4) for h, s in zip(hits, seen, strict=True)]
        assert found[f"rollout_tokens_per_forward_{k}"] == pytest.approx(sum(steps) / len(steps))
