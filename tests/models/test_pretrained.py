"""From every source, a model's folder is complete or absent."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from slam_asr.errors import UserError
from slam_asr.pretrained import hub as hub_module
from slam_asr.pretrained import locate as pretrained
from slam_asr.pretrained import model_files
from slam_asr.pretrained.hub import Unavailable
from slam_asr.pretrained.locate import locate_config, locate_model
from slam_asr.pretrained.model_files import weights_sha256

DEMO_HINT = "python -m demo.models openai/whisper-tiny.en in a checkout of slam-asr"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache, an empty cache of the hub, and no access to the hub; return the models' folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SLAM_ASR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "_further_sources", [])
    return tmp_path / "cache" / "models"


def write_folder(folder: Path, weights: bytes = b"weights") -> Path:
    """Write files with the names of those of a model, and return their folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


# Where models are searched for


def test_a_local_folder_is_used_unchanged(tmp_path):
    folder = write_folder(tmp_path / "mine")
    assert locate_model(str(folder)) == folder


def test_a_local_folder_without_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        locate_model(str(tmp_path))


@pytest.mark.parametrize("name", ["./none", "/none/there", "a/b/c", "two words", ""])
def test_a_path_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match=r"check the path|config\.json"):
        locate_model(name)


def test_the_cache_moves_with_slam_asr_cache(tmp_path, monkeypatch):
    cached = write_folder(tmp_path / "elsewhere" / "models" / "team--model")
    with pytest.raises(UserError):
        locate_model("team/model")
    monkeypatch.setenv("SLAM_ASR_CACHE", str(tmp_path / "elsewhere"))
    assert locate_model("team/model") == cached


def test_the_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.delenv("SLAM_ASR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrained.cache_folder() == tmp_path / "slam-asr"


def test_the_hubs_own_cache_is_used_if_complete(tmp_path):
    repository = tmp_path / "hub" / "models--team--model"
    folder = write_folder(repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert locate_model("team/model") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="No model team/model"):
        locate_model("team/model")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("openai/whisper-tiny.ne", "did you mean openai/whisper-tiny.en"),
        ("HuggingFaceTB/SmolLM2-135M-instruct", "did you mean HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("team/nothing-like-it", "it is not in the cache"),
        ("double--dash", "SLAM_ASR_CACHE"),
    ],
)
def test_an_unknown_model_is_refused_in_one_sentence(name, hint):
    with pytest.raises(UserError) as error:
        locate_model(name)
    assert str(error.value).startswith(f"No model {name}")
    assert hint in str(error.value)
    assert "\n" not in error.value.args[0]


def test_without_the_hub_the_sentence_names_the_program_that_fetches_the_demos_models():
    for locate in (locate_model, locate_config):
        with pytest.raises(UserError) as error:
            locate("openai/whisper-tiny.en")
        assert "the hub is switched off (HF_HUB_OFFLINE)" in str(error.value)
        assert DEMO_HINT in str(error.value)
        with pytest.raises(UserError) as error:
            locate("team/model")
        assert "demo.models" not in str(error.value)


def test_a_further_source_is_tried_after_the_hub_and_replaces_the_hint(cache):
    def from_shelf(name: str, folder: Path) -> None:
        if name != "team/model":
            raise Unavailable("the shelf is empty")
        write_folder(folder)

    pretrained.add_source(from_shelf)
    assert locate_model("team/model") == locate_config("team/model") == cache / "team--model"
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE\) and the shelf is empty; give") as error:
        locate_model("openai/whisper-tiny.en")
    assert "demo.models" not in str(error.value)
    assert not [f for f in cache.iterdir() if f.name.endswith(".partial")]


