"""Which utterance's features lie where: columns of numbers, 68 bytes an utterance.

An index is a safetensors file, so that a million entries are read in a moment and searched without
an object for each. Its metadata hold the fingerprint of what computed the features and the shards by
the SHA-256 of their bytes. Indexes are written once and never changed; `merge` reads several as one.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from slam_asr.errors import UserError

_FORMAT = 1
_COLUMNS = {
    "address": np.uint8,
    "shard": np.int32,
    "begin": np.int64,
    "scale_begin": np.int64,
    "frames": np.int32,
    "span": np.int32,
    "check": np.int64,
}


@dataclass(frozen=True)
class Shard:
    """A file of features."""

    sha256: str
    """Of its bytes, and its name."""
    bytes: int

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.sha256}.safetensors"


@dataclass
class Entry:
    """One utterance's place."""

    shard: int
    """Position in the index's list of shards."""
    begin: int
    """Byte in the shard at which its frames begin."""
    scale_begin: int
    """Byte at which its frames' scales begin; -1 where the dtype has none."""
    frames: int
    span: int
    """Length of the audio in frames, by which LLM positions are counted; see `EncoderSpec.span_of`."""
    check: int
    """XXH3 of the frames' bytes and then of the scales', as 64 bits with a sign."""


@dataclass
class Index:
    """Entries in the order of their addresses, and the shards that they lie in.

    An address is the SHA-256 of an utterance's audio; see `Utterance.audio_id`.
    """

    fingerprint: dict[str, Any]
    """What computed the features."""
    width: int
    """Values a frame."""
    shards: list[Shard] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=lambda: _no_entries())
    """`address` [entries, 32], and [entries] of each of the others in `Entry`."""

    def __post_init__(self) -> None:
        self._leading = _as_keys(self.columns["address"])[:, 0]

    def __len__(self) -> int:
        return len(self._leading)

    def addresses(self) -> list[str]:
        """All addresses, in hexadecimal, in order."""
        whole = self.columns["address"].tobytes().hex()
        return [whole[i : i + 64] for i in range(0, len(whole), 64)]

    def find(self, address: str) -> int:
        """The entry of this address, or -1."""
        wanted = bytes.fromhex(address)
        at = int(np.searchsorted(self._leading, int.from_bytes(wanted[:8], "big")))
        # The first 8 bytes of two digests are equal once in a lifetime; the rest is compared all the same.
        while at < len(self) and self.columns["address"][at].tobytes() < wanted:
            at += 1
        return at if at < len(self) and self.columns["address"][at].tobytes() == wanted else -1

    def locate(self, addresses: np.ndarray) -> np.ndarray:
        """[n] entries of addresses [n, 32], or -1."""
        if not len(self):
            return np.full(len(addresses), -1)
        at = np.minimum(np.searchsorted(self._leading, _as_keys(addresses)[:, 0]), len(self) - 1)
        for i in np.flatnonzero((self.columns["address"][at] != addresses).any(axis=1)):
            at[i] = self.find(addresses[i].tobytes().hex())
        return at

    def entry(self, at: int) -> Entry:
        """The place of an entry that `find` found."""
        return Entry(**{name: int(self.columns[name][at]) for name in _COLUMNS if name != "address"})

    def keep(self, wanted: np.ndarray) -> "Index":
        """Those entries for which `wanted` [entries] is true, and the shards that they lie in."""
        columns = {name: column[wanted] for name, column in self.columns.items()}
        used, columns["shard"] = np.unique(columns["shard"], return_inverse=True)
        columns["shard"] = columns["shard"].astype(np.int32)
        return Index(self.fingerprint, self.width, [self.shards[i] for i in used], columns)

    def to_bytes(self) -> bytes:
        """The index's file; the same entries give the same bytes."""
        about = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "width": self.width,
            "shards": [[s.sha256, s.bytes] for s in self.shards],
        }
        columns = {name: np.ascontiguousarray(column) for name, column in self.columns.items()}
        return save(columns, metadata={"slam_asr_features": json.dumps(about, sort_keys=True)})

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> "Index":
        """Read an index's file.

        Raises:
            UserError: it is none, or is damaged.
        """
        try:
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            about = json.loads(header["__metadata__"]["slam_asr_features"])
            if about["format"] != _FORMAT:
                raise UserError(
                    f"{where} is of format {about['format']}, and format {_FORMAT} is read here: extract features again."
                )
            columns = load(content)
            shards = [Shard(sha256, size) for sha256, size in about["shards"]]
            index = cls(
                about["fingerprint"],
                about["width"],
                shards,
                {name: columns[name].astype(t, copy=False) for name, t in _COLUMNS.items()},
            )
            if len({len(c) for c in index.columns.values()}) > 1 or (
                len(index) and index.columns["shard"].max() >= len(shards)
            ):
                raise ValueError("columns do not fit each other")
            return index
        except (ValueError, TypeError, KeyError, IndexError, SafetensorError, UnicodeDecodeError) as error:
            raise UserError(
                f"{where} is not a feature store's index, or is damaged: remove it and run `slam-asr extract-features` again."
            ) from error


