"""The index of a feature store: the shard of each utterance's features, and their place in it.

An index is a table of numbers in a safetensors file, with 68 bytes per utterance. A million entries can be
loaded and searched without a Python object for each. The file's metadata contain the fingerprint of the
features (encoder, preprocessing and dtype), and the SHA-256 and size of each shard. An index is written once
and never changed; `merge` combines several indexes into one.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from slam_asr.errors import InputError

_FORMAT = 1
_COLUMNS: dict[str, Any] = {
    "address": np.uint8,  # the audio ids; the file format calls this column "address"
    "shard": np.int32,
    "begin": np.int64,
    "scale_begin": np.int64,
    "frames": np.int32,
    "span": np.int32,
    "check": np.int64,
}
_ENTRY_COLUMNS = [name for name in _COLUMNS if name != "address"]


@dataclass(frozen=True)
class Shard:
    """A file with the features of many utterances."""

    sha256: str
    """The SHA-256 of the file's bytes, from which its name is made."""
    bytes: int

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.sha256}.safetensors"


@dataclass
class Entry:
    """The location of one utterance's features."""

    shard: int
    """The shard's position in the index's list of shards."""
    begin: int
    """Where the frames begin in the shard's file, in bytes."""
    scale_begin: int
    """Where the scales of the frames begin in the shard's file, in bytes; -1 for a dtype without scales."""
    frames: int
    """Number of saved frames."""
    span: int
    """Length of the audio in frames, which gives the number of LLM positions; see `EncoderSpec.span_of`."""
    check: int
    """XXH3 of the bytes of the frames followed by those of the scales, as a signed 64-bit number."""


@dataclass
class Index:
    """Entries sorted by audio id, and the shards that they refer to.

    An audio id is a SHA-256 that identifies an utterance's audio; see `Utterance.audio_id`. In arrays it has
    32 bytes; everywhere else it is a string of 64 hexadecimal digits.
    """

    fingerprint: dict[str, Any]
    """The fingerprint of the features: encoder, preprocessing and dtype."""
    width: int
    """Values per frame."""
    shards: list[Shard] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=lambda: _empty_columns())
    """`address`: the audio ids, uint8 [entries, 32]; and for each field of `Entry` a column [entries]."""

    def __len__(self) -> int:
        return len(self.columns["address"])

    def audio_ids(self) -> list[str]:
        """Return all audio ids in hexadecimal, sorted."""
        digits = self.columns["address"].tobytes().hex()
        return [digits[i : i + 64] for i in range(0, len(digits), 64)]

    def find(self, audio_id: str) -> int:
        """Return the position of the entry with this audio id, or -1 if none exists."""
        return int(self.locate(to_array([audio_id]))[0])

    def locate(self, audio_ids: np.ndarray) -> np.ndarray:
        """Find many entries at once.

        Args:
            audio_ids: uint8 [n, 32], in any order.

        Returns:
            int64 [n], the position of the entry with each audio id, or -1 where none exists.
        """
        return _positions_in(audio_ids, self.columns["address"])

    def lost_shards(self, sizes: Mapping[str, int]) -> list[Shard]:
        """Return the shards that are missing or cut short, given the size in bytes of each existing file."""
        return [shard for shard in self.shards if sizes.get(shard.name) != shard.bytes]

    def entry(self, position: int) -> Entry:
        """Return the entry at a position that `find` or `locate` returned."""
        return Entry(**{name: int(self.columns[name][position]) for name in _ENTRY_COLUMNS})

    def select(self, selection: np.ndarray) -> "Index":
        """Return some entries, and the shards that they refer to.

        Args:
            selection: a mask, bool [entries]; or positions, int [n], in the order of their audio ids.
        """
        columns = {name: column[selection] for name, column in self.columns.items()}
        # `used` contains the old shard numbers in ascending order. The inverse contains, for each entry, the
        # position in `used`, which is the new shard number.
        used, columns["shard"] = np.unique(columns["shard"], return_inverse=True)
        columns["shard"] = columns["shard"].astype(np.int32)
        return Index(self.fingerprint, self.width, [self.shards[i] for i in used], columns)

    def to_bytes(self) -> bytes:
        """Return the content of the index's file. The same entries always give the same bytes."""
        metadata = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "width": self.width,
            "shards": [[s.sha256, s.bytes] for s in self.shards],
        }
        columns = {name: np.ascontiguousarray(column) for name, column in self.columns.items()}
        return save(columns, metadata={"slam_asr_features": json.dumps(metadata, sort_keys=True)})

    @classmethod
    def from_bytes(cls, content: bytes, path: str) -> "Index":
        """Read the content of an index's file.

        Args:
            content: the file's content.
            path: the file's path, for error messages.

        Raises:
            InputError: the file is damaged, has another format, or is not an index.
        """
        try:
            # `load` returns only the tensors. The metadata are in the file's header, which is JSON after 8
            # bytes with its length.
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            metadata = json.loads(header["__metadata__"]["slam_asr_features"])
            if metadata["format"] != _FORMAT:
                raise InputError(
                    f"{path} has format {metadata['format']}, but this version reads format {_FORMAT}: "
                    "extract features again."
                )
            tensors = load(content)
            columns = {name: tensors[name].astype(kind, copy=False) for name, kind in _COLUMNS.items()}
            shards = [Shard(sha256, size) for sha256, size in metadata["shards"]]
            index = cls(metadata["fingerprint"], metadata["width"], shards, columns)
            lengths = {len(column) for column in columns.values()}
            has_shards = not len(index) or columns["shard"].max() < len(shards)
            if len(lengths) > 1 or not has_shards or columns["address"].shape[1:] != (32,):
                raise ValueError("the columns do not match each other")
            return index
        except (ValueError, TypeError, KeyError, IndexError, SafetensorError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path} is not a feature store's index, or is damaged: "
                "remove it and run `slam-asr extract-features` again."
            ) from error


