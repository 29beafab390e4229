"""`slam-asr transcribe` and its Python interface, with short, long and unreadable recordings."""

import json
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from slam_asr.artifacts.hypotheses import read_hypotheses
from slam_asr.artifacts.shipped import default_model
from slam_asr.audio import load_audio
from slam_asr.cli import main
from slam_asr.config.recipe import load_recipe
from slam_asr.decoding.model import open_model
from slam_asr.decoding.transcriber import load_transcriber
from slam_asr.models.searcher import Searcher
from slam_asr.stages.decode import decode
from slam_asr.stages.transcribe import transcribe
from tests.conftest import make_tone, write_wav
from tests.media import encoded


def test_texts_equal_those_of_the_decode_stage(model, tiny_recipe, tmp_path):
    """The tiny models' texts depend little on the audio, so another test compares the model's inputs."""
    recipe = load_recipe(str(tiny_recipe), {"features.cache": "none"})
    clip = write_wav(tmp_path / "a.wav", make_tone(2, frequency=500))
    (tmp_path / "test.jsonl").write_text(json.dumps({"key": "a", "source": str(clip), "target": "x"}) + "\n")
    decoded = decode(recipe, model, [str(tmp_path / "test.jsonl")], str(tmp_path / "d"))
    (transcript,) = transcribe(recipe, [str(clip)], model)
    assert [h.hypothesis for h in read_hypotheses(decoded.file("hypotheses.jsonl"))] == [transcript.text]


def test_the_python_interface_transcribes_one_file_or_several(model, tmp_path, capsys):
    files = [
        str(write_wav(tmp_path / f"{seconds}.wav", make_tone(seconds, frequency=300 * seconds)))
        for seconds in (1, 2)
    ]
    transcriber = load_transcriber(model)
    transcripts = list(transcriber.transcribe_files(files))
    assert [(t.file, t.duration) for t in transcripts] == [(files[0], 1.0), (files[1], 2.0)]
    assert transcriber.transcribe(files[0]).text == transcripts[0].text
    assert capsys.readouterr().out == ""


def test_importing_the_python_interface_does_not_import_torch():
    program = "import sys, slam_asr.decoding.transcriber; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_model_gets_each_segment_and_nothing_else(model, tiny_recipe, tmp_path, monkeypatch):
    recipe = load_recipe(str(tiny_recipe))
    tones = [make_tone(3, frequency=f) for f in (300, 500, 800)]
    quiet = np.zeros(16_000, np.float32)
    recording = write_wav(
        tmp_path / "long.wav", np.concatenate([x for tone in tones for x in (tone, quiet)]), subtype="FLOAT"
    )
    inputs = []
    decode_batch = Searcher.decode
    monkeypatch.setattr(
        Searcher,
        "decode",
        lambda self, audio, positions: inputs.extend(audio) or decode_batch(self, audio, positions),
    )
    (transcript,) = transcribe(recipe, [str(recording)], model, longest=5)
    prepare = open_model(model).spec.preparer()
    samples = load_audio(recording)
    expected = [
        prepare(samples[round(s.start * 16_000) : round(s.end * 16_000)]).inputs[0]
        for s in transcript.segments
    ]
    assert len(inputs) == len(expected) == 3
    for audio in inputs:
        assert any(audio.inputs[0].shape == e.shape and torch.equal(audio.inputs[0], e) for e in expected)


def test_a_long_recording_has_segments_where_there_is_sound(model, tiny_recipe, tmp_path):
    quiet = np.zeros(16_000, np.float32)
    samples = np.concatenate([x for f in (300, 500, 800, 1200) for x in (make_tone(3, frequency=f), quiet)])
    (transcript,) = transcribe(
        load_recipe(str(tiny_recipe)), [str(write_wav(tmp_path / "long.wav", samples))], model, longest=5
    )
    assert transcript.duration == 16
    assert [(round(s.start), round(s.end)) for s in transcript.segments] == [
        (0, 3),
        (4, 7),
        (8, 11),
        (12, 15),
    ]


