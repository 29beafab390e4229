"""Reads a feature store in a folder or in object storage. `namespace` describes the layout of a store."""

import mmap
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from slam_asr.artifacts.feature_store.index import to_array
from slam_asr.artifacts.feature_store.namespace import checksum, find_namespace
from slam_asr.artifacts.manifest import Utterance
from slam_asr.errors import InputError, StorageError
from slam_asr.models.feature_dtype import DTYPES, QuantizedFrames, dequantize
from slam_asr.storage import is_s3, local_path, parent_of
from slam_asr.storage.cache import CacheFull, DiskCache, cache_folder
from slam_asr.storage.downloads import download
from slam_asr.storage.objects import read

_MAX_MAPPED = 64
"""Maximum number of shards mapped into memory at once. A training window has 8 by default
(`features.window_shards`)."""
_PARALLEL_FETCHES = 3
"""Number of shards fetched at once. Each of them is fetched in parallel pieces."""


class FeatureStore:
    """Reads features. Shards are memory-mapped; those of a remote store are first fetched to local disk.

    The checksum of an entry is compared when the entry is first read, and that of a fetched shard when the
    shard arrives.

    Args:
        path: a store, or the folder in it of a namespace or of an extraction's record.
        expected: the fingerprint of the encoder that the features must come from; any if not given.
        dtype: the dtype to read if the store has features in several dtypes.
        audio_ids: the only audio ids that will be read. If not given, the index of the complete store is
            loaded, which needs much memory if it has millions of entries.
        cache_bytes: maximum total size in bytes of fetched shards on local disk.

    Raises:
        InputError: the path holds no store, the store is damaged, another encoder computed its features, or
            several namespaces match.
        StorageError: object storage cannot be read.
    """

    def __init__(
        self,
        path: str,
        expected: dict[str, Any] | None = None,
        dtype: str | None = None,
        audio_ids: Sequence[str] | None = None,
        cache_bytes: int = 50 * 10**9,
    ) -> None:
        self.path = str(path)
        self.namespace = find_namespace(self.path, expected, dtype)
        self.fingerprint = self.namespace.fingerprint() or {}
        self.dtype: str = self.fingerprint["dtype"]
        requested = None if audio_ids is None else to_array(sorted(set(audio_ids)))
        index = self.namespace.merged_index(requested)
        if index is None:
            raise InputError(
                f"{self.path} holds no finished feature store (no index): "
                "run `slam-asr extract-features` first, or again."
            )
        self.index = index
        self._require_shards()
        self.remote = is_s3(self.namespace.root)
        self._cache = DiskCache(cache_folder() / "features", cache_bytes) if self.remote else None
        self._verified = np.zeros(len(index), bool)
        self._mapped: OrderedDict[int, tuple[mmap.mmap, BinaryIO | None]] = OrderedDict()
        """Mapped shards by number, the least recently used first, each with the file that is held for it."""
        self._lock = threading.Lock()
        self._fetching: dict[int, Future[BinaryIO | None]] = {}
        self._pool = ThreadPoolExecutor(_PARALLEL_FETCHES, "fetch-features") if self.remote else None

    def _require_shards(self) -> None:
        # Checked when the store is opened, so that a missing shard is noticed before the work begins.
        sizes = self.namespace.shard_sizes()
        for shard in self.index.lost_shards(sizes):
            state = "missing" if shard.name not in sizes else "cut short"
            raise InputError(
                f"{self.namespace.shard_path(shard.name)} is {state}: "
                "run `slam-asr extract-features` again over the same manifests to compute it again."
            )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a feature store cannot be pickled: open it again in each process")

    def find(self, audio_id: str) -> int:
        """Return the position of this audio's entry in the index.

        Raises:
            InputError: the store has no features of this audio.
        """
        position = self.index.find(audio_id)
        if position < 0:
            raise InputError(
                f"The feature store {self.path} lacks audio {audio_id[:16]}…: "
                "run `slam-asr extract-features` over this manifest."
            )
        return position

    def span(self, utterance: Utterance) -> int:
        """Return the length of this utterance in encoder frames.

        Raises:
            InputError: the store has no features of this audio.
        """
        return int(self.index.columns["span"][self.find(utterance.audio_id)])

    def shards_of(self, audio_ids: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """Return the number of the shard that contains each utterance's features.

        Args:
            audio_ids: uint8 [utterances, 32], the audio ids as bytes; the store must have features of all.
            samples: ignored, because the index names the shard of each utterance.

        Returns:
            int32 [utterances].
        """
        return self.index.columns["shard"][self.index.locate(audio_ids)]

    def read(self, utterance: Utterance) -> torch.Tensor:
        """Read the features of this utterance.

        Returns:
            [frames, width] on the CPU in the store's dtype; fp8 is dequantized to bf16. It may be a view of
            the mapped shard.

        Raises:
            InputError: the store has no features of this audio, or they are damaged.
            StorageError: the shard's file or object storage cannot be read.
        """
        audio_id = utterance.audio_id
        position = self.find(audio_id)
        entry = self.index.entry(position)
        size = entry.frames * self.index.width * DTYPES[self.dtype].itemsize
        ranges = [(entry.begin, size)]
        if entry.scale_begin >= 0:
            ranges.append((entry.scale_begin, 4 * entry.frames))  # one fp32 scale per frame
        source = self._map_shard(entry.shard)
        chunks: list[memoryview | bytearray]
        if source is None:
            path = self._path(entry.shard)
            # An empty range cannot be requested over HTTP.
            chunks = [bytearray(read(path, begin, begin + n)) if n else bytearray() for begin, n in ranges]
        else:
            chunks = [memoryview(source)[begin : begin + n] for begin, n in ranges]
        # A mapped file does not change, so its entries are verified once. Bytes that are read directly from
        # object storage are verified every time.
        if source is None or not self._verified[position]:
            if checksum(*chunks) != entry.check:
                # `self.path` may be a folder in the store, such as that of an extraction's record.
                store = parent_of(self.namespace.root)
                raise InputError(
                    f"{self._path(entry.shard)} is damaged (the checksum of audio {audio_id[:16]}… differs): "
                    f"run `slam-asr features verify {store} --repair true`, "
                    "then `slam-asr extract-features` again over the same manifests."
                )
            self._verified[position] = True
        frames = _tensor(chunks[0], DTYPES[self.dtype]).view(entry.frames, self.index.width)
        scales = _tensor(chunks[1], torch.float32) if len(chunks) > 1 else None
        return dequantize(QuantizedFrames(frames, scales))

    def expect(self, shards: Iterable[int]) -> None:
        """Prefetch these shards, in this order, if the store is in object storage; release all others.

        Args:
            shards: numbers of the shards that are needed now or next.
        """
        ahead = list(dict.fromkeys(shards))
        with self._lock:
            for number in [n for n in self._mapped if n not in set(ahead)]:
                self._unmap(number)
            if self._pool is None:
                return
            for number in [n for n in self._fetching if n not in set(ahead)]:
                fetch = self._fetching.pop(number)
                # A fetch that is running cannot be cancelled. Its file is released as soon as it is complete.
                fetch.cancel()
                fetch.add_done_callback(_release)
            for number in ahead:
                if number not in self._mapped and number not in self._fetching:
                    self._fetching[number] = self._pool.submit(self._fetch, number)

    def _path(self, shard: int) -> str:
        return self.namespace.shard_path(self.index.shards[shard].name)

    def _map_shard(self, shard: int) -> mmap.mmap | None:
        """Map a shard into memory, fetching it first if needed; return None if local disk has no space."""
        with self._lock:
            if shard in self._mapped:
                self._mapped.move_to_end(shard)
                return self._mapped[shard][0]
            # From now on, the fetch belongs to this call, and `expect` can no longer release its file.
            fetching = self._fetching.pop(shard, None)
        # The lock is not held while waiting for a fetch, which takes the same lock in `_fetch`.
        held = None
        if self.remote:
            # A prefetch returns None if it finds no space. This second attempt may release other shards.
            held = (fetching.result() if fetching else None) or self._fetch(shard, urgent=True)
            if held is None:
                return None
        with self._lock:
            self._mapped[shard] = (_map(Path(held.name) if held else local_path(self._path(shard))), held)
            while len(self._mapped) > _MAX_MAPPED:
                self._unmap(next(iter(self._mapped)))
            return self._mapped[shard][0]

    def _fetch(self, number: int, urgent: bool = False) -> BinaryIO | None:
        """Fetch a shard to local disk.

        Args:
            number: the shard's number.
            urgent: whether to release this process's other shards if that is needed to make space.

        Returns:
            The file, or None if local disk has no space for it.
        """
        assert self._cache is not None  # only shards of a remote store are fetched
        shard = self.index.shards[number]
        while True:
            try:
                return self._cache.hold(
                    shard.name, shard.bytes, lambda file: download(self._path(number), file, shard.sha256)
                )
            except CacheFull:
                # If no shard can be released, the caller reads single utterances without using the disk.
                with self._lock:
                    if not urgent or not self._mapped:
                        return None
                    self._unmap(next(iter(self._mapped)))

    def _unmap(self, shard: int) -> None:
        _, held = self._mapped.pop(shard)
        # The mapping is not closed: tensors that are views of it keep it alive until the last is freed.
        if held is not None:
            held.close()


def _release(fetched: Future[BinaryIO | None]) -> None:
    if fetched.cancelled() or fetched.exception() is not None:
        return
    held = fetched.result()
    if held is not None:
        held.close()


def _tensor(content: memoryview | bytearray, dtype: torch.dtype) -> torch.Tensor:
    # torch.frombuffer refuses empty buffers.
    return torch.frombuffer(content, dtype=dtype) if len(content) else torch.zeros(0, dtype=dtype)


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            # Mapped copy-on-write, because torch warns about buffers that it must not write to.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path} cannot be read: run `slam-asr extract-features` again over the same manifests."
        ) from error