# The hub


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """A hub with one model, `team/model`: its address, its files, and the names of downloaded files."""
    files: dict[str, bytes] = {}
    downloaded: list[str] = []
    commit = "c" * 40

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            name = path.rpartition("/")[2]
            if path.startswith("/api/models/team/model/tree/"):
                self.answer(
                    json.dumps(
                        [{"type": "file", "path": f, "size": len(c), "oid": "0"} for f, c in files.items()]
                    ).encode()
                )
            elif path.startswith("/api/models/team/model"):
                siblings = [{"rfilename": f} for f in files]
                self.answer(json.dumps({"id": "team/model", "sha": commit, "siblings": siblings}).encode())
            elif path.startswith("/team/model/resolve/") and name in files:
                if self.command == "GET":
                    downloaded.append(name)
                self.answer(files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def answer(self, body: bytes, **headers: str) -> None:
            self.send_response(200)
            for key, value in ({"Content-Length": str(len(body)), "X-Repo-Commit": commit} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        # `shutdown` waits for the end of the poll interval, which is half a second by default.
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", files, downloaded
        server.shutdown()


def fetch_from(endpoint: str, name: str) -> subprocess.CompletedProcess:
    """Run the program in a new process: the hub's client reads the hub's address when it is imported."""
    # A process that starts warm has already imported the hub's client, with another address.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "SLAM_ASR_WARM"))}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_CACHE": os.environ["SLAM_ASR_CACHE"] + "/hub",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "slam_asr.pretrained.locate", name]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_hub_gives_safetensors_and_no_pickles(cache, hub):
    endpoint, files, downloaded = hub
    files |= {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": b"weights",
        "pytorch_model.bin": b"pickle",
        "README.md": b"text",
        "flax_model.msgpack": b"flax",
    }
    done = fetch_from(endpoint, "team/model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"team/model: {cache / 'team--model'}"
    assert sorted(f.name for f in (cache / "team--model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert sorted(downloaded) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_hub_gives_pickles_where_there_is_nothing_else(cache, hub):
    endpoint, files, _ = hub
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    files |= {
        "config.json": b"{}",
        "tokenizer.model": b"x",
        "pytorch_model.bin.index.json": json.dumps(index).encode(),
        "pytorch_model-1.bin": b"1",
        "pytorch_model-2.bin": b"2",
    }
    done = fetch_from(endpoint, "team/model")
    assert done.returncode == 0, done.stderr
    assert len(model_files.weight_files(cache / "team--model")) == 2


def test_a_name_that_the_hub_does_not_know_is_refused_in_one_sentence(hub):
    done = fetch_from(hub[0], "team/other")
    assert done.returncode == 2
    assert done.stderr.startswith("slam-asr: error: No model team/other: ")
    assert "the hub has no model of that name" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_reported_in_one_sentence():
    done = fetch_from("http://127.0.0.1:9", "team/other")
    assert done.returncode == 2
    assert "the hub cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Digests


def test_one_file_has_its_own_digest_and_several_have_one_that_ignores_their_names(tmp_path):
    single = write_folder(tmp_path / "single")
    assert weights_sha256(single) == hashlib.sha256(b"weights").hexdigest()
    sharded = []
    for folder, order in (("a", [b"1", b"2"]), ("b", [b"2", b"1"])):
        shards = write_folder(tmp_path / folder)
        (shards / "model.safetensors").unlink()
        (shards / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": "m1", "y": "m2"}})
        )
        for number, content in enumerate(order, 1):
            (shards / f"m{number}").write_bytes(content)
        sharded.append(weights_sha256(shards))
    assert sharded[0] == sharded[1] != hashlib.sha256(b"1").hexdigest()


def test_a_digest_is_computed_once_and_again_when_the_weights_change(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "model")
    first = weights_sha256(folder)
    with monkeypatch.context() as patch:
        patch.setattr(model_files, "sha256_of_file", lambda path: pytest.fail("read again"))
        assert weights_sha256(folder) == first
    (folder / "model.safetensors").write_bytes(b"changed")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert weights_sha256(folder) == hashlib.sha256(b"changed").hexdigest()


def test_a_digest_does_not_need_a_writable_folder(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "model")

    def refuse(path: Path, value: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(model_files, "write_json", refuse)
    assert weights_sha256(folder) == hashlib.sha256(b"weights").hexdigest()


def test_a_folder_without_all_weights_has_no_digest(tmp_path):
    folder = write_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="lacks weights"):
        weights_sha256(folder)


# Failures of the hub


class FlakyHub:
    """A stand-in for a call of the hub's client: it raises each of the failures, then succeeds."""

    def __init__(self, *failures: Exception) -> None:
        self.failures, self.calls = list(failures), 0

    def __call__(self) -> str:
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return "the answer"


def error_of_status(status: int) -> Exception:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils._http import httpx2 as httpx

    response = httpx.Response(status, request=httpx.Request("GET", "https://hub"))
    return HfHubHTTPError(str(status), response=response)


def no_connection() -> Exception:
    from huggingface_hub.utils._http import httpx2 as httpx

    return httpx.ConnectError("name resolution failed")


@pytest.mark.parametrize(
    ("failures", "pauses"),
    [
        ((no_connection(),), [1]),
        ((no_connection(), no_connection()), [1, 2]),
        ((error_of_status(503), error_of_status(429), error_of_status(500)), [1, 5, 15]),
    ],
)
def test_calls_of_the_hub_are_repeated_with_growing_pauses_after_failures_that_may_be_temporary(
    monkeypatch, capsys, failures, pauses
):
    slept: list[float] = []
    monkeypatch.setattr(hub_module.time, "sleep", slept.append)
    flaky = FlakyHub(*failures)
    assert hub_module._repeated(flaky, "team/model", hub_module.FIRST_PAUSES) == "the answer"
    assert slept == pauses
    assert capsys.readouterr().out.count("team/model: the hub fails (") == len(failures)


@pytest.mark.parametrize(
    ("failures", "calls"),
    [
        ([error_of_status(404)], 1),
        ([error_of_status(403)], 1),
        ([ValueError("a defect")], 1),
        ([no_connection() for _ in range(9)], 3),
        ([error_of_status(503) for _ in range(9)], 6),
    ],
)
def test_permanent_and_lasting_failures_of_the_hub_are_raised(monkeypatch, failures, calls):
    monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: None)
    flaky, first = FlakyHub(*failures), failures[0]
    with pytest.raises(type(first)):
        hub_module._repeated(flaky, "team/model", hub_module.FIRST_PAUSES)
    assert flaky.calls == calls


def test_an_incomplete_download_is_not_taken_for_a_model(cache, monkeypatch, tmp_path):
    """If the hub does not answer, its client returns the folder that an earlier, incomplete download left."""
    import huggingface_hub

    sibling = [type("File", (), {"rfilename": name}) for name in ("config.json", "model.safetensors")]
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "model_info",
        lambda *_, **__: type("Info", (), {"siblings": sibling, "sha": "c"}),
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: None)
    with pytest.raises(Unavailable, match="the hub cannot be reached"):
        hub_module.from_hub("team/model", tmp_path / "model")
