"""Instruction tuning: conversations are read whole, answers alone are learnt."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy
from train_data import config, pack
from transformers import AddedToken, PreTrainedTokenizerFast

from tidar.chat import Conversation
from tidar.checkpoint import load_model
from tidar.data.cache import open_cache
from tidar.data.config import DataConfig
from tidar.data.conversation import Message, Template, encode_conversations, template_encoder
from tidar.data.packing import PackedData
from tidar.data.prepare import prepare
from tidar.errors import TidarError
from tidar.train.inputs import Blocks, make_inputs
from tidar.train.loss import count, train_loss
from tidar.train.step import Stepper
from tidar.train.trainer import train
from tidar.train.validate import Validation

CPU = torch.device("cpu")
# As ChatML, with the end-of-text token where the turn ends and something behind it.
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
ENDLESS = TURNS + "{% if add_generation_prompt %}a:{% endif %}"
LAST_ONLY = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"
TALK: list[Message] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "two é"},
    {"role": "user", "content": "unanswered"},
]


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    made = tiny.byte_tokenizer()
    made.chat_template = template
    return made


def encoded(template: str, talk: list[Message]) -> tuple[list[int], list[bool], PreTrainedTokenizerFast]:
    tokenizer = tokenizer_with(template)
    segments = Template(tokenizer).segments(talk, "here")
    ((ids, learned),) = encode_conversations(template_encoder(tokenizer), [segments], tiny.EOS)
    return ids.tolist(), learned.tolist(), tokenizer


def runs(ids: list[int], learned: list[bool], tokenizer: PreTrainedTokenizerFast) -> list[tuple[bool, str]]:
    found: list[tuple[bool, list[int]]] = []
    for token, wanted in zip(ids, learned, strict=True):
        if not found or found[-1][0] != wanted:
            found.append((wanted, []))
        found[-1][1].append(token)
    return [(wanted, str(tokenizer.decode(part))) for wanted, part in found]


def test_answers_and_their_ends_are_learnt_and_nothing_else() -> None:
    assert runs(*encoded(TEMPLATE, TALK)) == [
        (False, "[system]Be short.<|endoftext|>\n[user]One?<|endoftext|>\n[assistant]"),
        (True, "1<|endoftext|>"),
        (False, "\n[user]Two?<|endoftext|>\n[assistant]"),
        (True, "two é<|endoftext|>"),
    ]


def test_a_template_without_an_end_gets_one() -> None:
    assert runs(*encoded(ENDLESS, TALK)) == [
        (False, "s:Be short.\nu:One?\na:"),
        (True, "1\n"),
        (False, "u:Two?\na:"),
        (True, "two é\n<|endoftext|>"),
    ]


def test_a_decoder_is_prompted_with_what_was_trained_on() -> None:
    ids, learned, tokenizer = encoded(TEMPLATE, TALK[1:3])

    class Asked:
        core = type("Core", (), {"tokenizer": tokenizer})

    prompt = Conversation(Asked()).ask("One?")  # type: ignore[arg-type]
    assert prompt == ids[: learned.index(True)]


def test_templates_that_cannot_be_used() -> None:
    with pytest.raises(TidarError, match="has none: name one in chat_template"):
        Template(tiny.byte_tokenizer())
    with pytest.raises(TidarError, match="here: the chat template writes earlier turns otherwise"):
        Template(tokenizer_with(LAST_ONLY)).segments(TALK, "here")
    with pytest.raises(TidarError, match="here: the chat template refuses the conversation: no system"):
        Template(tokenizer_with("{{ raise_exception('no system') }}")).segments(TALK, "here")


def test_special_tokens_without_a_name_are_not_spelt_out_either() -> None:
    tokenizer = tokenizer_with(TEMPLATE)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    template = Template(tokenizer)
    assert template.spells_special([{"role": "user", "content": "x<|turn|>assistant: y"}])
    assert not template.spells_special(TALK)


def test_text_that_is_prepared_holds_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("some text")
    tokenizer = tokenizer_with(TEMPLATE)
    made = prepare(DataConfig(sources=(str(tmp_path / "in"),), holdout=0.0), tokenizer, tmp_path / "made")
    with pytest.raises(TidarError, match="was prepared as text: name the conversations' files"):
        prepare(DataConfig(sources=(str(made),), turn_fields=("q", "a")), tokenizer, tmp_path / "out")


def test_how_streams_are_read_does_not_prepare_anew(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(TEMPLATE)
    plan = DataConfig(sources=(str(questions(tmp_path / "talk.jsonl.gz")),), turn_fields=("q", "a"))
    made = prepare(plan, tokenizer, tmp_path / "out")
    before = (made / "stats.json").stat().st_ino
    prepare(replace(plan, workers=1, patience=1.0), tokenizer, tmp_path / "out")
    assert (made / "stats.json").stat().st_ino == before
    prepare(replace(plan, min_bytes=2), tokenizer, tmp_path / "out")
    assert (made / "stats.json").stat().st_ino != before


def write(path: Path, rows: list[Any]) -> Path:
    with gzip.open(path, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(path: Path, number: int = 40) -> Path:
    return write(path, [{"q": f"What is {n} and {n}?", "a": f"It is {2 * n}.", "n": n} for n in range(number)])


def test_pairs_lists_and_strings_of_turns_are_one(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(TEMPLATE)
    rows = [{"q": f"{n}?", "a": f"{n}!"} for n in range(9)]
    turns = [[{"role": "user", "content": r["q"]}, {"role": "assistant", "content": r["a"]}] for r in rows]
    sources: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "pairs": (rows, {"turn_fields": ("q", "a")}),
        "lists": ([{"messages": t} for t in turns], {"messages_field": "messages"}),
        "strings": ([{"messages": json.dumps(t)} for t in turns], {"messages_field": "messages"}),
    }
    made = {}
    for name, (content, fields) in sources.items():
        source = write(tmp_path / f"{name}.jsonl.gz", content)
        settings: Any = {"sources": (str(source),), "holdout": 0.0, "duplicates": "keep", **fields}
        made[name] = prepare(DataConfig(**settings), tokenizer, tmp_path / name) / "train"
    for part in ("tokens.bin", "docs.bin", "learned.bin"):
        assert len({(folder / part).read_bytes() for folder in made.values()}) == 1
    data = open_cache(made["lists"])
    assert data.learned is not None
    text = tokenizer.decode(data.tokens[data.learned.astype(bool)].tolist())
    assert text == "".join(f"{n}!<|endoftext|>" for n in range(9))
    stats = json.loads((made["lists"].parent / "stats.json").read_text())
    assert stats["train"]["learned"] == 9 * 3


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [{"q": "a?", "a": "b"}, {"q": "a?", "a": "b"}, {"q": "<|endoftext|>", "a": "c"}, {"q": "d?", "a": "e"}]
    source = write(tmp_path / "talk.jsonl.gz", rows)
    plan = DataConfig(sources=(str(source),), turn_fields=("q", "a"), holdout=0.0, duplicates="exact")
    out = prepare(plan, tokenizer_with(TEMPLATE), tmp_path / "out")
    stats = json.loads((out / "stats.json").read_text())
    assert stats["removed"] == {"exact duplicate": 1, "spells out a special token": 1}
    assert stats["train"]["documents"] == 2
    silent = write(tmp_path / "silent.jsonl.gz", [{"m": TALK[:2]}, {"m": TALK}])
    plan = DataConfig(sources=(str(silent),), messages_field="m", holdout=0.0)
    stats = json.loads((prepare(plan, tokenizer_with(TEMPLATE), tmp_path / "two") / "stats.json").read_text())
    assert stats["removed"] == {"without an answer": 1}


def test_another_template_is_prepared_anew(tmp_path: Path) -> None:
    source = questions(tmp_path / "talk.jsonl.gz")
    plan = DataConfig(sources=(str(source),), turn_fields=("q", "a"))
    for template in (TEMPLATE, ENDLESS):
        prepare(plan, tokenizer_with(template), tmp_path / "out")
        data = open_cache(tmp_path / "out" / "train")
        first = data.tokens[: data.offsets[1]].tolist()
        assert tiny.byte_tokenizer().decode(first[:2]) == ("[u" if template == TEMPLATE else "u:")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"turn_fields": ("q", "answer")}, "has no field 'answer': set turn_fields to one of 'q', 'a', 'n'"),
        ({"messages_field": "q"}, "field 'q' holds no list of turns with role and content"),
        ({"messages_field": "talk"}, "has no field 'talk': set messages_field to one of"),
        ({"turn_fields": ("q", "n")}, "field 'n' holds int, not text: mend it or set turn_fields"),
        ({"turn_fields": ("q",)}, "turn_fields must be pairs of question and answer"),
        ({"turn_fields": ("q", "a"), "messages_field": "q"}, "set messages_field or turn_fields"),
        ({"chat_template": "x.jinja"}, "a chat_template writes conversations: set messages_field or turn_fields too"),
    ],
)
def test_fields_that_do_not_fit(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    source = questions(tmp_path / "talk.jsonl.gz")
    with pytest.raises(TidarError, match=said):
        prepare(DataConfig(sources=(str(source),), **fields), tokenizer_with(TEMPLATE), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_text_holds_no_conversation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(TidarError, match=r"a\.txt holds no conversations: give jsonl, parquet"):
        prepare(DataConfig(sources=(str(tmp_path),), turn_fields=("q", "a")), tokenizer_with(TEMPLATE), tmp_path / "o")


def test_packing_keeps_what_is_learnt_but_for_answers_cut_from_their_question(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(TEMPLATE)
    plan = DataConfig(sources=(str(questions(tmp_path / "talk.jsonl.gz")),), turn_fields=("q", "a"), holdout=0.0)
    data = PackedData(prepare(plan, tokenizer, tmp_path / "out") / "train", seq_len=100, batch_size=5, seed=1)
    cut = learned = 0
    for _ in range(8):
        batch = data.next()
        assert batch.learned is not None
        for tokens, starts, wanted in zip(batch.tokens, batch.starts, batch.learned, strict=True):
            for begin in starts.unique_consecutive().tolist():
                inside = starts == begin
                text = str(tokenizer.decode(tokens[inside].tolist()))
                answer = str(tokenizer.decode(tokens[inside & wanted].tolist()))
                if text.startswith("[user]"):
                    assert answer == text.partition("[assistant]")[2]
                    learned += len(answer) > 0
                else:
                    assert answer == ""
                    cut += 1
    assert cut > 5 and learned > 20


def test_both_halves_learn_the_answers_alone(converted: Callable[[str], Path]) -> None:
    model = load_model(converted("llama"), dtype="float64")
    learned = torch.rand(2, 24, generator=torch.Generator().manual_seed(3)) < 0.4
    batch = pack([[9, 15], [24]])._replace(learned=learned)
    inputs = make_inputs(batch, Blocks(4, 1), mask_id=model.mask_id, device=CPU)
    with torch.no_grad():
        logits = model.head(model.hidden(inputs.tokens, inputs.layout))
    ar = [
        cross_entropy(logits[row, i - 1], batch.tokens[row, i])
        for row in range(2)
        for i in range(24)
        if learned[row, i] and i > batch.starts[row, i]
    ]
    begins = inputs.layout.block[:, 24:, 0] - 24  # blocks that begin where nothing is learnt have nothing to learn
    drafted = learned & learned.gather(1, begins)
    assert 0 < int(drafted.sum()) < int(learned.sum())
    draft = cross_entropy(logits[:, 24:][drafted], batch.tokens[drafted])
    hidden = model.hidden(inputs.tokens, inputs.layout)
    counts = count([inputs.targets])
    found = train_loss(model.head, hidden, inputs.targets, counts, vocab=model.vocab_size)
    assert found[1].item() == pytest.approx(float(torch.stack(ar).mean()), rel=1e-6)
    assert found[2].item() == pytest.approx(float(draft), rel=1e-6)
    assert found[0].item() == pytest.approx(float(found[1] + found[2]) / 2, rel=1e-6)


def test_a_transition_reads_questions_too(converted: Callable[[str], Path]) -> None:
    """The token before an answer's first one is the question's, learnt or not."""
    batch = pack([[24]])
    plain = make_inputs(batch, Blocks(4, 1), mask_id=0, device=CPU)
    partly = make_inputs(batch._replace(learned=torch.arange(24)[None] > 11), Blocks(4, 1), mask_id=0, device=CPU)
    assert partly.targets.before is not None and plain.targets.before is not None
    assert torch.equal(partly.targets.before, plain.targets.before)


def test_validation_judges_answers_alone(tmp_path: Path, converted: Callable[[str], Path]) -> None:
    source = questions(tmp_path / "talk.jsonl.gz", 60)
    model = load_model(converted("llama"))
    model.tokenizer.chat_template = TEMPLATE
    data = DataConfig(sources=(str(source),), turn_fields=("q", "a"), holdout=0.5, duplicates="keep")
    plan = config(
        tmp_path, converted("llama"), data=data, block_sizes=(3,), eval_tokens=960, seq_len=120, batch_tokens=480
    )
    folder = prepare(data, model.tokenizer, tmp_path / "data") / "holdout"  # type: ignore[arg-type]
    validation = Validation(plan, model, folder)
    answers = [
        str(model.tokenizer.decode(tokens[wanted].tolist(), skip_special_tokens=True))
        for batch in validation.batches
        for tokens, wanted in zip(batch.tokens, batch.learned, strict=True)  # type: ignore[arg-type]
    ]
    assert validation.bytes == sum(map(len, answers)) and "It is" in answers[0] and "What" not in "".join(answers)
    before = validation.run(Stepper(model, plan))
    for batch in validation.batches:  # what nobody learns may be anything: the numbers are of the rest
        assert batch.learned is not None
        batch.learned.zero_()
    nothing = validation.run(Stepper(model, plan))
    assert before["bits_per_byte"] > 0 and before["draft_3"] > 0
    assert (nothing["bits_per_byte"], nothing["draft_3"], nothing["tokens_per_forward_3"]) == (0, 0, 0)
    assert nothing["rollout_tokens_per_forward_3"] == 0


def test_a_run_on_conversations_ends_in_a_model_that_chats(tmp_path: Path, converted: Callable[[str], Path]) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    data = DataConfig(
        sources=(str(questions(tmp_path / "talk.jsonl.gz")),),
        turn_fields=("q", "a"),
        chat_template=str(tmp_path / "chat.jinja"),
        holdout=0.2,
        duplicates="keep",
    )
    plan = config(tmp_path, converted("llama"), data=data, draft_text="model", kl_weight=0.5)
    result = train(plan)
    assert result.model is not None
    assert load_model(result.model).tokenizer.chat_template == TEMPLATE
    with pytest.raises(TidarError, match=r"cannot read the chat template .*none\.jinja"):
        train(
            config(
                tmp_path / "two",
                converted("llama"),
                data=DataConfig(
                    sources=data.sources, turn_fields=("q", "a"), chat_template=str(tmp_path / "none.jinja")
                ),
            )
        )
