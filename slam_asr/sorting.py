"""Lines in the order of their keys, whatever number of them: sorted in pieces on disk, and merged."""

import heapq
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_HEAD = struct.Struct("<IQI")
_RUN_BYTES = 64_000_000
"""Of lines that are sorted in memory at once."""


class SortedLines:
    """Collects lines and gives them back sorted by key; lines with one key stay in the order in which they came.

    Args:
        folder: on whose disk the pieces go; the system's temporary folder if not given.
        run_bytes: of lines that are kept in memory.
    """

    def __init__(self, folder: Path | None = None, run_bytes: int = _RUN_BYTES) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=".sorting-", dir=folder)
        self._limit, self._size, self._count = run_bytes, 0, 0
        self._lines: list[tuple[bytes, int, bytes]] = []
        self._runs: list[Path] = []

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> "SortedLines":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, key: str, line: bytes) -> None:
        """Take a line."""
        # UTF-8 has the order of code points.
        self._lines.append((key.encode("utf-8", "surrogatepass"), self._count, line))
        self._count += 1
        self._size += len(line) + len(key) + 150  # what Python needs for it
        if self._size > self._limit:
            self._spill()

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Keys and lines in order."""
        self._lines.sort()
        runs = [_read(open(run, "rb")) for run in self._runs]  # noqa: SIM115 - closed by _read
        for key, _, line in heapq.merge(*runs, iter(self._lines)):
            yield key.decode("utf-8", "surrogatepass"), line

    def _spill(self) -> None:
        self._lines.sort()
        run = Path(self._folder.name) / f"{len(self._runs):05}"
        with open(run, "wb") as file:
            for key, number, line in self._lines:
                file.write(_HEAD.pack(len(key), number, len(line)) + key + line)
        self._runs.append(run)
        self._lines, self._size = [], 0


def _read(file: BinaryIO) -> Iterator[tuple[bytes, int, bytes]]:
    with file:
        while head := file.read(_HEAD.size):
            key_bytes, number, line_bytes = _HEAD.unpack(head)
            key = file.read(key_bytes)
            yield key, number, file.read(line_bytes)
