"""The scripts behind the published numbers: what they count, and each of them end to end on a tiny checkpoint."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_holdout import files
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from runs import humaneval_exact, long_sequences, plot_bench, plot_training, quality, tokens_per_forward
from runs.tokens_per_forward import Output
from tidar.api import Model
from tidar.data.cache import CacheWriter, TokenCache
from tidar.data.tokenizer import encode_documents, plain_encoder, vocabulary_digest
from tidar.errors import TidarError

ROOT = Path(__file__).parent.parent
Converted = Callable[[str], Path]


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def script(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "runs" / name), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


# tokens per forward


def output(committed: list[int], **more: Any) -> Output:
    return Output(
        tokens=list(range(sum(committed))),
        text="é" * sum(committed),
        committed=committed,
        forwards=len(committed),
        **more,
    )


def test_rates_count_prefill_and_sum_before_dividing() -> None:
    found = tokens_per_forward.rates([output([1, 4, 5]), output([1, 1])])
    assert found["tokens_per_forward"] == pytest.approx(12 / 5)
    assert found["mean"] == pytest.approx((10 / 3 + 1) / 2, abs=1e-4)
    assert found["without_prefill"] == pytest.approx((4 + 5 + 1) / 3, abs=1e-4)
    assert found["bytes_per_forward"] == pytest.approx(24 / 5)


def test_summary_sets_repeating_outputs_apart_and_names_differences() -> None:
    outputs = [output([1, 4, 4, 3]), output([1, 2, 2], repeats=True)]
    other = output([1, 1, 3], repeats=True)
    other.tokens[3] = 77
    found = tokens_per_forward.summary(outputs, [outputs[0], other], 4)
    assert found["all"]["outputs"] == 2 and found["not_repeating"]["outputs"] == 1
    assert found["not_repeating"]["tokens_per_forward"] == 3
    assert found["repeating_share"] == 0.5
    assert found["lengths"] == [0, 1, 0, 2]  # last steps left out
    assert found["identical_to_ar"] == "1/2"
    assert found["differing"] == [[1, 3, 3, 77]]


def test_tokens_per_forward(tmp_path: Path, converted: Converted) -> None:
    source, prompts = files(tmp_path, {"a": 3, "b": 3}), tmp_path / "prompts.jsonl.gz"
    folder = str(converted("qwen3"))
    written = script(
        "tokens_per_forward.py",
        "--select",
        str(source),
        "--write",
        str(prompts),
        "--checkpoint",
        folder,
        "--count",
        "3",
    )
    assert written.returncode == 0, written.stderr
    assert "3 prompts of 2 packages" in written.stdout
    out, acceptance = tmp_path / "results.jsonl", tmp_path / "acceptance.jsonl"
    words = ["--checkpoint", folder, "--prompts", str(prompts), "--draft-len", "2", "4", "--new-tokens", "12"]
    tokens_per_forward.main(
        [*words, "--device", "cpu", "--check", "2", "--out", str(out), "--acceptance", str(acceptance)]
    )
    lines, kept = jsonl(out), jsonl(acceptance)
    assert [(line["draft_len"], line["sampling"]) for line in lines] == [
        (k, mode) for mode in ("greedy", "sampled") for k in (2, 4)
    ]
    for line, recording in zip(lines, kept, strict=True):
        assert line["identical_to_ar"] == "2/2" and line["checkpoint"] == "converted" and line["dtype"] == "float32"
        assert (recording["draft_len"], recording["sampling"]) == (line["draft_len"], line["sampling"])
        assert [sum(steps) for steps in recording["committed"]] == [12] * 3
        forwards = sum(map(len, recording["committed"]))
        assert line["all"]["tokens_per_forward"] == pytest.approx(36 / forwards, abs=1e-4)
        assert sum(line["lengths"]) == forwards - 6
        assert sum(recording["repeats"]) == round(3 * line["repeating_share"])
    assert lines[2]["temperature"] == 0.8 and lines[2]["top_p"] == 0.95


# HumanEval


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl.gz"
    prompts = ["def add(a, b):\n", "x = ", "import os\n\n\ndef size(path):\n"]
    lines = [{"task_id": f"T/{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return path


def exact(problems: Path, checkpoint: Path, out: Path, *more: str) -> int:
    words = ["--data", str(problems), "--checkpoint", str(checkpoint), "--out", str(out), "--device", "cpu"]
    return humaneval_exact.main([*words, "--draft-len", "3", "--new-tokens", "10", *more])


def test_humaneval_exact(problems: Path, tmp_path: Path, converted: Converted) -> None:
    assert exact(problems, converted("qwen3"), tmp_path / "out.jsonl") == 0
    lines = {line["dtype"]: line for line in jsonl(tmp_path / "out.jsonl")}
    for dtype in ("float32", "float64"):
        assert lines[dtype]["identical_to_ar"] == lines[dtype]["identical_to_transformers"] == 3
        assert lines[dtype]["misses"] == [] and lines[dtype]["tokens"] == 30
    assert 0 < lines["bfloat16"]["tokens_before_first_difference"] <= 1


@pytest.mark.parametrize("method", ["ar", "tidar"])
def test_humaneval_exact_sees_a_wrong_token(
    method: str, problems: Path, tmp_path: Path, converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Model.generate

    def wrong(self: Model, *args: Any, **options: Any) -> Any:
        answers = generate(self, *args, **options)
        if options.get("method", "tidar") == method:
            answers[1].token_ids[6] = (answers[1].token_ids[6] + 1) % 256
        return answers

    monkeypatch.setattr(Model, "generate", wrong)
    assert exact(problems, converted("qwen3"), tmp_path / "out.jsonl", "--dtypes", "float64") == 1
    [line] = jsonl(tmp_path / "out.jsonl")
    assert line["identical_to_ar"] == 2
    assert line["tokens_before_first_difference"] == pytest.approx(26 / 30, abs=1e-5)
    first = line["misses"][0]
    assert (first["task"], first["against"], first["position"]) == ("T/1", "ar", 6)
    assert first["gap"] > 1e-9 and line["failures"] == len(line["misses"])
    assert line["identical_to_transformers"] == (3 if method == "ar" else 2)


def test_a_near_tie_is_no_failure(
    problems: Path, tmp_path: Path, converted: Converted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(humaneval_exact.Plain, "gap", lambda *_: 5e-4)
    generate = Model.generate

    def wrong(self: Model, *args: Any, **options: Any) -> Any:
        answers = generate(self, *args, **options)
        if options.get("method") == "ar":
            answers[0].token_ids[9] = (answers[0].token_ids[9] + 1) % 256
        return answers

    monkeypatch.setattr(Model, "generate", wrong)
    assert exact(problems, converted("qwen3"), tmp_path / "out.jsonl", "--dtypes", "float32") == 0
    assert exact(problems, converted("qwen3"), tmp_path / "out.jsonl", "--dtypes", "float64") == 1
    assert [(line["identical_to_ar"], line["largest_gap"]) for line in jsonl(tmp_path / "out.jsonl")] == [(2, 5e-4)] * 2


def test_the_gap_is_that_of_the_lower_token(converted: Converted) -> None:
    plain = humaneval_exact.Plain(str(converted("qwen3")), torch.device("cpu"), torch.float64)
    text = list(b"x = ")
    logits = plain.hf(input_ids=torch.tensor([text])).logits[0, -1].detach()
    logits[plain.suppressed] = -torch.inf
    order = logits.argsort(descending=True)
    first, third = (int(i) for i in (order[0], order[2]))
    assert plain.gap(text, [first, third]) == pytest.approx(float(logits[first] - logits[third]))
    assert plain.gap(text, [first, first]) == 0


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    done = script("humaneval_exact.py", "--data", str(tmp_path / "none.jsonl.gz"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read") and done.stderr.count("\n") == 1


# quality


def test_quality(tmp_path: Path, converted: Converted, capsys: pytest.CaptureFixture[str]) -> None:
    folder, window = converted("qwen3"), 24
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    texts = ["def f(x):\n    return x\n", "é = 1\n", "import os\n" * 7 + "# end", "a"]
    cache = tmp_path / "cache"
    cache.mkdir()
    with CacheWriter(cache, vocab_size=len(tokenizer), eos_id=tiny.EOS) as writer:
        for text, ids in zip(texts, encode_documents(plain_encoder(tokenizer), texts, tiny.EOS), strict=True):
            writer.add(ids, len(text.encode()))
        writer.close({"tokenizer": vocabulary_digest(tokenizer)})
    words = ["--holdout", str(cache), "--checkpoint", f"ours={folder}", f"control={folder}", "--device", "cpu"]
    out = tmp_path / "out.jsonl"
    quality.main([*words, "--window", str(window), "--batch-tokens", "60", "--out", str(out)])

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    nats, predicted = 0.0, 0
    for text in texts:
        document = [*tokenizer(text)["input_ids"], tiny.EOS]
        for first in range(0, len(document) - 1, window):
            part = torch.tensor(document[first : first + window + 1])
            with torch.no_grad():
                logits = plain(input_ids=part[None, :-1]).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
            predicted += len(part) - 1
    size = sum(len(text.encode()) - 1 for text in texts)
    for line, name in zip(jsonl(out), ("ours", "control"), strict=True):
        assert line["name"] == name and line["tokens"] == predicted and line["bytes"] == size
        assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert line["ratio_to_control"] == 1
    assert "+0.00% against control" in capsys.readouterr().out

    meta = json.loads((cache / "meta.json").read_text())
    (cache / "meta.json").write_text(json.dumps({**meta, "tokenizer": "another"}))
    with pytest.raises(TidarError, match="not made with the tokenizer"):
        quality.main([*words, "--out", str(out)])


def test_windows_predict_every_token_once() -> None:
    offsets = np.array([0, 1, 6, 30, 47], np.int64)
    cache = TokenCache(np.zeros(offsets[-1], np.uint16), offsets, {})
    found = quality.windows(cache, 8)
    predicted = sorted(i for first, end in found for i in range(first + 1, end))
    assert predicted == sorted(set(range(47)) - {0, 1, 6, 30})
    assert max(end - first for first, end in found) == 9


# curves


def metrics(path: Path, tokens: list[int], *, rates: bool) -> Path:
    lines: list[dict[str, Any]] = []
    for i, count in enumerate(tokens):
        lines.append({"step": i, "tokens": count, "loss": 3.0})
        more = {f"tokens_per_forward_{k}": 1 + k * i / 20 for k in (4, 8, 16)} if rates else {}
        lines.append({"step": i, "tokens": count, "bits_per_byte": 1 + 1 / (i + 1), **more})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_plot_training(tmp_path: Path) -> None:
    words = []
    for name, rates in (("base", False), ("tidar", True), ("control", False)):
        words += [f"--{name}", str(metrics(tmp_path / f"{name}.jsonl", [10**7, 2 * 10**7, 3 * 10**7], rates=rates))]
    drawn = []
    for name in ("one", "two"):
        plot_training.main([*words, "--out", str(tmp_path / f"{name}.svg")])
        drawn.append((tmp_path / f"{name}.svg").read_bytes())
    assert drawn[0] == drawn[1] and len(drawn[0]) < 100_000
    text = drawn[0].decode()
    assert all(label in text for label in ("AR base", "AR control", "TiDAR", "k = 4", "k = 8", "k = 16"))
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "base.jsonl").write_text('{"step": 1, "tokens": 5}\n')
    with pytest.raises(TidarError, match="has no validation"):
        plot_training.main([*words, "--out", str(tmp_path / "three.svg")])


# long rows


def test_long_sequences(tmp_path: Path, converted: Converted, monkeypatch: pytest.MonkeyPatch) -> None:
    out, folder = tmp_path / "out.jsonl", str(converted("llama"))
    measure = long_sequences.measure

    def measured(size: int, mask_slice: int, args: Any) -> dict[str, Any]:
        if (size, mask_slice) == (96, 0):
            raise torch.OutOfMemoryError("no room for a test")
        return measure(size, mask_slice, args)

    monkeypatch.setattr(long_sequences, "measure", measured)
    words = ["--model", folder, "--device", "cpu", "--seq-len", "64", "96", "--mask-slice", "0", "40"]
    long_sequences.main([*words, "--seconds", "0.01", "--micro-batches", "2", "--out", str(out)])
    lines = jsonl(out)
    assert [(line["seq_len"], line["mask_slice"]) for line in lines] == [(64, 0), (64, 40), (96, 0), (96, 40)]
    assert [line["out_of_memory"] for line in lines] == [False, False, True, False]
    assert all(("tokens_per_second" in line) != line["out_of_memory"] for line in lines)
    assert lines[3]["tokens_per_second"] > 0 and lines[3]["peak_memory_gib"] > 0
    drawn = []
    for name in ("one", "two"):
        long_sequences.main(["--draw", str(tmp_path / f"{name}.svg"), "--out", str(out)])
        drawn.append((tmp_path / f"{name}.svg").read_bytes())
    assert drawn[0] == drawn[1] and b"slices of 40" in drawn[0] and b"one forward" in drawn[0]
    curves = long_sequences.newest(out)
    assert list(curves[folder, 40]) == [64, 96] and curves[folder, 0][96]["out_of_memory"]
    done = script("long_sequences.py", "--draw", str(tmp_path / "x.svg"), "--out", str(tmp_path / "none.jsonl"))
    assert done.returncode == 2 and done.stderr.startswith("error: cannot read") and done.stderr.count("\n") == 1


# speeds


def timed(method: str, speedup: float, *, day: int = 1, **more: Any) -> dict[str, Any]:
    line = {
        **{"model": "python-17m", "dtype": "bfloat16", "method": method, "batch": 1, "sampling": {}, "prompts": 8},
        **{"tokens_per_second": 5000 * speedup, "speedup": speedup, "speedup_95": [0.9 * speedup, 1.1 * speedup]},
        **{"tokens_per_step": 2.0, "milliseconds_per_step": 0.25, "identical_to_ar": "7/8"},
    }
    return {**line, **more, "provenance": {"command": "bench", "date": f"2026-01-0{day}T00:00:00+00:00"}}


def stepped(model: str, step: str, queries: int, milliseconds: float, *, day: int = 1, **more: Any) -> dict[str, Any]:
    line = {
        **{"model": model, "dtype": "bfloat16", "step": step, "queries": queries, "batch": 1, "prefix": 64},
        **{"sampled": False, "milliseconds": milliseconds, "floor_milliseconds": 0.5, "floor": {"bound": "memory"}},
        **{"share": 0.5 / milliseconds, "over_ar": milliseconds},
    }
    return {**line, **more, "provenance": {"command": "bench", "date": f"2026-01-0{day}T00:00:00+00:00"}}


def test_plot_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [stepped("large", "ar", 1, 4.0, day=2), stepped("large", "ar", 1, 9.0)]
    steps += [stepped("large", "tidar", 20, 8.0, day=2), stepped("large", "verify", 8, 79.0)]  # of the run before
    steps += [stepped("python-17m", name, n, 1.0 + n) for name, n in (("tidar", 20), ("draft", 5), ("ar", 1))]
    steps += [stepped("large", "ar", 1, 77.0, sampled=True), stepped("large", "ar", 1, 78.0, batch=4)]
    hot: dict[str, Any] = {"sampling": {"temperature": 0.8, "top_p": 0.95}}
    decoding = [timed("ar", 1.0), timed("tidar k=4", 2.0), timed("tidar k=4", 2.5), timed("auto", 3.0)]
    decoding += [timed("prompt lookup", 0.02, prompts=2), timed("ar", 1.0, **hot), timed("tidar k=4", 1.5, **hot)]
    decoding += [timed("ar", 1.0, batch=4), timed("tidar k=4", 1.25, batch=4), timed("ar", 1.0, model="other")]
    steps.append(stepped("large", "ar", 1, 3.0, weights="int8"))
    decoding += [timed("ar", 1.0, weights="fp8"), timed("auto", 2.25, weights="fp8")]
    steps.append(stepped("large", "tidar", 20, 10.0, adapter_rank=8))
    decoding += [timed(method, x, prompt_tokens=9) for method, x in (("ar", 1.0), ("tidar k=4", 2.0), ("auto", 1.5))]
    words = []
    for name, lines in (("step", steps), ("decode", decoding)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        words += [f"--{name}", str(path)]

    drawn = []
    for name in ("one", "two"):
        plot_bench.main([*words, "--out", str(tmp_path / "new" / f"{name}.png"), "--tables"])
        drawn.append((tmp_path / "new" / f"{name}.png").read_bytes())
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"\x89PNG") and len(drawn[0]) < 120_000
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["one.png", "two.png"]

    printed = capsys.readouterr().out
    assert "| ar | 1 | 4.000 | 0.500, memory | 12.5 % | 4.00 |" in printed  # the newest, though it stands first
    assert not any(f"{wrong}.000" in printed for wrong in (9, 77, 78, 79))
    assert "| tidar k=4 | 12,500 | 2.50x | 2.25–2.75 | 2.00 | 0.250 | 7/8 |" in printed  # of one day, the last
    assert "| prompt lookup | 100 | 0.020x | 0.018–0.022 |  |  | 7/8 |" in printed
    assert "batch 1, T = 0.8, top-p 0.95" in printed
    assert printed.count("int8 weights, large, prefix 64\n\n") == printed.count("| ar | 1 | 3.000 |") == 2
    assert "fp8 weights, batch 1, greedy\n\n" in printed and printed.count("11,250") == 2
    assert "| tidar k=4 | 6,250, 1.25x (1.12–1.38) |" in printed
    assert "adapters, large, prefix 64\n\n" in printed and "| tidar | 20 | 8.000 | 10.000 |" in printed
    assert "| greedy | 9 | 1 | tidar k=4, 2.00x | 1.50x (1.35–1.65) | 0.75 |" in printed
    assert "| greedy | 256 | 1 | tidar k=4, 2.50x | 3.00x (2.70–3.30) | 1.20 |" in printed
    kept = plot_bench.held_in(plot_bench.newest(tmp_path / "decode.jsonl", plot_bench.DECODE), None)
    shown = plot_bench.against_ar(plot_bench.by_sampling(kept, 1)["greedy"])
    assert [(line["method"], line["speedup"]) for line in shown] == [("auto", 3.0), ("tidar k=4", 2.5)]

    (tmp_path / "step.jsonl").write_text("")
    with pytest.raises(TidarError, match="is empty"):
        plot_bench.main([*words, "--out", str(tmp_path / "three.png")])
    done = script("plot_bench.py", "--step", str(tmp_path / "none.jsonl"))
    assert done.returncode == 2 and done.stderr.startswith("error: cannot read") and done.stderr.count("\n") == 1


def test_plot_parts(tmp_path: Path) -> None:
    from runs import plot_parts

    def forward(prefix: int, queries: int, **more: Any) -> dict[str, Any]:
        times = {f"{part}_milliseconds": 0.1 * queries + prefix / 1e4 for part in plot_parts.PANELS}
        about = {"model": "large", "dtype": "bfloat16", "layers": 4, "prefix": prefix, "queries": queries}
        return {**about, **times, "provenance": {"gpu": "a GPU"}, **more}

    lines = [forward(prefix, queries) for prefix in (2048, 1024) for queries in (16, 1)]
    path = tmp_path / "parts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, forward(1024, 1, total_milliseconds=7.0)]))
    _, kept = plot_parts.curves(path)
    assert {n: [line["queries"] for line in each] for n, each in kept.items()} == {1024: [1, 16], 2048: [1, 16]}
    assert kept[1024][0]["total_milliseconds"] == 7.0, "the newest"
    drawn = []
    for name in ("one", "two"):
        plot_parts.main(["--parts", str(path), "--out", str(tmp_path / f"{name}.png")])
        drawn.append((tmp_path / f"{name}.png").read_bytes())
    assert drawn[0] == drawn[1] and drawn[0].startswith(b"\x89PNG")
    for wrong in ("", "{}\n", json.dumps(forward(1, 1)) + "\n" + json.dumps(forward(1, 2, model="small")) + "\n"):
        path.write_text(wrong)
        with pytest.raises(TidarError, match="name a file that"):
            plot_parts.curves(path)


def test_tuning_covers_the_products_and_the_attention_of_a_step() -> None:
    """What can be said without a GPU: every case has candidates, the default among the first, none of them twice."""
    from runs import tune_kernels

    wanted = list(tune_kernels.cases(["17m", "1.5b", "8b"]))
    assert len(wanted) == len(set(wanted)) == 3 * (4 * 4 + 2 + 4)
    for case in wanted:
        tried = tune_kernels.cuts(case)
        assert len(tried) == len(set(tried)) > 5
        assert tune_kernels._default(case) in tried[:2]
    done = script("tune_kernels.py")
    assert torch.cuda.is_available() or (done.returncode == 2 and "there is no GPU here" in done.stderr)
