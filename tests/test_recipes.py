"""Named runs, TOML files, and what is wrong with them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from train_data import records
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

import tidar
from runs.compare_drafts import WAYS
from tidar.bench.shapes import SHAPES
from tidar.errors import TidarError
from tidar.recipes import RECIPES, load_recipe
from tidar.train.config import TrainConfig
from tidar.train.plan import ROOM, memory
from tidar.train.sizes import sizes_of
from tidar.train.trainer import train

RESULTS = Path(__file__).parent.parent / "results"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid(name: str) -> None:
    assert load_recipe(name).tokens > 0


def test_the_control_sees_what_tidar_sees() -> None:
    first, then, control = (load_recipe(f"python-17m{name}") for name in ("", "-rollout", "-control"))
    assert control.tokens == first.tokens + then.tokens
    assert then.model == f"{first.out}/model"
    drafting = {"block_sizes", "kl_weight"}
    named, plain = RECIPES["python-17m"], RECIPES["python-17m-control"]
    differing = {k for k in {*named, *plain} if named.get(k) != plain.get(k)}
    assert differing == {"out", "objective", "tokens", *drafting}


@pytest.mark.parametrize(
    ("name", "billions", "sizes"),
    [
        ("qwen2.5-1.5b", 50, (4, 8, 16)),
        ("qwen2.5-1.5b-control", 50, None),
        ("qwen3-8b", 150, (16,)),
    ],
)
def test_recipes_of_the_paper(name: str, billions: int, sizes: tuple[int, ...] | None) -> None:
    """Section 4.1: 2 M tokens a batch, 4096 a row, 1e-5 to 3e-6 by a cosine after 1 %, equal weights of both losses."""
    plan = load_recipe(name)
    assert plan.tokens == billions * 10**9 and (plan.batch_tokens, plan.seq_len) == (2**21, 4096)
    assert (plan.lr, plan.min_lr, plan.warmup, plan.optimizer) == (1e-5, 3e-6, 0.01, "adamw")
    assert (plan.alpha, plan.kl_weight, plan.draft_text, plan.masking) == (1.0, 0.0, "corpus", "full")
    assert (plan.transition, plan.offset_decay) == (0, 1.0), "what drafts better is the default, not the paper's"
    assert plan.objective == "ar" if sizes is None else plan.block_sizes == sizes


def test_what_drafted_best_is_the_default() -> None:
    """results/compare_drafts.jsonl: of the ways that read each text once, so that nothing is paid for but tokens."""
    lines = [json.loads(line) for line in (RESULTS / "compare_drafts.jsonl").read_text().splitlines()]
    rates = {x["way"]: x["tokens_per_forward"]["greedy"]["all"]["tokens_per_forward"] for x in lines}
    best = max((way for way in rates if "own text" not in way), key=lambda way: rates[way])
    plain = load_recipe("python-17m", WAYS[best])
    default = TrainConfig(data=plain.data)
    for name in ("kl_weight", "kl_from", "transition", "offset_decay", "draft_text"):
        assert getattr(plain, name) == getattr(default, name), name


@pytest.mark.parametrize("shape", ["qwen2.5-1.5b", "qwen3-8b"])
def test_recipes_of_the_paper_fit(shape: str) -> None:
    """On 8 GPUs of 80 GiB, by the count of `--plan`; and on as many as have a micro-batch each."""
    size = sizes_of(AutoConfig.for_model(**SHAPES[shape]))
    for name in (recipe for recipe in RECIPES if recipe.startswith(shape)):
        plan = load_recipe(name)
        assert memory(size, plan, 8).total < ROOM * 80 * 2**30
        assert memory(size, replace(plan, micro_batch=2 * plan.micro_batch), 8).total > 0.7 * ROOM * 80 * 2**30
        assert plan.accumulate % 128 == 0


def test_instruction_tuning(tmp_path: Path) -> None:
    """The recipe as it is, for two steps on a CPU, on lines like those of its data."""
    lines = [
        json.dumps({"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"}) for n in range(60)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    changes = {"data.sources": (str(tmp_path / "train.jsonl"),), "device": "cpu", "dtype": "fp32"}
    small = {"seq_len": 64, "micro_batch": 1, "batch_tokens": 64, "tokens": 128, "eval_tokens": 64}
    result = train(load_recipe("gsm8k", {**changes, **small, "out": str(tmp_path / "run")}))
    model = tidar.load(str(result.model))
    messages = [{"role": "user", "content": "What is 2 + 1?"}]
    asked = model.core.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert asked == "Question: What is 2 + 1?\nAnswer:"


def test_changes_reach_into_tables() -> None:
    plan = load_recipe("smoke", {"tokens": 5000, "arch.layers": 7, "lr": 1, "data.max_documents": 3})
    assert (plan.tokens, plan.arch.layers, plan.lr, plan.data.max_documents) == (5000, 7, 1, 3)
    assert plan.arch.hidden_size == load_recipe("smoke").arch.hidden_size
    assert plan.data.sources == load_recipe("smoke").data.sources


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_smoke_learns(tmp_path: Path) -> None:
    plan = load_recipe("smoke", {"out": str(tmp_path / "run"), "eval_every": 50})
    result = train(plan)
    assert result.tokens >= plan.tokens
    valid = [r["bits_per_byte"] for r in records(tmp_path / "run") if "bits_per_byte" in r]
    assert valid[-1] < 0.9 * valid[0]
    answer = tidar.load(str(result.model)).generate("def ", tidar.SamplingParams(max_new_tokens=20))[0]
    assert len(answer.token_ids) == 20


def test_smoke_starts_from_nothing(tmp_path: Path) -> None:
    """Offline, with data and tokenizer of its own."""
    plan = load_recipe("smoke", {"out": str(tmp_path / "run"), "tokens": 2048, "data.max_documents": 3})
    assert train(plan).step == 1


def test_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('out = "x"\nblock_sizes = [2, 3]\nlr = 1\n[data]\nsources = ["text"]\n[arch]\nlayers = 2\n')
    plan = load_recipe(str(path), {"seed": 9})
    assert (plan.out, plan.block_sizes, plan.lr, plan.arch.layers, plan.seed) == ("x", (2, 3), 1, 2, 9)
    path.write_text('base = "python-17m"\ntokens = 7\n[data]\nsources = ["elsewhere"]\n')
    based = load_recipe(str(path))
    assert (based.tokens, based.kl_weight) == (7, load_recipe("python-17m").kl_weight)
    assert based.data.sources == ("elsewhere",)


def test_streams_are_tables(tmp_path: Path) -> None:
    plan = load_recipe(str(Path(__file__).parent.parent / "docs" / "streams.toml"))
    first, second = plan.data.streams
    assert (first.path, first.weight, second.text_field) == ("HuggingFaceFW/fineweb-edu", 3, "text")
    assert (plan.accumulate, plan.lanes) == (64, 64)
    path = tmp_path / "mine.toml"
    path.write_text('base = "smoke"\n[data]\nsources = []\n[[data.streams]]\npath = "x"\nweigth = 2\n')
    with pytest.raises(TidarError, match="streams: unknown field 'weigth'; Stream has path, name, .*weight"):
        load_recipe(str(path))
    path.write_text('[data]\nstreams = ["x"]\n')
    with pytest.raises(TidarError, match="streams must be Stream, not 'x'"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("asked", "rows", "micro", "lanes"),
    [(16, 128, 64, 16), (16, 128, 4, 32), (16, 4, 2, 4), (16, 60, 10, 30), (3, 8, 8, 4), (1, 8, 8, 1), (5, 7, 7, 7)],
)
def test_lanes_fit_rows_and_micro_batches(asked: int, rows: int, micro: int, lanes: int) -> None:
    """As many as asked for or the next number of which a step's rows are a multiple, and a multiple of its parts."""
    changes = {"seq_len": 8, "micro_batch": micro, "batch_tokens": 8 * rows, "data.lanes": asked}
    assert load_recipe("smoke", changes).lanes == lanes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate = 1", "unknown field 'lerning_rate'; TrainConfig has .*lr"),
        ("[arch]\nlayer = 1", "unknown field 'layer'; Architecture has .*layers"),
        ('lr = "fast"', "lr must be float, not 'fast'"),
        ("seq_len = 1.5", "seq_len must be int"),
        ("compile = 1", "compile must be bool"),
        ("tokens = true", "tokens must be int"),
        ('objective = "mlm"', "objective must be tidar | ar, not 'mlm'"),
        ("block_sizes = 4", "block_sizes must be"),
        ('block_sizes = ["4"]', "block_sizes must be"),
        ("arch = 3", "arch must be Architecture"),
        ('base = "nothing"', "unknown recipe 'nothing'"),
        ("lr = ", "not valid TOML"),
        ("kl_weight = 2", "kl_weight must lie in"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text if "base" in text or text.startswith("[") else text + '\n[data]\nsources = ["text"]\n')
    if text.startswith("["):
        path.write_text('[data]\nsources = ["text"]\n' + text)
    with pytest.raises(TidarError, match=message) as error:
        load_recipe(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "nothing",
            {},
            "use one of smoke, python-17m-ar, python-17m, python-17m-adapters, python-17m-rollout, python-17m-control",
        ),
        ("missing.toml", {}, "cannot read missing.toml"),
        ("smoke", {"arch.depth": 3}, "unknown field 'depth'"),
        ("smoke", {"tokens.x": 3}, "tokens must be int"),
    ],
)
def test_unknown_names_list_what_there_is(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TidarError, match=message):
        load_recipe(name, changes)


def test_data_is_required(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(TidarError, match="data is missing"):
        load_recipe(str(tmp_path / "empty.toml"))
