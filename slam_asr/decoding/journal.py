"""Answers that are already there when a decoding was cut off: the next one goes on behind them.

Each batch's answers are appended to a file in the stage's folder as soon as they are there. Where results go to object storage, that file goes there too
every minute, so that another machine can go on. The file begins with a digest of all that decides the answers; those of another decoding are never used.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from slam_asr.errors import UserError
from slam_asr.models.search import Answer, Choice
from slam_asr.progress import log_line
from slam_asr.storage import delete, exists, fetch, join, upload, write_atomically

FILE = "unfinished.jsonl"
UPLOADED_EVERY = 60.0
"""Seconds."""


class DecodeJournal:
    """The answers of one decoding, by the utterance's number.

    Args:
        folder: the stage's, on local disk.
        of: digest of what decides the answers.
        remote: the stage's folder in object storage, if its results go there.
    """

    def __init__(self, folder: Path, of: str, remote: str | None = None) -> None:
        self.path, self.remote = folder / FILE, join(remote, FILE) if remote else None
        self.answers: dict[int, Answer] = {}
        head = {"decoding": of}
        lines = self._lines(self.path, head)
        if not lines and self.remote and exists(self.remote):
            lines = self._lines(fetch(self.remote), head)
        for line in lines:
            self.answers |= answers_in(line)
        # Written anew: what a killed process wrote last may be half a line.
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in (head, *lines)))
        self._file: IO[str] = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if self.answers:
            log_line(f"going on behind {len(self.answers)} utterances that are decoded already")
        self._uploaded = time.monotonic()

    def add(self, answers: dict[int, Answer]) -> None:
        """Keep a batch's answers."""
        self.answers |= answers
        self._file.write(json.dumps({at: asdict(answer) for at, answer in answers.items()}) + "\n")
        self._file.flush()
        if self.remote and time.monotonic() - self._uploaded > UPLOADED_EVERY:
            self._uploaded = time.monotonic()
            try:
                upload(self.path, self.remote)
            except UserError as error:
                log_line(
                    f"warning: what is decoded so far could not be kept in object storage, which costs time if this is cut off: {error}"
                )

    def close(self) -> None:
        """Take the file away: the results are there."""
        self._file.close()
        self.path.unlink()
        if self.remote and exists(self.remote):
            delete(self.remote)

    def __enter__(self) -> "DecodeJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @staticmethod
    def _lines(path: Path, head: dict[str, str]) -> list[dict[str, Any]]:
        """The whole lines behind a head of the same decoding."""
        if not path.exists():
            return []
        lines = list(_whole(path.read_text(encoding="utf-8").split("\n")))
        return lines[1:] if lines[:1] == [head] else []


def _whole(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def answers_in(line: dict[str, Any]) -> dict[int, Answer]:
    """The answers that a line of JSON holds, by the utterances' numbers."""
    return {
        int(at): Answer(**{**values, "choices": [Choice(**choice) for choice in values["choices"]]})
        for at, values in line.items()
    }
