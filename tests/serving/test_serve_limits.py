"""Limits, keys and the end of `slam-asr serve`.

The server refuses requests beyond its limits and clients without a key, cancels the work for clients that
have disconnected, and answers the requests in progress before it ends.
"""

import io
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import openai
import psutil
import pytest

from tests.conftest import make_tone, write_wav
from tests.serving.servers import Server, finish, post, serving

pytestmark = pytest.mark.slow
KEY = "a-key-that-is-long-enough"


@pytest.fixture(scope="module")
def strict(model, tmp_path_factory):
    """A server for one small request at a time. Its batches start too late for any request's deadline."""
    limits = {"requests": 1, "seconds": 3, "megabytes": 1.5, "deadline": 4, "wait": 10}
    options = [word for name, value in limits.items() for word in (f"--limits.{name}", str(value))]
    with serving(model, tmp_path_factory.mktemp("t"), "--host", "0.0.0.0", *options) as s:
        yield s


def test_uploads_that_are_too_large_or_too_long_are_refused(strict, tmp_path):
    create = strict.client().audio.transcriptions.create
    with pytest.raises(openai.APIStatusError, match=r"lasts 4\.00 s, longer than 3 s") as raised:
        create(file=write_wav(tmp_path / "a.flac", make_tone(4)), model=strict_name(strict))
    assert raised.value.status_code == 413
    with pytest.raises(openai.APIStatusError, match=r"larger than 1\.5 MB") as raised:
        create(file=("a.wav", bytes(2_400_000)), model=strict_name(strict))
    assert raised.value.status_code == 413
    # An upload without a length in its header is refused as soon as too many bytes have arrived.
    body = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + bytes(3_000_000)
    request = urllib.request.Request(
        f"{strict.url}/v1/audio/transcriptions",
        io.BytesIO(body),
        {"Content-Type": "multipart/form-data; boundary=b", "Transfer-Encoding": "chunked"},
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=20)
    assert error.value.code == 413
    # An upload that announces far too many bytes is refused before it is sent.
    with post(strict, b"", {"Content-Length": str(10**10)}) as connection:
        answer = b"".join(iter(lambda: connection.recv(65_536), b"")).decode()
        assert answer.startswith("HTTP/1.1 413") and "file_too_large" in answer


def strict_name(server: Server) -> str:
    return server.client().models.list().data[0].id


def test_more_requests_than_permitted_are_refused_and_uploads_have_no_name_on_the_disk(strict, tone):
    content = bytes(1_200_000)  # more than the server holds in memory
    with post(strict, content) as uploading:
        strict.wait_for("slam_asr_requests_in_progress", 1)
        end = time.monotonic() + 10
        while not (unnamed := open_files_of(strict)):
            assert time.monotonic() < end, "the upload is in no temporary file"
        assert all(name.endswith("(deleted)") for name in unnamed) and not list(strict.folder.iterdir())
        with pytest.raises(openai.RateLimitError, match="1 requests are in progress") as raised:
            strict.client().audio.transcriptions.create(file=tone, model="any")
        assert raised.value.response.headers["retry-after"] == "1"
        # The upload has only zeros, which are no audio.
        assert finish(uploading).startswith("HTTP/1.1 400")
    strict.wait_for("slam_asr_requests_in_progress", 0)
    assert open_files_of(strict) == [] and not list(strict.folder.iterdir())


def open_files_of(server: Server) -> list[str]:
    """Return the files, named or not, that the server has open in its folder for temporary files."""
    port = int(server.url.rpartition(":")[2])
    (process,) = {
        c.pid for c in psutil.net_connections("tcp4") if c.laddr.port == port and c.status == "LISTEN"
    }
    found = []
    for link in Path(f"/proc/{process}/fd").iterdir():
        try:
            name = os.readlink(link)
        except FileNotFoundError:
            continue
        if name.startswith(str(server.folder)):
            found.append(name)
    return found


def test_a_request_ends_at_its_deadline(strict, tone):
    started = time.monotonic()
    with pytest.raises(openai.APIStatusError, match="not finished within 4 s") as raised:
        # OpenAI's client would repeat a request after an ordinary 504.
        strict.client(max_retries=2).audio.transcriptions.create(file=tone, model=strict_name(strict))
    assert raised.value.status_code == 504 and 4 <= time.monotonic() - started < 8
    with pytest.raises(openai.APIError, match="not finished within 4 s"):
        list(strict.client().audio.transcriptions.create(file=tone, model=strict_name(strict), stream=True))
    assert strict.metric("slam_asr_segments_waiting") == strict.metric("slam_asr_requests_in_progress") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_for_a_client_that_disconnects_is_cancelled(strict, tone, stream):
    before = strict.metric('slam_asr_requests_total{status="499"}')
    field = b'\r\n--b\r\nContent-Disposition: form-data; name="stream"\r\n\r\ntrue' if stream else b""
    connection = post(strict, tone.read_bytes() + field)
    connection.sendall(b"\r\n--b--\r\n")
    strict.wait_for("slam_asr_segments_waiting", 1, seconds=4)
    connection.close()
    strict.wait_for('slam_asr_requests_total{status="499"}', before + 1, seconds=3)
    assert strict.metric("slam_asr_segments_waiting") == strict.metric("slam_asr_requests_in_progress") == 0
    # A client that disconnects before the end of its upload is noticed as well.
    connection = post(strict, bytes(1000))
    strict.wait_for("slam_asr_requests_in_progress", 1)
    connection.close()
    strict.wait_for('slam_asr_requests_total{status="499"}', before + 2, seconds=3)


def test_clients_need_a_key_and_requests_in_progress_end_before_the_server(model, tone, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\nanother-key\n")
    with serving(model, tmp_path / "t", "--api-key-file", str(keys), "--limits.wait", "1.5") as server:
        for wrong in ("none", KEY[:-1], f"{KEY}x", f"{KEY} another-key"):
            client = server.client(wrong)
            with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
                client.audio.transcriptions.create(file=tone, model="any")
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        assert server.get("/v1/models")[0] == 401
        assert {server.get(path)[0] for path in ("/health", "/ready", "/metrics", "/")} == {200}
        name = server.client("another-key").models.list().data[0].id
        made = []
        client = server.client(KEY)
        asking = threading.Thread(
            target=lambda: made.append(client.audio.transcriptions.create(file=tone, model=name))
        )
        asking.start()
        server.wait_for("slam_asr_segments_waiting", 1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(OSError):
            urllib.request.urlopen(f"{server.url}/ready", timeout=5)
        asking.join(20)
        assert made and made[0].text
        assert server.process.wait(20) == 0
        assert "finishing 1 requests" in server.lines
        assert not any("warning" in line or KEY in line or "Traceback" in line for line in server.lines)


def test_a_server_without_keys_that_everyone_can_reach_logs_a_warning(strict):
    assert [line for line in strict.lines if line.startswith("warning")] == [
        "warning: everyone who reaches 0.0.0.0 may use this server, because it has no --api-key-file"
    ]
    assert not any("Traceback" in line for line in strict.lines)
