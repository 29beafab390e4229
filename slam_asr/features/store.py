"""The feature store: safetensors shards and an index that is written last.

An entry is found by the SHA-256 of its audio file's bytes, not by its key: the same audio in two
manifests is stored once, and audio that was replaced is never mistaken for the old. The index names
each entry's shard and frames, each shard's checksum and size, and the fingerprint of what computed
them (encoder weights, preprocessing, dtype). A store without an index does not exist.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from slam_asr.audio import audio_sha256
from slam_asr.errors import UserError
from slam_asr.manifest import Utterance
from slam_asr.storage import digest, local_path, sha256_of_file, write_atomically, write_json

INDEX = "index.json"


@dataclass
class Entry:
    """One utterance's place."""

    shard: str
    frames: int
    span: int
    """Length of the audio in frames, by which LLM positions are counted; see `EncoderSpec.span_of`."""


@dataclass
class Index:
    """What a store holds."""

    fingerprint: dict[str, Any]
    """What computed the entries."""
    width: int
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """File name → sha256 and bytes."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """SHA-256 of the audio → place."""


def address_of(utterance: Utterance) -> str:
    """Where an utterance's features are found: the SHA-256 of its audio file's bytes."""
    return utterance.sha256 or audio_sha256(utterance.source)


@dataclass
class PlannedShard:
    """Entries that will lie in one file, decided before anything is computed."""

    addresses: list[str]
    name: str


def plan_shards(sizes: dict[str, int], limit: int, fingerprint: dict[str, Any]) -> list[PlannedShard]:
    """Divide entries into shards of at most `limit` bytes, in the given order.

    A shard's name is the digest of what it will hold and of what computes it, so that extraction
    that was interrupted finds the shards it had finished, and only those.
    """
    groups: list[list[str]] = []
    room = 0
    for address, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(address)
        room -= size
    return [PlannedShard(g, f"{digest([g, fingerprint])[:16]}.safetensors") for g in groups]


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one shard, whole or not at all."""
    write_atomically(path, save({address: t.contiguous() for address, t in tensors.items()}))


def write_index(folder: Path, index: Index) -> None:
    """Publish a store: from here on it exists."""
    write_json(folder / INDEX, asdict(index))


class FeatureStore:
    """Reads a store; shards are memory-mapped when first touched.

    Args:
        folder: what `extract-features` wrote.
        expected: the fingerprint of the encoder that the reader's model was or will be built on.

    Raises:
        UserError: no store there, a shard missing or cut, or another encoder's features.
    """

    def __init__(self, folder: str | Path, expected: dict[str, Any] | None = None) -> None:
        self.folder = local_path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            raise UserError(f"{folder} holds no feature store (no {INDEX}): run `slam-asr extract-features` first.")
        try:
            raw = json.loads(path.read_text())
            entries = {address: Entry(**entry) for address, entry in raw.pop("entries").items()}
            self.index = Index(entries=entries, **raw)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is not a feature store's index: run `slam-asr extract-features` again.") from error
        if expected is not None:
            self._refuse_others(expected)
        for name, shard in self.index.shards.items():
            file = self.folder / "shards" / name
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise UserError(f"{file} is missing or cut short: remove {self.folder} and extract features again.")
        self._open: dict[str, Any] = {}

    def _refuse_others(self, expected: dict[str, Any]) -> None:
        made = self.index.fingerprint
        differing = sorted(key for key in expected if made.get(key) != expected[key])
        if differing:
            detail = "; ".join(f"{key}: store {made.get(key)}, model {expected[key]}" for key in differing)
            raise UserError(
                f"The features in {self.folder} were made by another encoder or preprocessing ({detail}): "
                "extract features with this recipe, or give the store that belongs to it."
            )

    def span(self, address: str) -> int:
        """Length in frames of this audio.

        Raises:
            UserError: the store has none.
        """
        return self.entry(address).span

    def entry(self, address: str) -> Entry:
        """The place of this audio.

        Raises:
            UserError: the store has none.
        """
        entry = self.index.entries.get(address)
        if entry is None:
            raise UserError(
                f"The feature store {self.folder} lacks audio {address[:16]}…: run `slam-asr extract-features` "
                "over this manifest."
            )
        return entry

    def read(self, address: str) -> torch.Tensor:
        """[frames, width] of the entry of this audio, in the store's dtype."""
        name = self.entry(address).shard
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / "shards" / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{self.folder / 'shards' / name} cannot be read: extract features again.") from error
        return self._open[name].get_tensor(address)

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            UserError: one differs.
        """
        for name, shard in self.index.shards.items():
            file = self.folder / "shards" / name
            if sha256_of_file(file) != shard["sha256"]:
                raise UserError(f"{file} is damaged (its checksum differs): remove it and extract features again.")
