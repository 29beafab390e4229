"""`slam-asr transcribe`: what it prints and writes, for short and long recordings and for those that cannot be read."""

import json
import re

import numpy as np
import pytest
import torch

from slam_asr.audio import count_samples, load_audio
from slam_asr.cli import main
from slam_asr.conversion.convert import convert_checkpoint
from slam_asr.decoding.decode import decode
from slam_asr.models.projector import build_projector
from slam_asr.recipe import load_recipe
from slam_asr.scoring.wer import read_hypotheses
from slam_asr.transcribing.transcribe import transcribe
from tests.conftest import make_tone, write_wav

SHIPPED = "whisper-tiny.en-smollm2-135m"


@pytest.fixture(scope="module")
def model(tiny_recipe, tmp_path_factory) -> str:
    """A model whose projector has random weights: what it writes means nothing, but hangs on what it hears."""
    folder = tmp_path_factory.mktemp("model")
    recipe = load_recipe(str(tiny_recipe))
    weights = build_projector(recipe.projector, 16, 16, seed=3).state_dict()
    torch.save({f"encoder_projector.{n}": 30 * t for n, t in weights.items()}, folder / "model.pt")
    return convert_checkpoint(str(folder / "model.pt"), str(folder / "model"), recipe=recipe).folder


@pytest.mark.slow
def test_clips_and_what_is_made_of_them_have_the_texts_that_decoding_gives(libri_mini, tmp_path):
    """Real speech through the shipped projector: clips, and one recording of all of them with pauses between."""
    files = sorted(libri_mini.glob("test-other/*/*/*.flac"), key=lambda f: f.stat().st_size)[:4]
    rows = [{"key": f.stem, "source": str(f), "target": "unknown"} for f in files]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe("librispeech", {"features.cache": "none"})
    decoded = decode(recipe, SHIPPED, [str(tmp_path / "test.jsonl")], str(tmp_path / "d"))
    texts = {h.key: h.hypothesis for h in read_hypotheses(decoded.file("hypotheses.jsonl"))}
    assert len(set(texts.values())) == len(files)
    # Without the quiet at both ends, which transcribing leaves out, a word may come out otherwise.
    transcripts = transcribe(recipe, SHIPPED, [str(f) for f in files])
    assert sum(t.text == texts[f.stem] for f, t in zip(files, transcripts, strict=True)) >= len(files) // 2
    pause = np.zeros(16_000, np.float32)
    longest = max(count_samples(f) for f in files) / 16_000
    samples = np.concatenate([x for f in files for x in (load_audio(f), pause)])
    (whole,) = transcribe(recipe, SHIPPED, [str(write_wav(tmp_path / "long.wav", samples, subtype="FLOAT"))], longest=longest + 0.5)
    for segment in whole.segments:
        part = write_wav(tmp_path / "part.wav", samples[round(segment.start * 16_000) : round(segment.end * 16_000)], subtype="FLOAT")
        (alone,) = transcribe(recipe, SHIPPED, [str(part)])
        assert alone.text == segment.text
    assert whole.text == " ".join(s.text for s in whole.segments if s.text)


def test_a_long_recording_has_segments_where_there_is_sound(model, tiny_recipe, tmp_path):
    quiet = np.zeros(16_000, np.float32)
    samples = np.concatenate([x for f in (300, 500, 800, 1200) for x in (make_tone(3, frequency=f), quiet)])
    (transcript,) = transcribe(load_recipe(str(tiny_recipe)), model, [str(write_wav(tmp_path / "long.wav", samples))], longest=5)
    assert transcript.duration == 16
    assert [(round(s.start), round(s.end)) for s in transcript.segments] == [(0, 3), (4, 7), (8, 11), (12, 15)]


def test_what_is_printed_is_the_transcripts_alone(model, tmp_path, capsys):
    first, second = (str(write_wav(tmp_path / f"{name}.flac", make_tone(2, frequency=f))) for name, f in (("a", 300), ("b", 700)))
    main(["transcribe", model, first, second, "--format", "json", "--decoding.max-new-tokens", "3"])
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["file"] for row in rows] == [first, second]
    assert "models:" in printed.err


def test_files_are_written_beside_the_recordings_names(model, tmp_path):
    files = [str(write_wav(tmp_path / name, make_tone(2, rate, 400, channels), rate)) for name, rate, channels in (("a.wav", 44_100, 2), ("b c.opus", 48_000, 1))]
    main(["transcribe", model, *files, "--format", "srt", "--output", str(tmp_path / "out")])
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"a.srt", "b c.srt"}


def test_silence_has_an_empty_text(model, tmp_path, capsys):
    main(["transcribe", model, str(write_wav(tmp_path / "a.wav", np.zeros(16_000 * 3, np.float32)))])
    assert capsys.readouterr().out == "\n"


def test_a_damaged_file_costs_the_others_nothing(model, tmp_path, capsys):
    good = write_wav(tmp_path / "good.flac", make_tone(2))
    broken = tmp_path / "broken.flac"
    content = good.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit) as ended:
        main(["transcribe", model, str(broken), str(good), "--format", "json"])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and json.loads(printed.out)["file"] == str(good)
    assert "1 of 2 files could not be read, first" in printed.err and "Traceback" not in printed.err


@pytest.mark.parametrize("arguments, said", [
    (["{model}"], "no file to transcribe|Missing: --files"),
    (["{model}", "nowhere.wav"], "There is no audio file nowhere.wav"),
    (["{model}", "{text}"], "cannot be read as wav, flac, ogg, opus or mp3"),
    (["{model}", "{wav}", "--longest", "0"], "--longest is 0 s but must be at least 1"),
    (["{model}", "{wav}", "{wav2}", "--format", "srt"], "name a folder with --output"),
    (["{model}", "{wav}", "{wav}", "--output", "{out}"], "Two files would be written to"),
    (["{out}", "{wav}"], "holds no model"),
    ([], "Missing"),
])  # fmt: skip
def test_bad_input_is_one_sentence_before_anything_is_loaded(model, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("slam_asr.decoding.model.Model.load", None)
    (tmp_path / "text.wav").write_text("no audio")
    given = {"model": model, "wav": write_wav(tmp_path / "a.wav"), "wav2": write_wav(tmp_path / "b.wav"), "text": tmp_path / "text.wav", "out": tmp_path}
    with pytest.raises(SystemExit) as ended:
        main(["transcribe", *(a.format(**given) for a in arguments)])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and re.search(said, printed.err) and "Traceback" not in printed.err
    assert printed.out == ""
