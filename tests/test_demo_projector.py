"""The demo's script for training speech: joined and disturbed speech keeps its words and its length."""

import importlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DEMO = Path(__file__).resolve().parents[1] / "demo"


@pytest.fixture
def script(monkeypatch):
    """Import a script of the demo folder by name."""
    monkeypatch.syspath_prepend(str(DEMO))
    yield importlib.import_module
    for name in ("make_training_speech", "make_speech"):
        sys.modules.pop(name, None)


def test_joined_speech_keeps_all_words_in_order_and_its_length(script):
    speech = script("make_training_speech")
    rng = np.random.default_rng(0)
    excerpts = [rng.standard_normal(round(16_000 * s)).astype(np.float32) for s in rng.uniform(0.5, 9, 15)]
    texts = [f"TEXT {n}" for n in range(15)]
    joined = list(speech.join(excerpts, texts, speech.JOINED, random.Random(3)))
    assert " ".join(text for text, _ in joined) == " ".join(texts)
    assert 1 < len(joined) < 15
    pauses = sum(len(samples) for _, samples in joined) - sum(map(len, excerpts))
    assert (
        speech.PAUSE[0] * 16_000 * (15 - len(joined))
        <= pauses
        <= speech.PAUSE[1] * 16_000 * (15 - len(joined))
    )
    assert max(len(samples) for _, samples in joined) <= speech.JOINED[1] * 16_000


def test_augmented_speech_has_its_length_and_resembles_the_original(script):
    speech = script("make_training_speech")
    tone = np.sin(np.arange(32_000) / 10).astype(np.float32)
    assert len(speech.at_speed(tone, 1.1)) == pytest.approx(32_000 / 1.1, abs=2)
    for seed in range(20):
        disturbed = speech.disturb(tone, np.random.default_rng(seed))
        assert disturbed.shape == tone.shape and disturbed.dtype == np.float32
        assert 0.05 < np.abs(disturbed).max() <= 0.91
        assert abs(np.corrcoef(disturbed, tone)[0, 1]) > 0.5


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("make_training_speech", ["--text", "nowhere.txt", "--out", "{out}"], "there is no file nowhere.txt"),
        (
            "make_training_speech",
            ["--text", "{empty}", "--out", "{out}", "--voices", "0"],
            "has no line `<key> TEXT`",
        ),
        ("make_training_speech", ["--text", "{empty}", "--out", "{existing}"], "exists already"),
        (
            "make_training_speech",
            ["--text", "{empty}", "--out", "{out}", "--real", "{existing}"],
            "holds no .trans.txt",
        ),
    ],
)
def test_bad_input_gives_a_one_line_error_and_leaves_no_files(tmp_path, name, arguments, expected):
    (tmp_path / "empty").write_text("")
    (tmp_path / "existing").mkdir()
    paths = {key: tmp_path / key for key in ("out", "empty", "existing")}
    done = subprocess.run(
        [sys.executable, DEMO / f"{name}.py", *(a.format(**paths) for a in arguments)],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2 and expected in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "out").exists()
