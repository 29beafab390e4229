"""Speech by one fast voice has utterances of the planned lengths, and a repeated command continues.

The synthesiser itself is not installed here; a tone of the text's length stands for its audio.
"""

import numpy as np
import pytest
import soundfile

from demo import fast_speech


@pytest.fixture
def text(tmp_path):
    """Write 30 chapters of eight lines with 3 to 40 words; no word occurs twice."""
    lines, word = [], 0
    for chapter in range(30):
        for number, length in enumerate((12, 30, 8, 40, 3, 25, 5, 19)):
            words = ["".join("abcdefghij"[int(digit)] for digit in str(word + n)) for n in range(length)]
            word += length
            lines.append(f"7-{chapter}-{number:04d} {' '.join(words).upper()}\n")
    path = tmp_path / "text.txt"
    path.write_text("".join(lines))
    return path


def tone(text: str, speed: float, seed: int) -> np.ndarray:
    seconds = len(text.split()) / 2.7 / speed
    return 0.3 * np.sin(np.arange(round(24_000 * seconds)) * 0.05).astype(np.float32)


def test_utterances_join_successive_lines_of_one_chapter(text):
    chapters = {}
    for line in text.read_text().splitlines():
        key, _, words = line.partition(" ")
        chapters.setdefault(key.rpartition("-")[0], []).append(words.lower())
    texts = fast_speech.utterances(text, 100, 1)
    assert all(20 <= len(" ".join(lines).split()) <= 62 for lines in texts)
    spoken = [word for lines in texts for word in " ".join(lines).split()]
    assert len(spoken) == len(set(spoken)) and len(spoken) > 0.8 * sum(len(c.split()) for c in text.open())
    for lines in texts:
        (chapter,) = (own for own in chapters.values() if lines[0] in own)
        start = chapter.index(lines[0])
        assert chapter[start : start + len(lines)] == lines
    fewer = fast_speech.utterances(text, 0.1, 1)
    assert fewer == texts[: len(fewer)] and 0 < len(fewer) < len(texts)
    assert fast_speech.utterances(text, 100, 2) != texts


def test_a_speakers_files_are_the_same_each_time_and_are_not_written_twice(text, tmp_path, monkeypatch):
    monkeypatch.setattr(fast_speech, "VOICE", [tone])
    texts = fast_speech.utterances(text, 1, 1)[:3]
    for name in ("first", "second"):
        assert fast_speech.speak(tmp_path / name, (4, texts)) > 3 * 3
    first, second = (sorted((tmp_path / name).rglob("*.flac")) for name in ("first", "second"))
    assert [file.name for file in first] == [f"400005-1-{n:04d}.flac" for n in range(3)]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(soundfile.read(one)[0], soundfile.read(other)[0])
    transcript = tmp_path / "first" / "400005" / "1" / "400005-1.trans.txt"
    assert transcript.read_text().splitlines()[1] == f"400005-1-0001 {' '.join(texts[1]).upper()}"
    monkeypatch.setattr(fast_speech, "VOICE", [])
    assert fast_speech.speak(tmp_path / "first", (4, texts)) == 0


def test_speech_longer_than_whispers_window_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(fast_speech, "VOICE", [tone])
    long = ["a " * 62] * 3
    assert fast_speech.speak(tmp_path, (0, [long])) == 0
    assert not list(tmp_path.rglob("*.flac"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--text nowhere.txt --hours 1", "there is no file nowhere.txt: give one"),
        ("--text {empty} --hours 1", "gives no text of 20 to 62 words in a chapter"),
        ("--text {text} --hours 0", "--hours 0.0 is not positive"),
        ("--text {text} --hours 1", "the package hibari-tts is missing: install what demo/README.md names"),
    ],
)
def test_bad_input_gives_a_one_line_error(text, tmp_path, capsys, monkeypatch, arguments, expected):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "empty").write_text("no transcript\n")
    paths = {"text": text, "empty": tmp_path / "empty"}
    with pytest.raises(SystemExit) as stopped:
        fast_speech.main(f"{arguments} --out {tmp_path / 'out'}".format(**paths).split())
    assert stopped.value.code == 2 and expected in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
