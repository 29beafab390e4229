"""The plan of an extraction: the shards to compute, and the utterances that each of them holds.

Utterances are sorted by audio id. Audio ids are digests, so every shard holds a random mixture of the
manifest's utterances, and the order of the manifest does not matter.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slam_asr.artifacts.feature_store.index import Index, isin_sorted, merge, plan_shards, unique_audio_ids
from slam_asr.artifacts.feature_store.namespace import FeatureNamespace
from slam_asr.artifacts.manifest import Utterance
from slam_asr.artifacts.utterances import samples_of
from slam_asr.audio import SAMPLE_RATE
from slam_asr.config.recipe import Recipe
from slam_asr.errors import InputError, StorageError
from slam_asr.models.feature_dtype import bytes_per_frame
from slam_asr.runtime.work_split import WorkShard
from slam_asr.storage import delete, digest, exists, join, read_bytes, sha256_of_bytes, walk, write_bytes

if TYPE_CHECKING:
    from slam_asr.models.encoders.base import EncoderSpec


@dataclass
class ExtractionTask:
    """The settings that all shards of an extraction have in common."""

    recipe: Recipe
    spec: "EncoderSpec"
    namespace: FeatureNamespace
    """The part of the store to which shards are written."""
    fingerprint: dict[str, Any]
    """Everything that determines the features' values: encoder weights, preprocessing and dtype."""


@dataclass
class Audio:
    """The distinct audio of a manifest, sorted by audio id."""

    manifest: Sequence[Utterance]
    rows: np.ndarray
    """int64 [distinct]: for each audio id, the position in the manifest of the first utterance with it."""
    audio_ids: np.ndarray
    """uint8 [distinct, 32]: the audio ids, sorted."""
    samples: np.ndarray
    """int64 [distinct]: the length of each in samples at 16 kHz."""

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, selection: np.ndarray | slice) -> "Audio":
        """Return a part, selected by a mask (bool [distinct]), positions (int [n]) or a slice."""
        return Audio(self.manifest, self.rows[selection], self.audio_ids[selection], self.samples[selection])

    def digest(self) -> str:
        """Return the SHA-256 of all audio ids, in hexadecimal."""
        return sha256_of_bytes(self.audio_ids.tobytes())

    def seconds(self) -> float:
        """Return the total duration in seconds."""
        return float(self.samples.sum()) / SAMPLE_RATE


def distinct_audio(manifest: Sequence[Utterance]) -> Audio:
    """Collect the audio of a manifest. Audio that several utterances share is included once."""
    digests, samples = bytearray(), []
    for utterance in manifest:
        digests += bytes.fromhex(utterance.audio_id)
        samples.append(samples_of(utterance))
    audio_ids = np.frombuffer(bytes(digests), np.uint8).reshape(-1, 32)
    first, _ = unique_audio_ids(audio_ids)
    return Audio(manifest, first, audio_ids[first], np.array(samples, np.int64)[first])


@dataclass
class PlannedShard:
    """A shard to compute, with the audio that it will hold."""

    number: int
    """Position in the plan, counted from 0. It decides which work shard computes the shard."""
    audio: Audio
    receipt: str
    """Path of the index of this shard alone, written after the shard to show that the shard is finished."""
    pieces: str
    """Folder of the pieces that are saved before the shard is complete; see `features.pieces`."""


