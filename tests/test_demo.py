"""The demo's model uses its audio: its word error rate is far below those of its controls."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_demo_is_far_better_than_its_controls(tmp_path):
    command = [sys.executable, "-m", "pipelines", "run", "demo", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (numbers,) = tmp_path.glob("store/score/*/wer.json")
    report = json.loads(numbers.read_text())
    controls = {name: control["all"]["wer"] for name, control in report["controls"].items()}
    assert controls["empty output"] == 100
    assert report["all"]["wer"] < 0.5 * min(controls.values())
    assert set(report["subsets"]) == {"test-demo-known-voices", "test-demo-new-voices"}
    (page,) = tmp_path.glob("store/score/*/report.html")
    assert "Training time" in page.read_text()


def test_the_demos_speech_is_small_no_text_occurs_twice_and_new_voices_are_new():
    speech = CHECKOUT / "demo" / "speech"
    assert sum(f.stat().st_size for f in speech.rglob("*") if f.is_file()) <= 6_000_000
    texts, voices = {}, {}
    for transcript in speech.rglob("*.trans.txt"):
        subset, voice = transcript.relative_to(speech).parts[:2]
        voices.setdefault(subset, set()).add(voice)
        texts.setdefault(subset, []).extend(
            line.split(" ", 1)[1] for line in transcript.read_text().splitlines()
        )
    everything = [text for subset in texts.values() for text in subset]
    assert len(everything) >= 150 and len(set(everything)) == len(everything)
    assert len(set().union(*voices.values())) >= 6
    assert voices["test-demo-new-voices"].isdisjoint(voices["train-demo"] | voices["dev-demo"])
