"""SLAM-LLM's `model.pt` is read with its own recipe, refused with another, and written back bit for bit."""

from pathlib import Path

import pytest
import torch

from slam_asr.artifacts.model_folder import read_config, read_projector
from slam_asr.config.recipe import load_recipe
from slam_asr.errors import UserError
from slam_asr.models.llm import add_lora, load_llm
from slam_asr.models.projector import PROJECTORS, build_projector
from slam_asr.stages.convert_checkpoint import convert_checkpoint


def recipe(tiny_recipe, **overrides):
    return load_recipe(str(tiny_recipe), overrides)


def checkpoint(path: Path, options, widths=(16, 16), **more) -> Path:
    weights = build_projector(options, *widths, seed=3).state_dict()
    torch.save({f"encoder_projector.{n}": t for n, t in weights.items()} | more, path)
    return path


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_converted_file_is_written_back_bit_for_bit(tiny_recipe, tmp_path, kind):
    r = recipe(tiny_recipe, **{"projector.kind": kind, "projector.layers": 1, "projector.queries": 3})
    file = checkpoint(tmp_path / "model.pt", r.projector)
    model = convert_checkpoint(str(file), str(tmp_path / "model"), recipe=r)
    config = read_config(model.folder)
    assert (config.encoder_width, config.llm_width) == (16, 16)
    back = convert_checkpoint(model.folder, str(tmp_path / "back"), to="slam-llm")
    first, second = (torch.load(f, weights_only=True) for f in (file, back.file("model.pt")))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_half_precision_halves_the_size_and_is_read_as_float32(tiny_recipe, tmp_path):
    r = recipe(tiny_recipe)
    file = checkpoint(tmp_path / "model.pt", r.projector)
    complete, half = (
        convert_checkpoint(str(file), str(tmp_path / name), recipe=r, half=name == "half")
        for name in ("complete", "half")
    )
    sizes = [Path(model.file("projector.safetensors")).stat().st_size for model in (complete, half)]
    assert sizes[1] < 0.6 * sizes[0]
    first, second = (
        read_projector(model.folder, read_config(model.folder)).state_dict() for model in (complete, half)
    )
    for name, tensor in first.items():
        assert second[name].dtype == torch.float32
        torch.testing.assert_close(second[name], tensor, rtol=2**-8, atol=0)  # half of bf16's last bit
    with pytest.raises(UserError, match="--half true is only for --to model"):
        convert_checkpoint(half.folder, str(tmp_path / "back"), to="slam-llm", half=True)


def lora_weights(r):
    llm = load_llm(Path(r.llm.name), torch.float32)
    add_lora(llm, r.llm.lora, seed=1)
    return {f"llm.base_model.model.{n}": p.detach() + 1 for n, p in llm.named_parameters() if ".lora_" in n}


def test_lora_weights_survive_the_round_trip(tiny_recipe, tmp_path):
    r = recipe(tiny_recipe, **{"llm.tuning": "lora"})
    file = checkpoint(tmp_path / "model.pt", r.projector, **lora_weights(r))
    model = convert_checkpoint(str(file), str(tmp_path / "model"), recipe=r)
    assert model.file("adapter/adapter_model.safetensors").is_file()
    back = convert_checkpoint(model.folder, str(tmp_path / "back"), to="slam-llm")
    first, second = (torch.load(f, weights_only=True) for f in (file, back.file("model.pt")))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_lora_weights_are_refused_if_the_recipe_has_no_lora(tiny_recipe, tmp_path):
    r = recipe(tiny_recipe, **{"llm.tuning": "lora"})
    file = checkpoint(tmp_path / "model.pt", r.projector, **lora_weights(r))
    with pytest.raises(UserError, match=r"llm\.tuning"):
        convert_checkpoint(str(file), str(tmp_path / "model"), recipe=recipe(tiny_recipe))


@pytest.mark.parametrize(
    ("widths", "named"), [((24, 16), "encoder width 16 to LLM width 16"), ((16, 20), "to LLM width 16")]
)
def test_weights_of_other_widths_are_refused_by_name(tiny_recipe, tmp_path, widths, named):
    r = recipe(tiny_recipe)
    file = checkpoint(tmp_path / "model.pt", r.projector, widths)
    with pytest.raises(UserError, match=named):
        convert_checkpoint(str(file), str(tmp_path / "model"), recipe=r)
    assert not (tmp_path / "model" / "config.json").exists()


def test_a_weight_with_nan_is_refused_by_name(tiny_recipe, tmp_path):
    r = recipe(tiny_recipe)
    file = checkpoint(tmp_path / "model.pt", r.projector)
    weights = torch.load(file, weights_only=True)
    weights["encoder_projector.linear1.bias"][1] = torch.nan
    torch.save(weights, file)
    with pytest.raises(UserError, match=r"linear1\.bias holds values that are not finite"):
        convert_checkpoint(str(file), str(tmp_path / "model"), recipe=r)


def test_without_a_recipe_the_error_names_the_option(tiny_recipe, tmp_path):
    file = checkpoint(tmp_path / "model.pt", recipe(tiny_recipe).projector)
    with pytest.raises(UserError, match="name them with --recipe"):
        convert_checkpoint(str(file), str(tmp_path / "model"))


def test_a_truncated_file_is_refused_in_one_sentence(tiny_recipe, tmp_path):
    file = checkpoint(tmp_path / "model.pt", recipe(tiny_recipe).projector)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError) as raised:
        convert_checkpoint(str(file), str(tmp_path / "model"), recipe=recipe(tiny_recipe))
    assert "\n" not in raised.value.args[0]


def test_weights_of_another_part_are_refused(tiny_recipe, tmp_path):
    r = recipe(tiny_recipe)
    file = checkpoint(tmp_path / "model.pt", r.projector, **{"llm.lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(UserError, match=r"llm\.lm_head\.weight, which is neither"):
        convert_checkpoint(str(file), str(tmp_path / "model"), recipe=r)