class ExtractionPlan:
    """The shards to compute for a manifest.

    Audio that was already in the store's indexes when the extraction first started is not computed again. A
    file in the store names those indexes, so an interrupted extraction resumes with the same plan. Audio of
    shards that were lost since then is computed again.

    Args:
        audio: the distinct audio of a manifest.
        task: the settings of the extraction.
        work_shard: which of the planned shards this extraction computes.
    """

    def __init__(self, audio: Audio, task: ExtractionTask, work_shard: WorkShard) -> None:
        self.audio, self.task, self.work_shard = audio, task, work_shard
        self.namespace = namespace = task.namespace
        limit = task.recipe.features.shard_megabytes * 1_000_000
        # The name is the same for all work shards and after an interruption, so that they share one plan.
        self.name = digest([audio.digest(), limit])[:16]
        self._shard_sizes = namespace.shard_sizes()
        unfinished = join(namespace.root, "unfinished", self.name)
        self._receipts = {join(unfinished, f.name) for f in walk(unfinished)}
        self._pieces = join(namespace.root, "pieces", self.name)
        names = namespace.index_names()
        initial = [name for name in self._initial_indexes(names) if name in names]
        # The indexes that existed at the start decide the content of the shards, so that every process and
        # every later attempt plans the same shards. The current indexes only decide which shards are missing.
        indexed_at_start = self._merge(map(self._read_index, initial), audio.audio_ids)
        self.indexed = self._with_existing_shards(self._merge(map(self._read_index, names), audio.audio_ids))
        was_indexed = isin_sorted(audio.audio_ids, indexed_at_start.columns["address"])
        lost = was_indexed & ~isin_sorted(audio.audio_ids, self.indexed.columns["address"])
        frame_bytes = bytes_per_frame(task.spec.width, task.recipe.features.dtype)
        self.shards: list[PlannedShard] = []
        # Lost audio gets shards of its own. They are numbered last, so that the other shards do not change.
        for missing in (audio.select(~was_indexed), audio.select(lost)):
            sizes = [task.spec.frames_of(int(n)) * frame_bytes for n in missing.samples]
            for entries in plan_shards(sizes, limit):
                number = len(self.shards)
                receipt = join(unfinished, f"{number:06}.safetensors")
                pieces = join(self._pieces, f"{number:06}")
                self.shards.append(PlannedShard(number, missing.select(entries), receipt, pieces))
        self.own_shards = [shard for shard in self.shards if work_shard.takes(shard.number)]
        reused = audio.select(was_indexed & ~lost)
        own_reused = reused.select(slice(work_shard.number - 1, None, work_shard.total))
        self.own_audio = [*(shard.audio for shard in self.own_shards), own_reused]
        """The audio of this work shard, computed or reused."""

    def _initial_indexes(self, names: list[str]) -> list[str]:
        """Return the names of the indexes that existed when the first process started this extraction."""
        path = join(self.namespace.root, "plans", f"{self.name}.json")
        # The indexes that this plan's own work shards have published must not change the plan.
        others = [name for name in names if not name.startswith(self.name)]
        # An existing file is not replaced: the first process writes it, and all others read it.
        write_bytes(path, json.dumps(others) + "\n", replace=False)
        try:
            return list(json.loads(read_bytes(path)))
        except ValueError as error:
            raise InputError(
                f"{path} is damaged: remove it and run `slam-asr extract-features` again."
            ) from error

    def _read_index(self, name: str) -> Index:
        return self.namespace.read_index(self.namespace.index_path(name))

    def _merge(self, indexes: Iterable[Index], audio_ids: np.ndarray) -> Index:
        return merge(self.task.fingerprint, self.task.spec.width, indexes, audio_ids)

    def _with_existing_shards(self, index: Index) -> Index:
        """Return the entries whose shards exist and are complete."""
        complete = np.array([self._shard_sizes.get(s.name) == s.bytes for s in index.shards], bool)
        return index.select(complete[index.columns["shard"]])

    def is_missing(self, shard: PlannedShard) -> bool:
        """Return whether a shard must be computed: it is in no index and has no receipt, or it was lost."""
        if isin_sorted(shard.audio.audio_ids, self.indexed.columns["address"]).all():
            return False
        # The receipts were listed at the start, so a shard without a receipt needs no request to the store.
        receipt = self._read_receipt(shard) if shard.receipt in self._receipts else None
        if receipt is None:
            return True
        if len(self._with_existing_shards(receipt)) == len(shard.audio):
            return False
        # The shard was lost after it was finished. With its receipt, `encode.plan_batches` would skip it.
        delete(shard.receipt)
        return True

    def _read_receipt(self, shard: PlannedShard) -> Index | None:
        """Read a shard's receipt; return None before it is written and after `publish` has removed it."""
        if not exists(shard.receipt):
            return None
        try:
            return self.namespace.read_index(shard.receipt)
        except (FileNotFoundError, InputError, StorageError):
            # Another extraction of the same audio may have removed the receipt after the check above.
            if exists(shard.receipt):
                raise
            return None

    def publish(self) -> tuple[str, Index]:
        """Write the index of this work shard's utterances, and remove the receipts and pieces of its shards.

        Returns:
            The name of the index, and the index itself.

        Raises:
            InputError: features were removed while the extraction ran.
        """
        receipts = [index for shard in self.own_shards if (index := self._read_receipt(shard))]
        # Another extraction of the same audio may have published its index and then removed the receipts. The
        # indexes are listed after the receipts are read, so such an index is found here.
        published = map(self._read_index, self.namespace.index_names())
        self._shard_sizes = self.namespace.shard_sizes()
        audio_ids = np.concatenate([audio.audio_ids for audio in self.own_audio])
        in_order, _ = unique_audio_ids(audio_ids)
        index = self._with_existing_shards(self._merge([*receipts, *published], audio_ids[in_order]))
        if len(index) != len(audio_ids):
            raise InputError(
                f"{len(audio_ids) - len(index)} utterances were removed from {self.namespace.root} "
                "while features were extracted: run the same command again."
            )
        name = f"{self.name}-{self.work_shard}"
        write_bytes(self.namespace.index_path(name), index.to_bytes())
        # Receipts are removed only now, when an index refers to their shards.
        for shard in self.own_shards:
            delete(shard.receipt)
        # A killed extraction may have left pieces of a shard that it had just finished.
        own = {f"{shard.number:06}" for shard in self.own_shards}
        for file in walk(self._pieces):
            if file.name.partition("/")[0] in own:
                delete(join(self._pieces, file.name))
        return name, index

    def own_seconds(self) -> float:
        """Return the total duration in seconds of this work shard's audio, computed or reused."""
        return sum(audio.seconds() for audio in self.own_audio)
