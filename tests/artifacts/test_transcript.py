"""Transcripts keep their text and times in each format: text, JSON, SubRip and WebVTT."""

import itertools
import json
import re

import pytest

from slam_asr.artifacts.transcript import COLUMNS, Segment, Transcript, as_json, as_srt, as_text, as_vtt

LONG = (
    "it was the best of times it was the worst of times "
    "it was the age of wisdom it was the age of foolishness"
)
TRANSCRIPT = Transcript(
    "a/b.wav",
    3725.5,
    [Segment(0.25, 2.5, "hello there"), Segment(3, 4, ""), Segment(3700.0, 3710.5, LONG, cut=True)],
)


def test_text_is_one_line_without_empty_segments():
    assert as_text(TRANSCRIPT) == f"hello there {LONG}\n"
    assert as_text(Transcript("silence.wav", 3.0)) == "\n"


@pytest.mark.real_input("B33-small d")
def test_line_breaks_that_a_model_wrote_do_not_break_the_line():
    assert as_text(Transcript("a.wav", 1.0, [Segment(0, 1, "one\ntwo\r\n three")])) == "one two three\n"


def test_json_is_one_line_with_all_fields():
    written = as_json(TRANSCRIPT)
    assert written.count("\n") == 1
    values = json.loads(written)
    assert (
        values["file"] == "a/b.wav"
        and values["duration"] == 3725.5
        and values["text"] == f"hello there {LONG}"
    )
    assert values["segments"][2] == {"start": 3700.0, "end": 3710.5, "text": LONG, "cut": True}


def test_subtitles_are_numbered_timed_and_fit_the_screen():
    blocks = as_srt(TRANSCRIPT).strip().split("\n\n")
    assert [block.split("\n")[0] for block in blocks] == [str(n + 1) for n in range(len(blocks))]
    assert blocks[0] == "1\n00:00:00,250 --> 00:00:02,500\nhello there"
    times = [
        re.match(
            r"(\d\d):(\d\d):(\d\d),(\d\d\d) --> (\d\d):(\d\d):(\d\d),(\d\d\d)$", block.split("\n")[1]
        ).groups()
        for block in blocks
    ]
    seconds = [
        [int(t[0]) * 3600 + int(t[1]) * 60 + int(t[2]) + int(t[3]) / 1000 for t in (time[:4], time[4:])]
        for time in times
    ]
    assert all(start < end for start, end in seconds)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(seconds))
    assert seconds[1][0] == 3700.0 and seconds[-1][1] == 3710.5
    lines = [block.split("\n")[2:] for block in blocks]
    assert all(len(line) <= COLUMNS for block in lines for line in block) and all(
        len(block) <= 2 for block in lines
    )
    assert " ".join(" ".join(block) for block in lines[1:]) == LONG


def test_webvtt_has_the_times_of_subrip_and_escapes_markup():
    blocks = as_vtt(TRANSCRIPT).split("\n\n")
    assert blocks[0] == "WEBVTT" and blocks[1] == "00:00:00.250 --> 00:00:02.500\nhello there"
    times = [block.split("\n")[1] for block in as_srt(TRANSCRIPT).strip().split("\n\n")]
    assert [block.split("\n")[0] for block in blocks[1:]] == [time.replace(",", ".") for time in times]
    spoken = as_vtt(Transcript("a.wav", 1.0, [Segment(0, 1, "a <b> & c --> d")]))
    assert spoken.endswith("\na &lt;b&gt; &amp; c --&gt; d\n")
