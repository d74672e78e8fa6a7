"""`tidar train RECIPE --plan` against models as they are and runs as they went."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train_data import config

from tidar import cli
from tidar.bench.shapes import SHAPES
from tidar.checkpoint import embedded_checkpoint, load_model
from tidar.config import Architecture
from tidar.data.config import DataConfig
from tidar.errors import TidarError
from tidar.fresh import fresh_config
from tidar.recipes import load_recipe
from tidar.train import plan as module
from tidar.train.config import Cluster, TrainConfig
from tidar.train.plan import GIB, ROOM, describe, expected_mfu, memory, plan
from tidar.train.sizes import sizes, sizes_of, work

RESULTS = Path(__file__).parent.parent / "results"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_oss", "qwen3_moe"])
def test_parameters_are_counted_without_weights(
    tmp_path: Path, converted: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(converted(family))
    wanted = sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    found = sizes(config(tmp_path, converted(family), transition=0))
    assert found.total == wanted
    assert sizes(config(tmp_path, converted(family), objective="ar")).total == wanted, "only drafts have a transition"
    assert found.layers == model.hf.config.num_hidden_layers and found.vocab == model.vocab_size
    assert sum(count for _, count in found.attending) == found.layers
    assert {window for window, _ in found.attending} == set(model.windows)
    assert found.active < found.layer if family in ("qwen3_moe", "gpt_oss") else found.active == found.layer


def test_a_transition_is_counted(tmp_path: Path) -> None:
    reference = embedded_checkpoint()
    wanted = sum(weight.numel() for weight in load_model(reference).parameters())
    assert sizes(config(tmp_path, reference)).total == wanted


def test_work_of_a_small_model_by_hand() -> None:
    arch = Architecture(hidden_size=8, layers=2, heads=2, kv_heads=1, head_dim=4, intermediate_size=16)
    plain = TrainConfig(data=DataConfig(sources=("x",)), arch=arch, vocab_size=64, seq_len=10, batch_tokens=640)
    plain = replace(plain, block_sizes=(2, 4))
    size = sizes(plain)
    matrices = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    assert (size.layer - matrices, size.active) == (0, matrices)
    products = 2 * (2 * matrices + 64 * 8)
    causal, block = 4 * 8 * 5 * 2, 4 * 8 * 9 * 2  # 5 keys in the mean, and 4 of the block more; two layers
    assert work(size, replace(plain, objective="ar")).training == 3 * (products + causal)
    assert work(size, plain).training == 3 * (2 * products + causal + block)
    assert work(size, plain).rollout == 0
    assert work(size, replace(plain, draft_text="model")).rollout == 2 * products + causal + 4 * 8 * 7 * 2


RUNS = {
    "base": ("python-17m-ar", {}),
    "tidar": ("python-17m", {}),
    "rollout": ("python-17m-rollout", {}),
    "control": ("python-17m-control", {"micro_batch": 64}),
}


@pytest.mark.parametrize("run", RUNS)
def test_runs_as_they_went(run: str) -> None:
    """Memory within 15 %, speed within 25 % of what the reference checkpoint's runs recorded on one NVIDIA H200."""
    recipe, changes = RUNS[run]
    reference = str(embedded_checkpoint())
    found = plan(load_recipe(recipe, {**changes, "model": reference, "tokenizer": ""}), Cluster(gpus=1))
    lines = [json.loads(line) for line in (RESULTS / f"metrics_{run}.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    assert found.memory.total / GIB == pytest.approx(max(s["peak_memory_gib"] for s in steps), rel=0.15)
    assert found.tokens_per_second == pytest.approx(statistics.median(s["tokens_per_second"] for s in steps), rel=0.25)


def test_what_is_fitted_is_what_was_recorded() -> None:
    """The share of the matrix rate from the run on text, and the rollout's factor from the run on own words."""
    rates = []
    for run in ("tidar", "rollout"):
        lines = [json.loads(line) for line in (RESULTS / f"metrics_{run}.jsonl").read_text().splitlines()]
        rates.append(statistics.median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line))
    recipes = [load_recipe(RUNS[run][0], {"model": str(embedded_checkpoint())}) for run in ("tidar", "rollout")]
    text, own = (work(sizes(recipe), recipe) for recipe in recipes)
    flops = Cluster().tflops * 1e12
    share = rates[0] * text.training / flops
    factor = (flops * share / rates[1] - own.training) / own.rollout
    assert module.MEASURED[384] == round(share, 2) and pytest.approx(factor, rel=0.03) == module.ROLLOUT
    measured = [json.loads(line)["rates"]["matmul"] for line in (RESULTS / "bench_step.jsonl").read_text().splitlines()]
    assert statistics.median(measured) == pytest.approx(flops, rel=0.02)


def test_larger_shapes_as_they_went() -> None:
    """The same bounds for 1.5 B and 8 B parameters on one and two GPUs, whose speeds the larger shares are read off."""
    lines = [json.loads(line) for line in (RESULTS / "train_speed.jsonl").read_text().splitlines()]
    lines = [line for line in lines if isinstance(line["shape"], str)]
    assert {(line["shape"], line["gpus"]) for line in lines} >= {("qwen2.5-1.5b", 1), ("qwen3-8b", 2)}
    for line in lines:
        share = expected_mfu(SHAPES[line["shape"]]["hidden_size"])
        share /= module.RECOMPUTED if line["activation_checkpointing"] else 1
        for objective in ("ar", "tidar"):
            made = line[objective]
            assert made["planned_memory_gib"] == pytest.approx(made["peak_memory_gib"], rel=0.15)
            assert share == pytest.approx(made["mfu"], rel=0.25)


def test_train_speed_as_it_was() -> None:
    for line in map(json.loads, (RESULTS / "train_speed.jsonl").read_text().splitlines()):
        if "planned_memory_gib" in line["ar"]:
            continue  # `test_larger_shapes_as_they_went`
        rows = 65536 // line["seq_len"]
        for objective in ("ar", "tidar"):
            values: dict[str, Any] = {
                "objective": objective,
                "arch": Architecture(**line["shape"]),
                "vocab_size": 8192,
                "dtype": "bf16",
                "seq_len": line["seq_len"],
                "micro_batch": rows,
                "batch_tokens": 131072,
                "kl_weight": 0.5,
            }
            recipe = TrainConfig(data=DataConfig(sources=("x",)), **values)
            found = memory(sizes(recipe), recipe, 1).total / GIB
            assert found == pytest.approx(line[objective]["peak_memory_gib"], rel=0.15)


def big(**changes: Any) -> TrainConfig:
    arch = Architecture(
        hidden_size=4096, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate_size=12288, max_positions=8192
    )
    values: dict[str, Any] = {
        "arch": arch,
        "vocab_size": 151936,
        "seq_len": 4096,
        "micro_batch": 8,
        "batch_tokens": 2**21,
        "dtype": "bf16",
        "optimizer": "adamw",
        **changes,
    }
    return TrainConfig(data=DataConfig(sources=("x",)), **values)


@pytest.mark.parametrize(
    ("gpus", "rows", "micro_batches"),
    [(1, 1, 512), (1, 8, 64), (2, 1, 512), (2, 8, 64), (8, 8, 64), (8, 5, 8), (1, 14, 8)],
)
def test_the_remedy_is_one(gpus: int, rows: int, micro_batches: int) -> None:
    recipe = big(micro_batch=rows, batch_tokens=rows * micro_batches * 4096)
    cluster = Cluster(gpus=gpus)
    found = plan(recipe, cluster)
    said = describe(recipe, cluster, found)
    assert found.memory.total > ROOM * 80 * GIB and "\ntoo large" in said
    if "GPUs with" in said:
        gpus = int(re.findall(r"(\d+) GPUs with", said)[0])
    rows = int(re.findall(r"--micro-batch (\d+)", said)[0])
    changed = replace(recipe, micro_batch=rows, activation_checkpointing="--activation-checkpointing" in said)
    assert memory(sizes(recipe), changed, gpus).total <= ROOM * 80 * GIB
    again = Cluster(gpus=gpus)
    assert "too large" not in describe(changed, again, plan(changed, again))


def test_what_no_number_of_gpus_holds() -> None:
    """A step of two rows cannot be shared by more than two."""
    recipe = big(micro_batch=1, batch_tokens=2 * 4096)
    found = plan(recipe, Cluster(gpu_gib=24))
    assert describe(recipe, Cluster(gpu_gib=24), found).endswith("or take larger ones")


def test_memory_is_shared_and_recomputed() -> None:
    size = sizes(big())
    one, eight = memory(size, big(), 1), memory(size, big(), 8)
    assert eight.optimizer == one.optimizer / 8 and eight.activations == one.activations
    less = memory(size, big(activation_checkpointing=True), 8)
    assert less.activations < eight.activations / 5 and less.logits == eight.logits
    slow, fast = (plan(big(activation_checkpointing=on), Cluster(mfu=0.5)) for on in (True, False))
    assert fast.tokens_per_second == pytest.approx(slow.tokens_per_second * 4 / 3)


def test_slices_and_adapters_need_less() -> None:
    plain = big(seq_len=16384, micro_batch=1, transition=0)
    size = sizes(plain)
    sliced = replace(plain, mask_slice=2048)
    whole, less = memory(size, plain, 8), memory(size, sliced, 8)
    assert less.activations < 0.7 * whole.activations and less.logits <= whole.logits
    assert (less.weights, less.gradients, less.optimizer) == (whole.weights, whole.gradients, whole.optimizer)
    assert work(size, sliced) == work(size, plain)
    shape = fresh_config(plain.arch, plain.vocab_size)
    adapted = sizes_of(shape, rank=64)
    frozen = memory(adapted, plain, 8)
    layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 12288)
    assert adapted.pairs == 64 * layer * 36 + 4096
    assert sizes_of(shape, rank=64, modules=("q_proj", "v_proj")).pairs == 64 * (8192 + 5120) * 36 + 4096
    assert frozen.gradients == 4 * adapted.pairs / 8
    assert frozen.weights == whole.weights + frozen.gradients and frozen.optimizer == 2 * frozen.gradients
    assert frozen.activations < 0.6 * whole.activations, "the text keeps nothing but its keys and values"
    # Of the products three parts in six are left, of the attention the text's forward and all of the masks'.
    text, masks = (4 * 4096 * 36 * keys for keys in (8192, 8192 + 16))
    products = work(size, plain).training - 3 * (text + masks)
    assert work(adapted, plain).training == products / 2 + text + 3 * masks


