"""Documents, one after the other, from wherever a source names."""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tidar.data.config import DataConfig
from tidar.data.conversation import Message
from tidar.errors import TidarError

__all__ = ["Document", "documents", "first_line", "identity", "no_field"]

HUB = "hf:"
RETRIES = 3  # without a document in between
PAUSE = 2.0  # seconds before the first retry, doubled with each


class Document(NamedTuple):
    """A text, and where it came from for error messages; of a conversation the turns too."""

    origin: str
    text: str
    messages: tuple[Message, ...] = ()


def documents(source: str, config: DataConfig) -> Iterator[Document]:
    """The documents of one source in a fixed order, at most ``config.max_documents``.

    Raises:
        TidarError: the source is missing, unreadable, truncated or not UTF-8, a document has no text, or a download
            broke off and did not come back.
    """
    found = _hub(source, config) if source.startswith(HUB) else _local(source, config)
    return islice(found, config.max_documents)


def identity(source: str, config: DataConfig) -> list[Any]:
    """What tells a changed source from an unchanged one: names, sizes and times of files.

    A Hugging Face data set is taken to be unchanged.
    """
    if source.startswith(HUB):
        return [source]
    stats = [(path, path.stat()) for path in _files(source, config)]
    return [source, *([str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats)]


def _files(source: str, config: DataConfig) -> list[Path]:
    root = Path(source).expanduser()
    if not root.exists():
        raise TidarError(f"no data source {source}: name a folder, a file or hf:OWNER/NAME")
    if root.is_file():
        return [root]
    found = [
        path
        for path in root.rglob("*")
        if path.name.endswith(config.extensions)
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    ]
    if not found:
        raise TidarError(f"{source} has no file ending in {', '.join(config.extensions)}: set extensions")
    return sorted(found)


def _local(source: str, config: DataConfig) -> Iterator[Document]:
    for path in _files(source, config):
        try:
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                yield from _jsonl(path, config)
            elif path.suffix == ".parquet":
                yield from _parquet(path, config)
            elif config.conversations:
                raise TidarError(f"{path} holds no conversations: give jsonl, parquet or a Hugging Face data set")
            else:
                yield Document(str(path), _utf8(path.read_bytes(), str(path)))
        except (OSError, EOFError, zlib.error) as error:
            raise TidarError(f"cannot read {path} ({first_line(error)}): mend it or take it out") from error


def _utf8(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TidarError(f"{origin} is not UTF-8 (byte {error.start}): convert it or take it out") from error


def _jsonl(path: Path, config: DataConfig) -> Iterator[Document]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            origin = f"{path} line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(_utf8(line, origin))
            except json.JSONDecodeError as error:
                raise TidarError(f"{origin} is not JSON ({error.msg}), perhaps truncated: mend the file") from error
            yield _document(row, config, origin)


def _parquet(path: Path, config: DataConfig) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise TidarError(f"{path} needs pyarrow: pip install 'tidar[train]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            for field in config.fields:
                if field not in file.schema_arrow.names:
                    raise TidarError(no_field(str(path), field, file.schema_arrow.names, config.setting))
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=list(config.fields)):
                for row in batch.to_pylist():
                    number += 1
                    yield _document(row, config, f"{path} row {number}")
    except (ArrowException, UnicodeDecodeError) as error:
        raise TidarError(f"cannot read {path} ({first_line(error)}): mend it or take it out") from error


def _document(row: Any, config: DataConfig, origin: str) -> Document:
    if not isinstance(row, dict):
        raise TidarError(f"{origin} is no JSON object with a field {config.fields[0]!r}: mend the file")
    for field in config.fields:
        if field not in row:
            raise TidarError(no_field(origin, field, list(row), config.setting))
    values = [row[field] for field in config.fields]
    if not config.conversations:
        return Document(origin, _text(values[0], config.text_field, origin, config.setting))
    if config.messages_field:
        messages = _messages(values[0], config.messages_field, origin)
    else:
        texts = [_text(row[field], field, origin, config.setting) for field in config.turn_fields]
        roles = ("user", "assistant") * (len(texts) // 2)
        messages = tuple({"role": role, "content": text} for role, text in zip(roles, texts, strict=True))
    return Document(origin, "\n".join(message["content"] for message in messages), messages)


def _messages(value: Any, field: str, origin: str) -> tuple[Message, ...]:
    if isinstance(value, str):  # as some data sets keep them
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    turns: list[Any] = value if isinstance(value, list) else [None]
    if not all(isinstance(turn, dict) and isinstance(turn.get("role"), str) and "content" in turn for turn in turns):
        raise TidarError(f"{origin}: field {field!r} holds no list of turns with role and content; set messages_field")
    texts = [_text(turn["content"], "content", origin, "messages_field") for turn in turns]
    return tuple({"role": turn["role"], "content": text} for turn, text in zip(turns, texts, strict=True))


def _text(text: Any, field: str, origin: str, setting: str) -> str:
    if not isinstance(text, str):
        raise TidarError(f"{origin}: field {field!r} holds {type(text).__name__}, not text: mend it or set {setting}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TidarError(f"{origin} has half a surrogate pair (character {error.start}): mend or remove it") from error
    return text


def no_field(origin: str, field: str, names: list[str], setting: str = "text_field") -> str:
    return f"{origin} has no field {field!r}: set {setting} to one of {', '.join(map(repr, names))}"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _hub(source: str, config: DataConfig) -> Iterator[Document]:
    try:
        from datasets import load_dataset  # type: ignore[import-untyped]
    except ImportError as error:
        raise TidarError(f"{source} needs the datasets package: pip install 'tidar[train]'") from error
    path, _, split = source.removeprefix(HUB).partition(":")
    parts = path.split("/")
    if not all(parts) or len(parts) > 3:
        raise TidarError(f"{source} is no data set: write hf:OWNER/NAME[/CONFIG][:SPLIT]")
    name, subset = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    taken = failures = 0
    while True:
        try:
            stream = load_dataset(name, subset, split=split or "train", streaming=True)
            for row in stream.skip(taken):
                yield _document(row, config, f"{source} document {taken + 1}")
                taken += 1
                failures = 0
            return
        except TidarError:
            raise
        except (FileNotFoundError, ValueError) as error:
            raise TidarError(f"cannot read {source} ({first_line(error)}): check its name and split") from error
        except Exception as error:  # whatever the network libraries underneath raise
            failures += 1
            if failures > RETRIES:
                why = first_line(error)
                raise TidarError(f"{source} broke off after {taken} documents ({why}): try again later") from error
            time.sleep(PAUSE * 2 ** (failures - 1))
