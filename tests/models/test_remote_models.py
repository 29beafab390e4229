"""Models in object storage are fetched once, and again if they change; errors are one sentence."""

from pathlib import Path

import pytest
import torch

from slam_asr.config.recipe import Encoder
from slam_asr.errors import UserError
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.pretrained.locate import locate_model
from tests.conftest import REFERENCE, require_reference


def upload(bucket, folder, prefix: str) -> None:
    for file in Path(folder).iterdir():
        bucket.upload_file(str(file), f"{prefix}/{file.name}")


def test_a_prefix_serves_as_a_model_and_is_fetched_once(bucket, tiny_models):
    upload(bucket, tiny_models["encoder"], "a/whisper")
    bucket.put_object(Key="a/whisper/pytorch_model.bin", Body=b"a pickle that nobody needs")
    bucket.put_object(Key="a/whisper-other/config.json", Body=b"not this one")
    spec = describe_encoder(Encoder(name="s3://bucket/a/whisper/"))
    assert not (spec.folder / "pytorch_model.bin").exists()
    expected = describe_encoder(Encoder(name=tiny_models["encoder"]))
    assert spec.fingerprint() == expected.fingerprint()
    spec.load(torch.float32)
    times = {f: f.stat().st_mtime_ns for f in spec.folder.iterdir()}
    assert locate_model("s3://bucket/a/whisper") == spec.folder
    assert {f: f.stat().st_mtime_ns for f in spec.folder.iterdir()} == times


def test_a_changed_model_is_fetched_again(bucket, tiny_models):
    upload(bucket, tiny_models["llm"], "llm")
    first = locate_model("s3://bucket/llm")
    bucket.put_object(Key="llm/generation_config.json", Body=b'{"eos_token_id": 1 }')
    second = locate_model("s3://bucket/llm")
    assert first != second and (second / "generation_config.json").read_bytes() == b'{"eos_token_id": 1 }'


def test_an_original_file_is_fetched_and_converted(bucket):
    require_reference()
    bucket.upload_file(str(REFERENCE / "wavlm.pt"), "originals/wavlm.pt")
    assert describe_encoder(Encoder(name="s3://bucket/originals/wavlm.pt")).config.model_type == "wavlm"


def test_a_model_without_weights_is_refused(bucket):
    bucket.put_object(Key="empty/config.json", Body=b"{}")
    with pytest.raises(UserError, match="holds no complete model"):
        locate_model("s3://bucket/empty")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("s3://bucket/nothing", "There is nothing at"),
        ("s3://no-such-bucket/model", "there is no such bucket"),
        ("s3:///model", "names no bucket: write it as s3://bucket/prefix"),
    ],
)
def test_a_missing_model_is_refused_in_one_sentence(bucket, name, answer):
    with pytest.raises(UserError, match=answer) as raised:
        locate_model(name)
    assert "\n" not in raised.value.args[0]
