"""OpenAI's own client works unchanged with a real `slam-asr serve`."""

import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest

from slam_asr.artifacts.transcript import as_srt, as_text, as_vtt
from slam_asr.decoding.transcriber import Transcriber, load_transcriber
from tests.conftest import make_tone, write_wav
from tests.media import encoded
from tests.serving.servers import finish, post, serving

pytestmark = pytest.mark.slow
QUIET = np.zeros(16_000, np.float32)
LONG = np.concatenate([x for f in (300, 500, 800) for x in (make_tone(3, frequency=f), QUIET)])


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """A server with segments of at most five seconds, and batches that wait 0.1 s for more requests."""
    with serving(
        model,
        tmp_path_factory.mktemp("t"),
        "--limits.segment",
        "5",
        "--limits.wait",
        "0.1",
        "--names",
        "tiny",
        "whisper-1",
    ) as s:
        yield s


@pytest.fixture(scope="module")
def alone(model) -> Transcriber:
    """The same model without a server."""
    return load_transcriber(model, max_segment_seconds=5)


@pytest.fixture
def long(tmp_path) -> Path:
    return write_wav(tmp_path / "long.flac", LONG)


def test_each_format_for_openais_client_equals_a_transcription_without_a_server(server, alone, long):
    expected = alone.transcribe(str(long))
    assert len(expected.segments) == 3 and expected.text
    client, made = server.client(), {}
    for name in ("json", "text", "srt", "vtt", "verbose_json"):
        with open(long, "rb") as file:
            made[name] = client.audio.transcriptions.create(
                file=file, model="whisper-1", response_format=name, temperature=0
            )
    assert made["json"].text == made["verbose_json"].text == expected.text
    assert made["json"].usage.seconds == 12
    assert made["text"] == as_text(expected)
    assert made["srt"] == as_srt(expected) and made["srt"].startswith("1\n00:00:0")
    assert made["vtt"] == as_vtt(expected) and made["vtt"].startswith("WEBVTT\n\n00:00:0")
    verbose = made["verbose_json"]
    assert verbose.duration == 12 and verbose.language == ""
    assert [(s.id, s.text) for s in verbose.segments] == [
        (i, s.text) for i, s in enumerate(expected.segments)
    ]
    assert [(s.start, s.end) for s in verbose.segments] == [
        (pytest.approx(s.start, abs=1e-3), pytest.approx(s.end, abs=1e-3)) for s in expected.segments
    ]
    assert all(1 <= len(s.tokens) <= 4 and s.temperature == 0 for s in verbose.segments)


def test_segments_are_streamed_to_openais_client(server, alone, long):
    expected = alone.transcribe(str(long))
    client = server.client()
    for name in ("json", "verbose_json"):
        with open(long, "rb") as file:
            events = list(
                client.audio.transcriptions.create(file=file, model="tiny", stream=True, response_format=name)
            )
        *parts, done = events
        assert done.type == "transcript.text.done" and done.text == expected.text
        if name == "json":
            assert "".join(part.delta for part in parts) == expected.text
        else:
            assert [(p.type, p.text) for p in parts] == [
                ("transcript.text.segment", s.text) for s in expected.segments
            ]
            assert [round(p.start) for p in parts] == [round(s.start) for s in expected.segments]


def test_recordings_of_phones_and_browsers_and_silence_are_transcribed(server, alone, tmp_path):
    client = server.client()
    for name in ("m4a", "webm without length"):
        content = encoded(name, make_tone(2, 48_000 if name[0] == "w" else 44_100, 400)[:, None])
        (tmp_path / "a").write_bytes(content)
        made = client.audio.transcriptions.create(file=("a", content), model="tiny")
        assert made.text == alone.transcribe(str(tmp_path / "a")).text
    silence = write_wav(tmp_path / "silence.wav", QUIET)
    assert client.audio.transcriptions.create(file=silence, model="tiny").text == ""


def test_requests_share_batches_and_each_gets_its_own_text(server, alone, tmp_path):
    """Durations identify the recordings, because the tiny model may write the same text for all of them."""
    files = [
        write_wav(tmp_path / f"{n}.wav", make_tone(1 + n / 8, frequency=200 + 90 * n)) for n in range(24)
    ]
    expected = [(t.text, t.duration) for t in map(alone.transcribe, map(str, files))]
    before = [server.metric(f"slam_asr_batch_segments_{name}") for name in ("sum", "count")]
    client = server.client()

    def ask(file: Path) -> tuple[str, float]:
        made = client.audio.transcriptions.create(file=file, model="tiny", response_format="verbose_json")
        return made.text, made.duration

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, files)) == expected
    segments, batches = (
        server.metric(f"slam_asr_batch_segments_{name}") - b
        for name, b in zip(("sum", "count"), before, strict=True)
    )
    assert segments == 24 and batches < 20


