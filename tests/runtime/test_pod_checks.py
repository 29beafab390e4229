"""The checks of `doctor --run` find what is wrong in a pod. Folders and DNS are real; S3 is moto's."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slam_asr import __version__
from slam_asr.findings import BAD, Finding, parse_finding
from slam_asr.runtime.pod_checks import check_folder, check_gpus, check_name, check_store
from slam_asr.stages.check_pod import PodCheck, check_pod, examine, main
from slam_asr.version import source_digest


def lines(**values) -> list[str]:
    return [finding.line() for finding in examine(PodCheck("decode", "team", **values))]


def test_image_must_have_the_submitters_code():
    same = {"version": __version__, "source": source_digest()}
    assert lines(**same) == [f"✓ image: was pulled, and has your version of slam_asr, {__version__}"]
    [other] = lines(**same | {"version": "9.9"})
    assert other.startswith(f"✗ image: has slam_asr {__version__}, but you submit with 9.9: build and push ")
    [changed] = lines(**same | {"source": "0" * 64})
    assert changed.startswith(f"✗ image: has slam_asr {__version__} with other source code than the checkout")
    assert "`make images REGISTRY=… TAG=… PUSH=1`" in other and "give doctor the same --images." in changed


def test_store_is_written_read_listed_and_cleared(bucket):
    name, store = lines(store="s3://bucket/store", secret="keys")
    assert name == "✓ name 127.0.0.1: resolves (object storage)"
    assert store == "✓ store s3://bucket/store: can be written, read and listed, and objects can be removed"
    assert list(bucket.objects.all()) == []


def test_finding_on_an_unusable_store_says_where_the_pods_access_rights_come_from(bucket):
    _, store = lines(store="s3://no-such-bucket/store", secret="keys")
    assert store.startswith("✗ store s3://no-such-bucket/store: s3://no-such-bucket/store/.doctor-")
    assert "there is no such bucket" in store and "a-secret-that-nobody-may-see" not in store
    assert (
        "; this pod uses the keys in the secret keys, which `kubectl -n team create secret generic keys"
        in store
    )
    _, store = lines(store="s3://no-such-bucket/store")
    assert store.endswith("so the pod's account needs a role that may use the bucket.")


def test_local_store_whose_folder_cannot_be_created_is_a_finding(tmp_path):
    (tmp_path / "file").write_text("")
    finding = check_store(str(tmp_path / "file" / "store"), "choose another store")
    assert finding.sign == BAD and finding.detail.endswith("; choose another store.")


@pytest.mark.parametrize("address", ["http://no..such.name:9000", f"http://{'x' * 64}.example"])
def test_name_that_cannot_be_looked_up_is_a_finding(address, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    finding = check_name(address, "object storage", "correct storage.endpoint in the profile")
    assert (
        finding.line().startswith("✗ name ")
        and "object storage cannot be looked up in this pod (" in finding.detail
    )
    assert "): correct storage.endpoint in the profile, or check the cluster's DNS" in finding.detail


def test_proxy_is_looked_up_instead_of_the_host_that_it_reaches(monkeypatch):
    monkeypatch.setenv("https_proxy", "localhost:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    finding = check_name("https://no..such.name", "the model hub", "use no hub")
    assert finding.line() == "✓ name localhost: resolves (the proxy to the model hub)"
    monkeypatch.setenv("https_proxy", "http://no..such.proxy:3128")
    assert "HTTPS_PROXY in the profile" in check_name("https://hub.example", "the hub", "use no hub").detail
    monkeypatch.setenv("no_proxy", "localhost")
    assert (
        check_name("https://localhost", "the hub", "use no hub").line()
        == "✓ name localhost: resolves (the hub)"
    )


def test_store_is_not_tried_if_its_name_cannot_be_looked_up(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid:9000")
    [name] = lines(store="s3://bucket/store")
    assert name.startswith("✗ name no-such-host.invalid: object storage cannot be looked up in this pod (")


def test_folder_that_the_user_may_not_write_to_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setenv("SLAM_ASR_CACHE", str(tmp_path))
    folder = tmp_path / "models"
    [missing] = lines(claim="models")
    assert missing == (
        f"✗ model volume models: {folder} cannot be written (No such file or directory): `kubectl -n team "
        "describe pvc models` shows its size and access modes."
    )
    folder.mkdir()
    user = os.geteuid()
    assert lines(claim="models") == [f"✓ model volume models: user {user} may write to it"]
    assert list(folder.iterdir()) == []
    folder.chmod(0o555)
    if user == 0:  # root may write anywhere
        os.seteuid(1000)
    try:
        finding = check_folder(folder, "model volume models", "grow it", f"run `chmod 1777 {folder}` once")
    finally:
        os.seteuid(user)
    assert finding == Finding(
        BAD,
        "model volume models",
        f"user {user or 1000} is not allowed to write to {folder} (Permission denied): "
        f"run `chmod 1777 {folder}` once.",
    )


def test_gpus_that_torch_does_not_see_are_a_finding():
    count = torch.cuda.device_count()
    finding = check_gpus(count + 1, "steps.train")
    expected = (
        f"torch sees {count} of {count + 1}: "
        if torch.version.cuda
        else "torch in this image is a build for CPUs"
    )
    assert finding.sign == BAD and finding.detail.startswith(expected) and "steps.train.gpu" in finding.detail


def test_finding_can_be_parsed_from_its_line():
    finding = Finding(BAD, "store s3://bucket", "cannot be written: access is denied.")
    assert parse_finding(finding.line()) == finding
    assert parse_finding("a line of the log: 7") is None and parse_finding("✗ nothing") is None


def test_program_ends_with_its_problems_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "5")
    check = {"step": "decode", "version": "9.9"}
    assert [finding.sign for finding in check_pod(json.dumps(check))] == [BAD]
    for arguments, sentence in (
        ([json.dumps(check)], "slam-asr: error: image: has slam_asr "),
        (["nothing"], "slam-asr: error: The request is not the JSON of a PodCheck ("),
        (['{"stage": "decode"}'], "slam-asr: error: The request is not the JSON of a PodCheck ("),
        ([], "slam-asr: error: One argument is needed: the JSON of a PodCheck."),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.startswith(sentence) and len(err.splitlines()) == 1


@pytest.mark.slow
def test_nodes_of_a_trainjob_reach_each_other():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    check = json.dumps({"step": "train", "nodes": 2, "in_trainjob": True})
    command = [sys.executable, "-m", "slam_asr.stages.check_pod", check]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ
            | {"PET_NNODES": "2", "PET_NODE_RANK": str(rank)}
            | {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)},
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(processes):
        out, _ = process.communicate(timeout=120)
        line = f"✓ node {rank}: reaches 1 other node through 127.0.0.1:{port} with gloo"
        assert process.returncode == 0 and line in out.splitlines(), out
