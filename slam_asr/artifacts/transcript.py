"""Transcripts, and their formats: text, JSON, and subtitles as SubRip and WebVTT."""

import html
import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

COLUMNS, LINES = 42, 2
"""Maximum numbers of characters per line and of lines per subtitle. Players show subtitles of this size."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a recording. It is decoded as one input, and its transcript becomes a segment."""

    samples: "np.ndarray"
    """float32 [samples], mono at 16 kHz."""
    start: float
    """Start in the recording, in seconds."""
    end: float
    """End in the recording, in seconds."""
    positions: int
    """Number of LLM positions of its audio."""


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
        """The texts of all segments, joined by spaces."""
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
    return "\n".join(
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n"
        for number, (start, end, text) in enumerate(_subtitles(transcript), start=1)
    )


def as_vtt(transcript: Transcript) -> str:
    """Format a transcript as WebVTT subtitles, divided as those of `as_srt`."""
    # Escaped, because WebVTT has markup.
    return "WEBVTT\n" + "".join(
        f"\n{_clock(start, '.')} --> {_clock(end, '.')}\n{html.escape(text, quote=False)}\n"
        for start, end, text in _subtitles(transcript)
    )


def _subtitles(transcript: Transcript) -> Iterator[tuple[float, float, str]]:
    """Yield the start in seconds, the end in seconds and the text of each subtitle."""
    for segment in transcript.segments:
        lines = textwrap.wrap(segment.text, COLUMNS)
        shown = ["\n".join(lines[i : i + LINES]) for i in range(0, len(lines), LINES)]
        characters = sum(map(len, shown))
        start = segment.start
        for text in shown:
            # Rounding errors must not let the last subtitle end after its segment.
            end = min(segment.end, start + (segment.end - segment.start) * len(text) / characters)
            yield start, end, text
            start = end


def _clock(seconds: float, point: str) -> str:
    """Format seconds as hours:minutes:seconds, a decimal point, and milliseconds."""
    # Rounded before the division, so that 59.9996 s is 00:01:00.000 and not 00:00:59.1000.
    rest, milliseconds = divmod(round(seconds * 1000), 1000)
    rest, whole_seconds = divmod(rest, 60)
    hours, minutes = divmod(rest, 60)
    return f"{hours:02}:{minutes:02}:{whole_seconds:02}{point}{milliseconds:03}"


FORMATS = {"text": as_text, "json": as_json, "srt": as_srt, "vtt": as_vtt}
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}
