"""The report embeds as much audio as fits, worst utterances first; compression preserves the sound."""

import base64
import io

import numpy as np
import soundfile

from slam_asr.artifacts.hypotheses import Hypothesis
from slam_asr.artifacts.word_errors import measure
from slam_asr.audio import SAMPLE_RATE, AudioError
from slam_asr.scoring.report_audio import compress, encode_audio, read_audio, worst_first, write_audio
from tests.conftest import make_tone


def test_compressed_audio_sounds_the_same():
    tone = make_tone(2, frequency=440).astype(np.float32)
    content = compress(tone)
    pcm_bytes = 2 * len(tone)
    assert len(content) < 0.2 * pcm_bytes
    played, rate = soundfile.read(io.BytesIO(content))
    assert rate == SAMPLE_RATE and abs(len(played) - len(tone)) < 0.2 * SAMPLE_RATE
    spectrum = np.abs(np.fft.rfft(played))
    assert abs(spectrum.argmax() * rate / len(played) - 440) < 2


def test_the_size_limit_holds_and_unreadable_audio_is_logged(capsys, tmp_path):
    def load(name):
        if name[0] == "gone":
            raise AudioError("gone.wav does not exist.")
        return make_tone(1).astype(np.float32)

    names = [("a", "s"), ("gone", "s"), *((f"b{n}", "s") for n in range(50))]
    encoded = encode_audio(names, load, megabytes=0.02)
    assert list(encoded) == [name for name in names if name[0] != "gone"][: len(encoded)]
    assert 1 < len(encoded) < 50 and sum(map(len, encoded.values())) <= 20_000
    assert "cannot play gone" in capsys.readouterr().out
    write_audio(tmp_path, encoded)
    assert read_audio([tmp_path / "audio.jsonl"]) == encoded
    assert base64.b64decode(encoded["a", "s"])[:1] == b"\xff"


def test_the_worst_utterances_come_first():
    rows = [
        Hypothesis("a", "one two", "one two"),
        Hypothesis("b", "one two three", ""),
        Hypothesis("c", "one two", ""),
    ]
    assert [rows[i].key for i in worst_first(measure(rows))] == ["b", "c", "a"]
