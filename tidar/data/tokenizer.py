"""A byte-level BPE tokenizer for code, and the way documents become tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tidar.errors import TidarError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "EOS",
    "MASK",
    "encode_documents",
    "encoder_of",
    "end_of_text",
    "plain_encoder",
    "train_tokenizer",
    "vocabulary_digest",
]

EOS = "<|endoftext|>"
MASK = "<|mask|>"
BATCH = 256  # documents encoded at once; the tokenizer spreads them over all cores

# What a token may not cross, tried in this order: line ends with the indentation that follows; a word with one sign
# before it (" name", ".name", "_name"); single digits; runs of signs; runs of spaces, whose last goes with a word.
_PIECES = r"(?:[ \t]*\r?\n)+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, out: Path) -> PreTrainedTokenizerFast:
    """Trains a lossless byte-level BPE and saves it to the folder ``out``, where ``AutoTokenizer`` finds it.

    Args:
        texts: what to learn the merges from.
        vocab_size: token ids in all, 256 bytes and the two special tokens included: ``<|endoftext|>`` (end of text
            and padding, id 0) and ``<|mask|>`` (id 1).
        out: folder that receives tokenizer.json and tokenizer_config.json.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)
    return fast


def end_of_text(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that ends a document.

    Raises:
        TidarError: the tokenizer names none.
    """
    if not isinstance(tokenizer.eos_token_id, int):
        raise TidarError("the tokenizer has no end-of-text token: set eos_token in its tokenizer_config.json")
    return tokenizer.eos_token_id


def vocabulary_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Same digest, same ids for the same text; tokens added on top, such as a mask token, do not count."""
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    return hashlib.blake2b(json.dumps(sorted(vocabulary.items())).encode(), digest_size=16).hexdigest()


def plain_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that takes special tokens spelled out in a document for ordinary text."""
    return encoder_of(tokenizer.backend_tokenizer.to_str())


def encoder_of(description: str) -> Tokenizer:
    """`plain_encoder` from the tokenizer's JSON, which another process may have sent: a pickled encoder would take
    special tokens for such again."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(description)
    encoder.encode_special_tokens = True
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def encode_documents(encoder: Tokenizer, texts: Iterable[str], eos_id: int) -> Iterator[NDArray[Any]]:
    """The ids of each text, (n,) uint32, with the end-of-text token behind."""
    remaining = iter(texts)
    while batch := list(islice(remaining, BATCH)):
        for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array([*encoding.ids, eos_id], dtype=np.uint32)
