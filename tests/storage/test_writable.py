"""Outputs are tried before the work begins; a training run stops if it cannot write a checkpoint."""

import os
import stat

import pytest
import torch

from slam_asr.artifacts import checkpoint
from slam_asr.artifacts.checkpoint import Checkpoint
from slam_asr.artifacts.stage_record import Outcome, run_stage
from slam_asr.errors import StorageError, UserError
from slam_asr.pretrained.copy_to_bucket import copy_models
from slam_asr.stages.transcribe import transcribe
from slam_asr.storage import exists, read_bytes, require_writable, walk, write_atomically
from slam_asr.training.checkpoint_writer import UNSAVED, CheckpointWriter, Snapshot

INPUTS = {"seed": 1}


def refuse(*methods: str, text: str = ""):
    """Return a rule that answers with 403 to requests of these methods whose target contains this text."""
    return lambda request: (
        (403, "AccessDenied") if request.method in methods and text in request.target else None
    )


@pytest.fixture
def stage():
    """Return a function that runs a stage and returns how often its work was called."""

    def run(output: str, **inputs) -> int:
        calls = []

        def work(folder):
            calls.append(folder)
            return Outcome("done")

        try:
            run_stage("a-stage", output, INPUTS | inputs, work, overwrite=True)
        except (UserError, OSError):
            assert not calls
            raise
        return len(calls)

    return run


@pytest.mark.real_input("B07-store-not-writable")
@pytest.mark.parametrize("method", ["PUT", "GET", "DELETE"])
def test_a_stage_tries_its_output_before_it_works(faulty_s3, stage, method):
    faulty_s3.rule = refuse(method, text=".writable-")
    with pytest.raises(StorageError, match=r"^s3://bucket/y cannot be .*: access is denied") as raised:
        stage("s3://bucket/y")
    assert ".writable" not in str(raised.value)
    faulty_s3.rule = lambda request: None
    assert stage("s3://bucket/y") == 1
    if method != "DELETE":
        assert [f.name for f in walk("s3://bucket/y")] == ["stage.json"]
    # A finished stage does nothing, so it needs no permission to write.
    faulty_s3.rule = refuse("PUT", "DELETE")
    assert stage("s3://bucket/y") == 0
    # With other inputs, the stage tries the output first, and leaves the earlier record in place.
    with pytest.raises(StorageError, match="access is denied"):
        stage("s3://bucket/y", seed=2)
    assert exists("s3://bucket/y/stage.json")


@pytest.mark.real_input("B07-store-not-writable")
def test_a_missing_bucket_and_a_file_in_place_of_a_folder_are_noticed_first(bucket, stage, tmp_path):
    with pytest.raises(
        StorageError, match=r"^s3://no-such-bucket/y cannot be written: there is no such bucket"
    ):
        stage("s3://no-such-bucket/y")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OSError, match="file"):
        stage(str(tmp_path / "file" / "below"))
    require_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_folder_on_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / ".x.partial"))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        require_writable(tmp_path)
    assert raised.value.filename == str(tmp_path)
    assert stat.S_ISDIR(tmp_path.stat().st_mode) and list(tmp_path.iterdir()) == []


def test_transcribe_and_copy_models_try_their_output_first(faulty_s3, tmp_path):
    faulty_s3.rule = refuse("PUT")
    with pytest.raises(StorageError, match="access is denied"):
        transcribe(None, [str(tmp_path / "a.wav")], "no-model", output="s3://bucket/out")
    with pytest.raises(StorageError, match="access is denied"):
        copy_models("s3://bucket/models", models=["nobody/nothing"])


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def snapshot(step: int) -> Snapshot:
    tensors = {"weights": {"w": torch.full((2,), float(step))}, "moments": {"m": torch.ones(2)}}
    return Snapshot(Checkpoint(step, 0, step, "ddp", 1, INPUTS), tensors, b"{}\n")


def weight(folder: str) -> float:
    return float(checkpoint.require(folder).tensors("weights")["w"][0])


