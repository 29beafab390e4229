"""The stage `convert-checkpoint`: a checkpoint of any kind becomes a model folder.

What it is given is found out from its content: the folder of a training, SLAM-LLM's `model.pt`, a folder of DeepSpeed's, an
original file of a speech encoder, or a model folder that is to be written in another format.
"""

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slam_asr.errors import UserError
from slam_asr.progress import log_line
from slam_asr.recipe import Recipe, dump_recipe, load_recipe
from slam_asr.stage import RECORD, Outcome, Record, require_record, run_stage
from slam_asr.storage import exists, fetch, fetch_folder, is_s3, join, local_path, sha256_of_file

if TYPE_CHECKING:
    import torch

    from slam_asr.training.checkpoint import Checkpoint

STAGE = "convert-checkpoint"


def convert_checkpoint(
    checkpoint: str,
    output: str,
    to: Literal["model", "slam-llm", "llm"] = "model",
    recipe: Recipe | None = None,
    which: Literal["latest", "best", "average"] = "latest",
    half: bool = False,
    adapter: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> Record:
    """Turn a checkpoint into projector.safetensors and config.json, or into another format.

    Args:
        checkpoint: folder that train wrote; or SLAM-LLM's model.pt or a folder of DeepSpeed's, with the recipe that it was trained by; or an
            original file of Whisper, WavLM, HuBERT or wav2vec 2.0; or a model folder or a shipped model's name.
        output: folder of the model; {fingerprint} in it becomes a digest of the inputs.
        to: `model` is ours; `slam-llm` writes SLAM-LLM's model.pt; `llm` writes the trained LLM by itself as transformers does, with LoRA merged into it.
        recipe: encoder, LLM, projector and prompt of what does not name them: SLAM-LLM's model.pt, and DeepSpeed's folders.
        which: of a training's checkpoints, that of the last step, the one with the lowest dev loss, or the mean of all that were kept.
        half: store the projector's weights in fp16, in half the space; they are computed with in the recipe's precision either way.
        adapter: folder of a LoRA adapter as peft writes it, SLAM-LLM's peft_ckpt, where it does not lie in the checkpoint itself.
        verify: compare what was written with the checkpoint, by all weights and by the loss on a few made-up utterances, before it counts.
        overwrite: replace a model made from another checkpoint.

    Returns:
        The stage's record; its folder holds projector.safetensors and config.json, or what was asked for.

    Raises:
        UserError: no checkpoint there, or one that is incomplete, damaged, or does not fit its encoder or LLM.
    """
    from slam_asr.conversion.model import WEIGHTS
    from slam_asr.conversion.shipped import fetch_model, shipped_models
    from slam_asr.conversion.zero_checkpoint import zero_folder

    if half and to != "model":
        raise UserError(
            "--half true is for our model folder; the other formats have a precision of their own: leave it out."
        )
    how = How(to, half, verify)
    if checkpoint.endswith("model_states.pt"):
        # DeepSpeed's file of the weights; what belongs to it lies beside it.
        checkpoint = checkpoint.rpartition("/")[0] or "."
    elif exists(checkpoint):
        return _convert_file(fetch(checkpoint), output, how, recipe, adapter, overwrite)
    if adapter and exists(join(checkpoint, RECORD)):
        raise UserError(
            f"--adapter is for a checkpoint of SLAM-LLM; {checkpoint} holds its adapter itself, if it has one: leave it out."
        )
    if checkpoint in shipped_models() or exists(join(checkpoint, WEIGHTS)):
        return _convert_model(fetch_model(checkpoint), output, how, overwrite)
    if not exists(join(checkpoint, RECORD)):
        local = fetch_folder(checkpoint) if is_s3(checkpoint) else local_path(checkpoint)
        if (folder := zero_folder(local)) is not None:
            return _convert_deepspeed(folder, output, how, recipe, adapter, overwrite)
    return _convert_training(require_record(checkpoint, "train"), output, how, which, overwrite)


@dataclass(frozen=True)
class How:
    """What is made of a checkpoint."""

    to: str
    half: bool
    verify: bool

    @property
    def inputs(self) -> dict[str, Any]:
        """What it adds to a stage's inputs: of half and verify nothing where a model was converted in the usual way."""
        return {
            "to": self.to,
            **({"half": True} if self.half else {}),
            **({} if self.verify else {"verified": False}),
        }


def _convert_training(trained: Record, output: str, how: How, which: str, overwrite: bool) -> Record:
    from slam_asr.training.checkpoint import all_kept, require

    place = join(trained.folder, "checkpoints")
    sources = all_kept(place) if which == "average" else [require(place, which)]
    files = [{name: facts["sha256"] for name, facts in source.files.items()} for source in sources]
    inputs = {"training": trained.inputs, "files": files if which == "average" else files[0], **how.inputs}

    def work(folder: Path) -> Outcome:
        recipe = load_recipe(trained.file("recipe.yaml").read_text())
        facts = {**trained.facts, "steps": sources[-1].step}
        if which == "average":
            facts["averaged_steps"] = ", ".join(str(source.step) for source in sources)
            log_line(f"mean of {len(sources)} checkpoints, of steps {facts['averaged_steps']}")
        bases = {"encoder": facts.pop("encoder_fingerprint"), "llm_sha256": facts.pop("llm_sha256")}
        return _write(folder, _mean(sources), recipe, bases, facts, sources[-1].folder, how)

    return run_stage(STAGE, output, inputs, work, overwrite)


def _mean(sources: "Sequence[Checkpoint]") -> "Mapping[str, torch.Tensor]":
    """The mean of the checkpoints' weights, in fp32; one by itself as it is."""
    from slam_asr.models.tensors import Tensors

    first, *others = (source.tensors("weights") for source in sources)

    def mean(name: str) -> "torch.Tensor":
        middle = first[name]
        for number, other in enumerate(others, start=2):
            middle = middle + (other[name] - middle) / number
        return middle

    return Tensors({name: partial(mean, name) for name in first})


def _convert_file(
    path: Path, output: str, how: How, recipe: Recipe | None, adapter: str | None, overwrite: bool
) -> Record:
    from slam_asr.conversion.slam_llm import from_slam_llm, is_slam_llm
    from slam_asr.models.pickles import read_pickle

    content = read_pickle(path)
    if is_slam_llm(content):
        return _convert_foreign(
            partial(from_slam_llm, content, str(path)),
            str(path),
            {"file": sha256_of_file(path)},
            output,
            how,
            recipe,
            adapter,
            overwrite,
        )
    from slam_asr.models.originals import convert_original

    if how.to != "model":
        raise UserError(
            f"{path} is no model of projector and LLM, so it cannot be written for SLAM-LLM or as an LLM: leave out --to."
        )
    del content

    def convert(folder: Path) -> Outcome:
        return Outcome(convert_original(path, folder))

    return run_stage(STAGE, output, {"file": sha256_of_file(path), **how.inputs}, convert, overwrite)


def _convert_deepspeed(
    folder: Path, output: str, how: How, recipe: Recipe | None, adapter: str | None, overwrite: bool
) -> Record:
    from slam_asr.conversion.slam_llm import from_slam_llm, is_slam_llm
    from slam_asr.conversion.zero_checkpoint import fp32_weights

    def weights() -> "Mapping[str, torch.Tensor]":
        found = fp32_weights(folder)
        return from_slam_llm(found, str(folder)) if is_slam_llm(found) else found

    files = {path.name: sha256_of_file(path) for path in sorted(folder.glob("*.pt"))}
    return _convert_foreign(weights, str(folder), {"files": files}, output, how, recipe, adapter, overwrite)


def _convert_foreign(
    read: "Callable[[], Mapping[str, torch.Tensor]]",
    where: str,
    inputs: dict[str, Any],
    output: str,
    how: How,
    recipe: Recipe | None,
    adapter: str | None,
    overwrite: bool,
) -> Record:
    """What does not say which encoder and LLM it belongs to."""
    from slam_asr.conversion.model import adapter_file, read_peft
    from slam_asr.models.encoder import describe_encoder
    from slam_asr.models.pretrained import locate_model, weights_sha256

    if recipe is None:
        raise UserError(f"{where} does not say which encoder and LLM it belongs to: name them with --recipe.")
    # Its projector was trained on encoder outputs as they came, not on stored ones.
    recipe = replace(recipe, features=replace(recipe.features, dtype="fp32"))
    weights = read()
    if adapter:
        folder = fetch_folder(adapter) if is_s3(adapter) else local_path(adapter)
        inputs = {**inputs, "adapter": sha256_of_file(adapter_file(folder))}
        weights = ChainMap({f"llm.{name}": tensor for name, tensor in read_peft(folder).items()}, weights)
    bases = {
        "encoder": describe_encoder(recipe.encoder).fingerprint(),
        "llm_sha256": weights_sha256(locate_model(recipe.llm.name)),
    }

    def work(folder: Path) -> Outcome:
        facts = {"recipe": recipe.name, "encoder": recipe.encoder.name, "llm": recipe.llm.name}
        return _write(folder, weights, recipe, bases, facts, where, how)

    return run_stage(
        STAGE, output, {**inputs, **how.inputs, "recipe": dump_recipe(recipe), **bases}, work, overwrite
    )


def _convert_model(model: Path, output: str, how: How, overwrite: bool) -> Record:
    from slam_asr.conversion.model import (
        ENCODER,
        LLM,
        model_digests,
        read_adapter,
        read_config,
        read_projector,
    )

    own = [part for part in (LLM, ENCODER) if (model / part).is_dir()]
    if own:
        raise UserError(
            f"{model} holds a whole trained {own[0]}, which stands in its folder {own[0]}/ as transformers writes it: copy that, or convert the training's checkpoint."
        )
    config = read_config(model)

    def work(folder: Path) -> Outcome:
        weights = {
            f"projector.{name}": tensor for name, tensor in read_projector(model, config).state_dict().items()
        }
        weights |= {f"llm.{name}": tensor for name, tensor in read_adapter(model).items()}
        bases = {"encoder": config.encoder, "llm_sha256": config.llm_sha256}
        return _write(folder, weights, config.typed_recipe, bases, config.training, str(model), how)

    return run_stage(STAGE, output, {"model": model_digests(model), **how.inputs}, work, overwrite)


def _write(
    folder: Path,
    weights: "Mapping[str, torch.Tensor]",
    recipe: Recipe,
    bases: dict[str, Any],
    facts: dict[str, Any],
    where: str,
    how: How,
) -> Outcome:
    """Check the weights against their encoder and LLM, write them part by part, and compare what was written."""
    from slam_asr.conversion.model import LLM, ModelConfig, projector_with, write_adapter, write_model
    from slam_asr.conversion.slam_llm import FILE, write_slam_llm
    from slam_asr.conversion.tuned import (
        check_adapter,
        write_merged_llm,
        write_tuned_encoder,
        write_tuned_llm,
    )
    from slam_asr.models.encoder import describe_encoder
    from slam_asr.models.llm import describe_llm, llm_width
    from slam_asr.models.pretrained import locate_model
    from slam_asr.models.tensors import renamed

    names: dict[str, dict[str, str]] = {"projector": {}, "llm": {}, "encoder": {}}
    for name in weights:
        part, _, rest = name.partition(".")
        names.get(part, {})[rest] = name
    parts = {part: renamed(weights, own) for part, own in names.items()}
    if not parts["projector"]:
        raise UserError(f"{where} holds no projector: it is not a checkpoint of slam-asr train.")
    widths = describe_encoder(recipe.encoder).width, llm_width(describe_llm(locate_model(recipe.llm.name)))
    projector = projector_with(parts["projector"], recipe.projector, *widths, where)
    adapter = parts["llm"] if recipe.llm.tuning == "lora" else {}
    if bool(adapter) != any(".lora_" in name for name in parts["llm"]):
        raise UserError(
            f"{where} holds a LoRA adapter only if llm.tuning is lora, which it is not in the recipe {recipe.name}, or the other way round."
        )
    if adapter:
        check_adapter(adapter, recipe, where)
    if how.to == "llm":
        if not parts["llm"]:
            raise UserError(
                f"{where} leaves the LLM {recipe.llm.name} as it is, so there is no trained one to write: leave out --to."
            )
        if adapter:
            write_merged_llm(folder, adapter, recipe)
        else:
            write_tuned_llm(folder, parts["llm"], recipe, where)
        log_line(f"{folder}: name it as llm.name, or give it to any program that reads transformers' models")
    elif how.to == "slam-llm":
        if parts["encoder"] or (parts["llm"] and not adapter):
            raise UserError(
                f"{where} holds a whole trained LLM or encoder, which SLAM-LLM's model.pt has no place for: leave out --to."
            )
        write_slam_llm(folder, projector.state_dict(), adapter)
        log_line(f"{folder / FILE}: give it to SLAM-LLM as ckpt_path")
    else:
        if adapter:
            write_adapter(folder, adapter, recipe)
        elif parts["llm"]:
            write_tuned_llm(folder / LLM, parts["llm"], recipe, where)
        if parts["encoder"]:
            write_tuned_encoder(folder, parts["encoder"], recipe, where)
        write_model(
            folder,
            parts["projector"],
            ModelConfig(
                dump_recipe(recipe), **bases, encoder_width=widths[0], llm_width=widths[1], training=facts
            ),
            how.half,
        )
    compared = (
        _compare(folder, parts, recipe, widths, where, how)
        if how.verify
        else "not compared with the checkpoint"
    )
    counts = {part: sum(t.numel() for t in tensors.values()) for part, tensors in parts.items() if tensors}
    summary = " and ".join(f"{part} of {count:,} parameters" for part, count in counts.items())
    megabytes = sum(f.stat().st_size for f in folder.rglob("*") if f.suffix in (".safetensors", ".pt")) / 1e6
    return Outcome(f"{summary}, {megabytes:.1f} MB, {compared}", {"parameters": sum(counts.values())})


def _compare(
    folder: Path,
    parts: "dict[str, Mapping[str, torch.Tensor]]",
    recipe: Recipe,
    widths: tuple[int, int],
    where: str,
    how: How,
) -> str:
    """Read what was written, and compare it with what was read; what differs is taken away again."""
    from slam_asr.conversion.model import CONFIG, projector_with
    from slam_asr.conversion.slam_llm import FILE
    from slam_asr.conversion.verification import (
        Trained,
        loss_before_and_after,
        loss_of_merged,
        read_written,
        require_encoder,
    )
    from slam_asr.models.pretrained import locate_model

    rounded = {name: t.half().float() if how.half else t.float() for name, t in parts["projector"].items()}
    before = Trained(projector_with(rounded, recipe.projector, *widths, where), parts["llm"])
    try:
        if how.to == "llm":
            return loss_of_merged(recipe, locate_model(recipe.llm.name), widths[0], before, folder)
        if parts["encoder"]:
            require_encoder(folder, parts["encoder"], recipe)
        return loss_before_and_after(
            recipe,
            locate_model(recipe.llm.name),
            widths[0],
            before,
            lambda: read_written(folder, recipe, widths, how.to),
            str(folder),
        )
    except BaseException:
        (folder / (FILE if how.to == "slam-llm" else CONFIG)).unlink(missing_ok=True)
        raise
