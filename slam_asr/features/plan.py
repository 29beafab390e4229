"""What an extraction computes, shard by shard: decided from manifests alone, before anything is encoded.

Utterances are taken in the order of their addresses. Those are digests, so every shard holds a random
mixture of the manifest, and the plan depends on nothing but the audio.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from slam_asr.features.index import first_of_each
from slam_asr.features.space import address_of
from slam_asr.manifest import Utterance


@dataclass
class Audio:
    """The distinct audio of a manifest, in the order of its addresses."""

    manifest: Sequence[Utterance]
    rows: np.ndarray
    """[utterances] in the manifest, one for each address."""
    addresses: np.ndarray
    """[utterances, 32] of bytes."""
    samples: np.ndarray
    """[utterances] at 16 kHz."""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: np.ndarray) -> "Audio":
        """Some of it."""
        return Audio(self.manifest, self.rows[chosen], self.addresses[chosen], self.samples[chosen])

    def digest(self) -> str:
        """Of all addresses."""
        return hashlib.sha256(self.addresses.tobytes()).hexdigest()

    def seconds(self) -> float:
        """Of all audio."""
        return float(self.samples.sum()) / 16_000


def audio_of(manifest: Sequence[Utterance], samples_of: Callable[[Utterance], int]) -> Audio:
    """Which audio a manifest has, each once.

    Args:
        manifest: utterances.
        samples_of: tells an utterance's samples at 16 kHz.
    """
    addresses, samples = bytearray(), []
    for utterance in manifest:
        addresses += bytes.fromhex(address_of(utterance))
        samples.append(samples_of(utterance))
    columns = np.frombuffer(bytes(addresses), np.uint8).reshape(-1, 32)
    first, _ = first_of_each(columns)
    return Audio(manifest, first, columns[first], np.array(samples, np.int64)[first])


def plan_shards(sizes: Sequence[int], limit: int) -> list[slice]:
    """Divide entries, in their order, into shards of at most `limit` bytes; a larger entry has one to itself."""
    shards: list[slice] = []
    begin, room = 0, limit
    for at, size in enumerate(sizes):
        if at > begin and size > room:
            shards.append(slice(begin, at))
            begin, room = at, limit
        room -= size
    if len(sizes):
        shards.append(slice(begin, len(sizes)))
    return shards


@dataclass(frozen=True)
class Part:
    """One of several extractions that share a manifest: it takes every n-th shard."""

    number: int = 1
    of: int = 1

    def __str__(self) -> str:
        return f"{self.number}-of-{self.of}"

    def takes(self, shard: int) -> bool:
        """Whether a shard, counted from 0, is this part's."""
        return shard % self.of == self.number - 1
