"""Killed at any moment and run again, the pipeline comes to the same result as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from slam_asr.storage import sha256_of_file

CHECKOUT = Path(__file__).resolve().parents[2]
MOMENTS = [
    "1/6 build-manifest",
    "encoder parameters",
    "starting 1 training process",
    "step 1/3",
    "dev loss",
    "5/6 decode",
    "decoding 6",
]
"""Lines of the log, one or two a step, at which everything is killed."""
CHOSEN = MOMENTS if os.environ.get("SLAM_ASR_SOAK") else ["encoder parameters", "step 1/3"]


def command(recipe, corpus, output):
    return [
        sys.executable,
        "-m",
        "pipelines",
        "run",
        str(recipe),
        "--corpus",
        str(corpus),
        "--output",
        str(output),
    ]


def results(output):
    """What a run came to: the weights and the transcripts."""
    (model,) = output.glob("store/convert-checkpoint/*/projector.safetensors")
    (hypotheses,) = output.glob("store/score/*/hypotheses.jsonl")
    return sha256_of_file(model), hypotheses.read_text()


@pytest.fixture(scope="module")
def undisturbed(tiny_recipe, tiny_corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(command(tiny_recipe, tiny_corpus, output), cwd=CHECKOUT, check=True, capture_output=True)
    return results(output)


@pytest.mark.slow
@pytest.mark.parametrize("moment", CHOSEN)
def test_a_killed_run_goes_on_to_the_same_result(moment, undisturbed, tiny_recipe, tiny_corpus, tmp_path):
    run = subprocess.Popen(
        command(tiny_recipe, tiny_corpus, tmp_path), cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    )
    assert any(moment in line for line in run.stdout), f"the log has no line with {moment}"
    # Only the runner is killed, as the kernel does when memory is short; its steps find out by themselves.
    psutil.Process(run.pid).kill()
    run.wait()
    again = subprocess.run(
        command(tiny_recipe, tiny_corpus, tmp_path), cwd=CHECKOUT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert results(tmp_path) == undisturbed