def test_mfu_between_and_beyond_measured_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEASURED", {400: 0.2, 1600: 0.4})
    assert [round(expected_mfu(width), 6) for width in (100, 400, 800, 1600, 6400)] == [0.2, 0.2, 0.3, 0.4, 0.4]
    assert "which is far from 4096: give --mfu" in describe(big(), Cluster(), plan(big(), Cluster()))
    given = Cluster(mfu=0.5)
    assert "50% (as given)" in describe(big(), given, plan(big(), given))


def test_the_command_plans_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--gpus", "2", "--batch-tokens", "8192"]
    assert cli.main(["train", "smoke", "--plan", *words]) == 0
    out, err = capsys.readouterr()
    assert "\nstep       8,192 clean tokens = 2 GPUs x 2 micro-batches x 16 rows x 128 tokens\n" in out
    assert [line.split()[0] for line in out.splitlines()] == ["model", "step", "memory", "speed", "time"]
    assert err == "" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "3"], "3 GPUs cannot share the 1 micro-batches of a step"),
        (["--gpus", "0"], "gpus, gpu_gib and tflops must be above 0"),
        (["--mfu", "1.5"], "mfu must lie in"),
        (["--model", "./nowhere"], "no checkpoint at ./nowhere"),
        (["--tokenizer", "nowhere"], "no tokenizer in nowhere"),
    ],
)
def test_what_cannot_be_planned(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "smoke", "--plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_mfu_is_refused() -> None:
    with pytest.raises(TidarError, match="mfu must lie in"):
        Cluster(mfu=0)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_script_that_measures_speed(tmp_path: Path, ranks: int) -> None:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    words = "--device cpu --layers 2 --seq-len 32 --rows 2 --seconds 0.1".split()
    command = [sys.executable, *several, str(RESULTS.parent / "runs" / "train_speed.py"), *words]
    command += ["--out", str(tmp_path / "speed.jsonl"), "--profile", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, (tmp_path / "speed.jsonl").read_text().splitlines())
    assert (line["gpus"], line["shape"], line["layers"]) == (ranks, "python-17m", 2)
    for name in ("ar", "tidar"):
        assert line[name]["tokens_per_second"] > 0 and 0 < line[name]["planned_memory_gib"] < 1
    assert line["ar"]["planned_memory_gib"] < line["tidar"]["planned_memory_gib"]
    assert "aten::" in (tmp_path / f"python-17m-tidar-{ranks - 1}.txt").read_text()


@pytest.mark.slow
def test_what_was_measured_before_is_gone(tmp_path: Path) -> None:
    """Cycles hold a sharded model: a GPU that is filled by one of the two objectives has no room for both."""
    program = tmp_path / "alive.py"
    program.write_text(ALIVE)
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = "--device cpu --layers 1 --seq-len 32 --rows 1 --seconds 0.1 --activation-checkpointing".split()
    command = [sys.executable, *several, str(program), *words, "--out", str(tmp_path / "speed.jsonl")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RESULTS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("alive: 0") == 4  # two objectives on two ranks


ALIVE = """
import sys, weakref
from runs import train_speed

weights, ready = [], train_speed.ready

def noted(*args):
    # In one piece: two processes share the pipe.
    sys.stdout.write(f"alive: {sum(weight() is not None for weight in weights)}\\n")
    sys.stdout.flush()
    made = ready(*args)
    weights.extend(weakref.ref(weight) for weight in made[0].hf.parameters())
    return made

train_speed.ready = noted
train_speed.main(sys.argv[1:])
"""
