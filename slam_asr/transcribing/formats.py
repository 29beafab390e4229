"""A transcript as text, JSON or SubRip subtitles."""

import json
import textwrap
from dataclasses import asdict, dataclass, field

COLUMNS, LINES = 42, 2
"""Of a subtitle: what players show in full."""


@dataclass
class Segment:
    """A stretch of a recording and what is said in it."""

    start: float
    """Seconds."""
    end: float
    text: str
    cut: bool = False
    """Whether the answer reached decoding.max_new_tokens: something may be missing at its end."""


@dataclass
class Transcript:
    """A recording and what is said in it."""

    file: str
    duration: float
    """Seconds."""
    segments: list[Segment] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(s.text for s in self.segments if s.text)


def as_text(transcript: Transcript) -> str:
    """One line."""
    return transcript.text + "\n"


def as_json(transcript: Transcript) -> str:
    """One line: file, duration, text, and segments with their times in seconds."""
    segments = [asdict(s) | {"start": round(s.start, 3), "end": round(s.end, 3)} for s in transcript.segments]
    values = {
        "file": transcript.file,
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "segments": segments,
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


def as_srt(transcript: Transcript) -> str:
    """SubRip: a long segment becomes several subtitles, which share its time by their letters."""
    blocks = []
    for segment in transcript.segments:
        shown = ["\n".join(lines) for lines in _grouped(textwrap.wrap(segment.text, COLUMNS))]
        letters = sum(map(len, shown))
        start = segment.start
        for text in shown:
            end = min(segment.end, start + (segment.end - segment.start) * len(text) / letters)
            blocks.append(f"{len(blocks) + 1}\n{_clock(start)} --> {_clock(end)}\n{text}\n")
            start = end
    return "\n".join(blocks)


def _grouped(lines: list[str]) -> list[list[str]]:
    return [lines[at : at + LINES] for at in range(0, len(lines), LINES)]


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 3_600_000:02}:{milliseconds // 60_000 % 60:02}:{milliseconds // 1000 % 60:02},{milliseconds % 1000:03}"


FORMATS = {"text": as_text, "json": as_json, "srt": as_srt}
SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt"}
