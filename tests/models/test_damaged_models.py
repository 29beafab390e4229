"""A damaged, quantised or mixed-up model is refused in one sentence before any weight is loaded."""

import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slam_asr.config.recipe import Encoder, Llm, load_recipe
from slam_asr.errors import ModelError, UserError
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import load_llm, require_usable_llm
from slam_asr.pretrained.load_weights import load_weights
from slam_asr.pretrained.weight_checks import require_sound_files
from slam_asr.stages.extract_features import extract_features
from slam_asr.stages.plan import plan
from slam_asr.stages.train import train
from tests.models.test_pickles import Harm
from tests.random_inputs import number_of, random_choices, within_a_second

WEIGHTS = "model.safetensors"


def change_json(path: Path, **values) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | values), encoding="utf-8")


def in_two_files(folder: Path, kind: str = WEIGHTS) -> list[Path]:
    """Divide a model's weights into two files with an index; return the two."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    stem, suffix = kind.split(".")
    files = [folder / f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    weight_map = {name: files[i % 2].name for i, name in enumerate(sorted(tensors))}
    for file in files:
        part = {name: t for name, t in tensors.items() if weight_map[name] == file.name}
        if suffix == "bin":
            torch.save(part, file)
        else:
            save_file(part, file, metadata={"format": "pt"})
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def with_integers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = next(n for n in tensors if n.endswith("q_proj.weight"))
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / WEIGHTS, metadata={"format": "pt"})


def with_index(folder: Path, text: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(text)


def with_more_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {"more": len(vocabulary)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def as_pickle(folder: Path, content=None) -> Path:
    torch.save(content or load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    return folder / "pytorch_model.bin"


QUANTISED = {
    "gptq": lambda f: change_json(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    "awq": lambda f: change_json(f / "config.json", quantization_config={"quant_method": "awq", "bits": 4}),
    "bitsandbytes": lambda f: change_json(
        f / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "quantize_config.json": lambda f: change_json(f / "quantize_config.json", bits=4),
}
INDEXES = {"bad_index": '{"weight_map":', "no_map": "{}", "list": "[]", "number": '{"weight_map": {"a": 1}}'}
DAMAGES = {
    **{
        name: (damage, "is quantised .*give the model from which it was made")
        for name, damage in QUANTISED.items()
    },
    **{
        name: (lambda f, text=text: with_index(f, text), "index.json is damaged .*fetch the model again")
        for name, text in INDEXES.items()
    },
    "integers": (with_integers, "q_proj.weight as I8, so the LLM is quantised"),
    "cut off": (lambda f: truncate(f / WEIGHTS), "model.safetensors is damaged or cut off"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "model.safetensors is damaged or cut off"),
    "a missing file": (
        lambda f: in_two_files(f)[1].unlink(),
        "00002-of-00002.safetensors, which its index names",
    ),
    "the same file twice": (lambda f: shutil.copy(*in_two_files(f)), "which the index places in it"),
    "the same pickle twice": (
        lambda f: shutil.copy(*in_two_files(f, "pytorch_model.bin")),
        "which the index places in it",
    ),
    "a file cut off": (lambda f: truncate(in_two_files(f)[1]), "00002-of-00002.safetensors is damaged"),
    "a pickle cut off": (lambda f: truncate(as_pickle(f)), "pytorch_model.bin is damaged"),
    "a pointer of Git LFS": (
        lambda f: as_pickle(f).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        ),
        "pytorch_model.bin is no file of weights: fetch the model again",
    ),
    "a harmful pickle": (
        lambda f: as_pickle(f, {"w": Harm(os.system, "exit 1")}),
        "pytorch_model.bin holds posix.system, which no checkpoint needs",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "lacks weights"),
    "another architecture": (
        lambda f: change_json(f / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "do not fit its config.json",
    ),
    "another size": (lambda f: change_json(f / "config.json", hidden_size=32), "do not fit its config.json"),
    "config cut off": (lambda f: truncate(f / "config.json"), "has no readable config.json"),
    "config with a wrong size": (
        lambda f: change_json(f / "config.json", num_attention_heads="many"),
        "has no readable config.json|cannot be built as a causal LM",
    ),
    "tokenizer missing": (without_tokenizer, "no tokenizer"),
    "tokenizer cut off": (lambda f: truncate(f / "tokenizer.json"), "no tokenizer that can be read"),
    "tokenizer too large": (with_more_tokens, "1 tokens, such as 'more', for which the LLM has no embedding"),
    "adapter": (lambda f: change_json(f / "adapter_config.json", r=8), "is a LoRA adapter .*merge it"),
}


@pytest.fixture
def llm(tmp_path, tiny_models) -> Path:
    return Path(shutil.copytree(tiny_models["llm"], tmp_path / "llm"))


@pytest.fixture
def encoder(tmp_path, tiny_models) -> Path:
    return Path(shutil.copytree(tiny_models["encoder"], tmp_path / "encoder"))


@pytest.fixture
def manifest(tmp_path) -> str:
    """A manifest whose audio does not exist: the models are checked first."""
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"key": "a", "source": "a.wav", "target": "a", "duration": 1.0}) + "\n")
    return str(path)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_llm_is_refused_in_a_sentence(llm, name):
    damage, sentence = DAMAGES[name]
    damage(llm)
    with pytest.raises(ModelError, match=sentence) as refused:
        require_usable_llm(llm, Llm())
    assert str(llm) in str(refused.value)
    assert "\n" not in refused.value.args[0] and len(str(refused.value)) < 500


@pytest.mark.real_input("B19-llm-folders")
@pytest.mark.parametrize("name", ["gptq", "bad_index", "no_map", "cut off"])
@pytest.mark.parametrize("command", ["plan", "train"])
def test_plan_and_train_refuse_a_damaged_llm(llm, manifest, tmp_path, tiny_recipe, command, name):
    damage, sentence = DAMAGES[name]
    damage(llm)
    recipe = load_recipe(str(tiny_recipe), {"llm.name": str(llm)})
    with pytest.raises(ModelError, match=sentence):
        plan(recipe) if command == "plan" else train(recipe, manifest, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["gptq", "no_map", "cut off", "empty", "a missing file", "the same file twice", "no weights"]
)
def test_a_damaged_encoder_is_refused_in_a_sentence(encoder, name):
    describe_encoder(Encoder(name=str(encoder))).require_weights()
    damage, sentence = DAMAGES[name]
    damage(encoder)
    with pytest.raises(ModelError, match=sentence):
        describe_encoder(Encoder(name=str(encoder))).require_weights()


def test_an_encoder_of_another_size_is_refused_before_extraction(encoder, manifest, tmp_path, tiny_recipe):
    change_json(encoder / "config.json", d_model=32)
    recipe = load_recipe(str(tiny_recipe), {"encoder.name": str(encoder)})
    with pytest.raises(ModelError, match=r"weights of the encoder in .* do not fit its config\.json"):
        extract_features(recipe, [manifest], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_weights_without_permission_are_not_called_damaged(tiny_models):
    with tempfile.TemporaryDirectory() as root:
        folder = shutil.copytree(tiny_models["llm"], Path(root) / "llm")
        for path, mode in ((Path(root), 0o755), (folder, 0o755), (folder / WEIGHTS, 0)):
            path.chmod(mode)
        user = os.geteuid()
        os.seteuid(65_534 if user == 0 else user)  # root may read everything
        try:
            with pytest.raises(PermissionError, match=WEIGHTS):
                require_usable_llm(folder, Llm())
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("kind", [WEIGHTS, "pytorch_model.bin"])
def test_undamaged_weights_in_every_form_are_accepted(llm, kind):
    expected = load_llm(llm, torch.float32).state_dict()
    in_two_files(llm, kind)
    require_usable_llm(llm, Llm())
    found = load_llm(llm, torch.float32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_padding_token_without_embedding_is_accepted(llm):
    tokenizer = require_usable_llm(llm, Llm())
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(llm)
    assert len(require_usable_llm(llm, Llm())) == len(tokenizer)


def damaged_header(content: bytes, chance: random.Random) -> bytes:
    """Change the size, a few bytes, a number or all of a safetensors file's header, or cut off the file."""
    size = int.from_bytes(content[:8], "little")
    header, data = bytearray(content[8 : 8 + size]), content[8 + size :]
    match chance.randrange(5):
        case 0:
            edges = (0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1)
            size = chance.choice((*edges, chance.randrange(2**64)))
        case 1:
            for _ in range(chance.randrange(1, 4)):
                header[chance.randrange(len(header))] = chance.randrange(256)
        case 2:
            number = chance.choice([m for m in range(len(header)) if header[m : m + 1].isdigit()])
            header[number] = ord(chance.choice("0123456789-.e"))
        case 3:
            header = bytearray(chance.randbytes(len(header)))
        case 4:
            data = data[: chance.randrange(len(data))]
    return size.to_bytes(8, "little") + bytes(header) + data


def test_a_random_header_is_read_or_refused_in_a_sentence(llm):
    content = (llm / WEIGHTS).read_bytes()
    chance, refused = random_choices(), 0
    for _ in range(number_of(40)):
        (llm / WEIGHTS).write_bytes(damaged_header(content, chance))
        try:
            with within_a_second():
                require_sound_files(llm, "LLM")
            load_weights(AutoModelForCausalLM, llm, torch.float32, "LLM")
        except UserError as error:
            assert "\n" not in error.args[0]
            refused += 1
    assert refused > number_of(25)
