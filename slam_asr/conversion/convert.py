"""The stage `convert-checkpoint`: a checkpoint of any kind becomes a model folder.

What it is given is found out from its content: the folder of a training, SLAM-LLM's `model.pt`, an
original file of a speech encoder, or a model folder that is to be written in SLAM-LLM's format.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slam_asr.errors import UserError
from slam_asr.progress import say
from slam_asr.recipe import Recipe, dump_recipe, load_recipe
from slam_asr.stage import Outcome, Record, require_record, run_stage
from slam_asr.storage import exists, fetch, join, sha256_of_file

if TYPE_CHECKING:
    import torch

STAGE = "convert-checkpoint"
_HALF: dict[bool, dict[str, Any]] = {False: {}, True: {"half": True}}
_UNVERIFIED: dict[bool, dict[str, Any]] = {True: {}, False: {"verified": False}}
"""What they add to a stage's inputs: nothing to those of models that were converted in the usual way."""


def convert_checkpoint(
    checkpoint: str,
    output: str,
    to: Literal["model", "slam-llm"] = "model",
    recipe: Recipe | None = None,
    which: Literal["latest", "best"] = "latest",
    half: bool = False,
    verify: bool = True,
    overwrite: bool = False,
) -> Record:
    """Turn a checkpoint into projector.safetensors and config.json, or into another format.

    Args:
        checkpoint: folder that train wrote; or SLAM-LLM's model.pt, with the recipe that it was trained by; or an
            original file of Whisper, WavLM, HuBERT or wav2vec 2.0; or a model folder or a shipped model's name, to be written as SLAM-LLM's model.pt.
        output: folder of the model; {fingerprint} in it becomes a digest of the inputs.
        to: `model` is ours; `slam-llm` writes SLAM-LLM's model.pt.
        recipe: encoder, LLM, projector and prompt of SLAM-LLM's model.pt, which does not name them.
        which: of a training's checkpoints, that of the last step, or the one with the lowest dev loss.
        half: store the projector's weights in fp16, in half the space; they are computed with in the recipe's precision either way.
        verify: compare what was written with the checkpoint, by all weights and by the loss on a few made-up utterances, before it counts.
        overwrite: replace a model made from another checkpoint.

    Returns:
        The stage's record; its folder holds projector.safetensors and config.json, or what was asked for.

    Raises:
        UserError: no checkpoint there, or one that is incomplete, damaged, or does not fit its encoder or LLM.
    """
    if exists(checkpoint):
        return _convert_file(fetch(checkpoint), output, to, recipe, half, verify, overwrite)
    from slam_asr.conversion.model import WEIGHTS
    from slam_asr.conversion.shipped import fetch_model, shipped_models

    if half and to != "model":
        raise UserError("--half true is for our model folder; SLAM-LLM's model.pt holds fp32: leave one of them out.")
    if checkpoint in shipped_models() or exists(join(checkpoint, WEIGHTS)):
        return _write_for_slam_llm(fetch_model(checkpoint), output, to, overwrite)
    return _convert_training(require_record(checkpoint, "train"), output, to, which, half, verify, overwrite)


def _convert_training(trained: Record, output: str, to: str, which: str, half: bool, verify: bool, overwrite: bool) -> Record:
    from slam_asr.training.checkpoint import require

    source = require(join(trained.folder, "checkpoints"), which)
    inputs = {"training": trained.inputs, "files": {name: facts["sha256"] for name, facts in source.files.items()}, "to": to, **_HALF[half], **_UNVERIFIED[verify]}

    def work(folder: Path) -> Outcome:
        recipe = load_recipe(trained.file("recipe.yaml").read_text())
        facts = {**trained.facts, "steps": source.step}
        bases = {"encoder": facts.pop("encoder_fingerprint"), "llm_sha256": facts.pop("llm_sha256")}
        return _write(folder, dict(source.tensors("weights")), recipe, bases, facts, source.folder, to, half, verify)

    return run_stage(STAGE, output, inputs, work, overwrite)


def _convert_file(path: Path, output: str, to: str, recipe: Recipe | None, half: bool, verify: bool, overwrite: bool) -> Record:
    from slam_asr.conversion.slam_llm import from_slam_llm, is_slam_llm
    from slam_asr.models.encoder import describe_encoder
    from slam_asr.models.pickles import read_pickle
    from slam_asr.models.pretrained import locate_model, weights_sha256

    content = read_pickle(path)
    inputs: dict[str, Any] = {"file": sha256_of_file(path), "to": to, **_HALF[half], **_UNVERIFIED[verify]}
    if not is_slam_llm(content):
        from slam_asr.models.originals import convert_original

        if to != "model":
            raise UserError(f"{path} is no model of projector and LLM, so it cannot be written for SLAM-LLM: leave out --to.")
        del content

        def convert(folder: Path) -> Outcome:
            return Outcome(convert_original(path, folder))

        return run_stage(STAGE, output, inputs, convert, overwrite)
    if recipe is None:
        raise UserError(f"{path} does not say which encoder and LLM it belongs to: name them with --recipe.")
    # Its projector was trained on encoder outputs as they came, not on stored ones.
    recipe = replace(recipe, features=replace(recipe.features, dtype="fp32"))
    weights = from_slam_llm(content, str(path))
    bases = {
        "encoder": describe_encoder(recipe.encoder).fingerprint(), "llm_sha256": weights_sha256(locate_model(recipe.llm.name)),
    }
    inputs |= {"recipe": dump_recipe(recipe), **bases}

    def work(folder: Path) -> Outcome:
        facts = {"recipe": recipe.name, "encoder": recipe.encoder.name, "llm": recipe.llm.name}
        return _write(folder, weights, recipe, bases, facts, str(path), to, half, verify)

    return run_stage(STAGE, output, inputs, work, overwrite)


