"""Transcripts, and their formats: text, JSON and SubRip subtitles."""

import json
import textwrap
from dataclasses import asdict, dataclass, field

COLUMNS, LINES = 42, 2
"""Maximum number of characters in a subtitle's line, and of lines, so that players show all of it."""


@dataclass
class Segment:
    """A segment of a recording and its text."""

    start: float
    """Start in the recording, in seconds."""
    end: float
    """End in the recording, in seconds."""
    text: str
    cut: bool = False
    """Whether the text reached decoding.max_new_tokens, so that its end may be missing."""


@dataclass
class Transcript:
    """The transcript of a recording."""

    file: str
    """The recording's file name as given."""
    duration: float
    """Duration in seconds."""
    segments: list[Segment] = field(default_factory=list)
    """The segments in order of time, without overlap; empty for silence."""

    @property
    def text(self) -> str:
        """The complete text: that of all segments, joined by spaces."""
        return " ".join(s.text for s in self.segments if s.text)


def as_text(transcript: Transcript) -> str:
    """Format a transcript as one line of text, even if the model wrote line breaks."""
    return " ".join(transcript.text.split()) + "\n"


def as_json(transcript: Transcript) -> str:
    """Format a transcript as one line of JSON: file, duration, text, and segments with times in seconds."""
    segments = [asdict(s) | {"start": round(s.start, 3), "end": round(s.end, 3)} for s in transcript.segments]
    values = {
        "file": transcript.file,
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "segments": segments,
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def as_srt(transcript: Transcript) -> str:
    """Format a transcript as SubRip subtitles.

    A long segment becomes several subtitles, which share its time in proportion to their number of
    characters.
    """
    blocks: list[str] = []
    for segment in transcript.segments:
        shown = ["\n".join(lines) for lines in _grouped(textwrap.wrap(segment.text, COLUMNS))]
        characters = sum(map(len, shown))
        start = segment.start
        for text in shown:
            # Rounding errors must not let the last subtitle end after its segment.
            end = min(segment.end, start + (segment.end - segment.start) * len(text) / characters)
            blocks.append(f"{len(blocks) + 1}\n{_clock(start)} --> {_clock(end)}\n{text}\n")
            start = end
    return "\n".join(blocks)


def _grouped(lines: list[str]) -> list[list[str]]:
    """Group lines into subtitles."""
    return [lines[i : i + LINES] for i in range(0, len(lines), LINES)]


def _clock(seconds: float) -> str:
    """Format seconds as SubRip's hours:minutes:seconds,milliseconds."""
    rest, milliseconds = divmod(round(seconds * 1000), 1000)
    rest, whole_seconds = divmod(rest, 60)
    hours, minutes = divmod(rest, 60)
    return f"{hours:02}:{minutes:02}:{whole_seconds:02},{milliseconds:03}"


FORMATS = {"text": as_text, "json": as_json, "srt": as_srt}
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt"}