def test_standard_output_has_transcripts_only(model, tmp_path, capsys):
    first, second = (
        str(write_wav(tmp_path / f"{name}.flac", make_tone(2, frequency=f)))
        for name, f in (("a", 300), ("b", 700))
    )
    main(
        ["transcribe", first, second, "--model", model, "--format", "json", "--decoding.max-new-tokens", "3"]
    )
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["file"] for row in rows] == [first, second]
    assert "models:" in printed.err and "note:" not in printed.err
    main(["transcribe", model, first, second, "--format", "json", "--decoding.max-new-tokens", "3"])
    in_old_spelling = capsys.readouterr()
    assert in_old_spelling.out == printed.out
    assert "note: a model before the files is now spelled --model MODEL" in in_old_spelling.err


def test_transcript_files_are_named_after_the_recordings(model, tmp_path):
    files = [
        str(write_wav(tmp_path / name, make_tone(2, rate, 400, channels), rate))
        for name, rate, channels in (("a.wav", 44_100, 2), ("b c.opus", 48_000, 1))
    ]
    main(["transcribe", *files, "--model", model, "--format", "srt", "--output", str(tmp_path / "out")])
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"a.srt", "b c.srt"}


def test_silence_has_an_empty_transcript(model, tmp_path, capsys):
    main(["transcribe", model, str(write_wav(tmp_path / "a.wav", np.zeros(16_000 * 3, np.float32)))])
    assert capsys.readouterr().out == "\n"


@pytest.mark.real_input("B03-float-at-int16-scale")
def test_unusable_channels_are_refused_and_mixing_and_silence_are_logged(model, tmp_path, capsys):
    tone = make_tone(1.0)
    sounds = {
        "mixed": [tone, 0.5 * tone],
        "inverted": [tone, -tone],
        "silent": [0 * tone],
        "scaled": [9 * tone],
    }
    for name, channels in sounds.items():
        write_wav(tmp_path / f"{name}.wav", np.stack(channels, axis=1), subtype="FLOAT")
    with pytest.raises(SystemExit) as ended:
        main(["transcribe", model, *(str(tmp_path / f"{name}.wav") for name in sounds), "--format", "json"])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert [json.loads(line)["file"].rpartition("/")[2] for line in printed.out.splitlines()] == [
        "mixed.wav",
        "silent.wav",
    ]
    assert "2 of 4 files could not be read" in printed.err
    assert "error: The 2 channels of" in printed.err and "cancel each other" in printed.err
    assert "scaled.wav has samples up to 4.5, but full scale is 1" in printed.err
    assert "the 2 channels of" in printed.err and "mixed.wav are averaged" in printed.err
    assert "silent.wav holds no signal" in printed.err


def test_a_damaged_file_does_not_affect_the_others(model, tmp_path, capsys):
    good = write_wav(tmp_path / "good.flac", make_tone(2))
    broken = tmp_path / "broken.flac"
    content = good.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit) as ended:
        main(["transcribe", model, str(broken), str(good), "--format", "json"])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and json.loads(printed.out)["file"] == str(good)
    assert "1 of 2 files could not be read, first" in printed.err and "Traceback" not in printed.err