def test_models_and_probes(server):
    client = server.client()
    assert [m.id for m in client.models.list()] == ["tiny", "whisper-1"]
    assert client.models.retrieve("whisper-1").owned_by == "slam-asr"
    with pytest.raises(openai.NotFoundError, match="There is no model gpt-5 here"):
        client.models.retrieve("gpt-5")
    assert server.get("/health")[0] == server.get("/ready")[0] == 200
    assert server.metric('slam_asr_requests_total{status="200"}') > 0
    assert server.metric("slam_asr_audio_seconds_total") > 1
    status, schema = server.get("/openapi.json")
    assert status == 200 and "multipart/form-data" in schema
    status, text = server.get("/nothing")
    assert status == 404 and text.startswith('{"error":{"message":"Not Found.')


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "gpt-4o"}, openai.NotFoundError, "There is no model gpt-4o here: use tiny"),
        ({"response_format": "diarized_json"}, openai.BadRequestError, "use one of json, text, srt"),
        ({"temperature": 0.7}, openai.BadRequestError, "temperature can only be 0"),
        ({"language": "English please"}, openai.BadRequestError, "write it as ISO 639-1"),
        ({"timestamp_granularities": ["word"]}, openai.BadRequestError, "no times of words"),
        ({"include": ["logprobs"]}, openai.BadRequestError, "has no log probabilities"),
        ({"stream": True, "response_format": "srt"}, openai.BadRequestError, "srt cannot be streamed"),
        ({"file": ("a.wav", b"no audio")}, openai.BadRequestError, "a.wav cannot be read as wav, flac"),
        ({"file": ("a.wav", b"")}, openai.BadRequestError, "a.wav is empty"),
        ({"file": ("../b\n.wav", b"RIFF")}, openai.BadRequestError, r"^Error code.*b_0A\.wav (cannot|ends)"),
    ],
)
def test_unsupported_parameters_and_damaged_files_are_refused_in_a_sentence(
    server, tone, options, error, message
):
    with pytest.raises(error, match=message) as raised:
        server.client().audio.transcriptions.create(**({"file": tone, "model": "tiny"} | options))
    assert "Traceback" not in str(raised.value)


def test_a_truncated_file_is_refused_with_and_without_streaming(server, long):
    content = long.read_bytes()[:-2000]
    for options in ({}, {"stream": True}):
        with pytest.raises(openai.APIError, match=r"is damaged|ends too early"):
            list(server.client().audio.transcriptions.create(file=("a", content), model="tiny", **options))


def test_parameters_without_an_effect_are_named_in_a_header(server, tone):
    made = server.client().audio.transcriptions.with_raw_response.create(
        file=tone, model="tiny", prompt="Kubeflow", language="de"
    )
    assert made.headers["x-ignored-parameters"] == "language, prompt"
    made = server.client().audio.transcriptions.with_raw_response.create(file=tone, model="tiny")
    assert "x-ignored-parameters" not in made.headers


def test_a_request_without_a_form_or_without_a_file_is_refused(server):
    for body, kind, message in (
        (b"{}", "application/json", "There is no file"),
        (b"junk", "multipart/form-data; boundary=b", "The form cannot be read"),
        (b"junk", "multipart/form-data", "The form cannot be read"),
    ):
        request = urllib.request.Request(
            f"{server.url}/v1/audio/transcriptions", body, {"Content-Type": kind}
        )
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(request, timeout=20)
        assert raised.value.code == 400 and message in raised.value.read().decode()


def test_pages_of_other_sites_are_refused(server, tone):
    answer = finish(post(server, tone.read_bytes(), {"Origin": "https://elsewhere.example"}))
    assert answer.startswith("HTTP/1.1 403") and "elsewhere.example may not use" in answer
    assert finish(post(server, tone.read_bytes(), {"Origin": server.url})).startswith("HTTP/1.1 200")


def test_logs_have_no_text_no_traceback_and_no_warning(server, alone, long):
    server.client().audio.transcriptions.create(file=long, model="tiny")
    text = alone.transcribe(str(long)).text
    for line in server.lines:
        assert text not in line and "Traceback" not in line and "warning" not in line
    assert any(re.match(r"200 in \d+\.\d\d s, 12\.0 s of audio, 3 segments$", line) for line in server.lines)
