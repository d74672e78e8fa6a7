"""Ends of texts, streaming, counting of forwards, and what a user may get wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar.api import Model
from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.convert import convert
from tidar.decode.text import TextStream
from tidar.errors import TidarError

PROMPT = list(b"def add(a, b):\n    return")


def tokens(model: Model, new: int = 40, **params: object) -> list[int]:
    wanted = SamplingParams(max_new_tokens=new, ignore_eos=True, **params)  # type: ignore[arg-type]
    return model.generate(PROMPT, wanted, method="ar")[0].token_ids


def ending_at(model: Model, token: int) -> Model:
    """The same model with another end-of-text token."""
    other = object.__new__(type(model.core))
    other.__dict__ = {**model.core.__dict__, "eos_ids": frozenset([token])}
    return Model(other)


@pytest.mark.parametrize("k", [1, 3, 4, 8])
def test_end_of_text_anywhere_in_a_block(qwen3: Model, k: int) -> None:
    text = tokens(qwen3)
    places = set()
    for token in sorted(set(text)):
        place = text.index(token)
        places.add(place)
        for method in ("ar", "tidar"):
            got = ending_at(qwen3, token).generate(
                PROMPT,
                SamplingParams(max_new_tokens=40),
                method=method,
                draft_len=k,
            )[0]
            assert got.token_ids == text[: place + 1]
            assert got.finish_reason == "stop"
    assert len(places) > 5


def test_limits_are_exact_and_no_forward_is_wasted(qwen3: Model) -> None:
    text = tokens(qwen3)
    for new in (1, 2, 3, 7, 40):
        ar = qwen3.generate(PROMPT, SamplingParams(max_new_tokens=new, ignore_eos=True), method="ar")[0]
        assert ar.token_ids == text[:new]
        assert ar.forwards == new and ar.tokens_per_forward == 1.0
        got = qwen3.generate(PROMPT, SamplingParams(max_new_tokens=new, ignore_eos=True), draft_len=4)[0]
        assert got.token_ids == text[:new] and got.finish_reason == "length"
        assert got.forwards <= new


def test_positions_run_out(converted: Callable[[str], Path]) -> None:
    model = Model(load_model(converted("llama")))
    limit = model.core.max_positions
    prompt = list(b"ab" * (limit // 2 - 3))
    for method in ("ar", "tidar"):
        got = model.generate(prompt, SamplingParams(max_new_tokens=100, ignore_eos=True), method=method)[0]
        assert len(prompt) + len(got.token_ids) == limit and got.finish_reason == "length"


@pytest.mark.parametrize("method", ["ar", "tidar"])
def test_stop_strings(qwen3: Model, method: str) -> None:
    full = qwen3.generate(PROMPT, SamplingParams(max_new_tokens=40, ignore_eos=True), method="ar")[0]
    for start in (0, 5, 11):
        stop = full.text[start : start + 3]
        got = qwen3.generate(
            PROMPT,
            SamplingParams(max_new_tokens=40, stop=("never here", stop), ignore_eos=True),
            method=method,  # type: ignore[arg-type]
            draft_len=4,
        )[0]
        assert got.text == full.text[: full.text.index(stop)]
        assert got.finish_reason == "stop"
        assert full.token_ids[: len(got.token_ids)] == got.token_ids


@pytest.mark.parametrize("method", ["ar", "tidar", "linear"])
def test_stream_is_generate_in_pieces(qwen3: Model, method: str) -> None:
    prompts = [PROMPT, list(b"x"), list(b"import")]
    params = SamplingParams(max_new_tokens=30, temperature=0.9, seed=3)
    whole = qwen3.generate(prompts, params, method=method, draft_len=4)  # type: ignore[arg-type]
    texts, ids, forwards = [""] * 3, [[] for _ in prompts], [0] * 3  # type: ignore[var-annotated]
    for chunk in qwen3.stream(prompts, params, method=method, draft_len=4):  # type: ignore[arg-type]
        texts[chunk.index] += chunk.text
        ids[chunk.index] += chunk.token_ids
        forwards[chunk.index] += chunk.forwards
    assert texts == [c.text for c in whole]
    assert ids == [c.token_ids for c in whole]
    assert forwards == [c.forwards for c in whole]


def test_a_stream_may_be_left(qwen3: Model) -> None:
    stream = qwen3.stream(PROMPT, SamplingParams(max_new_tokens=30), draft_len=4)
    next(stream)
    assert not torch.is_inference_mode_enabled()
    del stream
    assert len(tokens(qwen3, 5)) == 5


@settings(max_examples=200)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_text_stream(text: str, stops: list[str]) -> None:
    """Byte by byte: no broken character and no part of a stop string is ever shown."""
    text = text.encode(errors="ignore").decode()
    stops = [s.encode(errors="ignore").decode() or "?" for s in stops]
    stream = TextStream(tiny.byte_tokenizer(), [], stops)
    ends = [text.index(s) + len(s) for s in stops if s in text]
    shown = ""
    alphabet = tiny.byte_tokenizer()(text)["input_ids"]
    for token in alphabet:
        shown += stream.push(token)
        assert "\ufffd" not in shown or "\ufffd" in text
        if stream.stopped:
            break
    shown += stream.finish()
    if ends:
        first = min(ends)
        assert stream.stopped
        assert shown == text[: min(text.index(s) for s in stops if s in text[:first])]
    else:
        assert shown == text


def test_broken_characters_at_the_end_are_shown_as_such() -> None:
    stream = TextStream(tiny.byte_tokenizer(), [])
    ids = tiny.byte_tokenizer()("é")["input_ids"]
    assert stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


def test_the_mask_is_never_produced(qwen3: Model) -> None:
    params = SamplingParams(max_new_tokens=200, temperature=50.0, ignore_eos=True, seed=1)
    for method in ("ar", "tidar"):
        ids = qwen3.generate(PROMPT, params, method=method, draft_len=4)[0].token_ids
        assert max(ids) < len(qwen3.core.tokenizer) and qwen3.core.mask_id not in ids


def test_a_generation_config_is_not_applied_silently(qwen3: Model) -> None:
    before = tokens(qwen3)
    qwen3.core.hf.generation_config.repetition_penalty = 5.0
    try:
        assert tokens(qwen3) == before
    finally:
        qwen3.core.hf.generation_config.repetition_penalty = None


BAD: list[tuple[str, Callable[[Model], object]]] = [
    ("prompt is empty", lambda m: m.generate("")),
    ("prompt 2 is empty", lambda m: m.generate([PROMPT, []])),
    ("takes fewer than 512", lambda m: m.generate([5] * 600)),
    ("outside 0", lambda m: m.generate([5, 10**6])),
    ("draft length must be at least 1", lambda m: m.generate(PROMPT, draft_len=0)),
    ("between 1 and", lambda m: m.generate(PROMPT, draft_len=4, proposals=5)),
    ("between 1 and", lambda m: m.generate(PROMPT, draft_len=4, proposals=0)),
    ("method 'fast' is unknown", lambda m: m.generate(PROMPT, method="fast")),  # type: ignore[arg-type]
    ("batch_size", lambda m: m.generate(PROMPT, batch_size=0)),
    ("2 sampling parameters for 1", lambda m: m.generate(PROMPT, [SamplingParams()] * 2)),
    ("temperature", lambda m: SamplingParams(temperature=-0.1)),
    ("temperature", lambda m: SamplingParams(temperature=float("nan"))),
    ("top_p", lambda m: SamplingParams(top_p=0.0)),
    ("top_p", lambda m: SamplingParams(top_p=1.1)),
    ("top_k", lambda m: SamplingParams(top_k=-1)),
    ("repetition_penalty", lambda m: SamplingParams(repetition_penalty=0.0)),
    ("max_new_tokens", lambda m: SamplingParams(max_new_tokens=0)),
    ("seed", lambda m: SamplingParams(seed=-1)),
    ("prompt 1 is not valid text at character 3", lambda m: m.generate("abc\ud800")),
    ("stop string", lambda m: SamplingParams(stop=("",))),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=[m for m, _ in BAD])
def test_bad_input(qwen3: Model, message: str, call: Callable[[Model], object]) -> None:
    with pytest.raises(TidarError, match=message) as caught:
        call(qwen3)
    assert "\n" not in str(caught.value)


def test_one_stop_string_is_not_its_letters() -> None:
    assert SamplingParams(stop="def").stop == ("def",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_a_prompt_may_end_inside_a_character() -> None:
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer("é😀x")["input_ids"]
    for cut in range(len(ids) + 1):
        stream = TextStream(tokenizer, ids[:cut])
        text = "".join(stream.push(token) for token in ids[cut:]) + stream.finish()
        assert text.endswith("x") or cut == len(ids)
        assert "é" not in text or cut < 2, "the prompt came out again"


@pytest.mark.parametrize("k", [1, 4, 16])
def test_texts_of_scaled_positions_end_at_the_same_place(tmp_path: Path, k: int) -> None:
    """longrope: masks past the original length must not switch the clean rows' frequencies."""
    scaling = {"rope_type": "longrope", "long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "rope_theta": 10000.0}
    folder = tiny.save_plain(
        "phi3", tmp_path / "plain", rope_parameters=scaling, original_max_position_embeddings=64, head_dim=8
    )
    model = Model(convert(folder, tmp_path / "out"))
    prompt = list(range(40, 69))
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    ar = model.generate(prompt, params, method="ar")[0].token_ids
    assert len(prompt) + len(ar) == 64
    with pytest.warns(UserWarning, match="not trained"):
        assert model.generate(prompt, params, draft_len=k)[0].token_ids == ar


def test_lengths_beyond_training_warn(qwen3: Model) -> None:
    params = SamplingParams(max_new_tokens=2)
    with pytest.warns(UserWarning, match="beyond the 16"):
        qwen3.generate(PROMPT, params, draft_len=17)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qwen3.generate(PROMPT, params, draft_len=16)


@pytest.mark.parametrize("method", ["ar", "tidar"])
def test_nan_logits_stop_the_run(converted: Callable[[str], Path], method: str) -> None:
    model = Model(load_model(converted("llama")))
    with torch.no_grad():
        dict(model.core.hf.named_parameters())["model.embed_tokens.weight"][PROMPT[-1]] = torch.nan
    with pytest.raises(TidarError, match="NaN"):
        model.generate(PROMPT, method=method)  # type: ignore[arg-type]
