"""Plans agree with published sizes. More memory or sharding never makes a plan worse. No model is loaded."""

import dataclasses

import pytest

from slam_asr.config.recipe import load_recipe, shipped_recipes
from slam_asr.errors import UserError
from slam_asr.planning.memory import Load, training_memory
from slam_asr.planning.shapes import describe, encoder_flops
from slam_asr.stages.plan import plan


@pytest.fixture(autouse=True)
def no_models(monkeypatch, tmp_path):
    """A machine without models and without access to the hub."""
    monkeypatch.setenv("SLAM_ASR_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def shapes(name, **overrides):
    return describe(load_recipe(name, overrides))


def test_sizes_are_the_published_ones():
    wavlm, whisper = shapes("wavlm-large-vicuna-7b"), shapes("whisper-large-v2-vicuna-7b")
    assert wavlm.projector_parameters == 18_880_512
    assert wavlm.llm_parameters == 6_738_415_616  # Vicuna's and Llama 2's, as the model hub counts them
    assert whisper.projector_parameters == pytest.approx(21.5e6, rel=1e-3)
    assert shapes("wavlm-large-llama-2-70b").llm_parameters == 68_976_648_192
    assert shapes("hubert-xlarge-ft-vicuna-7b").encoder_parameters == pytest.approx(964e6, rel=0.01)
    # FLOPs of one 30-s window, and of one second of audio.
    assert encoder_flops(whisper.encoder, 480_000) == pytest.approx(2.27e12, rel=0.02)
    assert encoder_flops(wavlm.encoder, 12 * 16_000) / 12 == pytest.approx(39.5e9, rel=0.1)


@pytest.mark.slow
def test_every_shipped_recipe_can_be_planned_without_its_models(capsys):
    for name in shipped_recipes():
        assert plan(load_recipe(name), gpus=8).memory.total > 0
    assert "proposed:" in capsys.readouterr().out


def test_planned_flops_of_a_thousand_hours_are_plausible_for_the_published_time():
    # If an epoch takes the published four hours on four A100 GPUs (312 TFLOP/s each), the planned FLOPs are
    # 8 % (WavLM) and 16 % (Whisper) of the peak.
    result = plan(load_recipe("wavlm-large-vicuna-7b", {"training.epochs": 1}), gpus=4, hours=1000)
    whisper = plan(load_recipe("whisper-large-v2-vicuna-7b", {"training.epochs": 1}), gpus=4, hours=1000)
    shares = [p.stages["train"].flops / (4 * 3600 * 4 * 312e12) for p in (result, whisper)]
    assert all(0.05 < share < 0.2 for share in shares) and shares[1] > shares[0]


def test_the_feature_cache_has_50_frames_per_second_or_whispers_complete_window():
    bytes_per_hour = plan(load_recipe("wavlm-large-vicuna-7b"), hours=100).cache_bytes / 100
    assert bytes_per_hour == pytest.approx(3600 * 50 * 1024 * 2, rel=0.01)
    # 281,241 utterances of LibriSpeech, each with 1,500 frames.
    assert plan(load_recipe("whisper-large-v2-vicuna-7b")).cache_bytes == pytest.approx(1.08e12, rel=0.01)


@pytest.mark.slow
def test_more_memory_never_stops_a_plan_from_fitting_and_the_proposal_fits():
    recipe = load_recipe("whisper-large-v2-vicuna-7b")
    fits = [plan(recipe, gpus=4, gpu_memory=g).fits for g in (8, 16, 24, 40, 80, 141)]
    assert fits == sorted(fits) and not fits[0] and fits[-1]
    for memory in (16, 24, 80):
        proposal = plan(recipe, gpus=4, gpu_memory=memory).proposal
        assert plan(load_recipe("whisper-large-v2-vicuna-7b", proposal), gpus=4, gpu_memory=memory).fits


@pytest.mark.slow
def test_a_plan_that_cannot_fit_has_no_proposal(capsys):
    result = plan(load_recipe("wavlm-large-llama-2-70b"), gpus=1, gpu_memory=80)
    assert not result.fits and result.proposal == {}
    assert "no combination of options fits" in capsys.readouterr().out


@pytest.mark.slow
def test_full_fine_tuning_of_70b_needs_host_memory_on_eight_gpus():
    result = plan(
        load_recipe("wavlm-large-llama-2-70b-full", {"training.offload_optimizer": False}),
        gpus=8,
        gpu_memory=80,
    )
    assert not result.fits
    assert plan(load_recipe("wavlm-large-llama-2-70b-full"), gpus=8, gpu_memory=80).fits


def test_each_zero_stage_takes_no_more_memory_than_the_previous_one():
    base, load = shapes("wavlm-large-vicuna-7b-full"), Load(4, 190, 123, 47)
    totals = []
    for stage in range(4):
        training = dataclasses.replace(base.recipe.training, zero_stage=stage, offload_optimizer=False)
        recipe = dataclasses.replace(base.recipe, training=training)
        totals.append(training_memory(dataclasses.replace(base, recipe=recipe), load, 8).total)
    assert totals == sorted(totals, reverse=True) and totals[0] > 3 * totals[3]


def test_gradient_checkpointing_saves_activation_memory():
    load = Load(8, 360, 300, 40)
    without, checkpointed = (
        training_memory(
            shapes("whisper-large-v2-vicuna-7b", **{"training.gradient_checkpointing": g}), load, 1
        ).activations
        for g in (False, True)
    )
    assert checkpointed < without / 5


def test_an_unknown_model_is_refused_in_one_line():
    with pytest.raises(UserError, match="nobody/nothing") as raised:
        plan(load_recipe("demo", {"llm.name": "nobody/nothing"}))
    assert "\n" not in raised.value.args[0]


def test_numbers_that_are_not_positive_are_refused():
    with pytest.raises(UserError, match="--hours is 0"):
        plan(load_recipe("demo"), hours=0)


def test_the_command_takes_the_recipe_as_first_argument(capsys):
    from slam_asr.cli import main

    main(["plan", "wavlm-large-vicuna-7b", "--gpus", "2", "--gpu-memory", "24", "--training.zero_stage", "3"])
    out = capsys.readouterr().out
    assert "each of 2 GPUs in training, ZeRO stage 3" in out and "24 GB" in out


def test_a_plan_counts_the_steps_flops_and_memory_of_a_beginning(capsys):
    options = {"training.epochs": 1, "projector.beginning.steps": 500}
    without = plan(load_recipe("wavlm-large-vicuna-7b", options), gpus=4)
    assert without.beginning is None and "beginning" not in capsys.readouterr().out
    begun = plan(load_recipe("wavlm-large-vicuna-7b", options | {"projector.beginning.kind": "ctc"}), gpus=4)
    assert begun.steps == without.steps + 500 and begun.memory == without.memory
    more = begun.stages["train"].flops - without.stages["train"].flops
    # Without the LLM's layers, a step of the beginning takes far fewer FLOPs.
    assert 0 < more / 500 < 0.05 * without.stages["train"].flops / without.steps
    # Projector with gradients and optimiser, 32,000 embeddings in bf16, logits of the audio, and CUDA.
    audio = begun.load.rows * begun.load.audio
    expected = 18_880_512 * 20 + 32_000 * 4096 * 2 + audio * 32_000 * 20 + 1.5e9
    assert begun.beginning.total == pytest.approx(expected, rel=0.03)
    assert "in the beginning, with at most 32000 tokens" in capsys.readouterr().out


def test_a_proposal_fits_in_the_beginning_too():
    """With gradient checkpointing, the beginning takes more memory than the rest of training."""
    options = {
        "projector.beginning.kind": "ctc",
        "training.positions_per_step": 200_000,
        "training.gradient_checkpointing": True,
    }
    recipe = load_recipe("whisper-tiny-tinyllama", options | {"training.positions_per_batch": 200_000})
    result = plan(recipe, gpus=1, gpu_memory=24)
    assert not result.fits and result.beginning.total > result.memory.total
    proposed = plan(load_recipe("whisper-tiny-tinyllama", options | result.proposal), gpus=1, gpu_memory=24)
    assert proposed.fits and proposed.beginning.total < 24e9
