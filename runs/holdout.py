"""Prompts from held-out files: chosen once, kept in a small file, read again."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidar.errors import TidarError

__all__ = ["Prompt", "load", "read_lines", "save", "select"]

PROMPT = 256  # tokens
CONTINUATION = 256


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The first tokens of a held-out file, and those that follow."""

    package: str
    path: str
    text: str
    """Prompt and continuation."""
    ids: list[int]
    """256 tokens."""
    continuation: list[int]
    """256 tokens; fewer under another tokenizer than the one the file was chosen with."""


def select(path: Path, tokenizer: Any, *, count: int, per_package: int) -> list[Prompt]:
    """``count`` files with more than 512 tokens: from each package in turn, in the order of hashes of their paths.

    Args:
        path: jsonl, perhaps gzipped, with package, path, tokens and text: holdout/files.jsonl of runs/corpus.py.
        tokenizer: the Hugging Face tokenizer that the tokens were counted with.
        count: prompts wanted.
        per_package: at most so many of one package.

    Raises:
        TidarError: too few files.
    """
    packages: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in read_lines(path):
        if file["tokens"] > PROMPT + CONTINUATION:
            packages[file["package"]].append(file)
    for files in packages.values():
        files.sort(key=lambda file: _hash(file["path"]))
    names = sorted(packages, key=_hash)
    turns = [packages[n][turn] for turn in range(per_package) for n in names if turn < len(packages[n])]
    if len(turns) < count:
        raise TidarError(f"{path} has {len(turns)} prompts, not {count}: lower --count or raise --per-package")
    return [_prompt(file, tokenizer) for file in turns[:count]]


def save(prompts: Sequence[Prompt], out: Path) -> None:
    """Gzipped jsonl of package, path and text; the same bytes for the same prompts; whole or absent."""
    kept = [{"package": p.package, "path": p.path, "text": p.text} for p in prompts]
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in kept).encode(), mtime=0))
    os.replace(part, out)


def load(path: Path, tokenizer: Any) -> list[Prompt]:
    """What `save` wrote."""
    return [_prompt(line, tokenizer) for line in read_lines(path)]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a jsonl file, perhaps gzipped.

    Raises:
        TidarError: it cannot be read.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise TidarError(f"cannot read {path} ({error}): name another file") from error


def _prompt(file: dict[str, Any], tokenizer: Any) -> Prompt:
    ids = tokenizer(file["text"], add_special_tokens=False)["input_ids"][: PROMPT + CONTINUATION]
    if len(ids) <= PROMPT:
        raise TidarError(f"{file['path']} has {len(ids)} tokens under this tokenizer: choose prompts with it")
    return Prompt(
        package=file["package"],
        path=file["path"],
        text=tokenizer.decode(ids),
        ids=ids[:PROMPT],
        continuation=ids[PROMPT:],
    )


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
