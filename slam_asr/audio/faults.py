"""The faults of audio files: one error with a reason, which statistics count."""

from slam_asr.errors import InputError

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
NO_SEGMENTS = "segment of a format without segments"


class AudioError(InputError):
    """An audio file that cannot be used. `reason` is the kind of fault, for statistics."""

    def __init__(self, sentence: str, reason: str = UNREADABLE) -> None:
        super().__init__(sentence)
        self.reason = reason


class LengthError(AudioError):
    """An audio file that holds less or more than its header announces, or has damage between its frames."""


NOT_AUDIO = "cannot be read as wav, flac, ogg, opus, mp3, m4a, webm or another usual format of audio"
"""The fault of a file of an unknown format; the file's name goes in front."""
TRUNCATED = "ends too early: it was truncated when it was written or copied"
"""The fault of a file that holds less than its header announces; the file's name goes in front."""


def more_than_announced(extra: str) -> str:
    """Return what is wrong with a file that holds more than its header announces."""
    return f"holds more than its header announces ({extra}): write it again with a correct header"
