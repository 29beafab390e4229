"""What an extraction computes, shard by shard: decided from manifests alone, before anything is encoded.

Utterances are taken in the order of their addresses. Those are digests, so every shard holds a random
mixture of the manifest, and the plan depends on nothing but the audio.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slam_asr.errors import UserError
from slam_asr.features.index import Index, among, first_of_each, in_order, merge
from slam_asr.features.namespace import FeatureNamespace
from slam_asr.manifest import Utterance
from slam_asr.models.feature_dtype import bytes_a_frame
from slam_asr.storage import delete, digest, exists, join, read_bytes, walk, write_bytes
from slam_asr.work_split import WorkShard

if TYPE_CHECKING:
    from slam_asr.models.encoder import EncoderSpec
    from slam_asr.recipe import Features


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
        addresses += bytes.fromhex(utterance.audio_id)
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


@dataclass
class Planned:
    """A shard to be, and the audio that goes into it."""

    number: int
    audio: Audio
    receipt: str
    """Where it is noted that the shard is finished."""


class ExtractionPlan:
    """The shards that a manifest's audio becomes.

    What other indexes had when the extraction was first begun is not computed again; which indexes those
    were is written down, so that an interrupted extraction comes to the same plan. Shards that were lost
    since are computed again.

    Args:
        audio: of a manifest.
        space: where features go.
        fingerprint: of the space.
        spec: the encoder.
        features: size of shards, and their dtype.
        part: which shards are this extraction's.
    """

    def __init__(
        self,
        audio: Audio,
        space: FeatureNamespace,
        fingerprint: dict[str, Any],
        spec: "EncoderSpec",
        features: "Features",
        part: WorkShard,
    ) -> None:
        self.audio, self.space, self.fingerprint, self.spec, self.part = audio, space, fingerprint, spec, part
        limit = features.shard_megabytes * 1_000_000
        self.name = digest([audio.digest(), limit])[:16]
        self._there = self.space.shards_there()
        unfinished = join(self.space.root, "unfinished", self.name)
        self._noted = {join(unfinished, f.name) for f in walk(unfinished)}
        names = self.space.index_names()
        bases = [name for name in self._bases(names) if name in names]
        based = merge(self.fingerprint, self.spec.width, map(self._index, bases), audio.addresses)
        self.have = self._present(
            merge(self.fingerprint, self.spec.width, map(self._index, names), audio.addresses)
        )
        is_old = among(audio.addresses, based.columns["address"])
        lost = is_old & ~among(audio.addresses, self.have.columns["address"])
        self.old = audio.take(is_old & ~lost)
        frame = bytes_a_frame(self.spec.width, features.dtype)
        self.shards: list[Planned] = []
        for chosen in (audio.take(~is_old), audio.take(lost)):
            sizes = [self.spec.frames_of(int(n)) * frame for n in chosen.samples]
            for piece in plan_shards(sizes, limit):
                number = len(self.shards)
                self.shards.append(
                    Planned(number, chosen.take(piece), join(unfinished, f"{number:06}.safetensors"))
                )
        self.mine = [shard for shard in self.shards if self.part.takes(shard.number)]

    def _bases(self, names: list[str]) -> list[str]:
        """The indexes that were there when this extraction was first begun, by whatever process."""
        path = join(self.space.root, "plans", f"{self.name}.json")
        others = [name for name in names if not name.startswith(self.name)]
        write_bytes(path, json.dumps(others) + "\n", replace=False)
        try:
            return list(json.loads(read_bytes(path)))
        except ValueError as error:
            raise UserError(
                f"{path} is damaged: remove it and run `slam-asr extract-features` again."
            ) from error

    def _index(self, name: str) -> Index:
        return self.space.read_index(self.space.index(name))

    def _present(self, index: Index) -> Index:
        """Those entries whose shards are there."""
        whole = np.array([self._there.get(s.name) == s.bytes for s in index.shards], bool)
        return index.keep(whole[index.columns["shard"]] if len(index) else np.zeros(0, bool))

    def is_missing(self, shard: Planned) -> bool:
        """Whether a shard is neither indexed nor noted as finished, or is gone."""
        if among(shard.audio.addresses, self.have.columns["address"]).all():
            return False
        noted = self._read_receipt(shard) if shard.receipt in self._noted else None
        if noted is None:
            return True
        if len(self._present(noted)) == len(shard.audio):
            return False
        delete(shard.receipt)
        return True

    def _read_receipt(self, shard: Planned) -> Index | None:
        """What a finished shard holds, or None where it is not noted, or its index was published meanwhile."""
        if not exists(shard.receipt):
            return None
        try:
            return self.space.read_index(shard.receipt)
        except (FileNotFoundError, UserError):
            if exists(shard.receipt):
                raise
            return None

    def publish(self) -> tuple[str, Index]:
        """Write the index of this part's utterances, its name and what it holds."""
        noted = [index for shard in self.mine if (index := self._read_receipt(shard))]
        # Another extraction of the same audio may have published its index, and removed the receipts, first.
        published = map(self._index, self.space.index_names())
        self._there = self.space.shards_there()
        mine = [s.audio.addresses for s in self.mine] + [
            self.old.addresses[self.part.number - 1 :: self.part.of]
        ]
        wanted = np.concatenate(mine)
        wanted = wanted[in_order(wanted)]
        index = self._present(merge(self.fingerprint, self.spec.width, [*noted, *published], wanted))
        if len(index) != len(wanted):
            raise UserError(
                f"{len(wanted) - len(index)} utterances vanished from {self.space.root} while features were extracted: run the same command again."
            )
        name = f"{self.name}-{self.part}"
        write_bytes(self.space.index(name), index.to_bytes())
        for shard in self.mine:
            delete(shard.receipt)
        return name, index

    def mine_seconds(self) -> float:
        """Of this part's audio, old and new."""
        return (
            sum(s.audio.seconds() for s in self.mine)
            + float(self.old.samples[self.part.number - 1 :: self.part.of].sum()) / 16_000
        )
