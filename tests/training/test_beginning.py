"""The beginning of a training run: its loss, its end, exact resumption in both phases, and refused inputs."""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

from slam_asr.artifacts import checkpoint
from slam_asr.artifacts.checkpoint import BEGINNING
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.hypotheses import read_hypotheses
from slam_asr.artifacts.manifest import read_manifest
from slam_asr.artifacts.stage_record import read_record
from slam_asr.config.recipe import load_recipe, settings_that_affect_weights
from slam_asr.decoding.model import open_model
from slam_asr.errors import UserError
from slam_asr.models.ctc import BLANK, BlankFilter
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import load_llm, load_tokenizer
from slam_asr.models.projector import build_projector
from slam_asr.stages.convert_checkpoint import convert_checkpoint
from slam_asr.stages.decode import decode
from slam_asr.stages.train import train
from slam_asr.training.live import read_curve
from slam_asr.training.step_plan import Budget, TrainingPlan
from tests.training.test_resuming import ended, start, succeed, wait_for_step

SOAK = bool(os.environ.get("SLAM_ASR_SOAK"))
BORDER, STEPS = 8, 14
OPTIONS = {
    "projector.beginning.kind": "ctc",
    "projector.beginning.steps": BORDER,
    # The tokens of the tiny models are single characters. CTC needs at least one LLM position per token.
    "projector.downsampling": 1,
    "training.positions_per_step": 150,
    "training.positions_per_batch": 80,
    "training.epochs": 100,
    "training.max_steps": STEPS - BORDER,
    "training.validate_every": 5,
    "training.checkpoint_every": 1,
    "training.checkpoints": STEPS,
}
LORA = {
    "llm.tuning": "lora",
    "llm.lora.dropout": 0.2,
    "projector.dropout": 0.1,
    "projector.masks.time_share": 0.2,
    "projector.masks.time_length": 5,
    "projector.masks.channel_share": 0.2,
    "projector.masks.channel_length": 3,
    "projector.ctc_weight": 0.5,
    # A model this small gives blanks almost no probability, so the threshold is tiny too.
    "projector.drop_blanks": 1e-26,
}


def run(prepared, output: Path, **options):
    recipe, manifests, features = prepared
    return train(
        load_recipe(recipe, OPTIONS | options),
        f"{manifests}/train.jsonl",
        str(output),
        features,
        f"{manifests}/dev.jsonl",
    )