def _write(
    folder: Path, weights: "dict[str, torch.Tensor]", recipe: Recipe, bases: dict[str, Any], facts: dict[str, Any],
    where: str, to: str, half: bool, verify: bool,
) -> Outcome:
    """Check the weights against their encoder and LLM, write them part by part, and compare what was written."""
    from slam_asr.conversion.model import ModelConfig, projector_with, write_adapter, write_model
    from slam_asr.conversion.slam_llm import write_slam_llm
    from slam_asr.conversion.tuned import check_adapter, write_tuned_encoder, write_tuned_llm
    from slam_asr.models.encoder import describe_encoder
    from slam_asr.models.llm import describe_llm, llm_width
    from slam_asr.models.pretrained import locate_model

    parts: dict[str, dict[str, torch.Tensor]] = {"projector": {}, "llm": {}, "encoder": {}}
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        parts.get(part, {})[rest] = tensor
    if not parts["projector"]:
        raise UserError(f"{where} holds no projector: it is not a checkpoint of slam-asr train.")
    widths = describe_encoder(recipe.encoder).width, llm_width(describe_llm(locate_model(recipe.llm.name)))
    projector = projector_with(parts["projector"], recipe.projector, *widths, where)
    adapter = parts["llm"] if recipe.llm.tuning == "lora" else {}
    if bool(adapter) != any(".lora_" in name for name in parts["llm"]):
        raise UserError(f"{where} holds a LoRA adapter only if llm.tuning is lora, which it is not in the recipe {recipe.name}, or the other way round.")
    if adapter:
        check_adapter(adapter, recipe, where)
    if to == "slam-llm":
        if parts["encoder"] or (parts["llm"] and not adapter):
            raise UserError(f"{where} holds a whole trained LLM or encoder, which SLAM-LLM's model.pt has no place for: leave out --to.")
        write_slam_llm(folder, projector.state_dict(), adapter)
    else:
        if adapter:
            write_adapter(folder, adapter, recipe)
        elif parts["llm"]:
            write_tuned_llm(folder, parts["llm"], recipe, where)
        if parts["encoder"]:
            write_tuned_encoder(folder, parts["encoder"], recipe, where)
        write_model(folder, parts["projector"], ModelConfig(dump_recipe(recipe), **bases, encoder_width=widths[0], llm_width=widths[1], training=facts), half)
    compared = _compare(folder, parts, recipe, widths, where, to, half) if verify else "not compared with the checkpoint"
    counts = {part: sum(t.numel() for t in tensors.values()) for part, tensors in parts.items() if tensors}
    summary = " and ".join(f"{part} of {count:,} parameters" for part, count in counts.items())
    megabytes = sum(f.stat().st_size for f in folder.rglob("*") if f.suffix in (".safetensors", ".pt")) / 1e6
    return Outcome(f"{summary}, {megabytes:.1f} MB, {compared}", {"parameters": sum(counts.values())})


def _compare(
    folder: Path, parts: "dict[str, dict[str, torch.Tensor]]", recipe: Recipe, widths: tuple[int, int], where: str, to: str, half: bool
) -> str:
    """Read what was written, and compare it with what was read; what differs is taken away again."""
    from slam_asr.conversion.model import CONFIG, projector_with
    from slam_asr.conversion.slam_llm import FILE
    from slam_asr.conversion.verifying import Trained, loss_before_and_after, read_written, require_encoder
    from slam_asr.models.pretrained import locate_model

    rounded = {name: t.half().float() if half else t.float() for name, t in parts["projector"].items()}
    before = Trained(projector_with(rounded, recipe.projector, *widths, where), parts["llm"])
    try:
        if parts["encoder"]:
            require_encoder(folder, parts["encoder"], recipe)
        return loss_before_and_after(recipe, locate_model(recipe.llm.name), widths[0], before, lambda: read_written(folder, recipe, widths, to), str(folder))
    except UserError:
        (folder / (FILE if to == "slam-llm" else CONFIG)).unlink(missing_ok=True)
        raise


def _write_for_slam_llm(model: Path, output: str, to: str, overwrite: bool) -> Record:
    from slam_asr.conversion.model import ENCODER, LLM, model_digests, read_adapter, read_config, read_projector
    from slam_asr.conversion.slam_llm import FILE, write_slam_llm

    if to == "model":
        raise UserError(f"{model} is a model already: decode with it, or add --to slam-llm to write SLAM-LLM's model.pt.")
    own = [part for part in (LLM, ENCODER) if (model / part).is_dir()]
    if own:
        raise UserError(f"{model} holds a whole trained {own[0]}, which SLAM-LLM's model.pt has no place for.")
    config = read_config(model)

    def work(folder: Path) -> Outcome:
        write_slam_llm(folder, read_projector(model, config).state_dict(), read_adapter(model))
        say(f"{folder / FILE}: give it to SLAM-LLM as ckpt_path")
        return Outcome(f"SLAM-LLM's {FILE}, {(folder / FILE).stat().st_size / 1e6:.1f} MB")

    return run_stage(STAGE, output, {"model": model_digests(model), "to": to}, work, overwrite)
