"""The channel that a corpus names is used, and audio without a usable signal is rejected with its reason."""

import json

import numpy as np
import pytest

from slam_asr.artifacts.manifest import read_manifest
from slam_asr.artifacts.utterances import load_utterance
from slam_asr.config.recipe import Data, load_recipe
from slam_asr.corpora.audio_check import Checked, check_all
from slam_asr.corpora.detection import open_corpus
from slam_asr.errors import UserError
from slam_asr.stages.build_manifest import build_manifest
from tests.conftest import make_tone, write_wav


def read_all(root):
    corpus = open_corpus(str(root), Data())
    return [item for subset in corpus.subsets() for item in corpus.read(subset)]


def recipe(**data):
    return load_recipe("librispeech", {f"data.{name}": value for name, value in data.items()})


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def kaldi_with_two_channels(folder, segments="", channels=""):
    """Write a data folder with a recording whose channels have tones of 300 Hz and 700 Hz."""
    sound = np.stack([make_tone(2.0, frequency=300), make_tone(2.0, frequency=700)], axis=1)
    write_wav(folder / "rec.wav", sound)
    write_wav(folder / "mono.wav", sound[:, 1])
    write_text(folder / "wav.scp", "r rec.wav\nq rec.wav\nm mono.wav\n")
    keys = [line.split()[0] for line in segments.splitlines()] or ["r", "q", "m"]
    write_text(folder / "text", "".join(f"{key} {key}\n" for key in keys))
    for name, content in (("segments", segments), ("reco2file_and_channel", channels)):
        if content:
            write_text(folder / name, content)


def checked_by_key(folder):
    results = check_all(read_all(folder), Data(), "test")
    return {r.utterance.key if isinstance(r, Checked) else r.key: r for r in results}


def frequency_of(checked):
    samples = load_utterance(checked.utterance)
    spectrum = np.abs(np.fft.rfft(samples))
    return round(np.argmax(spectrum) * 16_000 / len(samples))


@pytest.mark.real_input("B12-kaldi-channel")
def test_a_segment_is_read_from_the_channel_that_it_names(tmp_path):
    kaldi_with_two_channels(
        tmp_path, "a r 0 1 0\nb r 0 1 1\nc r 0 1 2\nboth r 0 1\nopen r 0 1 -1\nd m 0 1 0\ne m 0 1 1\n"
    )
    found = checked_by_key(tmp_path)
    assert [frequency_of(found[key]) for key in "abd"] == [300, 700, 700]
    assert [found[key].utterance.audio_channel for key in ("a", "b", "d", "both", "open")] == [
        0,
        1,
        None,
        None,
        None,
    ]
    assert len({found[key].utterance.audio_id for key in ("a", "b", "both")}) == 3
    assert {found["c"].reason, found["e"].reason} == {"no such channel"}


def test_a_recording_is_read_from_the_channel_in_reco2file_and_channel(tmp_path):
    # `m` is listed as channel B, but its file has only one channel, which is then used.
    kaldi_with_two_channels(tmp_path / "x", channels="r call A\nq call 2\nm call B\nnone call B\n")
    found = checked_by_key(tmp_path / "x")
    assert {key: frequency_of(checked) for key, checked in found.items()} == {"r": 300, "q": 700, "m": 700}
    assert found["m"].utterance.audio_channel is None
    kaldi_with_two_channels(tmp_path / "y", "a r 0 1\nb q 0 1\nc r 0 1 1\n", "r call A\nq call B\n")
    found = checked_by_key(tmp_path / "y")
    assert {key: frequency_of(checked) for key, checked in found.items()} == {"a": 300, "b": 700, "c": 700}


def test_the_channel_is_in_the_manifest_and_averaging_channels_is_logged(tmp_path, capsys):
    kaldi_with_two_channels(tmp_path / "data" / "test", "a r 0 1 1\nb q 0 1\nc q 1 2\n")
    settings = recipe(train=[], dev=[], test=["test"])
    build_manifest(settings, str(tmp_path / "data"), str(tmp_path / "out"))
    first, second, _ = read_manifest(tmp_path / "out" / "test.jsonl")
    assert (first.audio_channel, second.audio_channel) == (1, None)
    assert len(load_utterance(first)) == 16_000
    assert "the channels of 2 utterances are averaged" in capsys.readouterr().out


def test_json_lines_are_read_from_the_channel_that_they_name(tmp_path):
    sound = np.stack([make_tone(1.0, frequency=300), make_tone(1.0, frequency=700)], axis=1)
    write_wav(tmp_path / "rec.wav", sound)
    line = {"key": "a", "source": "rec.wav", "target": "a", "audio_channel": 1}
    write_text(tmp_path / "test.jsonl", json.dumps(line))
    (checked,) = checked_by_key(tmp_path).values()
    assert (checked.utterance.audio_channel, frequency_of(checked)) == (1, 700)


def test_a_tables_audio_channel_column_is_not_copied_to_the_manifest(tmp_path):
    write_wav(tmp_path / "data" / "a.wav", make_tone(1.0))
    write_text(tmp_path / "data" / "test.csv", "audio,text,audio_channel\na.wav,one,left\n")
    build_manifest(recipe(train=[], dev=[], test=["test"]), str(tmp_path / "data"), str(tmp_path / "out"))
    (utterance,) = read_manifest(tmp_path / "out" / "test.jsonl")
    assert utterance.audio_channel is None and "audio_channel" not in utterance.extra


@pytest.mark.parametrize("channel", ["A", "-2", "1.5"])
def test_the_error_for_an_invalid_channel_names_its_line(tmp_path, channel):
    kaldi_with_two_channels(tmp_path, f"ok r 0 1 1\na r 0 1 {channel}\n")
    with pytest.raises(UserError, match=r"segments, line 2 must be .*a channel, counted from 0, may follow"):
        read_all(tmp_path)


@pytest.mark.real_input("B03-float-at-int16-scale")
def test_audio_without_a_usable_signal_is_rejected_with_its_reason(tmp_path):
    sounds = {
        "good": make_tone(1.0),
        "scaled": 32_768 * make_tone(1.0),
        "silent": np.zeros(16_000, np.float32),
        "inverted": np.stack([make_tone(1.0), -make_tone(1.0)], axis=1),
    }
    lines = []
    for name, samples in sounds.items():
        write_wav(tmp_path / f"{name}.wav", samples, subtype="FLOAT")
        lines.append(json.dumps({"key": name, "source": f"{name}.wav", "target": "x", "subset": "test"}))
    write_text(tmp_path / "all.jsonl", "\n".join(lines))
    settings = recipe(train=[], dev=[], test=["test"], max_rejected=0.9)
    build_manifest(settings, str(tmp_path / "all.jsonl"), str(tmp_path / "out"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert {row["key"]: row["reason"] for row in rows} == {
        "scaled": "samples far above full scale",
        "silent": "digital silence",
        "inverted": "channels that cancel each other",
    }
    [detail] = [row["detail"] for row in rows if row["key"] == "silent"]
    assert "silent.wav have the same value" in detail
