"""Corpora as people have them: one reader a kind, all alike to `build`.

A reader finds out from what lies in a folder whether it is its kind, names the subsets, lists the
files that matter, and yields candidates. Whether their audio can be used is not its concern. None
holds a corpus in memory: each call reads what lies there from its start.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

SPLITS = ("train", "dev", "test")

SPLIT_NAMES = {**dict(zip(SPLITS, SPLITS, strict=True)), "validation": "dev", "valid": "dev", "val": "dev"}
"""Subsets whose names say what they are for, and that split."""

AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")
"""In order of preference where one utterance has several files."""

AUDIO_FOLDER = "audio"
"""In the stage's folder: what was unpacked from archives and tables."""

NO_AUDIO = "transcript without audio"
NO_TRANSCRIPT = "audio without transcript"
BLANK = "blank transcript"
DUPLICATE = "duplicate key"
TOO_SHORT = "too short"
UNSUPPORTED = "not one channel of one recording"


@dataclass
class Candidate:
    """An utterance as the corpus has it, its audio not yet looked at."""

    key: str
    source: str
    """The audio file: an absolute path or an s3:// URI. A name for people where there is `content`."""
    text: str
    """The transcript as the corpus writes it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields for the manifest, `subset` among them."""
    start: float | None = None
    """Seconds into the file, where the utterance is a segment of it."""
    duration: float | None = None
    """Seconds of that segment; None: to the file's end."""
    content: bytes | None = None
    """The audio file's bytes, where they lie in a table instead of a file."""
    listed: str | None = None
    """What the manifest has for `source`, if it is another name: a path relative to the manifest."""
    split: str = ""
    """The split that the utterance goes to, once that is known."""


@dataclass
class Rejection:
    """An utterance that is set aside."""

    key: str
    source: str
    reason: str
    """One of few, to count by."""
    detail: str = ""
    """A sentence about this one."""


Stamp = tuple[str, int, str]
"""A file's name, size and time of change or etag: what tells a changed corpus without reading it."""


class CorpusReader(Protocol):
    """One corpus, opened."""

    kind: str
    """In words, for people."""
    root: str
    """The path or URI that was given."""

    def subsets(self) -> list[str]:
        """The names that a recipe's patterns are matched against."""

    def stamps(self, subset: str) -> Iterator[Stamp]:
        """The files that the subset's utterances depend on, in a fixed order, found without opening audio."""

    def prepare(self, folder: Path, subsets: list[str]) -> None:
        """Unpack what these subsets need, where it is packed, into the stage's folder; called before `read`."""

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        """The subset's utterances in a fixed order, and what cannot be one."""
