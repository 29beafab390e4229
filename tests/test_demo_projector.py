"""The demo's script for a projector: CTC aligns tokens with audio."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from slam_asr.config.recipe import Projector
from slam_asr.models.projector import build_projector

DEMO = Path(__file__).resolve().parents[1] / "demo"


@pytest.fixture
def script(monkeypatch):
    """Import a script of the demo folder by name."""
    monkeypatch.syspath_prepend(str(DEMO))
    yield importlib.import_module
    sys.modules.pop("begin_projector", None)


@pytest.mark.parametrize("seed", [2, 3])
def test_a_projector_learns_the_tokens_and_its_outputs_approach_their_embeddings(script, seed):
    begin = script("begin_projector")
    torch.manual_seed(seed)
    sounds = torch.randn(6, 12)  # of tokens 1 to 5, and of silence
    targets = [[1, 2, 3], [4, 1, 5], [2, 5], [3]]
    frames = [
        torch.cat([torch.stack([sounds[t], sounds[t], sounds[0], sounds[0]]) for t in row]) for row in targets
    ]
    speller = begin.Speller(build_projector(Projector(downsampling=2, hidden=64), 12, 16), torch.randn(6, 16))
    optimizer = torch.optim.Adam(speller.parameters(), lr=1e-2)
    losses, distances = [], []
    for step in range(400):
        loss = begin.loss_of(speller, frames, [torch.tensor(row) for row in targets], step / 400)
        losses.append(loss.item())
        distances.append(speller(frames)[1].mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert [begin.best_path(speller, f) for f in frames] == targets
    similarities = (
        nn.functional.normalize(speller.projector([frames[0][:2]]), dim=1)
        @ nn.functional.normalize(speller.embeddings, dim=1).T
    )
    assert similarities.argmax() == targets[0][0] and similarities.max() > 0.9 and distances[-1] < 0.3


def test_ctc_over_an_utterances_own_tokens_equals_ctc_over_all_tokens(script):
    """The loss over a few columns equals torch's over the entire vocabulary."""
    begin = script("begin_projector")
    torch.manual_seed(1)
    speller = begin.Speller(build_projector(Projector(downsampling=2, hidden=8), 6, 10), torch.randn(41, 10))
    frames, targets = (
        [torch.randn(30, 6), torch.randn(21, 6)],
        [torch.tensor([7, 3, 3, 40]), torch.tensor([1, 7])],
    )
    logits, distances = speller(frames)
    scores = nn.utils.rnn.pad_sequence(logits.log_softmax(1).split([15, 10]))
    expected = (
        nn.functional.ctc_loss(
            scores, torch.cat(targets), torch.tensor([15, 10]), torch.tensor([4, 2]), reduction="sum"
        )
        / 6
    )
    assert begin.loss_of(speller, frames, targets, 0.5).item() == pytest.approx(
        (expected + 0.5 * distances.mean()).item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        (
            "begin_projector",
            ["--manifest", "nowhere.jsonl", "--features", "x", "--out", "{out}"],
            "There is no manifest nowhere.jsonl",
        ),
        (
            "begin_projector",
            ["--manifest", "{empty}", "--features", "x", "--out", "{out}"],
            "holds no utterance",
        ),
        (
            "begin_projector",
            ["--recipe", "libri", "--manifest", "{empty}", "--features", "x", "--out", "{out}"],
            "No recipe named libri",
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
