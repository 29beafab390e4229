"""A stage with its output in object storage counts as finished only when its record exists."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from slam_asr.artifacts.stage_record import (
    Outcome,
    follow_pointer,
    read_record,
    require_record,
    run_stage,
    write_pointer,
)
from slam_asr.errors import UserError
from slam_asr.storage import exists, read_bytes, walk, write_bytes
from tests.faults import STALL

fork = multiprocessing.get_context("fork")
OUTPUT = "s3://bucket/results/{fingerprint}"
INPUTS = {"recipe": "a", "seed": 1}


class Work:
    """A stage's work, which counts its calls."""

    def __init__(self, text: str = "result") -> None:
        self.text, self.calls = text, 0

    def __call__(self, folder: Path) -> Outcome:
        self.calls += 1
        for name in ("a.txt", "below/b.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{self.text} {name}")
        return Outcome(summary=f"two files of {self.text}", metrics={"files": 2.0})


def test_a_finished_stage_is_not_repeated_despite_network_faults(faulty_s3, tmp_path, capsys):
    work = Work()
    for attempt in range(6):
        # A later pod shares only object storage with this one, so the cache is removed.
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        record = run_stage("a-stage", OUTPUT, INPUTS, work)
        assert record.folder.startswith("s3://bucket/results/") and "{" not in record.folder
        assert work.calls == 1 and ("already there" in capsys.readouterr().out) == (attempt > 0)
        assert {
            f.name: read_bytes(f"{record.folder}/{f.name}")
            for f in walk(record.folder)
            if f.name != "stage.json"
        } == {"a.txt": b"result a.txt", "below/b.txt": b"result below/b.txt"}
        assert record.file("a.txt").read_text() == "result a.txt"
        assert require_record(record.folder, "a-stage").metrics == {"files": 2.0}
    assert faulty_s3.faults.total() > 5
    assert not [f for f in (tmp_path / "cache" / "work").iterdir() if not f.name.endswith(".lock")]


@pytest.mark.parametrize("during", ["the results", "the record"])
def test_a_stage_that_is_killed_while_uploading_is_repeated(faulty_s3, during):
    faulty_s3.fault_rate = 0
    part = "stage.json" if during == "the record" else "below/b.txt"
    faulty_s3.rule = lambda request: STALL if request.method == "PUT" and part in request.target else None
    process = fork.Process(target=run_stage, args=("a-stage", "s3://bucket/out", INPUTS, Work()))
    process.start()
    # `a.txt` arrives in both cases: uploads run in parallel, and the record is uploaded last.
    while not (faulty_s3.faults[STALL] and exists("s3://bucket/out/a.txt")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    faulty_s3.rule = None
    assert exists("s3://bucket/out/a.txt") and not exists("s3://bucket/out/stage.json")
    assert read_record("s3://bucket/out") is None
    with pytest.raises(UserError, match="no finished a-stage"):
        require_record("s3://bucket/out", "a-stage")
    work = Work()
    faulty_s3.fault_rate = 0.2
    assert run_stage("a-stage", "s3://bucket/out", INPUTS, work).summary == "two files of result"
    assert work.calls == 1
    run_stage("a-stage", "s3://bucket/out", INPUTS, work)
    assert work.calls == 1


@pytest.mark.parametrize("where", ["s3://bucket/pointer.json", "pointer.json"])
def test_a_pointer_is_valid_until_the_results_are_replaced(faulty_s3, tmp_path, where):
    pointer = where if where.startswith("s3:") else tmp_path / where
    record = run_stage("a-stage", "s3://bucket/out", INPUTS, Work())
    write_pointer(record, pointer)
    assert follow_pointer(pointer) == "s3://bucket/out"
    run_stage("a-stage", "s3://bucket/out", {"seed": 2}, Work("other"), overwrite=True)
    with pytest.raises(UserError, match="is gone or was replaced"):
        follow_pointer(pointer)


def test_results_of_other_inputs_are_replaced_only_on_request(faulty_s3):
    run_stage("a-stage", "s3://bucket/out", INPUTS, Work())
    other = Work("other")
    with pytest.raises(UserError, match="other inputs"):
        run_stage("a-stage", "s3://bucket/out", {"seed": 2}, other)
    assert other.calls == 0 and read_bytes("s3://bucket/out/a.txt") == b"result a.txt"
    record = run_stage("a-stage", "s3://bucket/out", {"seed": 2}, other, overwrite=True)
    assert other.calls == 1 and read_bytes("s3://bucket/out/a.txt") == b"other a.txt"
    assert read_record("s3://bucket/out") == record


def test_overwriting_removes_the_previous_record_first(faulty_s3):
    faulty_s3.fault_rate = 0
    run_stage("a-stage", "s3://bucket/out", INPUTS, Work())

    def work(folder: Path) -> Outcome:
        assert read_record("s3://bucket/out") is None
        raise UserError("failed halfway.")

    with pytest.raises(UserError, match="failed halfway"):
        run_stage("a-stage", "s3://bucket/out", {"seed": 2}, work, overwrite=True)
    assert read_record("s3://bucket/out") is None


def test_files_left_by_an_interrupted_run_are_not_published_by_the_next(bucket):
    def fails_halfway(folder: Path) -> Outcome:
        (folder / "left-over.txt").write_text("x")
        raise UserError("failed halfway.")

    with pytest.raises(UserError, match="failed halfway"):
        run_stage("a-stage", "s3://bucket/out", INPUTS, fails_halfway)
    run_stage("a-stage", "s3://bucket/out", {"seed": 2}, Work())
    assert sorted(f.name for f in walk("s3://bucket/out")) == ["a.txt", "below/b.txt", "stage.json"]


def test_a_damaged_record_is_reported_in_one_sentence(bucket):
    write_bytes("s3://bucket/out/stage.json", b"{ no json")
    with pytest.raises(UserError, match="not a stage's record") as raised:
        run_stage("a-stage", "s3://bucket/out", INPUTS, Work())
    assert "\n" not in raised.value.args[0]