@pytest.mark.real_input("B33-small e")
def test_no_other_file_is_mentioned_if_there_is_none(model, tmp_path, capsys):
    broken = write_wav(tmp_path / "broken.flac", make_tone(2))
    broken.write_bytes(broken.read_bytes()[:-2000])
    with pytest.raises(SystemExit) as ended:
        main(["transcribe", model, str(broken)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"1 of 1 files could not be read, first {broken}.\n")


@pytest.mark.real_input("B33-small e")
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{model}"], "No file to transcribe|Missing: FILES…"),
        (["{model}", "nowhere.wav"], "There is no audio file nowhere.wav: check the path\\.$"),
        (["{model}", "{text}"], "cannot be read as wav, flac, ogg, opus, mp3, m4a, webm or another usual"),
        (["{model}", "{wav}", "--longest", "0"], "--longest is 0 s but must be at least 1"),
        (["{model}", "{wav}", "{wav2}", "--format", "srt"], "name a folder with --output"),
        (["{model}", "{wav}", "{wav}", "--output", "{out}"], "Two files would be written to"),
        (["{out}", "{wav}"], "is a folder and holds no model"),
        (
            ["whisper-tiny", "{wav}"],
            "There is no audio file whisper-tiny; did you mean whisper-tiny.en-smoll",
        ),
        ([], "Missing"),
    ],
)
def test_bad_input_is_refused_before_weights_are_loaded(
    model, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.setattr("slam_asr.decoding.model.Model.load", None)
    (tmp_path / "text.wav").write_text("no audio")
    values = {
        "model": model,
        "wav": write_wav(tmp_path / "a.wav"),
        "wav2": write_wav(tmp_path / "b.wav"),
        "text": tmp_path / "text.wav",
        "out": tmp_path,
    }
    with pytest.raises(SystemExit) as ended:
        main(["transcribe", *(a.format(**values) for a in arguments)])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and re.search(message, printed.err) and "Traceback" not in printed.err
    assert printed.out == ""


SHIPPED = default_model()


def test_recordings_of_a_phone_and_a_browser_are_transcribed_and_damaged_ones_named(model, tmp_path, capsys):
    tone = make_tone(2, 48_000, 400)[:, None]
    files = [tmp_path / name for name in ("phone.mp4", "browser.webm", "cut.webm", "sound.wav")]
    for file, name in zip(files, ("mp4", "webm without length", "webm", "webm"), strict=True):
        file.write_bytes(encoded(name, tone, picture=name == "mp4"))
    files[2].write_bytes(files[2].read_bytes()[:-1000])
    with pytest.raises(SystemExit) as ended:
        main(["transcribe", *map(str, files), "--model", model, "--format", "json"])
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert ended.value.code == 2 and [row["file"] for row in rows] == [str(files[i]) for i in (0, 1, 3)]
    assert [row["duration"] for row in rows] == pytest.approx([2.0] * 3, abs=0.001)
    assert "cut.webm ends too early" in printed.err and "Traceback" not in printed.err


@pytest.mark.slow
def test_the_shipped_model_transcribes_real_speech_of_any_length(demo_models, libri_mini, tmp_path, capsys):
    """For short clips, far more words are right than by chance; in one long file, at least some are."""
    import soundfile

    from slam_asr.artifacts.hypotheses import Hypothesis
    from slam_asr.artifacts.word_errors import measure

    clips, spoken = [], []
    for transcript in sorted(libri_mini.glob("train-clean-100/*/*/*.trans.txt"))[:3]:
        for line in transcript.read_text().splitlines()[:2]:
            key, text = line.split(" ", 1)
            clips.append(transcript.parent / f"{key}.flac")
            spoken.append(text.lower())
    single = transcribe(load_recipe(SHIPPED), [str(c) for c in clips])
    matched = measure(
        [Hypothesis(str(i), text, t.text) for i, (text, t) in enumerate(zip(spoken, single, strict=True))]
    ).total()
    mismatched = measure(
        [
            Hypothesis(str(i), text, t.text)
            for i, (text, t) in enumerate(zip(spoken, single[1:] + single[:1], strict=True))
        ]
    ).total()
    assert matched.wer < 0.75 and matched.hits > 3 * mismatched.hits
    pause = np.zeros(16_000, np.float32)
    soundfile.write(
        tmp_path / "long.flac", np.concatenate([x for c in clips for x in (load_audio(c), pause)]), 16_000
    )
    main(["transcribe", str(tmp_path / "long.flac"), "--format", "json"])
    line = capsys.readouterr().out.splitlines()[-1]
    segments = json.loads(line)["segments"]
    assert len(segments) >= 3 and all(a["end"] <= b["start"] for a, b in pairwise(segments))
    together = measure([Hypothesis("long", " ".join(spoken), json.loads(line)["text"])]).total()
    assert together.wer < 0.85
