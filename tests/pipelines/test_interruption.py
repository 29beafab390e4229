"""A run that is killed at any moment and repeated gives the same result as an undisturbed one."""

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from slam_asr.storage import sha256_of_file
from tests.pipelines import run_command

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
"""Texts in the log, in its order. For each text, one run is killed at the first line that contains it."""
MOMENTS_TO_TEST = MOMENTS if os.environ.get("SLAM_ASR_SOAK") else ["step 1/3"]


def results(output):
    """Return the results of a run: the checksum of the weights, and the transcripts."""
    (model,) = output.glob("store/convert-checkpoint/*/projector.safetensors")
    (hypotheses,) = output.glob("store/score/*/hypotheses.jsonl")
    return sha256_of_file(model), hypotheses.read_text()


@pytest.fixture(scope="module")
def undisturbed(tiny_recipe, tiny_corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(
        run_command(tiny_recipe, tiny_corpus, output), cwd=CHECKOUT, check=True, capture_output=True
    )
    return results(output)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS_TO_TEST)
def test_killed_run_resumes_to_the_same_result(moment, undisturbed, tiny_recipe, tiny_corpus, tmp_path):
    run = subprocess.Popen(
        run_command(tiny_recipe, tiny_corpus, tmp_path), cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    )
    assert any(moment in line for line in run.stdout), f"the log has no line with {moment}"
    # Kill only the runner, as the kernel does when memory runs out. Its steps end at their next output.
    psutil.Process(run.pid).kill()
    run.wait()
    again = subprocess.run(
        run_command(tiny_recipe, tiny_corpus, tmp_path), cwd=CHECKOUT, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert results(tmp_path) == undisturbed
