"""A checkpoint has only the parts that the recipe trains, and decoding uses all of them."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from slam_asr.artifacts import checkpoint
from slam_asr.artifacts.model_folder import read_adapter, read_config, read_projector
from slam_asr.config.recipe import load_recipe
from slam_asr.decoding.model import Model
from slam_asr.errors import UserError
from slam_asr.models.precision import DTYPES
from slam_asr.stages.build_manifest import build_manifest
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from slam_asr.stages.decode import decode
from slam_asr.stages.extract_features import extract_features
from slam_asr.stages.score import score
from slam_asr.stages.train import train

KINDS = {
    "lora": {"llm.tuning": "lora", "llm.learning_rate": 5e-4, "training.zero_stage": 2},
    "full-llm": {"llm.tuning": "full", "llm.learning_rate": 1e-5, "training.gradient_checkpointing": True},
    "full-llm-offload": {
        "llm.tuning": "full",
        "training.zero_stage": 2,
        "training.offload_optimizer": True,
        "training.precision": "bf16",
    },
    "full-encoder": {"encoder.tuning": "full", "encoder.learning_rate": 2e-5, "training.zero_stage": 3},
    "q-former": {"projector.kind": "q-former", "projector.queries": 5, "projector.layers": 1},
    "cov1d-linear": {"projector.kind": "cov1d-linear", "training.zero_stage": 3},
    "drawn-prompts": {"llm.training_prompts": ["Write it down. ", "What is said? "]},
}
if os.environ.get("SLAM_ASR_SOAK"):
    # Each of these two options is already in another kind.
    KINDS["lora-bf16"] = {"llm.tuning": "lora", "training.precision": "bf16"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_everything_trained_reaches_decoding(tiny_recipe, tiny_corpus, tmp_path, monkeypatch, kind):
    recipe = load_recipe(str(tiny_recipe), {"training.learning_rate": 1e-3, **KINDS[kind]})
    built = build_manifest(recipe, str(tiny_corpus), str(tmp_path / "m"))
    features = extract_features(recipe, [built.folder], str(tmp_path / "f"))
    manifest = str(built.file("train.jsonl"))
    trained = train(recipe, manifest, str(tmp_path / "t"), features.folder, str(built.file("dev.jsonl")))
    assert trained.facts["steps"] == 3
    weights = checkpoint.require(str(tmp_path / "t" / "checkpoints")).tensors("weights")
    parts = {name.partition(".")[0] for name in weights}
    tuned = {part for part in ("llm", "encoder") if getattr(recipe, part).tuning != "frozen"}
    assert parts == {"projector"} | tuned
    trains_more = trained.facts["trained_parameters"] > trained.facts["projector_parameters"]
    assert trains_more == bool(tuned)
    if recipe.llm.tuning == "lora":
        assert all(".lora_" in n for n in weights if n.startswith("llm."))
        assert any(t.any() for n, t in weights.items() if ".lora_B" in n)

    model = convert_checkpoint(trained.folder, str(tmp_path / "model"))
    config = read_config(model.folder)
    for name, tensor in read_projector(model.folder, config).state_dict().items():
        torch.testing.assert_close(tensor, weights[f"projector.{name}"])
    if recipe.llm.tuning == "lora":
        adapter = read_adapter(model.folder)
        assert {f"llm.{n}" for n in adapter} == {n for n in weights if n.startswith("llm.")}
        assert json.loads(model.file("adapter/adapter_config.json").read_text())["r"] == 8
    if tuned and recipe.llm.tuning != "lora":
        [part] = tuned
        base = load_file(f"{recipe.llm.name if part == 'llm' else recipe.encoder.name}/model.safetensors")
        own = load_file(model.file(f"{part}/model.safetensors"))
        assert own.keys() == base.keys()
        assert any(not torch.equal(own[n].float(), base[n].float()) for n in own)
    loaded, load = [], Model.load
    monkeypatch.setattr(Model, "load", lambda *a, **options: loaded.append(load(*a, **options)) or loaded[-1])
    decoded = decode(recipe, model.folder, [built.folder], str(tmp_path / "d"), features.folder)
    used = {f"{part}.{n}": t for part in parts for n, t in getattr(loaded[0], part).named_parameters()}
    for name, tensor in weights.items():
        # A tuned LLM is written in the precision of the training.
        own_llm = name.startswith("llm.") and recipe.llm.tuning == "full"
        written = tensor.to(DTYPES[recipe.training.precision]) if own_llm else tensor
        assert torch.equal(used[name], written.to(used[name].dtype)), name
    scored = score(recipe, model.folder, [decoded.folder], str(tmp_path / "s"))
    assert scored.metrics["wer"] > 0
    if recipe.encoder.tuning == "frozen":
        decode(recipe, model.folder, [built.folder], str(tmp_path / "a"))
        texts = [(tmp_path / d / "hypotheses.jsonl").read_text() for d in ("d", "a")]
        assert texts[0] == texts[1]

    if not tuned or recipe.llm.tuning == "lora":
        theirs = convert_checkpoint(model.folder, str(tmp_path / "slam-llm"), to="slam-llm")
        back = convert_checkpoint(str(theirs.file("model.pt")), str(tmp_path / "back"), recipe=recipe)
        for name, tensor in load_file(model.file("projector.safetensors")).items():
            assert torch.equal(tensor, load_file(back.file("projector.safetensors"))[name])
        assert read_adapter(model.folder).keys() == read_adapter(back.folder).keys()


def test_layers_that_the_llm_does_not_have_are_refused_before_training(tiny_recipe, tiny_corpus, tmp_path):
    recipe = load_recipe(str(tiny_recipe), {"llm.tuning": "lora", "llm.lora.targets": ["q_prj"]})
    built = build_manifest(recipe, str(tiny_corpus), str(tmp_path / "m"))
    features = extract_features(recipe, [built.folder], str(tmp_path / "f"))
    with pytest.raises(
        UserError, match=r"names q_prj, a layer that this LLM does not have; did you mean q_proj\?"
    ):
        train(recipe, str(built.file("train.jsonl")), str(tmp_path / "t"), features.folder)


def test_a_prompt_and_answer_without_positions_for_audio_are_refused_before_training(
    tiny_recipe, tiny_corpus, tmp_path
):
    recipe = load_recipe(str(tiny_recipe), {"decoding.max_new_tokens": 2040})
    built = build_manifest(recipe, str(tiny_corpus), str(tmp_path / "m"))
    features = extract_features(recipe, [built.folder], str(tmp_path / "f"))
    with pytest.raises(
        UserError, match=r"holds 2048 LLM positions: the prompt .* which leaves none for audio"
    ):
        train(recipe, str(built.file("train.jsonl")), str(tmp_path / "t"), features.folder)


def test_an_llm_without_a_tokenizer_is_refused_before_training(tiny_recipe, tiny_corpus, tmp_path):
    recipe = load_recipe(str(tiny_recipe))
    folder = tmp_path / "llm"
    shutil.copytree(recipe.llm.name, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    built = build_manifest(recipe, str(tiny_corpus), str(tmp_path / "m"))
    features = extract_features(recipe, [built.folder], str(tmp_path / "f"))
    with pytest.raises(UserError, match="has no tokenizer"):
        train(
            load_recipe(str(tiny_recipe), {"llm.name": str(folder)}),
            str(built.file("train.jsonl")),
            str(tmp_path / "t"),
            features.folder,
        )


@pytest.mark.slow
def test_a_training_run_starts_from_projector_and_adapter_of_another_model(
    tiny_recipe, tiny_corpus, tmp_path, capsys
):
    lora = {"llm.tuning": "lora", "llm.lora.rank": 4}
    recipe = load_recipe(str(tiny_recipe), lora)
    built = build_manifest(recipe, str(tiny_corpus), str(tmp_path / "m"))
    features = extract_features(recipe, [built.folder], str(tmp_path / "f"))
    manifest = str(built.file("train.jsonl"))
    first = convert_checkpoint(
        train(recipe, manifest, str(tmp_path / "t"), features.folder).folder, str(tmp_path / "first")
    )
    options = lora | {
        "projector.init_from": first.folder,
        "training.max_steps": 1,
        "training.warmup_steps": 0,
        "training.learning_rate": 1e-12,
    }
    record = train(load_recipe(str(tiny_recipe), options), manifest, str(tmp_path / "u"), features.folder)
    second = convert_checkpoint(record.folder, str(tmp_path / "second"))
    for part in ("projector.safetensors", "adapter/adapter_model.safetensors"):
        before, after = (load_file(model.file(part)) for model in (first, second))
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-8)
    assert all(tensor.any() for name, tensor in before.items() if "lora_B" in name), "nothing was learnt"
    assert {"init_from", "init_adapter"} <= record.inputs.keys()
    assert "warning" not in capsys.readouterr().out
    frozen = load_recipe(str(tiny_recipe), options | {"llm.tuning": "frozen"})
    without = train(frozen, manifest, str(tmp_path / "w"), features.folder)
    assert "init_adapter" not in without.inputs
    assert "was trained with a LoRA adapter, which is left out here" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"adapter of .* does not fit the recipe's: set llm\.lora\.rank to 4\."
    ):
        train(
            load_recipe(str(tiny_recipe), options | {"llm.lora.rank": 8}),
            manifest,
            str(tmp_path / "v"),
            features.folder,
        )
    with pytest.raises(
        UserError, match=r"projector\.init_from: .* does not fit a linear projector with k = 5"
    ):
        train(
            load_recipe(str(tiny_recipe), options | {"projector.hidden": 9}),
            manifest,
            str(tmp_path / "v"),
            features.folder,
        )
    with pytest.raises(UserError, match="holds no model"):
        train(
            load_recipe(str(tiny_recipe), options | {"projector.init_from": str(tmp_path)}),
            manifest,
            str(tmp_path / "v"),
            features.folder,
        )
