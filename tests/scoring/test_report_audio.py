"""Audio on the report's page: whatever there is room for, the worst first, and the sound stays what it is."""

import base64
import io

import numpy as np
import soundfile

from slam_asr.audio import SAMPLE_RATE, AudioError
from slam_asr.scoring.metrics import measure
from slam_asr.scoring.report_audio import compress, encode_audio, read_audio, worst_first, write_audio
from slam_asr.scoring.wer import Hypothesis
from tests.conftest import make_tone


def test_what_is_compressed_sounds_the_same():
    tone = make_tone(2, frequency=440).astype(np.float32)
    content = compress(tone)
    assert len(content) < 0.2 * 2 * len(tone)
    played, rate = soundfile.read(io.BytesIO(content))
    assert rate == SAMPLE_RATE and abs(len(played) - len(tone)) < 0.2 * SAMPLE_RATE
    spectrum = np.abs(np.fft.rfft(played))
    assert abs(spectrum.argmax() * rate / len(played) - 440) < 2


def test_the_room_is_kept_and_what_cannot_be_read_is_said(capsys, tmp_path):
    def load(name):
        if name[0] == "gone":
            raise AudioError("gone.wav is not there.")
        return make_tone(1).astype(np.float32)

    names = [("a", "s"), ("gone", "s"), *((f"b{n}", "s") for n in range(50))]
    heard = encode_audio(names, load, megabytes=0.02)
    assert list(heard) == [name for name in names if name[0] != "gone"][: len(heard)]
    assert 1 < len(heard) < 50 and sum(map(len, heard.values())) <= 20_000
    assert "cannot play gone" in capsys.readouterr().out
    write_audio(tmp_path, heard)
    assert read_audio([tmp_path / "audio.jsonl"]) == heard
    assert base64.b64decode(heard["a", "s"])[:1] == b"\xff"


def test_the_worst_come_first():
    rows = [
        Hypothesis("a", "one two", "one two"),
        Hypothesis("b", "one two three", ""),
        Hypothesis("c", "one two", ""),
    ]
    assert [rows[i].key for i in worst_first(measure(rows))] == ["b", "c", "a"]
