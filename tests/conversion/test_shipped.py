"""Each shipped model can be read, fits its base models, is small, and has a model card."""

import json
import re

import pytest
import torch
from safetensors import safe_open

from slam_asr.artifacts.model_folder import (
    ADAPTER,
    WEIGHTS,
    fetch_model,
    read_adapter,
    read_config,
    read_projector,
    shipped_models,
    write_adapter,
)
from slam_asr.config.recipe import load_recipe, shipped_recipes
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import describe_llm, llm_width
from slam_asr.pretrained.locate import locate_model
from slam_asr.pretrained.model_files import weights_sha256

MAX_BYTES = 12e6


def test_the_model_that_the_demo_starts_from_is_shipped():
    assert "whisper-tiny.en-smollm2-135m" in shipped_models()


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_is_small_and_in_half_precision(name):
    folder = fetch_model(name)
    files = [folder / WEIGHTS, *folder.glob(f"{ADAPTER}/*.safetensors")]
    assert sum(file.stat().st_size for file in files) < MAX_BYTES
    for weights in files:
        with safe_open(weights, "pt") as file:
            dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
            assert dtypes in ({torch.bfloat16}, {torch.float16})
    assert (len(files) == 2) == (read_config(folder).typed_recipe.llm.tuning == "lora")


def test_an_adapter_that_is_read_and_written_is_the_same(tmp_path):
    folder = fetch_model("whisper-base-smollm2-135m")
    recipe = read_config(folder).typed_recipe
    write_adapter(tmp_path, read_adapter(folder), recipe, half=True)
    written, shipped = (path / ADAPTER for path in (tmp_path, folder))
    file = "adapter_model.safetensors"
    assert (written / file).read_bytes() == (shipped / file).read_bytes()
    # The order too: peft itself writes the names in an order that differs from one run to the next.
    for path in (written, shipped):
        config = json.loads((path / "adapter_config.json").read_text())
        assert config["target_modules"] == recipe.llm.lora.targets


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_models())
def test_the_recipe_of_a_shipped_model_starts_from_that_model(name):
    trained, recipe = read_config(fetch_model(name)).typed_recipe, load_recipe(name)
    assert recipe.projector.init_from == name
    assert (
        recipe.encoder.name,
        recipe.encoder.frames,
        recipe.llm.name,
        recipe.llm.template,
        recipe.llm.prompt,
        recipe.llm.answer_prefix,
        recipe.llm.tuning,
        recipe.llm.lora.targets,
        recipe.llm.lora.rank,
    ) == (
        trained.encoder.name,
        trained.encoder.frames,
        trained.llm.name,
        trained.llm.template,
        trained.llm.prompt,
        trained.llm.answer_prefix,
        trained.llm.tuning,
        trained.llm.lora.targets,
        trained.llm.lora.rank,
    )
    assert (recipe.projector.kind, recipe.projector.downsampling, recipe.projector.hidden) == (
        trained.projector.kind,
        trained.projector.downsampling,
        trained.projector.hidden,
    )
    for other in (load_recipe(n) for n in shipped_recipes()):
        assert not other.projector.init_from or other.projector.init_from in shipped_models()


@pytest.mark.parametrize("name", shipped_models())
def test_the_card_of_a_shipped_model_describes_data_training_and_results(name):
    card = (fetch_model(name) / "README.md").read_text()
    for part in (
        "## Data",
        "## How it was trained",
        "## Word error rate",
        "hours",
        "test-other",
        "shuffled audio",
        "slam-asr train",
        "Licence",
    ):
        assert part in card, part
    assert not re.search(r"/(?:tmp|work|root|home)/", card)
    (rate,) = re.findall(r"type: wer, value: ([\d.]+)", card)
    assert f"| {rate} % |" in card, "the front matter and the table have the same word error rate"


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_fits_the_base_models_that_are_fetched(demo_models, name):
    config = read_config(fetch_model(name))
    recipe = config.typed_recipe
    spec, llm = describe_encoder(recipe.encoder), locate_model(recipe.llm.name)
    assert spec.fingerprint() == config.encoder and weights_sha256(llm) == config.llm_sha256
    projector = read_projector(fetch_model(name), config)
    (position,) = projector([torch.zeros(recipe.projector.downsampling, spec.width)])
    assert position.shape == (llm_width(describe_llm(llm)),) and torch.isfinite(position).all()
