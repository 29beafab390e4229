"""Sorting what memory does not hold: sorted runs on local disk, merged as they are read.

A record is a key and a payload, both bytes. UTF-8 sorts by its bytes as the text does by its
characters, so that keys may be compared without decoding them.
"""

import heapq
import struct
import tempfile
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO

Record = tuple[bytes, bytes]

RUN_BYTES = 48 * 2**20
"""Keys and payloads that are held before a run is written; what Python adds to short records doubles it."""
_RECORD_BYTES = 100
"""What Python adds to a record: two bytes objects and a tuple."""
_MOST_RUNS = 200
"""Open files of a merge; more runs are merged into one on the way."""
_HEAD = struct.Struct("<II")


class ExternalSort:
    """Takes records in any order and gives them by key; those of equal keys in the order of their coming.

    Used as a context; its temporary files are gone at the end.

    Args:
        folder: where runs are written, if there are more records than memory should hold; the system's
            folder for temporary files if not given.
        run_bytes: how much is held in memory.
    """

    def __init__(self, folder: str | Path | None = None, run_bytes: int = RUN_BYTES) -> None:
        self.run_bytes = run_bytes
        self.count = 0
        self._folder = folder
        self._held: list[Record] = []
        self._bytes = 0
        self._runs: list[BinaryIO] = []

    def __enter__(self) -> "ExternalSort":
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            run.close()

    def __len__(self) -> int:
        return self.count

    def add(self, key: bytes, payload: bytes) -> None:
        """Take a record."""
        self._held.append((key, payload))
        self._bytes += len(key) + len(payload) + _RECORD_BYTES
        self.count += 1
        if self._bytes > self.run_bytes:
            self._spill()

    def __iter__(self) -> Iterator[Record]:
        """All records by key; may be asked for again, one iteration at a time."""
        self._held.sort(key=itemgetter(0))
        if not self._runs:
            return iter(self._held)
        return heapq.merge(*map(_read_run, self._runs), self._held, key=itemgetter(0))

    def _spill(self) -> None:
        if len(self._runs) == _MOST_RUNS:
            merged = heapq.merge(*map(_read_run, self._runs), key=itemgetter(0))
            whole = self._new_run(merged)
            for run in self._runs:
                run.close()
            self._runs = [whole]
        self._held.sort(key=itemgetter(0))
        self._runs.append(self._new_run(self._held))
        self._held, self._bytes = [], 0

    def _new_run(self, records: Iterator[Record] | list[Record]) -> BinaryIO:
        # Without a name: the kernel frees it however the program ends.
        run = tempfile.TemporaryFile(dir=self._folder, buffering=2**18)  # noqa: SIM115 - closed by __exit__
        for key, payload in records:
            run.write(_HEAD.pack(len(key), len(payload)) + key + payload)
        run.flush()
        return run


def _read_run(run: BinaryIO) -> Iterator[Record]:
    run.seek(0)
    while head := run.read(_HEAD.size):
        key_bytes, payload_bytes = _HEAD.unpack(head)
        yield run.read(key_bytes), run.read(payload_bytes)
