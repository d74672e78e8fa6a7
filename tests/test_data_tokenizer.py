from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tidar
from tidar.data.tokenizer import (
    EOS,
    MASK,
    encode_documents,
    end_of_text,
    plain_encoder,
    train_tokenizer,
    vocabulary_digest,
)
from tidar.errors import TidarError

SOURCES = [path.read_text() for path in sorted(Path(tidar.__file__).parent.rglob("*.py"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(SOURCES, vocab_size=1024, out=out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [str(tokenizer.decode([i])) for i in ids]


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 1024
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.mask_token) == (EOS, EOS, MASK)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 0, 1)
    assert tokenizer("x")["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]


@settings(deadline=None, max_examples=100)
@given(text=st.text() | st.text("ab1_ .\n\t\r(é中\u00a0"))
def test_nothing_is_lost(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    (ids,) = encode_documents(plain_encoder(tokenizer), [text], 0)
    assert tokenizer.decode(ids[:-1].tolist()) == text
    assert ids[-1] == 0


def test_sources_are_not_changed(tokenizer: PreTrainedTokenizerFast) -> None:
    for source in SOURCES:
        assert tokenizer.decode(tokenizer(source)["input_ids"]) == source


def test_pieces_suit_python(tokenizer: PreTrainedTokenizerFast) -> None:
    assert pieces(tokenizer, "\n        return 1024\n\n\ndef ") == [
        *("\n        ", "return", " ", "1", "0", "2", "4", "\n\n\n", "def", " ")
    ]
    assert ".shape" in pieces(tokenizer, "x.shape")


def test_merges_do_not_cross_lines_words_or_digits(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for token in range(2, 1024):
        text = str(tokenizer.decode([token]))
        if text == "\ufffd":
            continue  # part of a character
        assert sum(c.isdigit() for c in text) * len(text) in (0, 1), text
        assert "\n" not in text.strip(), text
        assert not (text[-1].isalpha() and " " in text.strip()), text


def test_specials_spelled_out_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    (ids,) = encode_documents(plain_encoder(tokenizer), [f"a{EOS}b{MASK}"], 0)
    assert not np.isin(ids[:-1], [0, 1]).any()
    assert tokenizer(EOS)["input_ids"] == [0]  # the tokenizer itself is as it was


def test_batches_keep_the_order(tokenizer: PreTrainedTokenizerFast) -> None:
    def texts() -> Iterator[str]:
        yield from (f"number {i}" for i in range(600))

    decoded = [tokenizer.decode(ids[:-1].tolist()) for ids in encode_documents(plain_encoder(tokenizer), texts(), 0)]
    assert decoded == list(texts())


def test_a_mask_token_on_top_keeps_the_digest(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    plain, more = tiny.byte_tokenizer(), tiny.byte_tokenizer()
    more.add_special_tokens({"mask_token": "<|mask|>"})
    assert len(more) == len(plain) + 1
    assert vocabulary_digest(more) == vocabulary_digest(plain) != vocabulary_digest(tokenizer)


def test_no_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert end_of_text(tokenizer) == 0
    without = tiny.byte_tokenizer()
    without.eos_token = None
    with pytest.raises(TidarError, match="no end-of-text token: set eos_token"):
        end_of_text(without)
