"""The journal of a decoding saves the answers so far, so that an interrupted decoding can be resumed.

Each batch's answers are appended to a file in the stage's folder as soon as they are known. If the results go
to object storage, the file is uploaded there every minute, so that another machine can resume. The file's
first line holds a digest of everything that determines the answers; answers with another digest are never
used.
"""

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slam_asr.errors import UserError
from slam_asr.models.searcher import Answer, Choice
from slam_asr.progress import log_line
from slam_asr.storage import delete, exists, fetch, join, upload, write_atomically

FILE = "unfinished.jsonl"
"""Name of the journal in the stage's folder."""
UPLOADED_EVERY = 60.0
"""Seconds between two uploads of the journal."""


class DecodeJournal:
    """The journal of one decoding, with its `answers` by utterance index.

    Args:
        folder: the stage's folder on local disk.
        decoding_digest: digest of everything that determines the answers.
        remote: the stage's folder in object storage, if its results go there.
    """

    def __init__(self, folder: Path, decoding_digest: str, remote: str | None = None) -> None:
        self.path, self.remote = folder / FILE, join(remote, FILE) if remote else None
        self.answers: dict[int, Answer] = {}
        head = {"decoding": decoding_digest}
        lines = self._lines(self.path, head)
        if not lines and self.remote and exists(self.remote):
            lines = self._lines(fetch(self.remote), head)
        for line in lines:
            self.answers |= answers_in(line)
        # The file is rewritten, because the last line that a killed process wrote may be incomplete.
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in (head, *lines)))
        if self.answers:
            log_line(f"resuming: {len(self.answers)} utterances are already decoded")
        self._uploaded = time.monotonic()

    def add(self, answers: dict[int, Answer]) -> None:
        """Record a batch's answers."""
        self.answers |= answers
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({index: asdict(answer) for index, answer in answers.items()}) + "\n")
        if self.remote and time.monotonic() - self._uploaded > UPLOADED_EVERY:
            # The time is set before the upload, so that a failed upload is retried after the same interval.
            self._uploaded = time.monotonic()
            try:
                upload(self.path, self.remote)
            # The decoding itself does not need the upload, so it continues.
            except UserError as error:
                log_line(
                    "warning: could not save the answers so far in object storage; if this decoding is "
                    f"interrupted, another machine has to repeat them: {error}"
                )

    def discard(self) -> None:
        """Delete the journal, because the stage's results are complete."""
        self.path.unlink()
        if self.remote and exists(self.remote):
            delete(self.remote)

    @staticmethod
    def _lines(path: Path, head: dict[str, str]) -> list[dict[str, Any]]:
        """Return the complete lines after the first, or none if the first belongs to another decoding."""
        if not path.exists():
            return []
        lines = []
        with contextlib.suppress(ValueError):  # raised by the first line that is incomplete or damaged
            for line in path.read_bytes().split(b"\n"):
                lines.append(json.loads(line))
        return lines[1:] if lines[:1] == [head] else []


def answers_in(line: dict[str, Any]) -> dict[int, Answer]:
    """Return the answers in a line of the journal, keyed by the utterances' indices."""
    return {
        int(index): Answer(**{**values, "choices": [Choice(**choice) for choice in values["choices"]]})
        for index, values in line.items()
    }
