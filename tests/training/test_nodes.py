"""Several machines train as one machine does.

In these tests, a machine is a process tree with its own cache folder. The machines meet at a port.
"""

import os
import re
import socket
import subprocess
import sys
import time

import pytest

from slam_asr.artifacts.stage_record import read_record
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.stages.build_manifest import build_manifest
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from slam_asr.storage import read_bytes, walk
from slam_asr.training.launch import Nodes, nodes_from_environment
from slam_asr.training.live import read_curve

VARIABLES = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")


def set_environment(monkeypatch, *values: str) -> None:
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)


def test_a_machine_reads_its_rank_from_the_environment(monkeypatch):
    set_environment(monkeypatch, "", "", "", "")
    assert nodes_from_environment(1) == Nodes() and nodes_from_environment(1).is_coordinator
    set_environment(monkeypatch, "1", "0", "host", "29400")
    assert nodes_from_environment(1) == Nodes()
    set_environment(monkeypatch, "3", "2", "host", "29400")
    assert (
        nodes_from_environment(3) == Nodes(3, 2, "host", 29400)
        and not nodes_from_environment(3).is_coordinator
    )


@pytest.mark.parametrize(
    ("values", "expected", "sentence"),
    [
        (
            ("", "", "", ""),
            2,
            "training.nodes is 2, but PET_NNODES is not set here: start `slam-asr train` on 2 machines",
        ),
        (("2", "0", "host", "1"), 1, "training.nodes is 1, but PET_NNODES is 2 here"),
        (("3", "0", "host", "1"), 2, "training.nodes is 2, but PET_NNODES is 3 here"),
        (("2", "", "host", ""), 2, "PET_NODE_RANK and PET_MASTER_PORT are not set"),
        (("2", "x", "host", "1"), 2, "PET_NODE_RANK is 'x'"),
        (("2", "2", "host", "1"), 2, "PET_NODE_RANK is 2, but with 2 machines it must be from 0 to 1"),
    ],
)
def test_an_environment_that_contradicts_the_recipe_is_refused(monkeypatch, values, expected, sentence):
    set_environment(monkeypatch, *values)
    with pytest.raises(UserError, match=re.escape(sentence)):
        nodes_from_environment(expected)


@pytest.fixture
def machines(bucket, tiny_recipe, tiny_corpus, tmp_path):
    """Return a function that starts `slam-asr train` on a number of machines, and returns their processes."""
    build_manifest(load_recipe(str(tiny_recipe)), str(tiny_corpus), str(tmp_path / "manifest"))

    def start(name: str, number: int, *options: str) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(number):
            rendezvous = {
                "PET_NNODES": str(number),
                "PET_NODE_RANK": str(rank),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port),
            }
            environment = os.environ | {
                "SLAM_ASR_CACHE": str(tmp_path / f"disk-{name}-{rank}"),
                "OMP_NUM_THREADS": "1",
            }
            command = [
                sys.executable,
                "-m",
                "slam_asr",
                "train",
                "--recipe",
                str(tiny_recipe),
                "--train-manifest",
                str(tmp_path / "manifest" / "train.jsonl"),
                "--output",
                f"s3://bucket/{name}",
                "--training.nodes",
                str(number),
                "--features.cache",
                "none",
                # One utterance per batch, so that each process has work in every step.
                "--training.positions_per_batch",
                "40",
                *options,
            ]
            started.append(
                subprocess.Popen(
                    command,
                    env=environment | (rendezvous if number > 1 else {}),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return started

    return start


def finish(processes: list[subprocess.Popen], seconds: float = 150) -> list[str]:
    return [process.communicate(timeout=seconds)[0] for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, *([0] if os.environ.get("SLAM_ASR_SOAK") else [])])
def test_two_machines_train_like_two_processes_on_one(machines, bucket, tmp_path, stage):
    zero = ["--training.zero_stage", str(stage)]
    one = machines(f"one-{stage}", 1, "--training.processes", "2", *zero)
    outputs = finish(one)
    assert one[0].returncode == 0, outputs[0]
    two = machines(f"two-{stage}", 2, *zero)
    outputs = finish(two)
    assert [process.returncode for process in two] == [0, 0], "\n".join(outputs)
    assert "on node 1 of 2" in outputs[1] and "the first node wrote s3://bucket/two" in outputs[1]
    assert "step 3/3" in outputs[0] and "step 3/3" not in outputs[1]
    records = [read_record(f"s3://bucket/{name}-{stage}") for name in ("one", "two")]
    curves = [[row["loss"] for row in read_curve(record.file("curve.jsonl"))[0]] for record in records]
    assert curves[0] == curves[1] and len(set(curves[0])) == 3
    assert records[1].facts["processes"] == 2
    # The checkpoint has the files of every rank, and gives the same weights.
    files = [
        sorted(f.name for f in walk(f"s3://bucket/{name}-{stage}/checkpoints")) for name in ("one", "two")
    ]
    assert files[0] == files[1] and sum("/weights-" in name for name in files[1]) == 2
    models = [
        convert_checkpoint(f"s3://bucket/{name}-{stage}", str(tmp_path / f"model-{name}"))
        for name in ("one", "two")
    ]
    weights = [read_bytes(model.file("projector.safetensors")) for model in models]
    assert weights[0] == weights[1]
    # If the command is run again, all machines find the record, and do nothing.
    again = machines(f"two-{stage}", 2, *zero)
    assert all("already there, nothing to do" in text for text in finish(again)) and [
        p.returncode for p in again
    ] == [0, 0]
    # With other inputs, all machines refuse, and none waits for another.
    other = machines(f"two-{stage}", 2, *zero, "--training.max_steps", "2")
    assert all("with other inputs (changed: recipe)" in text for text in finish(other)) and [
        p.returncode for p in other
    ] == [2, 2]


@pytest.mark.slow
def test_a_lost_machine_ends_the_others_and_leaves_no_record(machines, bucket):
    both = machines("lost", 2, "--training.max_steps", "100000", "--training.epochs", "100000")
    for line in both[0].stdout:
        if line.startswith("step "):
            break
    both[1].kill()
    started = time.monotonic()
    outputs = both[0].communicate(timeout=120)[0]
    assert both[0].returncode == 2 and "slam-asr: error: A training process ended with code" in outputs, (
        outputs
    )
    assert time.monotonic() - started < 60
    assert read_record("s3://bucket/lost") is None
    both[1].wait()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_machines_with_a_message(machines, bucket):
    first, second = machines(
        "diverges",
        2,
        "--training.learning_rate",
        "1e30",
        "--training.max_steps",
        "50",
        "--training.epochs",
        "1000",
    )
    outputs = finish([first, second])
    assert (first.returncode, second.returncode) == (2, 2), "\n".join(outputs)
    assert any("was not finite for 3 steps in a row" in text for text in outputs)
