"""Weights that DeepSpeed's zero_to_fp32.py wrote are converted; incomplete checkpoints are refused."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from slam_asr.config.recipe import load_recipe
from slam_asr.conversion.zero_checkpoint import fp32_weights
from slam_asr.errors import ModelError, UserError
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from tests.conversion.test_kinds import deepspeeds_folder, weights_of
from tests.random_inputs import number_of, random_choices, within_a_second


@pytest.fixture
def recipe(tiny_recipe):
    return load_recipe(str(tiny_recipe))


@pytest.fixture
def step(recipe, tmp_path):
    return deepspeeds_folder(tmp_path / "run" / "global_step7", weights_of(recipe))


def consolidated(step, out, **options):
    """Write a checkpoint's weights with DeepSpeed's own script; return the folder `out`."""
    for path in step.glob("*.pt"):
        # `deepspeeds_folder` writes only what our conversion reads, but the script needs more keys.
        content = torch.load(path, weights_only=True)
        if "optimizer_state_dict" in content:
            content["optimizer_state_dict"] |= {"zero_stage": 2, "partition_count": 2}
        else:
            content |= {"ds_version": "0.19.0", "shared_params": {}, "frozen_param_shapes": None}
        torch.save(content, path)
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    convert_zero_checkpoint_to_state_dict(str(step.parent), str(out), tag=step.name, **options)
    return out


FORMS = {
    "a pickle": {},
    "pickles": {"max_shard_size": "1KB"},
    "safetensors": {"safe_serialization": True},
    "several safetensors": {"safe_serialization": True, "max_shard_size": "1KB"},
}


@pytest.mark.real_input("B22-checkpoint-folders")
@pytest.mark.parametrize("form", FORMS)
def test_weights_from_zero_to_fp32_give_the_same_model(recipe, step, tmp_path, form):
    out = consolidated(step, tmp_path / "out", **FORMS[form])
    assert bool(list(out.glob("*.index.json"))) == ("max_shard_size" in FORMS[form])
    made = convert_checkpoint(str(out), str(tmp_path / "model"), recipe=recipe)
    weights = load_file(made.file("projector.safetensors"))
    expected = weights_of(recipe)
    assert weights.keys() == expected.keys() and all(torch.equal(weights[n], t) for n, t in expected.items())
    if form == "safetensors":
        again = convert_checkpoint(str(out / "model.safetensors"), str(tmp_path / "again"), recipe=recipe)
        assert load_file(again.file("projector.safetensors")).keys() == expected.keys()


@pytest.mark.real_input("B22-checkpoint-folders")
def test_a_folder_with_slam_llms_file_is_read(recipe, tmp_path):
    folder = tmp_path / "asr_epoch_1_step_1000"
    folder.mkdir()
    torch.save({f"encoder_projector.{n}": t for n, t in weights_of(recipe).items()}, folder / "model.pt")
    made = convert_checkpoint(str(folder), str(tmp_path / "model"), recipe=recipe)
    weights = load_file(made.file("projector.safetensors"))
    assert all(torch.equal(weights[n], t) for n, t in weights_of(recipe).items())


def refusal(recipe, checkpoint, tmp_path) -> str:
    with pytest.raises(UserError) as refused:
        convert_checkpoint(str(checkpoint), str(tmp_path / "model"), recipe=recipe)
    assert "\n" not in refused.value.args[0] and not (tmp_path / "model" / "config.json").exists()
    return str(refused.value)


@pytest.mark.real_input("B22-checkpoint-folders")
def test_a_missing_file_is_named(recipe, tmp_path):
    assert f"There is no file or folder {tmp_path}/no.pt" in refusal(recipe, tmp_path / "no.pt", tmp_path)


@pytest.mark.real_input("B22-checkpoint-folders")
def test_half_precision_does_not_replace_the_fp32_weights_of_zero(recipe, step, tmp_path):
    for path in step.glob("*optim_states.pt"):
        path.unlink()
    assert "0 of 2 optimiser shards" in refusal(recipe, step, tmp_path)


def test_half_precision_weights_are_taken_only_with_a_note(tmp_path, capsys):
    model = {"module": {"w": torch.ones(2).bfloat16()}, "optimizer": None, "buffer_names": []}
    torch.save(model, tmp_path / "mp_rank_00_model_states.pt")
    assert fp32_weights(tmp_path)["w"].dtype == torch.float32
    assert "no fp32 weights; its bfloat16 weights are converted" in capsys.readouterr().out


def test_frozen_weights_are_refused_with_the_option_that_leaves_them_out(recipe, tmp_path):
    weights = {f"encoder_projector.{n}": t for n, t in weights_of(recipe).items()}
    torch.save(weights | {"llm.model.norm.weight": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    assert "--exclude_frozen_parameters" in refusal(recipe, tmp_path, tmp_path)


@pytest.mark.parametrize("form", ["several safetensors", pytest.param("pickles", marks=pytest.mark.slow)])
def test_shards_that_are_missing_repeated_or_truncated_are_refused(recipe, step, tmp_path, form):
    out = consolidated(step, tmp_path / "out", **FORMS[form])
    first, second, *_ = sorted(file for file in out.iterdir() if "-of-" in file.name)
    content = second.read_bytes()
    second.unlink()
    assert second.name in refusal(recipe, out, tmp_path)
    shutil.copy(first, second)
    assert "which the index places in it" in refusal(recipe, out, tmp_path)
    for size in (0, 7, len(content) // 2, len(content) - 1):
        second.write_bytes(content[:size])
        assert second.name in refusal(recipe, out, tmp_path)
    second.write_bytes(content)
    assert convert_checkpoint(str(out), str(tmp_path / "model"), recipe=recipe)


def spoil(content: dict, chance: random.Random) -> None:
    """Remove or replace a random value in nested dictionaries and lists."""
    while True:
        key = chance.choice(list(content) if isinstance(content, dict) else range(len(content)))
        inner = content[key]
        if isinstance(inner, dict | list) and inner and chance.random() < 0.7:
            content = inner
            continue
        if chance.random() < 0.5:
            del content[key]
        else:
            content[key] = chance.choice([None, -1, "x", [], {}, torch.zeros(3), torch.zeros(0)])
        return


def test_a_random_change_of_deepspeeds_files_is_read_or_refused_in_a_sentence(recipe, step):
    files = sorted(step.glob("*.pt"))
    originals = {file: file.read_bytes() for file in files}
    chance, refused = random_choices(), 0
    for _ in range(number_of(60)):
        file = chance.choice(files)
        content = torch.load(file, weights_only=True)
        spoil(content, chance)
        torch.save(content, file)
        try:
            with within_a_second():
                weights = fp32_weights(step)
            assert all(torch.is_tensor(weights[name]) for name in weights)
        except ModelError as error:
            assert "\n" not in error.args[0]
            refused += 1
        file.write_bytes(originals[file])
    assert refused > number_of(20)
