"""Reading a feature store, whether it lies in a folder or in object storage; `space` says what lies where."""

import mmap
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slam_asr.errors import UserError
from slam_asr.features.index import Entry, to_array
from slam_asr.features.namespace import checksum, find_namespace
from slam_asr.models.feature_dtype import DTYPES, QuantizedFrames, dequantize
from slam_asr.storage import is_s3, local_path, s3
from slam_asr.storage.cache import DiskCache, Held, NoRoom, cache_folder

_MOST_OPEN = 64
"""Shards that are mapped at once; those of a training's windows are fewer."""
_FETCHES = 3
"""Shards on their way at once; each is fetched in parallel pieces."""


class FeatureStore:
    """Reads features; shards are memory-mapped, and fetched to local disk first where the store is remote.

    Every entry's checksum is compared when it is first read, and a fetched shard's SHA-256 when it arrives.

    Args:
        path: a store, or the folder of an extraction's record in it.
        expected: the fingerprint of the encoder that the reader's model was or will be built on.
        dtype: which one is meant where the store has these features in several.
        wanted: addresses, the only ones that will be read; with a million others in the store, these alone take memory.
        cache_bytes: of local disk that fetched shards may take.

    Raises:
        UserError: no store there, a shard missing or cut, or another encoder's features.
    """

    def __init__(
        self,
        path: str,
        expected: dict[str, Any] | None = None,
        dtype: str | None = None,
        wanted: Sequence[str] | None = None,
        cache_bytes: int = 50 * 10**9,
    ) -> None:
        self.path = str(path)
        self.space = find_namespace(self.path, expected, dtype)
        self.fingerprint = self.space.fingerprint() or {}
        self.dtype: str = self.fingerprint["dtype"]
        index = self.space.published(to_array(sorted(set(wanted))) if wanted is not None else None)
        if index is None:
            raise UserError(
                f"{self.path} holds no finished feature store (no index): run `slam-asr extract-features` first, or again."
            )
        self.index = index
        self._require_shards()
        self.remote = is_s3(self.space.root)
        self._cache = DiskCache(cache_folder() / "features", cache_bytes) if self.remote else None
        self._checked = np.zeros(len(index), bool)
        self._open: OrderedDict[int, tuple[mmap.mmap, Held | None]] = OrderedDict()
        self._lock = threading.Lock()
        self._coming: dict[int, Future] = {}
        self._pool = ThreadPoolExecutor(_FETCHES, "fetch-features") if self.remote else None

    def _require_shards(self) -> None:
        there = self.space.shards_there()
        for shard in self.index.shards:
            if there.get(shard.name) != shard.bytes:
                state = "missing" if shard.name not in there else "cut short"
                raise UserError(
                    f"{self.space.shard(shard.name)} is {state}: run `slam-asr extract-features` again over the same manifests, "
                    "which computes it anew."
                )

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a feature store is opened anew in each process")

    def find(self, address: str) -> int:
        """Position of this audio's entry in the index.

        Raises:
            UserError: the store has none.
        """
        at = self.index.find(address)
        if at < 0:
            raise UserError(
                f"The feature store {self.path} lacks audio {address[:16]}…: run `slam-asr extract-features` over this manifest."
            )
        return at

    def entry(self, address: str) -> Entry:
        """The place of this audio.

        Raises:
            UserError: the store has none.
        """
        return self.index.entry(self.find(address))

    def span(self, address: str) -> int:
        """Length in frames of this audio.

        Raises:
            UserError: the store has none.
        """
        return int(self.index.columns["span"][self.find(address)])

    def shard_of(self, address: str) -> int:
        """Position of the shard that this audio's features lie in, in the index's list.

        Raises:
            UserError: the store has none.
        """
        return int(self.index.columns["shard"][self.find(address)])

    def read(self, address: str) -> torch.Tensor:
        """[frames, width] of this audio, in the store's dtype; fp8 scaled back to bf16.

        Raises:
            UserError: the store has none, or they are damaged.
        """
        at = self.find(address)
        entry = self.index.entry(at)
        size = entry.frames * self.index.width * DTYPES[self.dtype].itemsize
        ranges = [(entry.begin, size)] + (
            [(entry.scale_begin, 4 * entry.frames)] if entry.scale_begin >= 0 else []
        )
        source = self._mapped(entry.shard)
        if source is None:
            parts = [
                bytearray(s3.read(self._path(entry.shard), begin, begin + n)) if n else bytearray()
                for begin, n in ranges
            ]
        else:
            parts = [memoryview(source)[begin : begin + n] for begin, n in ranges]
        if source is None or not self._checked[at]:
            if checksum(*parts) != entry.check:
                raise UserError(
                    f"{self._path(entry.shard)} is damaged (the checksum of audio {address[:16]}… differs): run `slam-asr features verify "
                    f"{self.path} --repair true`, then `slam-asr extract-features` again over the same manifests."
                )
            self._checked[at] = True
        if not entry.frames:
            return dequantize(
                QuantizedFrames(
                    torch.zeros(0, self.index.width, dtype=DTYPES[self.dtype]),
                    torch.zeros(0) if len(parts) > 1 else None,
                )
            )
        frames = torch.frombuffer(parts[0], dtype=DTYPES[self.dtype]).view(entry.frames, self.index.width)
        return dequantize(
            QuantizedFrames(
                frames, torch.frombuffer(parts[1], dtype=torch.float32) if len(parts) > 1 else None
            )
        )

    def expect(self, shards: Iterable[int]) -> None:
        """Let go of all other shards, and where the store is remote, fetch these ahead, in this order."""
        ahead = list(dict.fromkeys(shards))
        with self._lock:
            for number in [n for n in self._open if n not in set(ahead)]:
                self._close(number)
            if not self.remote:
                return
            for number in [n for n in self._coming if n not in set(ahead)]:
                self._coming.pop(number).add_done_callback(_let_go)
            for number in ahead:
                if number not in self._open and number not in self._coming:
                    self._coming[number] = self._pool.submit(self._fetch, number)

    def _path(self, shard: int) -> str:
        return self.space.shard(self.index.shards[shard].name)

    def _mapped(self, shard: int) -> mmap.mmap | None:
        """A shard's bytes, or None where local disk has no room for it."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard][0]
            coming = self._coming.pop(shard, None)
        held = None
        if self.remote:
            held = (coming.result() if coming else None) or self._fetch(shard, urgent=True)
            if held is None:
                return None
        with self._lock:
            self._open[shard] = (_map(held.path if held else local_path(self._path(shard))), held)
            while len(self._open) > _MOST_OPEN:
                self._close(next(iter(self._open)))
            return self._open[shard][0]

    def _fetch(self, shard: int, urgent: bool = False) -> Held | None:
        """A shard on local disk, or None where there is no room for it."""
        wanted = self.index.shards[shard]
        while True:
            try:
                return self._cache.hold(
                    wanted.name,
                    wanted.bytes,
                    lambda file: s3.download(self._path(shard), file, wanted.sha256),
                )
            except NoRoom:
                # What this process has open but does not need just now makes room. Failing that, utterances are
                # fetched one by one, past the disk.
                with self._lock:
                    if not urgent or not self._open:
                        return None
                    self._close(next(iter(self._open)))

    def _close(self, shard: int) -> None:
        _, held = self._open.pop(shard)
        # The mapping itself ends with the last tensor that is a view of it.
        if held is not None:
            held.release()


def _let_go(fetched: Future) -> None:
    if not fetched.cancelled() and fetched.exception() is None and fetched.result() is not None:
        fetched.result().release()


def _map(path: Path) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            # Private: torch wants memory that it may write to.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: run `slam-asr extract-features` again over the same manifests."
        ) from error