def curve_of(record) -> list[dict]:
    """Return all rows of the curve without `memory`, which differs from run to run."""
    rows = [json.loads(line) for line in Path(record.file("curve.jsonl")).read_text("utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k != "memory"} for row in rows]


def tensors_of(output: Path, step: int) -> dict[str, torch.Tensor]:
    folder = output / "checkpoints" / checkpoint.folder_name(step)
    tensors = {}
    for path in sorted([*folder.glob("weights-*"), *folder.glob("moments-*")]):
        with safe_open(path, "pt") as file:
            tensors |= {f"{path.name}/{key}": file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    """Record and folder of a training run with CTC, dropout and masks in both phases.

    Dropout applies to the encoder's values and to LoRA's inputs.
    """
    output = tmp_path_factory.mktemp("uninterrupted") / "t"
    return run(prepared, output, **LORA), output


@pytest.mark.slow
def test_both_phases_are_steps_of_one_training_run(uninterrupted):
    record, output = uninterrupted
    begun, begun_dev = read_curve(record.file("curve.jsonl"), BEGINNING)
    main, dev = read_curve(record.file("curve.jsonl"))
    assert [row["step"] for row in begun + main] == list(range(1, STEPS + 1))
    assert [row["step"] for row in begun_dev] == [5, BORDER] and [row["step"] for row in dev] == [10, STEPS]
    # Steps have different utterances, so after a few of them the loss need not be lower yet.
    assert all(0 <= row["accuracy"] <= 1 for row in main) and all(row["loss"] > 0 for row in begun)
    assert record.facts["steps"] == STEPS and record.metrics["steps of the beginning"] == BORDER
    assert "Beginning: " in Path(record.file("curves.html")).read_text("utf-8")
    # The beginning trains nothing of the LLM, and the main phase nothing of the head.
    names = [
        {name.partition("/")[2] for name in tensors_of(output, step) if name.startswith("weights")}
        for step in (BORDER, STEPS)
    ]
    assert names[0] - names[1] == {"head.log_sharpness"}
    assert all(".lora_" in name for name in names[1] - names[0]) and names[1] - names[0]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["beginning", "border", "main"])
def test_a_resumed_training_run_is_bit_equal(prepared, uninterrupted, tmp_path, where):
    """After a kill, the pointer `latest` names a checkpoint, and later ones may exist too."""
    record, output = uninterrupted
    # A checkpoint is postponed while another is being written, so not every step has one.
    saved = [c.step for c in checkpoint.all_complete(str(output / "checkpoints"))]
    step = {
        "beginning": saved[0],
        "border": BORDER,
        "main": next(s for s in saved if s > BORDER),
    }[where]
    assert (step < BORDER) == (where == "beginning") and step in saved
    shutil.copytree(output / "checkpoints", tmp_path / "t" / "checkpoints")
    (tmp_path / "t" / "checkpoints" / "latest").write_text(checkpoint.folder_name(step))
    (tmp_path / "t" / "checkpoints" / "best").unlink()
    resumed = run(prepared, tmp_path / "t", **LORA)
    assert curve_of(resumed) == curve_of(record)
    for later in {max(step, BORDER), STEPS}:
        expected, actual = tensors_of(output, later), tensors_of(tmp_path / "t", later)
        assert expected.keys() == actual.keys() and len(expected) > 12
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.skipif(not SOAK, reason="takes minutes: make soak")
def test_kills_at_random_steps_of_both_phases_change_no_bit(prepared, tmp_path):
    border, steps = 40, 80
    options = OPTIONS | LORA | {"projector.beginning.steps": border, "training.max_steps": steps - border}
    options |= {"training.checkpoint_every": 3}
    succeed(start(prepared, tmp_path / "uninterrupted", **options))
    kills = [*random.sample(range(2, border), 4), border, *random.sample(range(border + 1, steps - 5), 4)]
    for step in sorted(kills):
        process = start(prepared, tmp_path / "killed", **options)
        wait_for_step(process, tmp_path / "killed", step)
        process.kill()
        ended(process)
    succeed(start(prepared, tmp_path / "killed", **options))
    folders = [tmp_path / "uninterrupted", tmp_path / "killed"]
    expected, actual = (curve_of(read_record(str(folder))) for folder in folders)
    assert len(expected) > steps and actual == expected
    expected, actual = (tensors_of(folder, steps) for folder in folders)
    assert expected.keys() == actual.keys() and len(expected) > 12
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    print(f"killed after steps {sorted(kills)}")


@pytest.mark.slow
def test_the_best_checkpoint_the_average_and_the_model_are_of_the_main_phase(uninterrupted, tmp_path):
    record, output = uninterrupted
    best = checkpoint.require(str(output / "checkpoints"), "best")
    assert best.step > BORDER and best.dev_loss == min(row["loss"] for row in record.facts["validation"])
    model = convert_checkpoint(str(output), str(tmp_path / "model"))
    head = json.loads(Path(model.file("config.json")).read_text("utf-8"))["training"]["ctc_head"]
    # The beginning has learned the sharpness, and the main phase does not change it.
    learned = tensors_of(output, BORDER)["weights-00000-of-00001.safetensors/head.log_sharpness"].exp()
    assert head["sharpness"] == pytest.approx(float(learned)) and len(head["tokens"]) > 10
    with safe_open(model.file("projector.safetensors"), "pt") as file:
        assert all("head" not in name and "sharpness" not in name for name in file.keys())  # noqa: SIM118
    # A training run that has not finished has the same checkpoints, but no record yet.
    shutil.copytree(output, tmp_path / "unfinished", ignore=shutil.ignore_patterns("stage.json"))
    early = convert_checkpoint(str(tmp_path / "unfinished"), str(tmp_path / "early"))
    assert json.loads(Path(early.file("config.json")).read_text("utf-8"))["training"]["ctc_head"] == head
    mean = convert_checkpoint(str(output), str(tmp_path / "mean"), which="average")
    saved = [c.step for c in checkpoint.all_complete(str(output / "checkpoints")) if c.step > BORDER]
    mean_of = [tensors_of(output, step) for step in saved]
    name = "linear2.weight"
    expected = sum(
        tensors["weights-00000-of-00001.safetensors/projector." + name] for tensors in mean_of
    ) / len(mean_of)
    with safe_open(mean.file("projector.safetensors"), "pt") as file:
        torch.testing.assert_close(file.get_tensor(name), expected)


@pytest.mark.slow
def test_ctcs_share_changes_hypotheses_but_batches_do_not(prepared, uninterrupted, tmp_path):
    model = convert_checkpoint(str(uninterrupted[1]), str(tmp_path / "model")).folder
    texts = {}
    for name, options in {
        "llm": {},
        "batched": {"decoding.ctc_weight": 0.7},
        "single": {"decoding.ctc_weight": 0.7, "decoding.positions_per_batch": 1},
        "greedy": {"decoding.ctc_weight": 0.7, "decoding.beams": 1},
    }.items():
        recipe = load_recipe(prepared[0], {"decoding.max_new_tokens": 12, "decoding.beams": 3} | options)
        record = decode(recipe, model, [f"{prepared[1]}/dev.jsonl"], str(tmp_path / name), prepared[2])
        rows = read_hypotheses(record.file("hypotheses.jsonl"))
        texts[name] = {row.key: row.hypothesis for row in rows}
    assert texts["batched"] == texts["single"] and len(texts["batched"]) > 1
    assert texts["llm"] != texts["batched"] and all(texts["greedy"].values())


@pytest.mark.slow
def test_the_trained_head_finds_blanks_among_other_positions(prepared, uninterrupted, tmp_path):
    model = open_model(convert_checkpoint(str(uninterrupted[1]), str(tmp_path / "model")).folder)
    slam = model.load(model.trained.decoding, with_encoder=False)
    reader = FeatureStore(prepared[2], model.spec.fingerprint(), model.trained.features.dtype)
    features = [reader.read(utterance) for utterance in read_manifest(f"{prepared[1]}/train.jsonl")]
    outputs, head = slam.projector(features), slam.blank_filter.head
    # The tiny models have random weights, so no fixed threshold would divide the positions. The median does.
    scores = head(outputs.float()).log_softmax(1)[:, BLANK].double()
    blanks = BlankFilter(head, float(scores.median().exp())).find(outputs)
    assert 0 < int(blanks.sum()) < len(blanks)


@pytest.mark.slow
def test_the_loss_is_that_of_torchs_ctc_over_all_tokens_of_each_utterance(prepared, tmp_path):
    options = {
        "projector.beginning.dropout": 0.0,
        "projector.beginning.distance_weight": 0.0,
        "projector.beginning.steps": 2,
        "training.max_steps": 1,
        "training.positions_per_step": 10_000,
        "projector.beginning.keep_head": True,
        "training.positions_per_batch": 80,
    }
    record = run(prepared, tmp_path / "t", **options)
    recipe = load_recipe(prepared[0], OPTIONS | options)
    spec = describe_encoder(recipe.encoder)
    utterances = list(read_manifest(f"{prepared[1]}/train.jsonl"))
    reader = FeatureStore(prepared[2], spec.fingerprint(), recipe.features.dtype)
    tokenizer, llm = load_tokenizer(Path(recipe.llm.name)), load_llm(Path(recipe.llm.name), torch.float32)
    # The tokens are bytes, so every character is one token.
    texts = [tokenizer.encode(u.target, add_special_tokens=False) for u in utterances]
    blank = tokenizer.encode("\n", add_special_tokens=False)
    tokens = blank + sorted({t for row in texts for t in row})
    embeddings = llm.get_input_embeddings().weight[tokens]
    size = embeddings.norm(dim=1).mean()
    projector = build_projector(recipe.projector, spec.width, 16, recipe.training.seed)
    total = 0.0
    for utterance, text in zip(utterances, texts, strict=True):
        outputs = projector([reader.read(utterance)])
        logits = -20 * torch.cdist(outputs / size, embeddings / size).square() / 2
        total += functional.ctc_loss(
            logits.log_softmax(1)[:, None],
            torch.tensor([[tokens.index(t) for t in text]]),
            [len(outputs)],
            [len(text)],
            reduction="sum",
        ).item()
    first = read_curve(record.file("curve.jsonl"), BEGINNING)[0][0]
    assert first["loss"] == pytest.approx(total / sum(map(len, texts)), rel=1e-5)
    head = record.facts["ctc_head"]
    assert head["tokens"] == tokens and 0 < abs(head["sharpness"] - 20) < 2


@pytest.mark.slow
def test_losses_do_not_depend_on_processes_engine_or_where_features_are(prepared, tmp_path):
    # Without dropout, because each process draws random numbers of its own.
    options = {
        "projector.beginning.dropout": 0.0,
        "training.learning_rate": 1e-4,
        "projector.ctc_weight": 0.5,
        "projector.drop_blanks": LORA["projector.drop_blanks"],
    }
    runs: dict[str, dict] = {
        "one": {},
        "two": {"training.processes": 2, "training.zero_stage": 3},
        "on the fly": {"training.engine": "ddp", "features.cache": "none"},
        "fsdp": {"training.processes": 2, "training.engine": "fsdp"},
    }
    curves = {
        name: [row["loss"] for phase in (BEGINNING, "main") for row in read_curve(file, phase)[0]]
        for name, more in runs.items()
        for file in [run(prepared, tmp_path / name, **options | more).file("curve.jsonl")]
    }
    assert len(set(curves["one"])) == STEPS
    for name in runs:
        assert curves[name] == pytest.approx(curves["one"], rel=3e-4), name


@pytest.mark.slow
def test_a_beginning_ends_when_the_error_rate_is_low_enough_and_resumes_at_that_border(prepared, tmp_path):
    """Nearly every error rate is below the limit of 1.0, so an early validation ends the beginning."""
    options = {"projector.beginning.until": 1.0, "projector.beginning.steps": 500, "training.max_steps": 4}
    record = run(prepared, tmp_path / "t", **options)
    dev = read_curve(record.file("curve.jsonl"), BEGINNING)[1]
    border = dev[-1]["step"]
    assert 1 - dev[-1]["accuracy"] <= 1.0 and all(1 - row["accuracy"] > 1.0 for row in dev[:-1])
    assert record.facts["steps"] == border + 4 and "ctc_head" not in record.facts
    shutil.copytree(tmp_path / "t" / "checkpoints", tmp_path / "u" / "checkpoints")
    (tmp_path / "u" / "checkpoints" / "latest").write_text(checkpoint.folder_name(border))
    assert curve_of(run(prepared, tmp_path / "u", **options)) == curve_of(record)


def test_a_q_former_and_an_error_rate_without_dev_are_refused(prepared, tmp_path):
    recipe, manifests, features = prepared
    for key, value in (("projector.beginning.kind", "ctc"), ("projector.ctc_weight", 0.5)):
        with pytest.raises(UserError, match="CTC cannot train a q-former"):
            load_recipe(recipe, {key: value, "projector.kind": "q-former"})
    with pytest.raises(UserError, match=r"drop_blanks needs CTC's loss .*: set projector.ctc_weight above 0"):
        load_recipe(recipe, {"projector.drop_blanks": 0.9})
    with pytest.raises(UserError, match=r"until is an error rate on dev, but this training has no dev"):
        train(
            load_recipe(recipe, OPTIONS | {"projector.beginning.until": 0.3}),
            f"{manifests}/train.jsonl",
            str(tmp_path / "t"),
            features,
        )
    assert not (tmp_path / "t").exists()


def test_utterances_that_ctc_cannot_align_are_refused(prepared, tmp_path):
    with pytest.raises(
        UserError,
        match=r"6 of 6 train utterances have too few audio positions for their tokens, so CTC cannot align "
        r"them: "
        r"lower projector\.downsampling \(5\)",
    ):
        run(prepared, tmp_path / "t", **{"projector.downsampling": 5})


def test_the_keys_of_an_unused_beginning_are_no_inputs_of_a_training_run(prepared):
    recipe = load_recipe(prepared[0])
    off = dataclasses.replace(recipe.projector.beginning, steps=7, dropout=0.5)
    changed = dataclasses.replace(recipe, projector=dataclasses.replace(recipe.projector, beginning=off))
    assert {"beginning", "ctc_weight", "drop_blanks", "dropout", "masks"}.isdisjoint(
        settings_that_affect_weights(recipe)["projector"]
    )
    assert "answer_prefix" not in settings_that_affect_weights(recipe)["llm"]
    assert settings_that_affect_weights(changed) == settings_that_affect_weights(recipe)
    on = load_recipe(prepared[0], OPTIONS)
    assert settings_that_affect_weights(on)["projector"]["beginning"]["steps"] == BORDER


class Examples:
    """Thirty utterances in three shards."""

    def __init__(self) -> None:
        self.positions = [10 + i % 7 for i in range(30)]
        self.shards = np.arange(30) // 10


def plan_of(beginning: int, max_steps: int = 1000) -> TrainingPlan:
    return TrainingPlan(
        Examples(), Budget(40, 40), 1, seed=0, epochs=2, max_steps=max_steps, beginning=beginning
    )


def test_epochs_after_a_beginning_are_complete_and_any_step_can_be_resumed_from():
    without = plan_of(0)
    per_epoch = without.steps // 2
    for beginning in (1, per_epoch, per_epoch + 3, 3 * per_epoch):
        plan = plan_of(beginning)
        steps = list(plan.after(0))
        assert len(steps) == plan.steps and plan.beginning == beginning
        after = [i for _, _, step in steps[beginning:] for i in step]
        assert sorted(after) == sorted([*range(30), *range(30)])
        assert [step for *_, step in plan.after(beginning + 2)] == [
            step for *_, step in steps[beginning + 2 :]
        ]
        assert {window.epoch for window, *_ in steps[:beginning]}.isdisjoint(
            window.epoch for window, *_ in steps[beginning:]
        )
    assert plan_of(5, max_steps=3).steps == 8
    shortened = plan_of(20)
    shortened.set_beginning(4)
    assert [step for *_, step in shortened.after(0)] == [step for *_, step in plan_of(4).after(0)]
