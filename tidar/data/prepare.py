"""From sources to token caches: ``train/`` and ``holdout/``, made once for a configuration and a tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tidar.data.cache import FORMAT, CacheWriter, TokenCache, fresh_folder, open_cache
from tidar.data.config import DataConfig
from tidar.data.conversation import Template, encode_conversations, template_encoder
from tidar.data.dedup import digest, near_duplicates, signature
from tidar.data.sources import Document, documents, identity
from tidar.data.tokenizer import encode_documents, end_of_text, plain_encoder, vocabulary_digest
from tidar.errors import TidarError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["prepare"]

NOT_OF_SOURCES = ("streams", "lanes", "shuffle", "workers", "patience", "chat_template")
"""Settings that change nothing here; the template counts by its text."""

Encoded = tuple[NDArray[np.uint32], NDArray[np.bool_] | None]


def prepare(config: DataConfig, tokenizer: PreTrainedTokenizerFast, out: Path) -> Path:
    """Reads, filters, deduplicates and tokenises; returns a folder for `tidar.data.packing.PackedData`.

    The folder holds ``train/``, ``holdout/`` (if ``config.holdout`` is above 0) and ``stats.json``. It is ``out``,
    taken as it is if it was made from the same sources, settings and tokenizer; or the source itself, if that is one
    prepared folder. Documents are held out by the hash of their text, so the result depends on nothing but the input.

    Raises:
        TidarError: a source is missing or broken, nothing is left to train on, the tokenizer has no end-of-text token
            or is not the one of the prepared folder, the disk is full. ``out`` is then as it was before.
    """
    eos_id, vocabulary = end_of_text(tokenizer), vocabulary_digest(tokenizer)
    prepared = [s for s in config.sources if (Path(s).expanduser() / "train" / "meta.json").is_file()]
    if prepared:
        if len(config.sources) > 1:
            raise TidarError(f"{prepared[0]} is already prepared: it must be the only source")
        folder = Path(prepared[0]).expanduser()
        meta = open_cache(folder / "train").meta
        if (meta.get("tokenizer"), meta["eos_id"]) != (vocabulary, eos_id):
            raise TidarError(f"{folder} was prepared with another tokenizer: use that one or prepare the data again")
        if config.conversations and not meta.get("partly"):
            raise TidarError(
                f"{folder} was prepared as text: name the conversations' files, or clear the fields of turns"
            )
        return folder
    template = tokenizer.chat_template if config.conversations else None
    origins = [identity(source, config) for source in config.sources]
    said = {name: value for name, value in asdict(config).items() if name not in NOT_OF_SOURCES}
    key = [FORMAT, said, template, origins, vocabulary, eos_id, len(tokenizer)]
    fingerprint = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    if _fingerprint_of(out) == fingerprint:
        return out
    with fresh_folder(out) as folder:
        stats = _fill(folder, config, tokenizer, eos_id, {"fingerprint": fingerprint, "tokenizer": vocabulary})
        (folder / "stats.json").write_text(json.dumps(stats, indent=1) + "\n", encoding="utf-8")
    return out


def _fingerprint_of(out: Path) -> str | None:
    try:
        fingerprint: str | None = open_cache(out / "train").meta.get("fingerprint")
    except TidarError:
        return None
    return fingerprint


class _Reader:
    """Documents worth keeping, and what is needed later to choose among them."""

    def __init__(self, config: DataConfig, template: Template | None) -> None:
        self.config = config
        self.template = template
        self.removed: Counter[str] = Counter()
        self.digests: list[bytes] = []
        self.sizes: list[int] = []
        self.signatures: list[NDArray[np.uint32]] = []

    def documents(self) -> Iterator[Document]:
        config, seen = self.config, set()
        for source in config.sources:
            for document in documents(source, config):
                data = document.text.encode("utf-8")
                if len(data) < config.min_bytes or not document.text.strip():
                    self.removed["small"] += 1
                elif config.conversations and all(m["role"] != "assistant" for m in document.messages):
                    self.removed["without an answer"] += 1
                elif self.template is not None and self.template.spells_special(document.messages):
                    self.removed["spells out a special token"] += 1
                elif len(data) > config.max_bytes:
                    self.removed["large"] += 1
                elif (key := digest(data)) in seen and config.duplicates != "keep":
                    self.removed["exact duplicate"] += 1
                else:
                    seen.add(key)
                    self.digests.append(key)
                    self.sizes.append(len(data))
                    if config.duplicates == "near":
                        self.signatures.append(signature(data))
                    yield document

    def encoded(self, tokenizer: PreTrainedTokenizerFast, eos_id: int) -> Iterator[Encoded]:
        """The ids of each document, and which are learnt, if not all."""
        if self.template is not None:
            template = self.template
            segments = (template.segments(d.messages, d.origin) for d in self.documents())
            yield from encode_conversations(template_encoder(tokenizer), segments, eos_id)
        else:
            texts = (document.text for document in self.documents())
            for ids in encode_documents(plain_encoder(tokenizer), texts, eos_id):
                yield ids, None


def _fill(
    folder: Path, config: DataConfig, tokenizer: PreTrainedTokenizerFast, eos_id: int, extra: dict[str, str]
) -> dict[str, object]:
    """All documents are tokenised into a spool as they come, since a stream comes but once; then the chosen copied."""
    vocab_size = len(tokenizer)
    template = Template(tokenizer) if config.conversations else None
    reader = _Reader(config, template)
    spool = folder / "spool"
    spool.mkdir()
    with CacheWriter(spool, vocab_size=vocab_size, eos_id=eos_id, partly=template is not None) as cache:
        for tokens, learned in _shown(reader.encoded(tokenizer, eos_id)):
            cache.add(tokens, reader.sizes[len(cache.lengths)], learned)
        cache.close()
    if not reader.sizes:
        why = ", ".join(f"{n} {rule}" for rule, n in reader.removed.items()) or "the sources are empty"
        raise TidarError(f"no document is left to train on ({why}): check sources, min_bytes and max_bytes")
    stats: dict[str, object] = {}
    whole = open_cache(spool)
    for name, chosen in _parts(reader).items():
        (folder / name).mkdir()
        stats[name] = _copy(folder / name, whole, chosen, reader.sizes, extra)
    shutil.rmtree(spool)
    return {"removed": dict(sorted(reader.removed.items())), **stats}


def _parts(reader: _Reader) -> dict[str, NDArray[np.int64]]:
    """Indices of the documents for ``train`` and ``holdout``, near duplicates left out."""
    count, config = len(reader.sizes), reader.config
    held = np.zeros(count, bool)
    if config.holdout:
        if count < 2:
            raise TidarError("one document alone cannot be split: set holdout to 0 or add documents")
        wanted = min(count - 1, max(1, round(config.holdout * count)))
        held[sorted(range(count), key=lambda i: reader.digests[i])[:wanted]] = True
    order = np.argsort(~held, kind="stable")  # held-out documents first: of a pair the one in training goes
    if reader.signatures:
        signatures = np.stack(reader.signatures)[order]
        twin = near_duplicates(signatures, config.similarity, held=int(held.sum()))
        leaks = (twin >= 0) & held[order[twin]] & ~held[order]
        reader.removed.update(["near duplicate of the hold-out"] * int(leaks.sum()))
        reader.removed.update(["near duplicate"] * int((twin >= 0).sum() - leaks.sum()))
        order = order[twin < 0]
    apart = {reader.digests[i] for i in range(count) if held[i]}  # copies, where duplicates are kept
    order = order[[held[i] or reader.digests[i] not in apart for i in order]]
    parts = {"train": np.sort(order[~held[order]])}
    if config.holdout:
        parts["holdout"] = np.sort(order[held[order]])
    if not len(parts["train"]):
        raise TidarError("every document resembles a held-out one: set holdout to 0 or raise similarity")
    return parts


def _copy(
    folder: Path, whole: TokenCache, chosen: NDArray[np.int64], sizes: list[int], extra: dict[str, str]
) -> dict[str, int]:
    meta, learned = whole.meta, 0
    partly = whole.learned is not None
    with CacheWriter(folder, vocab_size=meta["vocab_size"], eos_id=meta["eos_id"], partly=partly) as cache:
        for i in chosen:
            part = slice(whole.offsets[i], whole.offsets[i + 1])
            kept = None if whole.learned is None else whole.learned[part].astype(bool)
            cache.add(whole.tokens[part], sizes[i], kept)
            learned += 0 if kept is None else int(kept.sum())
        cache.close(extra)
    stats = {"documents": len(chosen), "bytes": cache.text_bytes, "tokens": sum(cache.lengths)}
    return {**stats, "learned": learned} if partly else stats


def _shown(encoded: Iterator[Encoded]) -> Iterator[Encoded]:
    """Passes the documents on and shows their number on the terminal."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("preparing data")
        total = 0
        for number, (tokens, learned) in enumerate(encoded, 1):
            total += len(tokens)
            if number % 100 == 0:
                progress.update(task, description=f"preparing data: {number:,} documents, {total:,} tokens")
            yield tokens, learned
