"""A model is rewritten as transformers' own Voxtral without changing what it computes, or refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.models.projector import build_projector
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from tests.conversion.test_huggingface import add_bos, decoded, up_to_end, utterances
from tests.conversion.test_slam_llm import lora_weights


@pytest.fixture(scope="module")
def parts(tiny_models, tmp_path_factory) -> dict[str, str]:
    """Recipe keys of a Whisper whose last LayerNorm has random weights, and an LLM with spare embeddings."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    config = WhisperConfig.from_pretrained(tiny_models["encoder"])
    config.max_source_positions, config.encoder_ffn_dim = 100, 4 * config.d_model
    encoder = AutoModel.from_config(config)
    encoder.encoder.conv1.weight.data *= 50
    norm = encoder.encoder.layer_norm
    norm.weight.data.uniform_(0.5, 2.0)
    norm.bias.data.normal_(0.1, 0.3)
    encoder.save_pretrained(folder / "encoder")
    shutil.copytree(tiny_models["llm"], folder / "llm")
    llm = LlamaForCausalLM.from_pretrained(folder / "llm")
    llm.resize_token_embeddings(264, mean_resizing=False)
    for name, weight in llm.named_parameters():
        weight.data *= 10 if "_proj" in name else 1
    llm.save_pretrained(folder / "llm")
    add_bos(folder / "llm")
    return {
        "encoder.name": str(folder / "encoder"),
        "encoder.frames": "all",
        "features.dtype": "fp32",
        "llm.name": str(folder / "llm"),
        "decoding.max_new_tokens": 8,
    }


def checkpoint(tiny_recipe, folder: Path, options):
    recipe = load_recipe(str(tiny_recipe), options)
    weights = build_projector(recipe.projector, 16, 16, seed=3).state_dict()
    adapter = lora_weights(recipe) if recipe.llm.tuning == "lora" else {}
    more = {name: 0.1 * tensor for name, tensor in adapter.items()}
    torch.save({f"encoder_projector.{n}": 3 * t for n, t in weights.items()} | more, folder / "model.pt")
    return recipe, str(folder / "model.pt")


@pytest.mark.parametrize(
    ("template", "tuning"),
    [
        ("USER: {}\n ASSISTANT:", "frozen"),
        pytest.param("a {audio} {}\n", "lora", marks=pytest.mark.slow),
    ],
)
def test_voxtral_decodes_to_the_same_token_ids(tiny_recipe, parts, tmp_path, template, tuning):
    options = parts | {"llm.template": template, "llm.tuning": tuning, "llm.lora.rank": 2}
    recipe, file = checkpoint(tiny_recipe, tmp_path, options)
    model = convert_checkpoint(file, str(tmp_path / "model"), recipe=recipe, verify=False).folder
    folder = convert_checkpoint(model, str(tmp_path / "voxtral"), to="voxtral").folder
    # Another user may load the folder.
    assert all(file.stat().st_mode & 0o444 == 0o444 for file in (tmp_path / "voxtral").iterdir())
    assert (
        not list(Path(folder).glob("*.py")) and "auto_map" not in (Path(folder) / "config.json").read_text()
    )
    voxtral = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=False)
    assert type(voxtral).__name__ == "VoxtralForConditionalGeneration"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    waves = utterances()
    turns = [[{"role": "user", "content": recipe.llm.prompt}]] * len(waves)
    inputs = tokenizer.apply_chat_template(turns, return_dict=True, return_tensors="pt")
    features = extractor(waves, sampling_rate=16_000, return_tensors="pt")["input_features"]
    for beams, expected in zip((1, 4), decoded(model, (1, 8), (4, 8)), strict=True):
        sequences = voxtral.generate(**inputs, input_features=features, num_beams=beams)
        answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        assert [up_to_end(ids, voxtral.generation_config.eos_token_id) for ids in answers] == expected
        assert len({tuple(ids) for ids in expected}) > 1, "the texts must depend on the audio"


@pytest.mark.parametrize(
    ("options", "condition"),
    [
        ({"encoder.frames": "speech"}, r"all frames of the window \(encoder.frames is speech\)"),
        ({"encoder.long_audio": "split"}, "one window per utterance"),
        (
            {"projector.ctc_weight": 0.5, "projector.drop_blanks": 0.9},
            r"an LLM that reads every position \(projector.drop_blanks is 0.9\)",
        ),
        ({"projector.kind": "cov1d-linear"}, r"a linear projector \(projector.kind is cov1d-linear\)"),
        ({"projector.downsampling": 3}, "at least 4 frames per position"),
        ({"projector.downsampling": 7}, r"a window of 100 frames that projector.downsampling \(7\) divides"),
        (
            {"projector.hidden": 16},
            r"a hidden width of the projector \(projector.hidden, 16\) below the LLM's",
        ),
    ],
)
def test_the_condition_that_fails_is_named(tiny_recipe, parts, tmp_path, options, condition):
    recipe, file = checkpoint(tiny_recipe, tmp_path, parts | options)
    with pytest.raises(UserError, match=f"cannot become a Voxtral, which needs {condition}"):
        convert_checkpoint(file, str(tmp_path / "voxtral"), to="voxtral", recipe=recipe)


def test_an_encoder_whose_constant_is_zero_and_an_llm_without_a_spare_token_are_refused(
    tiny_recipe, tiny_models, parts, tmp_path
):
    recipe, file = checkpoint(tiny_recipe, tmp_path, parts | {"llm.name": tiny_models["llm"]})
    with pytest.raises(UserError, match="has no unused special token"):
        convert_checkpoint(file, str(tmp_path / "voxtral"), to="voxtral", recipe=recipe)
    encoder = Path(shutil.copytree(parts["encoder.name"], tmp_path / "encoder"))
    weights = load_file(encoder / "model.safetensors")
    weights["encoder.layer_norm.bias"].zero_()
    save_file(weights, encoder / "model.safetensors", {"format": "pt"})
    recipe, file = checkpoint(tiny_recipe, tmp_path, parts | {"encoder.name": str(encoder)})
    with pytest.raises(UserError, match="β / γ do not add up to zero"):
        convert_checkpoint(file, str(tmp_path / "voxtral"), to="voxtral", recipe=recipe)
