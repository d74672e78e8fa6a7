"""What the data of a training run are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tidar.errors import TidarError

__all__ = ["MAX_PATIENCE", "DataConfig", "Stream"]

MAX_PATIENCE = 480.0
"""Seconds; less than the ten minutes for which ranks wait for one another."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A data set that is read while training, through `datasets`; a `[[data.streams]]` table of a recipe."""

    path: str
    """Hub id, folder, or files: a path, pattern or URL that ends in `.jsonl`, `.json`, `.parquet` or `.txt`, each
    perhaps compressed."""
    name: str = ""
    """Configuration of a hub data set that has several."""
    split: str = "train"
    """Split to read."""
    data_files: tuple[str, ...] = ()
    """Files of the folder or hub data set to read, patterns allowed; all by default."""
    revision: str = ""
    """Commit of a hub data set: pinned, it cannot change between a run and its continuation."""
    text_field: str = "text"
    """Column that holds the text."""
    weight: float = 1.0
    """Share of the tokens, in relation to the other streams' weights."""

    def __post_init__(self) -> None:
        if not self.path:
            raise TidarError("a stream needs a path: a hub id, a folder or files")
        if not 0 < self.weight < float("inf"):
            raise TidarError(f"the weight of stream {self.path} must be above 0, not {self.weight}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources and what is kept of them.

    Either ``sources``, prepared before training, or ``streams``, read while training (docs/data.md).
    """

    sources: tuple[str, ...] = ()
    """Folders of text or code, files (`.jsonl`, `.jsonl.gz`, `.parquet`, anything else as one text), Hugging Face
    datasets as `hf:OWNER/NAME[/CONFIG][:SPLIT]` (read as a stream), or one folder that is already prepared."""
    text_field: str = "text"
    """Field or column of jsonl, parquet and Hugging Face documents that holds the text."""
    messages_field: str = ""
    """Field that holds a conversation instead, a list of turns with `role` and `content`: only what the assistant says
    is learnt."""
    turn_fields: tuple[str, ...] = ()
    """Fields that hold the turns of a conversation, the user's and the assistant's by turns: `question answer`."""
    chat_template: str = ""
    """Jinja file that writes conversations, kept in the model; by default the tokenizer's own."""
    extensions: tuple[str, ...] = (".md", ".py", ".rst", ".txt")
    """Files that are taken from a folder; hidden ones and hidden folders are not."""
    max_documents: int | None = None
    """Take only the first documents of each source."""
    min_bytes: int = 1
    """Leave out smaller documents; blank ones always."""
    max_bytes: int = 1_000_000
    """Leave out larger documents."""
    duplicates: Literal["keep", "exact", "near"] = "near"
    """What to remove: nothing, equal documents, or near duplicates too (0.2 s a MB on one core)."""
    similarity: float = 0.7
    """Share of common 5-word runs (Jaccard) from which two documents are near duplicates."""
    holdout: float = 0.02
    """Share of documents held out for validation; what resembles one of them by half is not trained on (of streams:
    what equals one)."""

    streams: tuple[Stream, ...] = ()
    """Data sets read while training, mixed by weight; of the settings above `min_bytes`, `max_bytes` and `holdout`
    count."""
    lanes: int = 16
    """Streams are divided among this many readers at least, whose rows a step has in equal parts; the order of the
    data depends on it, and on the number of ranks or workers does not."""
    shuffle: int = 262_144
    """Tokens a lane reads at least before it shuffles the rows of them; after a resume it reads them again."""
    workers: int = 4
    """Processes in which a rank reads and tokenises streams ahead of its steps; 0: none, the steps wait for it."""
    patience: float = 300.0
    """Seconds for which a source that cannot be reached is asked again, ever more rarely, before the run stops."""

    @property
    def conversations(self) -> bool:
        """Whether the documents are conversations."""
        return bool(self.messages_field or self.turn_fields)

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields or columns of a document that are read."""
        return self.turn_fields or (self.messages_field or self.text_field,)

    @property
    def setting(self) -> str:
        """The setting that names them."""
        return "turn_fields" if self.turn_fields else "messages_field" if self.messages_field else "text_field"

    def __post_init__(self) -> None:
        if not self.sources and not self.streams:
            raise TidarError("no data sources: name at least one folder, file or hf: data set")
        if self.messages_field and self.turn_fields:
            raise TidarError("a conversation is in one field or in several: set messages_field or turn_fields")
        if len(self.turn_fields) % 2:
            raise TidarError(f"turn_fields must be pairs of question and answer, not {list(self.turn_fields)}")
        if self.chat_template and not self.conversations:
            raise TidarError("a chat_template writes conversations: set messages_field or turn_fields too")
        if self.streams and self.conversations:
            raise TidarError("conversations are for sources, which are prepared before training: streams hold text")
        if self.sources and self.streams:
            raise TidarError("data has both sources and streams: give one, and [] for the other")
        if self.streams and self.max_documents is not None:
            raise TidarError("max_documents is for sources: with streams the run's tokens say how much is read")
        for name, least in (("lanes", 1), ("shuffle", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise TidarError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.patience <= MAX_PATIENCE:
            raise TidarError(f"patience must lie between 0 and {MAX_PATIENCE:.0f} seconds, not {self.patience}")
        if self.max_documents is not None and self.max_documents < 1:
            raise TidarError(f"max_documents must be at least 1, not {self.max_documents}")
        if not 0 <= self.min_bytes <= self.max_bytes:
            raise TidarError(f"min_bytes must lie between 0 and max_bytes, not {self.min_bytes} and {self.max_bytes}")
        if not 0 < self.similarity <= 1:
            raise TidarError(f"similarity must lie in (0, 1], not {self.similarity}")
        if not 0 <= self.holdout < 1:
            raise TidarError(f"holdout must lie in [0, 1), not {self.holdout}")
