"""Every kind of checkpoint is recognised by its content; whatever the format, the weights stay the same."""

import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slam_asr.artifacts.checkpoint import (
    BEGINNING,
    DESCRIPTION,
    LATEST,
    Checkpoint,
    all_complete,
    file_name,
    folder_name,
    publish,
)
from slam_asr.artifacts.model_folder import read_adapter, read_config, read_projector
from slam_asr.config.recipe import load_recipe
from slam_asr.conversion import writers
from slam_asr.conversion.zero_checkpoint import find_zero_folder
from slam_asr.errors import UserError
from slam_asr.models.llm import add_lora, load_llm
from slam_asr.models.projector import build_projector
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from slam_asr.storage import sha256_of_file
from tests.conversion.test_slam_llm import checkpoint
from tests.models.test_pickles import Harm

LORA = {"llm.tuning": "lora", "llm.lora.targets": ["q_proj", "v_proj"], "llm.lora.rank": 2}


@pytest.fixture
def recipe(tiny_recipe):
    return load_recipe(str(tiny_recipe))


def weights_of(recipe, seed: int = 3) -> dict[str, torch.Tensor]:
    return build_projector(recipe.projector, 16, 16, seed=seed).state_dict()


def deepspeeds_folder(folder, weights, ranks: int = 2, step: int = 7, prefix: str = "encoder_projector."):
    """Write a checkpoint as ZeRO-2 does: flattened weights, cut into a slice per rank. Return `folder`."""
    folder.mkdir(parents=True)
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    size = -(-len(flat) // ranks)
    padded = torch.nn.functional.pad(flat, (0, size * ranks - len(flat)))
    model = {
        "dp_world_size": ranks,
        "module": {},
        "param_shapes": [{prefix + name: tensor.shape for name, tensor in weights.items()}],
        "optimizer": None,
        "buffer_names": [],
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        state = {
            "single_partition_of_fp32_groups": [padded[rank * size : (rank + 1) * size].clone()],
            "base_optimizer_state": {"state": {0: {"step": torch.tensor(float(step))}}},
        }
        torch.save(
            {"optimizer_state_dict": state}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
    return folder


@pytest.mark.parametrize("named", ["the training's folder", "the step's", "the file of weights"])
def test_a_folder_of_deepspeeds_is_the_same_model_as_slam_llms_file(recipe, tmp_path, named):
    run = tmp_path / "run"
    step = deepspeeds_folder(run / "global_step7", weights_of(recipe))
    deepspeeds_folder(run / "global_step3", weights_of(recipe, seed=9))
    (run / "latest").write_text("global_step7")
    source = {
        "the training's folder": run,
        "the step's": step,
        "the file of weights": step / "mp_rank_00_model_states.pt",
    }[named]
    ours = convert_checkpoint(str(source), str(tmp_path / "ours"), recipe=recipe)
    theirs = convert_checkpoint(
        str(checkpoint(tmp_path / "model.pt", recipe.projector)), str(tmp_path / "theirs"), recipe=recipe
    )
    first, second = (load_file(record.file("projector.safetensors")) for record in (ours, theirs))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert "the same before and after" in ours.summary


def test_an_ambiguous_choice_of_deepspeeds_folders_is_refused(recipe, tmp_path):
    for step in (3, 7):
        deepspeeds_folder(tmp_path / f"global_step{step}", weights_of(recipe))
    with pytest.raises(
        UserError,
        match=r"2 checkpoints and no file `latest`: give the folder of one of them, such as .*global_step7",
    ):
        find_zero_folder(tmp_path)
    (tmp_path / "latest").write_text("global_step9")
    with pytest.raises(UserError, match=r"names global_step9, which is missing"):
        find_zero_folder(tmp_path)


def spoil(folder, change) -> None:
    [path] = folder.glob("*pp_rank_1*")
    content = torch.load(path, weights_only=True)
    change(content["optimizer_state_dict"])
    torch.save(content, path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda s: s["single_partition_of_fp32_groups"].append(torch.zeros(3)),
            r"not from the same checkpoint \(sizes differ\)",
        ),
        (
            lambda s: s["base_optimizer_state"]["state"][0].update(step=torch.tensor(8.0)),
            r"not from the same checkpoint \(step differ\)",
        ),
        (
            lambda s: s.update(fp32_flat_groups=s.pop("single_partition_of_fp32_groups")),
            r"not from the same checkpoint \(ZeRO stage, sizes differ\)",
        ),
        (lambda s: s.pop("single_partition_of_fp32_groups"), "holds no fp32 weights of ZeRO"),
    ],
)
def test_ranks_that_disagree_are_refused_and_named(recipe, tmp_path, change, sentence):
    folder = deepspeeds_folder(tmp_path / "global_step7", weights_of(recipe))
    spoil(folder, change)
    with pytest.raises(UserError, match=sentence) as refused:
        convert_checkpoint(str(folder), str(tmp_path / "model"), recipe=recipe)
    assert "pp_rank_1" in str(refused.value) and not (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize(
    "file",
    [
        "adapter_model.bin",
        "mp_rank_00_model_states.pt",
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "model.pt",
    ],
)
def test_no_code_from_a_pickle_runs_in_any_file(recipe, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    folder = deepspeeds_folder(tmp_path / "global_step7", weights_of(recipe))
    harm = Harm(os.system, "touch it-ran")
    content = {"optimizer_state_dict": harm, "module": harm, "encoder_projector.x": harm}
    torch.save(content, folder / file)
    source = folder / file if file == "model.pt" else folder
    adapter = str(folder) if file == "adapter_model.bin" else None
    with pytest.raises(UserError, match=r"posix\.system"):
        convert_checkpoint(str(source), str(tmp_path / "model"), recipe=recipe, adapter=adapter)
    assert not (tmp_path / "it-ran").exists()


def test_a_model_can_be_copied_and_copied_in_half_precision(recipe, tmp_path):
    model = convert_checkpoint(
        str(checkpoint(tmp_path / "model.pt", recipe.projector)), str(tmp_path / "model"), recipe=recipe
    )
    copy = convert_checkpoint(model.folder, str(tmp_path / "copy"))
    half = convert_checkpoint(model.folder, str(tmp_path / "half"), half=True)
    assert (tmp_path / "copy" / "config.json").read_bytes() == (
        tmp_path / "model" / "config.json"
    ).read_bytes()
    weights = {
        name: read_projector(record.folder, read_config(record.folder)).state_dict()
        for name, record in (("model", model), ("copy", copy), ("half", half))
    }
    for name, tensor in weights["model"].items():
        assert torch.equal(weights["copy"][name], tensor) and torch.equal(
            weights["half"][name], tensor.bfloat16().float()
        )


def with_lora(tiny_recipe, tmp_path, precision: str):
    base = load_recipe(str(tiny_recipe)).llm.name
    torch.manual_seed(11)
    drawn = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    with torch.no_grad():
        for weights in drawn.parameters():
            if weights.dim() > 1:
                weights.mul_(8)  # with small initial weights, the adapter would hardly change the output
    drawn.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    recipe = load_recipe(
        str(tiny_recipe), {**LORA, "training.precision": precision, "llm.name": str(tmp_path / "base")}
    )
    llm = load_llm(recipe.llm.name, torch.float32)
    add_lora(llm, recipe.llm.lora, seed=1)
    generator = torch.Generator().manual_seed(5)
    # The initial B is zero, and an adapter without effect would prove nothing.
    adapter = {
        f"llm.base_model.model.{n}": 0.3 * torch.randn(p.shape, generator=generator)
        for n, p in llm.named_parameters()
        if ".lora_" in n
    }
    return recipe, llm, checkpoint(tmp_path / "model.pt", recipe.projector, **adapter), adapter


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_merged_llm_computes_the_logits_of_llm_and_adapter(tiny_recipe, tmp_path, precision):
    recipe, llm, file, adapter = with_lora(tiny_recipe, tmp_path, precision)
    record = convert_checkpoint(str(file), str(tmp_path / "llm"), to="llm", recipe=recipe)
    llm.load_state_dict(
        {name.removeprefix("llm.base_model.model."): tensor for name, tensor in adapter.items()}, strict=False
    )
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        expected, found = llm.eval()(ids).logits, load_llm(record.folder, torch.float32).eval()(ids).logits
        before = load_llm(recipe.llm.name, torch.float32).eval()(ids).logits
    error, effect = (found - expected).abs().max(), (before - expected).abs().max()
    assert error < effect * (1e-5 if precision == "fp32" else 0.05), (error, effect)
    assert "before" in record.summary
    # The projector is not in the result.
    parameters = sum(tensor.numel() for tensor in adapter.values())
    assert record.metrics["parameters"] == parameters and record.summary.startswith("adapter of "), record
    # A model folder with an adapter gives the same merged LLM.
    model = convert_checkpoint(str(file), str(tmp_path / "model"), recipe=recipe)
    again = convert_checkpoint(model.folder, str(tmp_path / "again"), to="llm")
    name = "model.safetensors"
    assert again.file(name).read_bytes() == record.file(name).read_bytes()


def test_a_training_run_in_its_beginning_is_not_converted(tmp_path):
    folder = tmp_path / "checkpoints"
    publish(str(folder), Checkpoint(7, 0, 7, "ddp", 1, {}, phase=BEGINNING), keep=1)
    with pytest.raises(UserError, match="is still in its beginning"):
        convert_checkpoint(str(tmp_path), str(tmp_path / "model"))


def test_an_adapter_can_be_written_in_half_precision(tiny_recipe, tmp_path):
    recipe, _, file, _ = with_lora(tiny_recipe, tmp_path, "fp32")
    models = [
        convert_checkpoint(str(file), str(tmp_path / name), recipe=recipe, half=name == "half")
        for name in ("complete", "half")
    ]
    complete, half = (read_adapter(model.folder) for model in models)
    assert complete and complete.keys() == half.keys()
    for name, tensor in complete.items():
        assert half[name].dtype == torch.bfloat16 and torch.equal(half[name], tensor.bfloat16())
    # Copying the model that is in half precision loses no further precision.
    copy = convert_checkpoint(models[1].folder, str(tmp_path / "copy"))
    assert all(torch.equal(t, half[n].float()) for n, t in read_adapter(copy.folder).items())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_adapter_in_its_own_folder_gives_the_same_model_as_one_in_the_file(tiny_recipe, tmp_path, suffix):
    recipe, _, file, adapter = with_lora(tiny_recipe, tmp_path, "fp32")
    together = convert_checkpoint(str(file), str(tmp_path / "together"), recipe=recipe)
    folder = tmp_path / "peft_ckpt"
    folder.mkdir()
    weights = {
        name.removeprefix("llm.").replace(".default.", "."): tensor for name, tensor in adapter.items()
    }
    (save_file if suffix == "safetensors" else torch.save)(weights, folder / f"adapter_model.{suffix}")
    alone = checkpoint(tmp_path / "alone.pt", recipe.projector)
    apart = convert_checkpoint(str(alone), str(tmp_path / "apart"), recipe=recipe, adapter=str(folder))
    for part in ("projector.safetensors", "adapter/adapter_model.safetensors"):
        assert apart.file(part).read_bytes() == together.file(part).read_bytes()
    with pytest.raises(UserError, match="holds no LoRA adapter"):
        convert_checkpoint(str(alone), str(tmp_path / "none"), recipe=recipe, adapter=str(tmp_path))


def test_an_llm_merged_wrongly_is_not_published(tiny_recipe, tmp_path, monkeypatch):
    recipe, _, file, _ = with_lora(tiny_recipe, tmp_path, "fp32")
    write = writers.write_trained_llm
    monkeypatch.setattr(
        writers,
        "write_trained_llm",
        lambda folder, parts: write(folder, replace(parts, llm={n: 0 * t for n, t in parts.llm.items()})),
    )
    with pytest.raises(UserError, match="is not what the checkpoint holds: the loss"):
        convert_checkpoint(str(file), str(tmp_path / "llm"), to="llm", recipe=recipe)
    assert not (tmp_path / "llm" / "config.json").exists() and not (tmp_path / "llm" / "stage.json").exists()


def test_a_frozen_llm_is_not_written(recipe, tmp_path):
    with pytest.raises(UserError, match="has no trained LLM to write"):
        convert_checkpoint(
            str(checkpoint(tmp_path / "model.pt", recipe.projector)),
            str(tmp_path / "llm"),
            to="llm",
            recipe=recipe,
        )


def write_training(folder, recipe, tiny_recipe, seeds=(1, 2, 3)) -> str:
    """Write a training run with complete checkpoints and an unfinished one; return its folder."""
    for number, seed in enumerate(seeds, start=1):
        step = folder / "checkpoints" / folder_name(10 * number)
        step.mkdir(parents=True)
        name = file_name("weights", 0, 1)
        save_file(
            {f"projector.{key}": tensor for key, tensor in weights_of(recipe, seed).items()}, step / name
        )
        description = {
            "step": 10 * number,
            "epoch": 0,
            "updates": 10 * number,
            "engine": "ddp",
            "processes": 1,
            "inputs": {},
        }
        description["files"] = {
            name: {"bytes": (step / name).stat().st_size, "sha256": sha256_of_file(step / name)}
        }
        (step / DESCRIPTION).write_text(json.dumps(description))
        (folder / "checkpoints" / LATEST).write_text(step.name)
    (folder / "checkpoints" / folder_name(99)).mkdir()
    (folder / "recipe.yaml").write_text(tiny_recipe.read_text())
    facts = {"encoder_fingerprint": {}, "llm_sha256": "x"}
    (folder / "stage.json").write_text(
        json.dumps({"summary": "", "facts": facts, "stage": "train", "inputs": {"a": 1}})
    )
    return str(folder)


def test_an_average_is_the_mean_of_all_complete_checkpoints(recipe, tiny_recipe, tmp_path):
    training = write_training(tmp_path / "training", recipe, tiny_recipe)
    assert [found.step for found in all_complete(f"{training}/checkpoints")] == [10, 20, 30]
    record = convert_checkpoint(training, str(tmp_path / "mean"), which="average")
    found = load_file(record.file("projector.safetensors"))
    for name, tensor in found.items():
        expected = torch.stack([weights_of(recipe, seed)[name] for seed in (1, 2, 3)]).mean(0)
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    assert read_config(record.folder).training["averaged_steps"] == "10, 20, 30"
    latest = load_file(convert_checkpoint(training, str(tmp_path / "latest")).file("projector.safetensors"))
    assert all(torch.equal(latest[name], weights_of(recipe, 3)[name]) for name in latest)


def test_an_adapter_beside_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="smollm2-135m contains its adapter itself"):
        convert_checkpoint("whisper-tiny.en-smollm2-135m", str(tmp_path / "m"), adapter=str(tmp_path))
