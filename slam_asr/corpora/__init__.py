"""Readers for the usual kinds of speech corpora, one module per kind, all derived from `CorpusReader`.

A reader recognises its kind of corpus by the files in a folder, names the subsets, lists the files on which
the result depends, and yields candidates. `audio_check` then checks the audio. No reader holds a corpus in
memory: each call of `read` reads the files again from the start.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from slam_asr.config.recipe import Data

SPLITS = ("train", "dev", "test")

SPLIT_NAMES = {**dict(zip(SPLITS, SPLITS, strict=True)), "validation": "dev", "valid": "dev", "val": "dev"}
"""Subset names that denote a split, whatever the recipe's patterns are. The values are the splits."""

AUDIO_SUFFIXES = (
    *(".flac", ".wav", ".ogg", ".opus", ".mp3"),
    *(".m4a", ".webm", ".aac", ".amr", ".3gp", ".caf", ".wma", ".mp4", ".mov", ".mkv"),
)
"""File suffixes of audio, in order of preference if one utterance has several files. The second line needs
PyAV, except for some .caf files."""

AUDIO_FOLDER = "audio"
"""Subfolder of the stage's output that holds audio unpacked from archives and tables."""


class Reason(StrEnum):
    """Reasons for rejections, besides those in `slam_asr.audio.faults`."""

    NO_AUDIO = "transcript without audio"
    NO_TRANSCRIPT = "audio without transcript"
    BLANK = "blank transcript"
    DUPLICATE = "duplicate key"
    TOO_SHORT = "too short"
    UNSUPPORTED = "mixed, multi-channel or transformed cut"


@dataclass
class Candidate:
    """An utterance as the corpus describes it, before its audio is checked."""

    key: str
    source: str
    """The audio file: an absolute path or s3:// URI. If `content` is set, it is only a name: messages show
    it, and its suffix is used if the content does not show the format."""
    text: str
    """The transcript, unchanged."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields for the manifest; always includes `subset`."""
    start: float | None = None
    """Where a segment begins in the file, in seconds; None for the complete file."""
    duration: float | None = None
    """Length of the segment in seconds; None if it extends to the end of the file."""
    content: bytes | None = None
    """The audio file's bytes, if the audio is embedded in a table."""
    manifest_source: str | None = None
    """The `source` to write to the manifest, if it differs from `source`: a path relative to the manifest."""
    identity: str = field(default="", compare=False)
    """A text, such as a file's name, that distinguishes the utterance from others with the same key. Two
    candidates with the same key and different identities are different utterances, and the reader then makes
    other keys. If empty, the key is the identity."""
    split: str = ""
    """The split that the utterance belongs to; empty until `splits.read_splits` sets it."""
    channel: int | None = None
    """Number of the file's channel that holds the speaker, counted from 0; None if the corpus names none."""
    channel_of_several: bool = False
    """Whether `channel` applies only to files with several channels. A file with one channel is valid too."""


@dataclass
class Rejection:
    """An utterance that cannot be used."""

    key: str
    source: str
    reason: str
    """A `Reason` or a `Fault` of `slam_asr.audio.faults`; statistics count rejections by it."""
    detail: str = ""
    """A sentence for the user."""


Item = Candidate | Rejection
"""What a reader yields."""

Subsets = dict[str, list[str]]
"""The names of the subsets of each split."""

Stamp = tuple[str, int, str]
"""A file's name, its size in bytes, and its modification time in ns or its etag.

A corpus with unchanged stamps need not be read again.
"""


class CorpusReader(ABC):
    """An opened corpus."""

    kind: ClassVar[str]
    """The kind of corpus, for messages."""
    layout: ClassVar[str]
    """The files that a corpus of this kind has, for messages."""
    root: str
    """The corpus's absolute path or URI."""
    by_subset: Mapping[str, Any]
    """The folder or the files of each subset."""
    notes: tuple[str, ...] = ()
    """Sentences for the log about files of the corpus that are not read."""

    @classmethod
    @abstractmethod
    def find(cls, root: str, data: Data) -> "CorpusReader | None":
        """Open the corpus at an absolute path or URI; return None if no corpus of this kind is there.

        Args:
            root: the path or URI.
            data: the recipe's `data` section.

        Raises:
            InputError: a file of the corpus is damaged or of the wrong form.
            ConfigurationError: a column of a table is missing or ambiguous.
        """

    def subsets(self) -> list[str]:
        """Return the names of the subsets, which the recipe's patterns select."""
        return sorted(self.by_subset)

    @abstractmethod
    def stamps(self, subset: str) -> Iterator[Stamp]:
        """Yield the stamp of each file on which a subset depends, in a fixed order. No audio is opened."""

    def prepare(self, folder: Path, subsets: list[str]) -> None:  # noqa: B027 - most kinds have nothing to do
        """Unpack the archives of these subsets into the stage's folder. It must be called before `read`."""

    def refine_keys(self) -> str:
        """Make keys in another way from now on, after different utterances have got the same key.

        Returns:
            A sentence for the log; empty if the keys cannot be made in another way.
        """
        return ""

    @abstractmethod
    def read(self, subset: str) -> Iterator[Item]:
        """Yield a subset's utterances in a fixed order, with a rejection for each incomplete one."""