@pytest.mark.real_input("B07-store-not-writable")
def test_a_checkpoint_that_cannot_be_uploaded_stops_training_and_stays_on_local_disk(
    faulty_s3, process_group, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "0.3")
    faulty_s3.rule = lambda request: None
    folder = "s3://bucket/x/checkpoints"
    writer = CheckpointWriter(folder, tmp_path, keep=2)
    writer.save(snapshot(1))
    writer.wait()
    faulty_s3.rule = refuse("PUT", text="step-00000002")
    writer.save(snapshot(2))
    writer.wait()
    assert writer.failure is not None
    tried = faulty_s3.faults.total()
    assert tried > 1  # the upload was retried for SLAM_ASR_S3_PATIENCE seconds
    writer.save(snapshot(3))
    with pytest.raises(StorageError) as raised:
        writer.close()
    assert faulty_s3.faults.total() == tried  # no further checkpoint was tried
    here = str(tmp_path / UNSAVED)
    assert str(raised.value).startswith(
        "The checkpoint of step 2 could not be written: s3://bucket/x/checkpoints/"
    )
    assert "access is denied" in str(raised.value) and "\n" not in raised.value.args[0]
    assert (
        f"the weights are in {here}/step-00000002, and the latest checkpoint is {folder}/step-00000001"
        in str(raised.value)
    )
    assert (
        "the checkpoint of step 2 could not be written; training continues, and the write is repeated for"
        in capsys.readouterr().out
    )
    assert weight(folder) == 1.0 and weight(here) == 2.0
    # The next start of the same command on the same machine uploads the checkpoint.
    faulty_s3.rule = lambda request: None
    checkpoint.recover(here, folder, keep=2)
    assert weight(folder) == 2.0
    # A newer checkpoint is not replaced by the local one.
    writer = CheckpointWriter(folder, tmp_path, keep=2)
    writer.save(snapshot(5))
    writer.close()
    checkpoint.recover(here, folder, keep=2)
    assert weight(folder) == 5.0


def test_the_upload_of_a_checkpoint_is_retried_for_the_seconds_of_patience(
    faulty_s3, process_group, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "20")
    denied = []

    def rule(request):
        if request.method == "PUT" and len(denied) < 3:
            denied.append(request)
            return 403, "ExpiredToken"
        return None

    faulty_s3.rule = rule
    writer = CheckpointWriter("s3://bucket/x/checkpoints", tmp_path, keep=2)
    writer.save(snapshot(1))
    writer.close()
    assert len(denied) == 3 and weight("s3://bucket/x/checkpoints") == 1.0


def test_a_first_local_checkpoint_that_cannot_be_written_is_reported(process_group, tmp_path, monkeypatch):
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "0")
    folder = tmp_path / "checkpoints"
    writer = CheckpointWriter(str(folder), tmp_path, keep=2)
    (tmp_path / "checkpoints").write_text("in the way", encoding="utf-8")
    writer.save(snapshot(1))
    with pytest.raises(
        StorageError, match=r"could not be written: .* is a file.*; there is no earlier checkpoint: make"
    ):
        writer.close()


def test_whoever_may_read_the_folder_may_read_a_checkpoint(process_group, tmp_path):
    for name, mode in (("shared", 0o755), ("private", 0o700)):
        folder = tmp_path / name
        folder.mkdir(mode)
        writer = CheckpointWriter(str(folder), tmp_path, keep=2)
        before = os.umask(0o777 - mode)
        try:
            writer.save(snapshot(1))
            writer.close()
        finally:
            os.umask(before)
        files = list(folder.rglob("*.safetensors"))
        assert files and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600 | mode & 0o444}


def test_a_function_for_local_files_refuses_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="is in object storage"):
        write_atomically("s3://bucket/x", b"x")
    assert list(tmp_path.iterdir()) == []


def test_compare_writes_its_numbers_to_object_storage(bucket, tmp_path):
    from slam_asr.stages.compare import compare

    for name in ("a", "b"):
        for end in ("pred", "gt"):
            (tmp_path / f"{name}_{end}").write_text("u\tone two\n", encoding="utf-8")
    compare(str(tmp_path / "a_pred"), str(tmp_path / "b_pred"), output="s3://bucket/difference.json")
    assert b'"unit": "percent"' in read_bytes("s3://bucket/difference.json")
