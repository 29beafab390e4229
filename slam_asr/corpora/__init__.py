"""Corpora as people have them: one reader a kind, all alike to `build`.

A reader finds out from what lies in a folder whether it is its kind, names the subsets, lists the
files that matter, and yields candidates. Whether their audio can be used is not its concern.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

SPLITS = ("train", "dev", "test")

AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")
"""In order of preference where one utterance has several files."""

NO_AUDIO = "transcript without audio"
NO_TRANSCRIPT = "audio without transcript"
BLANK = "blank transcript"
DUPLICATE = "duplicate key"
TOO_SHORT = "too short"


@dataclass
class Candidate:
    """An utterance as the corpus has it, its audio not yet looked at."""

    key: str
    source: str
    """The audio file: an absolute path."""
    text: str
    """The transcript as the corpus writes it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields for the manifest, `subset` among them."""


@dataclass
class Rejection:
    """An utterance that is set aside."""

    key: str
    source: str
    reason: str
    """One of few, to count by."""
    detail: str = ""
    """A sentence about this one."""


Stamp = tuple[str, int, int]
"""A file's name, size and time of change in ns: what tells a changed corpus without reading it."""


class Reader(Protocol):
    """One corpus, opened."""

    kind: str
    """In words, for people."""
    root: Path

    def subsets(self) -> list[str]:
        """The names that a recipe's patterns are matched against."""

    def stamps(self, subset: str) -> Iterator[Stamp]:
        """The files that the subset's utterances depend on, in a fixed order, found without opening audio."""

    def read(self, subset: str) -> Iterator[Candidate | Rejection]:
        """The subset's utterances in a fixed order, and what cannot be one."""


def stamp(name: str, status: os.stat_result) -> Stamp:
    """The stamp of a file; a name that is not UTF-8 is escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace"), status.st_size, status.st_mtime_ns
