"""Models in object storage: fetched whole, once, and again when they change; every failure is a sentence."""

import socket
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from slam_asr.errors import UserError
from slam_asr.models.encoder import describe_encoder
from slam_asr.models.pretrained import locate_model
from slam_asr.object_storage import list_objects, split_uri
from slam_asr.recipe import Encoder

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


@pytest.fixture(scope="module")
def server():
    """A server that speaks S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """An empty bucket, and an empty cache."""
    for name, value in {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "SLAM_ASR_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    made = boto3.resource("s3").create_bucket(Bucket="models")
    yield made
    made.objects.all().delete()
    made.delete()


def upload(bucket, folder, prefix: str) -> None:
    for file in Path(folder).iterdir():
        bucket.upload_file(str(file), f"{prefix}/{file.name}")


def test_a_prefix_serves_as_a_model_and_is_fetched_once(bucket, tiny_models):
    upload(bucket, tiny_models["encoder"], "a/whisper")
    bucket.put_object(Key="a/whisper/pytorch_model.bin", Body=b"a pickle that nobody needs")
    bucket.put_object(Key="a/whisper-other/config.json", Body=b"not this one")
    spec = describe_encoder(Encoder(name="s3://models/a/whisper/"))
    assert not (spec.folder / "pytorch_model.bin").exists()
    wanted = describe_encoder(Encoder(name=tiny_models["encoder"]))
    assert spec.fingerprint() == wanted.fingerprint()
    spec.load(torch.float32)
    times = {f: f.stat().st_mtime_ns for f in spec.folder.iterdir()}
    assert locate_model("s3://models/a/whisper") == spec.folder
    assert {f: f.stat().st_mtime_ns for f in spec.folder.iterdir()} == times


def test_what_changed_is_fetched_again(bucket, tiny_models):
    upload(bucket, tiny_models["llm"], "llm")
    first = locate_model("s3://models/llm")
    bucket.put_object(Key="llm/generation_config.json", Body=b'{"eos_token_id": 1 }')
    second = locate_model("s3://models/llm")
    assert first != second and (second / "generation_config.json").read_bytes() == b'{"eos_token_id": 1 }'


def test_an_original_file_is_fetched_and_converted(bucket):
    if not REFERENCE.is_dir():
        pytest.skip("the reference's files are not there")
    bucket.upload_file(str(REFERENCE / "wavlm.pt"), "originals/wavlm.pt")
    assert describe_encoder(Encoder(name="s3://models/originals/wavlm.pt")).config.model_type == "wavlm"


def test_a_model_without_weights_is_refused(bucket):
    bucket.put_object(Key="empty/config.json", Body=b"{}")
    with pytest.raises(UserError, match="holds no whole model"):
        locate_model("s3://models/empty")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("s3://models/nothing", "There is nothing at"), ("s3://no-such-bucket/model", "there is no such bucket"),
        ("s3:///model", "write it as s3://bucket/prefix"),
    ],
)
def test_what_is_not_there_is_one_sentence(bucket, name, answer):
    with pytest.raises(UserError, match=answer) as raised:
        locate_model(name)
    assert "\n" not in str(raised.value)


def test_a_server_that_does_not_answer_is_one_sentence(bucket, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(UserError, match="cannot be reached"):
            list_objects("s3://models/x")


def test_missing_credentials_are_one_sentence(bucket, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="needs credentials"):
        list_objects("s3://models/x")


def test_a_name_that_leads_out_of_the_folder_is_not_written(bucket, tiny_models, tmp_path):
    from slam_asr.object_storage import download

    bucket.put_object(Key="evil/../../escaped.json", Body=b"{}")
    objects = list_objects("s3://models/evil")
    assert objects and split_uri("s3://models/evil") == ("models", "evil")
    with pytest.raises(UserError, match="leads out of its folder"):
        download("s3://models/evil", objects, tmp_path / "in" / "here")
    assert not list(tmp_path.rglob("escaped.json"))
