"""Faults of audio files: the errors, and the reasons under which the statistics count them."""

from enum import StrEnum

from slam_asr.errors import InputError


class Fault(StrEnum):
    """The kinds of faults."""

    MISSING = "missing audio"
    UNREADABLE = "unreadable audio"
    EMPTY = "empty audio"
    NOT_FINITE = "non-finite samples"
    TOO_LONG = "too long"
    BEYOND_END = "segment beyond the file's end"
    TOO_LOUD = "samples far above full scale"
    SILENT = "digital silence"
    CANCELLED = "channels that cancel each other"
    NO_CHANNEL = "no such channel"
    NO_SEGMENTS = "segment of a file that allows no seeking"


class AudioError(InputError):
    """An audio file that cannot be used. `reason` is the kind of fault, for statistics."""

    def __init__(self, sentence: str, reason: Fault = Fault.UNREADABLE) -> None:
        super().__init__(sentence)
        self.reason = reason


class StructureError(AudioError):
    """An audio file with a fault of its structure.

    It holds less or more than its header announces, is damaged between its frames, changes its sample rate or
    number of channels, or is encrypted.
    """


# Ends of messages, which begin with the file's name.
TRUNCATED_TEXT = "ends too early: it was truncated when it was written or copied"
"""The fault of a file that holds less than its header announces."""
CHANGED_TEXT = "changes its sample rate or number of channels: write it again as one stream"
"""The fault of a file whose format changes, as when different files were joined."""


def more_than_announced(extra: str) -> str:
    """Describe the fault of a file that holds more than its header announces; `extra` says how much."""
    return f"holds more than its header announces ({extra}): write it again with a correct header"