def build(fingerprint: dict[str, Any], width: int, shard: Shard, entries: dict[str, Entry]) -> Index:
    """The index of one shard.

    Args:
        fingerprint: of what computed it.
        width: values a frame.
        shard: that all entries lie in.
        entries: by address; their `shard` is not looked at.
    """
    ordered = sorted(entries)
    columns = {
        name: np.array([getattr(entries[a], name) for a in ordered], kind)
        for name, kind in _COLUMNS.items()
        if name != "address"
    }
    columns["shard"][:] = 0
    columns["address"] = to_array(ordered)
    return Index(fingerprint, width, [shard], columns)


def merge(
    fingerprint: dict[str, Any], width: int, indexes: Iterable[Index], wanted: np.ndarray | None = None
) -> Index:
    """Several indexes as one; of an address that is in several, the first one's entry counts.

    Args:
        fingerprint: of them all.
        width: of them all.
        indexes: in an order that does not depend on chance.
        wanted: addresses [n, 32] in order, the only ones that are kept; all if not given.
    """
    shards: dict[Shard, int] = {}
    parts: list[dict[str, np.ndarray]] = []
    for index in indexes:
        if wanted is not None:
            index = index.keep(among(index.columns["address"], wanted))
        numbers = np.array([shards.setdefault(s, len(shards)) for s in index.shards], np.int32)
        parts.append(
            index.columns
            | {"shard": numbers[index.columns["shard"]] if len(index) else index.columns["shard"]}
        )
    joined = {name: np.concatenate([p[name] for p in parts]) for name in _COLUMNS} if parts else _no_entries()
    first, _ = first_of_each(joined["address"])
    merged = Index(fingerprint, width, list(shards), {name: column[first] for name, column in joined.items()})
    merged = merged.keep(np.ones(len(merged), bool))
    # By name, so that the same entries give the same bytes whatever they were merged from.
    order = sorted(range(len(merged.shards)), key=lambda i: merged.shards[i].sha256)
    rank = np.argsort(np.array(order, int)) if order else np.zeros(0, int)
    merged.columns["shard"] = rank[merged.columns["shard"]].astype(np.int32)
    merged.shards = [merged.shards[i] for i in order]
    return merged


def to_array(addresses: Sequence[str]) -> np.ndarray:
    """Addresses in hexadecimal → [n, 32] of bytes."""
    return np.frombuffer(bytes.fromhex("".join(addresses)), np.uint8).reshape(-1, 32)


def _as_keys(addresses: np.ndarray) -> np.ndarray:
    """[n, 32] bytes → [n, 4] numbers in the same order."""
    return np.ascontiguousarray(addresses).view(">u8").astype(np.uint64)


def in_order(addresses: np.ndarray) -> np.ndarray:
    """Positions of addresses [n, 32] in their order; of equal ones, in the order given."""
    # lexsort is stable, and its last key counts most.
    return np.lexsort(_as_keys(addresses).T[::-1])


def first_of_each(addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the distinct addresses, in the order of the addresses, of equal ones the first; and which of these each is."""
    keys, order = _as_keys(addresses), in_order(addresses)
    distinct = np.ones(len(keys), bool)
    distinct[1:] = (keys[order][1:] != keys[order][:-1]).any(axis=1)
    which = np.empty(len(keys), np.int64)
    which[order] = np.cumsum(distinct) - 1
    return order[distinct], which


def among(addresses: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[n] whether each of `addresses` is one of `wanted`, which is in order."""
    if not len(wanted) or not len(addresses):
        return np.zeros(len(addresses), bool)
    ours, theirs = _as_keys(addresses), _as_keys(wanted)
    at = np.minimum(np.searchsorted(theirs[:, 0], ours[:, 0]), len(theirs) - 1)
    return (theirs[at] == ours).all(axis=1)


def _no_entries() -> dict[str, np.ndarray]:
    return {name: np.zeros((0, 32) if name == "address" else 0, kind) for name, kind in _COLUMNS.items()}
