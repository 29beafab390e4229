"""An address without a bucket, such as `s3://$BUCKET` with an unset variable, is refused in one sentence."""

import pytest

from pipelines.cluster import load_cluster
from pipelines.compile import compile_command, location_parameters
from pipelines.kubeflow.submit import submit
from pipelines.run import run as run_locally
from slam_asr.artifacts.manifest import read_manifest
from slam_asr.artifacts.stage_record import Outcome, require_record, run_stage
from slam_asr.cli import run
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.storage import exists, is_s3, join, parent_of, read_bytes, upload, walk, write_bytes

NO_BUCKET = ["s3://", "s3:///x", "s3:/", "s3:/bucket/x", "s3:////"]


def sentence(call, *arguments) -> str:
    with pytest.raises(UserError) as raised:
        call(*arguments)
    assert "\n" not in raised.value.args[0] and str(raised.value).endswith(".")
    return str(raised.value)


@pytest.mark.parametrize("address", NO_BUCKET)
def test_no_call_takes_an_address_without_a_bucket(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        is_s3,
        exists,
        read_bytes,
        parent_of,
        read_manifest,
        lambda path: join(path, "x"),
        lambda path: list(walk(path)),
        lambda path: write_bytes(path, b"x"),
        lambda path: upload(__file__, path),
        lambda path: require_record(path, "train"),
        lambda path: run_stage("a-stage", path, {}, lambda folder: Outcome("")),
    ):
        assert "names no bucket" in sentence(call, address)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key", ["data.audio_root", "encoder.name", "llm.name", "projector.init_from", "training.deepspeed"]
)
def test_no_key_of_a_recipe_takes_an_address_without_a_bucket(key):
    assert "names no bucket" in sentence(load_recipe, "demo", {key: "s3://"})
    if key != "training.deepspeed":  # this file is read first, so the message does not name the key
        assert f"{key}: s3:///models names no bucket" in sentence(load_recipe, "demo", {key: "s3:///models"})


def test_no_profile_takes_an_address_without_a_bucket(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("storage: {store: 's3://'}", encoding="utf-8")
    assert "Cluster mine: storage.store: s3:// names no bucket" in sentence(load_cluster, str(file))


def slam_asr(options: list[str]) -> None:
    run(options[0], options[1:])


SCORE = ["score", "--recipe", "demo", "--model", "m", "--output", "x", "--parts"]


@pytest.mark.real_input("B32-address-without-bucket")
@pytest.mark.parametrize(
    ("command", "options"),
    [
        (compile_command, ["--store", "s3:///x"]),
        (submit, ["demo", "--corpus", "s3:///x"]),
        (run_locally, ["demo", "--store", "s3://"]),
        (slam_asr, [*SCORE, "a", "s3://"]),
        (slam_asr, ["compare", "a", "b", "--output", "s3:///x"]),
    ],
)
def test_no_option_takes_an_address_without_a_bucket(command, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "names no bucket" in sentence(command, options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real_input("B32-address-without-bucket")
@pytest.mark.parametrize(
    ("command", "options", "name"),
    [
        (run_locally, ["demo", "--corpus", ""], "--corpus"),
        (compile_command, ["--model", ""], "--model"),
        (submit, ["demo", "--corpus", "s3://b-b/x", "--store", ""], "--store"),
        (slam_asr, [*SCORE, "a", ""], "--parts"),
        (slam_asr, ["compare", "a", "b", "--output", ""], "--output"),
    ],
)
def test_an_empty_option_is_refused_instead_of_meaning_the_working_folder(
    command, options, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert sentence(command, options) == f"{name} is empty: give a value, or leave the option out."
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["corpus", "store", "model"])
def test_no_pipeline_parameter_is_empty_or_without_a_bucket(option):
    places = {"corpus": "s3://b-b/c", "store": "s3://b-b/s", "model": None}
    assert location_parameters(load_cluster("cpu"), **places) == {k: v for k, v in places.items() if v}
    assert "names no bucket" in sentence(
        lambda: location_parameters(load_cluster("cpu"), **places | {option: "s3://"})
    )
    assert f"--{option} is empty" in sentence(
        lambda: location_parameters(load_cluster("cpu"), **places | {option: ""})
    )


def test_a_bucket_is_its_own_folder():
    assert [parent_of(f"s3://bucket{path}") for path in ("", "/", "/a", "/a/b")] == [
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket",
        "s3://bucket/a",
    ]
    assert not is_s3("s3") and not is_s3("s3-data/x") and not is_s3("./s3:/x")
