"""Models are copied to a bucket once, and can be loaded from the address that `copy_models` returns."""

from pathlib import Path

import pytest

from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.pretrained.copy_to_bucket import copy_models
from slam_asr.pretrained.locate import locate_model
from slam_asr.pretrained.model_files import weights_sha256


def test_copied_models_are_the_same_and_copied_once(faulty_s3, tiny_recipe, capsys):
    faulty_s3.fault_rate = 0
    recipe = load_recipe(str(tiny_recipe))
    encoder, llm = copy_models("s3://bucket/models", recipe)
    assert llm.startswith("s3://bucket/models/")
    for copied, original in ((encoder, recipe.encoder.name), (llm, recipe.llm.name)):
        assert weights_sha256(locate_model(copied)) == weights_sha256(locate_model(original))
    assert faulty_s3.count("PUT", "config.json") > 0
    faulty_s3.clear()
    assert copy_models("s3://bucket/models", recipe) == [encoder, llm]
    assert faulty_s3.requests and {r.method for r in faulty_s3.requests} <= {"GET", "HEAD"}
    assert capsys.readouterr().out.count("already at") == 2


def test_an_interrupted_copy_is_repeated(bucket, tiny_recipe):
    recipe = load_recipe(str(tiny_recipe))
    _, llm = copy_models("s3://bucket/models", recipe)
    for name in ("config.json", "model.safetensors"):
        bucket.Object(f"{llm.removeprefix('s3://bucket/')}/{name}").delete()
    copy_models("s3://bucket/models", recipe)
    assert weights_sha256(locate_model(llm)) == weights_sha256(locate_model(recipe.llm.name))


def test_names_on_the_hub_keep_their_owner(bucket, monkeypatch, tiny_models):
    monkeypatch.setattr(
        "slam_asr.pretrained.copy_to_bucket.locate_model", lambda name: Path(tiny_models["llm"])
    )
    assert copy_models("s3://bucket/models", models=["lmsys/vicuna-7b-v1.5"]) == [
        "s3://bucket/models/lmsys/vicuna-7b-v1.5"
    ]


@pytest.mark.parametrize(
    ("to", "models", "sentence"),
    [
        ("/data", ["x/y"], "--to is /data: give an s3:// prefix"),
        ("s3://bucket/models", [], "No model is named: give a recipe, or --models"),
    ],
)
def test_mistakes_are_reported_before_anything_is_fetched(to, models, sentence):
    with pytest.raises(UserError, match=sentence):
        copy_models(to, models=models)
