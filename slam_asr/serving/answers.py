"""Formats transcripts as the response bodies and the events of OpenAI's interface."""

import json
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slam_asr.artifacts.transcript import FORMATS, Piece, Segment, Transcript

if TYPE_CHECKING:
    from slam_asr.models.searcher import Answer

MEDIA_TYPES = {
    "json": "application/json",
    "verbose_json": "application/json",
    "text": "text/plain; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
    "vtt": "text/vtt; charset=utf-8",
}
"""The response's media type, keyed by `response_format`."""


@dataclass(frozen=True)
class Decoded:
    """A decoded piece of a recording."""

    segment: Segment
    tokens: list[int]
    """Token ids that the LLM generated, without the token that ends the answer."""

    @classmethod
    def of(cls, piece: Piece, answer: "Answer", stops: Sequence[int]) -> "Decoded":
        """Join a piece and its answer; `stops` are the tokens that end an answer."""
        end = next((i for i, token in enumerate(answer.ids) if token in stops), len(answer.ids))
        return cls(Segment(piece.start, piece.end, answer.text, answer.cut), answer.ids[:end])


def body_of(format: str, duration: float, language: str, decoded: list[Decoded]) -> str:
    """Format a complete transcript.

    Args:
        format: a key of `MEDIA_TYPES`.
        duration: length of the recording in seconds.
        language: ISO 639-1 code, or empty if unknown.
        decoded: the decoded pieces in chronological order.
    """
    transcript = Transcript("", duration, [part.segment for part in decoded])
    usage = {"type": "duration", "seconds": round(duration, 3)}
    if format == "json":
        return _json({"text": transcript.text, "usage": usage})
    if format == "verbose_json":
        values = {
            "task": "transcribe",
            "language": language,
            "duration": round(duration, 3),
            "text": transcript.text,
            "segments": [_verbose(number, part) for number, part in enumerate(decoded)],
            "usage": usage,
        }
        return _json(values)
    return FORMATS[format](transcript)


def _verbose(number: int, part: Decoded) -> dict[str, Any]:
    segment, text = part.segment, part.segment.text.encode()
    return {
        "id": number,
        "seek": round(segment.start * 100),  # Whisper's unit: frames of 10 ms
        "start": round(segment.start, 3),
        "end": round(segment.end, 3),
        "text": segment.text,
        "tokens": part.tokens,
        "temperature": 0.0,
        # As Whisper defines it: bytes of the text per byte of its zlib compression. Repetitions make it high.
        "compression_ratio": round(len(text) / len(zlib.compress(text)), 3),
        # The search does not estimate these two.
        "avg_logprob": None,
        "no_speech_prob": None,
        "cut": segment.cut,
    }


async def events_of(format: str, duration: float, answers: AsyncIterator[Decoded]) -> AsyncIterator[str]:
    """Yield server-sent events: one for each segment as soon as it is decoded, and one at the end.

    A segment without text has an event only in `verbose_json`.

    Args:
        format: `verbose_json` for segments with times; all other formats give pieces of text only.
        duration: length of the recording in seconds.
        answers: the decoded pieces in chronological order.
    """
    transcript = Transcript("", duration)
    async for part in answers:
        segment = part.segment
        if format == "verbose_json":
            yield as_event(
                {
                    "type": "transcript.text.segment",
                    "id": str(len(transcript.segments)),
                    "start": round(segment.start, 3),
                    "end": round(segment.end, 3),
                    "text": segment.text,
                    # OpenAI's event always has this field; speakers are not distinguished here.
                    "speaker": "",
                    "cut": segment.cut,
                }
            )
        elif segment.text:
            delta = f" {segment.text}" if any(s.text for s in transcript.segments) else segment.text
            yield as_event({"type": "transcript.text.delta", "delta": delta})
        transcript.segments.append(segment)
    usage = {"type": "duration", "seconds": round(duration, 3)}
    yield as_event({"type": "transcript.text.done", "text": transcript.text, "usage": usage})


def as_event(values: Mapping[str, Any]) -> str:
    """Format a server-sent event; its `type`, if any, is also the event's name."""
    name = f"event: {values['type']}\n" if "type" in values else ""
    return f"{name}data: {_json(values)}\n\n"


def _json(values: Mapping[str, Any]) -> str:
    # An event's data must be on one line. It is, because json writes a line break in a text as \n.
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))
