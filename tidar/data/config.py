"""What the data of a training run are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tidar.errors import TidarError

__all__ = ["DataConfig"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources and what is kept of them."""

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
    """Share of documents held out for validation; what resembles one of them by half is not trained on."""

    @property
    def conversations(self) -> bool:
        """Whether the documents are conversations."""
        return bool(self.messages_field or self.turn_fields)

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields or columns of a document that are read."""
        return self.turn_fields or (self.messages_field or self.text_field,)

    def __post_init__(self) -> None:
        if not self.sources:
            raise TidarError("no data sources: name at least one folder, file or hf: data set")
        if self.messages_field and self.turn_fields:
            raise TidarError("a conversation is in one field or in several: set messages_field or turn_fields")
        if len(self.turn_fields) % 2:
            raise TidarError(f"turn_fields must be pairs of question and answer, not {list(self.turn_fields)}")
        if self.chat_template and not self.conversations:
            raise TidarError("a chat_template writes conversations: set messages_field or turn_fields too")
        if self.max_documents is not None and self.max_documents < 1:
            raise TidarError(f"max_documents must be at least 1, not {self.max_documents}")
        if not 0 <= self.min_bytes <= self.max_bytes:
            raise TidarError(f"min_bytes must lie between 0 and max_bytes, not {self.min_bytes} and {self.max_bytes}")
        if not 0 < self.similarity <= 1:
            raise TidarError(f"similarity must lie in (0, 1], not {self.similarity}")
        if not 0 <= self.holdout < 1:
            raise TidarError(f"holdout must lie in [0, 1), not {self.holdout}")