def build(fingerprint: dict[str, Any], width: int, shard: Shard, entries: dict[str, Entry]) -> Index:
    """Build the index of one shard.

    Args:
        fingerprint: the fingerprint of the features.
        width: values per frame.
        shard: the file that contains the features of all entries.
        entries: the entries by audio id. Their field `shard` must be 0.
    """
    audio_ids = sorted(entries)
    columns = {
        name: np.array([getattr(entries[a], name) for a in audio_ids], _COLUMNS[name])
        for name in _ENTRY_COLUMNS
    }
    return Index(fingerprint, width, [shard], columns | {"address": to_array(audio_ids)})


def merge(
    fingerprint: dict[str, Any], width: int, indexes: Iterable[Index], audio_ids: np.ndarray | None = None
) -> Index:
    """Merge several indexes into one. If an audio id is in several, the entry of the first is used.

    Args:
        fingerprint: the fingerprint that all indexes have.
        width: values per frame, the same in all indexes.
        indexes: the indexes in a reproducible order, such as that of their names.
        audio_ids: uint8 [n, 32], sorted. Only entries with these ids are included; all if not given.
    """
    if audio_ids is not None:
        indexes = (index.select(isin_sorted(index.columns["address"], audio_ids)) for index in indexes)
    # The empty index gives the columns their dtypes if there is no other.
    parts = [Index(fingerprint, width), *indexes]
    # Shards are sorted by name, so that the same entries give the same bytes from any set of indexes.
    shards = sorted({shard for part in parts for shard in part.shards}, key=lambda shard: shard.name)
    numbers = {shard: number for number, shard in enumerate(shards)}
    joined = {name: np.concatenate([part.columns[name] for part in parts]) for name in _COLUMNS}
    # Each index numbers its own shards from 0. A shard in several indexes gets one common number.
    joined["shard"] = np.concatenate(
        [np.array([numbers[s] for s in part.shards], np.int32)[part.columns["shard"]] for part in parts]
    )
    # The first entry of each audio id, and only the shards to which such an entry refers.
    first, _ = unique_audio_ids(joined["address"])
    return Index(fingerprint, width, shards, joined).select(first)


def to_array(audio_ids: Sequence[str]) -> np.ndarray:
    """Convert n audio ids in hexadecimal to uint8 [n, 32]."""
    return np.frombuffer(bytes.fromhex("".join(audio_ids)), np.uint8).reshape(-1, 32)


def _as_bytes(audio_ids: np.ndarray) -> np.ndarray:
    """View audio ids, uint8 [n, 32], as byte strings [n], which numpy sorts and compares like numbers."""
    # numpy ignores zero bytes at the end of a string. That merges no ids, because all have the same length.
    return np.ascontiguousarray(audio_ids).view("S32")[:, 0]


def argsort_audio_ids(audio_ids: np.ndarray) -> np.ndarray:
    """Return the positions, int64 [n], that sort audio ids, uint8 [n, 32]; equal ones stay in their order."""
    return np.argsort(_as_bytes(audio_ids), kind="stable")


def unique_audio_ids(audio_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the distinct audio ids.

    Args:
        audio_ids: uint8 [n, 32], in any order.

    Returns:
        int64 [distinct], the position of the first occurrence of each distinct audio id, sorted by audio id;
        and int64 [n], for each of `audio_ids` its position among the distinct ones.
    """
    _, first, inverse = np.unique(_as_bytes(audio_ids), return_index=True, return_inverse=True)
    return first, inverse


def isin_sorted(audio_ids: np.ndarray, sorted_ids: np.ndarray) -> np.ndarray:
    """Compute which audio ids are in a sorted list.

    Args:
        audio_ids: uint8 [n, 32], in any order.
        sorted_ids: uint8 [m, 32], sorted.

    Returns:
        bool [n].
    """
    return _positions_in(audio_ids, sorted_ids) >= 0


def _positions_in(audio_ids: np.ndarray, sorted_ids: np.ndarray) -> np.ndarray:
    """Return the position, int64 [n], of each audio id in a sorted list; -1 where the list lacks it."""
    if not len(sorted_ids):
        return np.full(len(audio_ids), -1)
    ours, theirs = _as_bytes(audio_ids), _as_bytes(sorted_ids)
    positions = np.minimum(np.searchsorted(theirs, ours), len(theirs) - 1)
    return np.where(theirs[positions] == ours, positions, -1)


def _empty_columns() -> dict[str, np.ndarray]:
    return {name: np.zeros((0, 32) if name == "address" else 0, kind) for name, kind in _COLUMNS.items()}


def plan_shards(sizes: Sequence[int], limit: int) -> list[slice]:
    """Divide entries, in their order, into shards of at most `limit` bytes.

    An entry that is larger than the limit gets its own shard.

    Args:
        sizes: size of each entry in bytes.
        limit: maximum size of a shard in bytes.

    Returns:
        For each shard, the slice of the entries in it.
    """
    shards: list[slice] = []
    begin, capacity = 0, limit
    for i, size in enumerate(sizes):
        if i > begin and size > capacity:
            shards.append(slice(begin, i))
            begin, capacity = i, limit
        capacity -= size
    if len(sizes):
        shards.append(slice(begin, len(sizes)))
    return shards
