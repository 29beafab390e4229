"""Credentials come from the environment or a mounted secret, may change at any time, and are never shown."""

import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from slam_asr.errors import UserError
from slam_asr.storage import (
    fetch,
    fetch_folder,
    info,
    join,
    local_path,
    read_bytes,
    upload,
    walk,
    write_bytes,
)
from slam_asr.storage.client import client

NAME, PASSWORD, TOKEN = "AKIARECOGNISABLE", "rec0gnisable/secret+key", "recognisable-token"


def in_use() -> tuple[str | None, ...]:
    """Return access key, secret key, token, endpoint and region of the current client."""
    present = client()
    keys = present._request_signer._credentials
    return keys.access_key, keys.secret_key, keys.token, present.meta.endpoint_url, present.meta.region_name


@pytest.fixture
def no_credentials(bucket, s3_server, monkeypatch, tmp_path):
    """Remove all AWS settings from the environment, and set a home folder without any."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def mount(folder: Path, monkeypatch, **files: str) -> Path:
    """Create a secret as Kubernetes mounts it: symbolic links to the folder of its current version."""
    version = folder / f"..{len(list(folder.glob('..*')))}" if folder.exists() else folder / "..0"
    version.mkdir(parents=True)
    for name, content in files.items():
        (version / name).write_text(content + "\n")
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..new").symlink_to(version.name)
    os.replace(folder / "..new", folder / "..data")
    monkeypatch.setenv("SLAM_ASR_S3_SECRET", str(folder))
    return folder


def test_both_sets_of_file_names_in_a_mounted_secret_work(no_credentials, s3_server, monkeypatch, tmp_path):
    host = s3_server.removeprefix("http://")
    mount(tmp_path / "kubeflow", monkeypatch, accesskey="a", secretkey="b", endpoint=host, region="eu-west-3")
    assert in_use() == ("a", "b", None, s3_server, "eu-west-3")
    assert write_bytes("s3://bucket/x", b"x") and read_bytes("s3://bucket/x") == b"x"
    mount(
        tmp_path / "aws",
        monkeypatch,
        AWS_ACCESS_KEY_ID="c",
        AWS_SECRET_ACCESS_KEY="d",
        AWS_SESSION_TOKEN="t",
        AWS_ENDPOINT_URL=s3_server,
        AWS_REGION="eu-north-1",
    )
    assert in_use() == ("c", "d", "t", s3_server, "eu-north-1")


def test_the_environment_takes_precedence_over_a_mounted_secret(
    no_credentials, s3_server, monkeypatch, tmp_path
):
    mount(
        tmp_path / "secret",
        monkeypatch,
        accesskey="a",
        secretkey="b",
        AWS_SESSION_TOKEN="t",
        endpoint="http://elsewhere:1",
        region="eu-west-3",
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert in_use() == ("a", "b", "t", s3_server, "eu-west-3")
    monkeypatch.setenv("AWS_REGION", "us-west-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "c")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "d")
    # The access key of one source is never combined with the secret key or token of the other.
    assert in_use() == ("c", "d", None, s3_server, "us-west-1")


def test_a_changed_secret_is_used(no_credentials, s3_server, monkeypatch, tmp_path):
    folder = mount(tmp_path / "secret", monkeypatch, accesskey="a", secretkey="b", endpoint=s3_server)
    assert in_use()[:2] == ("a", "b")
    mount(folder, monkeypatch, accesskey="c", secretkey="d", endpoint=s3_server)
    assert in_use()[:2] == ("c", "d")


def test_a_changed_credentials_file_is_used(no_credentials, s3_server, monkeypatch, tmp_path):
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for time, (name, password) in enumerate((("a", "b"), ("c", "d"))):
        file.write_text(f"[default]\naws_access_key_id = {name}\naws_secret_access_key = {password}\n")
        os.utime(file, (time, time))
        assert in_use()[:2] == (name, password)


@pytest.mark.parametrize(
    ("files", "message"),
    [(None, "is not a folder"), ({"accesskey": "a"}, "only one of"), ({}, "needs credentials")],
)
def test_an_unusable_secret_is_reported_in_one_sentence(
    no_credentials, s3_server, monkeypatch, tmp_path, files, message
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("SLAM_ASR_S3_SECRET", str(tmp_path / "secret"))
    if files is not None:
        mount(tmp_path / "secret", monkeypatch, **files)
    with pytest.raises(UserError, match=message) as raised:
        read_bytes("s3://bucket/x")
    # Not str(), which escapes line breaks.
    assert "\n" not in raised.value.args[0]


def test_a_request_outlives_the_replacement_of_its_client(bucket, monkeypatch):
    write_bytes("s3://bucket/x", b"content")
    stream = client().get_object(Bucket="bucket", Key="x")["Body"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    assert in_use()[0] == "another" and stream.read() == b"content"


def test_a_forked_process_has_its_own_connections(bucket):
    write_bytes("s3://bucket/x", b"content")
    child = os.fork()
    if child == 0:
        os._exit(0 if read_bytes("s3://bucket/x") == b"content" else 1)
    assert os.waitpid(child, 0)[1] == 0 and read_bytes("s3://bucket/x") == b"content"


def failures(s3_server: str):
    """Yield ways to fail: environment variables, and the server's answer."""
    userinfo = s3_server.replace("//", f"//{NAME}:{PASSWORD}@")
    yield {}, (403, "AccessDenied")
    yield {}, (403, "SignatureDoesNotMatch")
    yield {}, (400, "ExpiredToken")
    yield {}, (400, PASSWORD)
    yield {}, (503, "SlowDown")
    yield {}, "reset"
    yield {}, "cut"
    yield {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, None
    yield {"AWS_ENDPOINT_URL": userinfo}, None
    yield {"AWS_ENDPOINT_URL": f"http://{NAME}:{PASSWORD.replace('/', '%2F')}@127.0.0.1:1"}, None
    yield {"AWS_ENDPOINT_URL": f"{NAME}:{PASSWORD}@127.0.0.1"}, None
    yield {"AWS_ENDPOINT_URL_S3": userinfo}, None
    yield {"AWS_ENDPOINT_URL": f"http://{NAME}:{PASSWORD.replace('/', '')}"}, None
    yield {"AWS_REGION": f"no region {PASSWORD}"}, None
    yield {"AWS_PROFILE": PASSWORD}, None
    yield {"HTTP_PROXY": f"http://{NAME}:{PASSWORD.replace('/', '')}@127.0.0.1:1", "NO_PROXY": ""}, None


@pytest.mark.slow
def test_no_credential_is_ever_shown(faulty_s3, s3_server, monkeypatch, tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    # The test's own server logs its requests.
    caplog.set_level(logging.WARNING, logger="werkzeug")
    monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "0.05")
    (tmp_path / "file").write_bytes(b"content")
    calls = [
        info,
        read_bytes,
        fetch,
        fetch_folder,
        lambda uri: list(walk(uri)),
        lambda uri: write_bytes(uri, b"x"),
        lambda uri: write_bytes(uri, b"x", replace=False),
        lambda uri: upload(tmp_path / "file", uri),
    ]
    shown, failed = [], 0
    for variables, answer in failures(faulty_s3.address):
        faulty_s3.rule = lambda request, answer=answer: answer
        with monkeypatch.context() as patch:
            for name, value in {
                "AWS_ACCESS_KEY_ID": NAME,
                "AWS_SECRET_ACCESS_KEY": PASSWORD,
                "AWS_SESSION_TOKEN": TOKEN,
                **variables,
            }.items():
                patch.setenv(name, value)
            for call in calls:
                try:
                    call("s3://bucket/x")
                except UserError as error:
                    failed += 1
                    assert "\n" not in error.args[0]
                    shown += [
                        "".join(traceback.format_exception_only(error)),
                        "".join(traceback.format_exception(error)),
                    ]
    for uri in (f"s3://{NAME}:{PASSWORD}@bucket/x", f"s3://{NAME}@bucket/x"):
        for call in (*calls, lambda uri: join(uri, "y") and read_bytes(join(uri, "y"))):
            with pytest.raises(UserError) as raised:
                call(uri)
            shown.append("".join(traceback.format_exception(raised.value)))
    for uri in (f"S3://{NAME}:{PASSWORD}@bucket/x", f"http://{NAME}:{PASSWORD}@host/x"):
        with pytest.raises(UserError) as raised:
            local_path(uri)
        shown.append(str(raised.value))
    captured = capfd.readouterr()
    everything = "\n".join([*shown, captured.out, captured.err, caplog.text])
    assert failed > 70
    for secret in (
        PASSWORD,
        PASSWORD.replace("/", ""),
        PASSWORD.replace("/", "%2F"),
        PASSWORD.partition("/")[2],
        TOKEN,
        NAME,
    ):
        assert secret not in everything


def test_the_logging_of_boto3_is_left_unchanged(bucket):
    program = (
        "import logging; from slam_asr.storage import objects, uploads\n"
        "uploads.write('s3://bucket/x', b'x'); objects.read('s3://bucket/x')\n"
        "for name in ('boto3', 'botocore', 'urllib3', 's3transfer'):\n"
        "    logger = logging.getLogger(name)\n"
        "    assert logger.level in (0, 30), name\n"
        "    assert all(isinstance(h, logging.NullHandler) for h in logger.handlers), name\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
