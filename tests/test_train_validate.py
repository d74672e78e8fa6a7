"""Validation numbers against the same numbers counted by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from train_data import config, pack, write_text

from tidar.checkpoint import load_model
from tidar.data.packing import PackedData
from tidar.data.prepare import prepare
from tidar.train.inputs import Blocks, make_inputs
from tidar.train.step import Stepper
from tidar.train.validate import Validation, leading_matches


def test_leading_matches_by_hand() -> None:
    match = torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    begins = torch.zeros_like(match)
    begins[0, [0, 4, 8]] = True
    # Offset 0 is the AR token itself: whether the draft guessed it does not matter.
    assert leading_matches(match, begins, 4).tolist() == [3, 1, 4]
    assert leading_matches(match, begins, 1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("objective", ["ar", "tidar"])
def test_validation_counts_what_it_says(tmp_path: Path, converted: Callable[[str], Path], objective: str) -> None:
    write_text(tmp_path / "text")
    plan = config(tmp_path, converted("llama"), objective=objective, block_sizes=(3, 5), eval_tokens=150)
    model = load_model(converted("llama"))
    folder = prepare(plan.data, model.tokenizer, tmp_path / "data") / "holdout"  # type: ignore[arg-type]
    found = Validation(plan, model, folder).run(Stepper(model, plan))

    data = PackedData(folder, seq_len=24, batch_size=2, seed=0)
    batches = [data.next() for _ in range(3)]
    nats, size, bytes_seen = 0.0, 24, b""
    for batch in batches:
        for tokens, starts in zip(batch.tokens, batch.starts, strict=True):
            for begin in sorted(set(starts.tolist())):
                document = tokens[starts == begin]
                with torch.no_grad():
                    logp = model.hf(input_ids=document[None]).logits[0].double().log_softmax(-1)
                nats -= sum(float(logp[i - 1, document[i]]) for i in range(1, len(document)))
                bytes_seen += model.tokenizer.decode(document[1:].tolist(), skip_special_tokens=True).encode()  # type: ignore[union-attr]
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(bytes_seen), rel=1e-4)
    if objective == "ar":
        assert list(found) == ["bits_per_byte"]
        return

    for k in (3, 5):
        hits, seen, steps, draft = [0] * k, [0] * k, [], []
        for batch in batches:
            inputs = make_inputs(batch, Blocks(k, 0), mask_id=model.mask_id, device=torch.device("cpu"))
            with torch.no_grad():
                logits = model.head(model.hidden(inputs.tokens, inputs.layout))
            for row in range(2):
                agree = {}
                for i in range(size):
                    begin, end = int(batch.starts[row, i]), int(batch.ends[row, i])
                    draft.append(-float(logits[row, size + i].log_softmax(-1)[batch.tokens[row, i]]))
                    if i == begin:
                        continue
                    agree[i] = int(logits[row, i - 1].argmax()) == int(logits[row, size + i].argmax())
                    hits[(i - begin) % k] += agree[i]
                    seen[(i - begin) % k] += 1
                for i in range(size):
                    begin, end = int(batch.starts[row, i]), int(batch.ends[row, i])
                    if (i - begin) % k == 0 and i + k <= end:
                        n = 1
                        while n < k and agree[i + n]:
                            n += 1
                        steps.append(n)
        assert found[f"match_{k}"] == [pytest.approx(h / s, abs=1e-4) for h, s in zip(hits, seen, strict=True)]
        assert found[f"tokens_per_forward_{k}"] == pytest.approx(sum(steps) / len(steps))
        assert found[f"draft_{k}"] == pytest.approx(sum(draft) / len(draft), rel=1e-4)


def test_validation_changes_no_weight(tmp_path: Path, converted: Callable[[str], Path]) -> None:
    write_text(tmp_path / "text")
    plan = config(tmp_path, converted("llama"))
    model = load_model(converted("llama"))
    folder = prepare(plan.data, model.tokenizer, tmp_path / "data") / "holdout"  # type: ignore[arg-type]
    stepper = Stepper(model, plan)
    before = {n: p.detach().clone() for n, p in model.hf.named_parameters()}
    first = Validation(plan, model, folder).run(stepper)
    assert Validation(plan, model, folder).run(stepper) == first
    assert all(p.grad is None for p in stepper.parameters)
    stepper([pack([[24]])], 0, 1e-3)
    assert any(not torch.equal(p, before[n]) for n, p in model.hf.named_parameters())
    assert Validation(plan, model, folder).run(stepper) != first
