"""The stage `convert-checkpoint`: converts a checkpoint of any kind to a model folder or another format.

It recognises the kind of the checkpoint by its content: the folder of a training, SLAM-LLM's `model.pt`, a
folder that DeepSpeed wrote, the original file of a speech encoder, or a model folder that is to be written in
another format.
"""

from collections import ChainMap
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from slam_asr.artifacts.stage_record import RECORD, Outcome, Record, require_record, run_stage
from slam_asr.config.recipe import Recipe, dump_recipe, load_recipe
from slam_asr.errors import ConfigurationError, ModelError
from slam_asr.progress import log_line
from slam_asr.storage import exists, fetch, fetch_folder, is_s3, join, local_path, sha256_of_file

if TYPE_CHECKING:
    import torch

    from slam_asr.artifacts.checkpoint import Checkpoint

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
    """Convert a checkpoint to projector.safetensors and config.json, or to another format.

    Args:
        checkpoint: folder that train wrote; or SLAM-LLM's model.pt or DeepSpeed's folder, both of which need
            `recipe`; or the original file of Whisper, WavLM, HuBERT or wav2vec 2.0; or a model folder; or a
            shipped model's name.
        output: folder of the model; {fingerprint} in it is replaced by a digest of the inputs.
        to: `model` writes this project's model folder; `slam-llm` writes SLAM-LLM's model.pt; `llm` writes
            only the trained LLM, as transformers does, with LoRA merged into it.
        recipe: defines encoder, LLM, projector and prompt for checkpoints that do not name them: SLAM-LLM's
            model.pt and DeepSpeed's folders.
        which: which checkpoint of a training to convert: the latest, the best (the one with the lowest dev
            loss), or the average (the mean of all saved checkpoints).
        half: save the projector in fp16, which halves its size; computations use the recipe's precision
            anyway.
        adapter: folder of a LoRA adapter as peft writes it (SLAM-LLM's peft_ckpt), for a checkpoint that does
            not contain its adapter.
        verify: compare the result with the checkpoint before publishing it: all weights, and the loss on a
            probe of a few utterances with random audio.
        overwrite: replace a model that was made from another checkpoint.

    Returns:
        The stage's record; its folder holds projector.safetensors and config.json, or the requested format.

    Raises:
        ModelError: the checkpoint is missing, incomplete or damaged, or does not fit its encoder or LLM.
        ConfigurationError: the options contradict each other or the checkpoint's kind.
    """
    from slam_asr.artifacts.model_folder import WEIGHTS, fetch_model, shipped_models
    from slam_asr.conversion.zero_checkpoint import find_zero_folder

    if half and to != "model":
        raise ConfigurationError(
            "--half true is only for --to model; the other formats have their own precision: leave it out."
        )
    target = TargetFormat(to, half, verify)
    if checkpoint.endswith("model_states.pt"):
        # DeepSpeed's file of the weights; the optimiser's files are in the same folder.
        checkpoint = checkpoint.rpartition("/")[0] or "."
    elif exists(checkpoint):
        return _convert_file(fetch(checkpoint), output, target, recipe, adapter, overwrite)
    if adapter and exists(join(checkpoint, RECORD)):
        raise ConfigurationError(
            f"--adapter is for a checkpoint of SLAM-LLM; {checkpoint} contains its adapter itself, if it has "
            "one: leave it out."
        )
    if checkpoint in shipped_models() or exists(join(checkpoint, WEIGHTS)):
        return _convert_model(fetch_model(checkpoint), output, target, overwrite)
    if not exists(join(checkpoint, RECORD)):
        local = fetch_folder(checkpoint) if is_s3(checkpoint) else local_path(checkpoint)
        if (folder := find_zero_folder(local)) is not None:
            return _convert_deepspeed(folder, output, target, recipe, adapter, overwrite)
    return _convert_training(require_record(checkpoint, "train"), output, target, which, overwrite)


@dataclass(frozen=True)
class TargetFormat:
    """How the result is written. Each field is the option of `convert_checkpoint` with the same name."""

    to: str
    half: bool
    verify: bool

    @property
    def inputs(self) -> dict[str, Any]:
        """The stage's inputs that describe these options.

        `half` and `verify` are left out if they have their default values: models converted before these
        options existed still have the same fingerprint.
        """
        return {
            "to": self.to,
            **({"half": True} if self.half else {}),
            **({} if self.verify else {"verified": False}),
        }


def _convert_training(
    trained: Record, output: str, target: TargetFormat, which: str, overwrite: bool
) -> Record:
    from slam_asr.artifacts.checkpoint import all_complete, require

    place = join(trained.folder, "checkpoints")
    sources = all_complete(place) if which == "average" else [require(place, which)]
    files = [{name: facts["sha256"] for name, facts in source.files.items()} for source in sources]
    inputs = {"training": trained.inputs, "files": files if which == "average" else files[0], **target.inputs}

    def work(folder: Path) -> Outcome:
        recipe = load_recipe(trained.file("recipe.yaml").read_text())
        facts = {**trained.facts, "steps": sources[-1].step}
        if which == "average":
            facts["averaged_steps"] = ", ".join(str(source.step) for source in sources)
            log_line(f"mean of {len(sources)} checkpoints, of steps {facts['averaged_steps']}")
        bases = {"encoder": facts.pop("encoder_fingerprint"), "llm_sha256": facts.pop("llm_sha256")}
        return _write(folder, _mean(sources), recipe, bases, facts, sources[-1].folder, target)

    return run_stage(STAGE, output, inputs, work, overwrite)


def _mean(sources: "Sequence[Checkpoint]") -> "Mapping[str, torch.Tensor]":
    """Return the mean of the checkpoints' fp32 weights; each tensor is computed when it is accessed."""
    from slam_asr.pretrained.lazy_tensors import LazyTensors

    first, *others = (source.tensors("weights") for source in sources)

    def mean(name: str) -> "torch.Tensor":
        # A running mean needs two tensors in memory, however many checkpoints there are.
        running = first[name]
        for count, other in enumerate(others, start=2):
            running = running + (other[name] - running) / count
        return running

    return LazyTensors({name: partial(mean, name) for name in first})


def _convert_file(
    path: Path, output: str, target: TargetFormat, recipe: Recipe | None, adapter: str | None, overwrite: bool
) -> Record:
    from slam_asr.conversion.slam_llm import from_slam_llm, is_slam_llm
    from slam_asr.pretrained.unpickle import read_pickle

    content = read_pickle(path)
    if is_slam_llm(content):
        return _convert_foreign(
            partial(from_slam_llm, content, str(path)),
            str(path),
            {"file": sha256_of_file(path)},
            output,
            target,
            recipe,
            adapter,
            overwrite,
        )
    from slam_asr.pretrained.original_checkpoints import convert_original

    if target.to != "model":
        raise ConfigurationError(
            f"{path} holds neither a projector nor an LLM, so it cannot be written for SLAM-LLM or as an "
            "LLM: leave out --to."
        )
    del content  # `convert_original` reads the file again

    def convert(folder: Path) -> Outcome:
        return Outcome(convert_original(path, folder))

    return run_stage(STAGE, output, {"file": sha256_of_file(path), **target.inputs}, convert, overwrite)


def _convert_deepspeed(
    folder: Path,
    output: str,
    target: TargetFormat,
    recipe: Recipe | None,
    adapter: str | None,
    overwrite: bool,
) -> Record:
    from slam_asr.conversion.slam_llm import from_slam_llm, is_slam_llm
    from slam_asr.conversion.zero_checkpoint import fp32_weights

    def weights() -> "Mapping[str, torch.Tensor]":
        tensors = fp32_weights(folder)
        return from_slam_llm(tensors, str(folder)) if is_slam_llm(tensors) else tensors

    files = {path.name: sha256_of_file(path) for path in sorted(folder.glob("*.pt"))}
    return _convert_foreign(
        weights, str(folder), {"files": files}, output, target, recipe, adapter, overwrite
    )


def _convert_foreign(
    read: "Callable[[], Mapping[str, torch.Tensor]]",
    where: str,
    inputs: dict[str, Any],
    output: str,
    target: TargetFormat,
    recipe: Recipe | None,
    adapter: str | None,
    overwrite: bool,
) -> Record:
    """Convert a checkpoint that does not name its encoder and LLM.

    Args:
        read: function that returns the checkpoint's weights, by this project's names.
        where: the checkpoint, for error messages.
        inputs: digests of its files, for the stage's fingerprint.
        output: folder of the model.
        target: how to write it.
        recipe: names encoder and LLM.
        adapter: folder of a LoRA adapter that is not in the checkpoint.
        overwrite: replace a model that was made from another checkpoint.
    """
    from slam_asr.artifacts.model_folder import adapter_file, read_peft
    from slam_asr.models.encoders.registry import describe_encoder
    from slam_asr.pretrained.locate import locate_model, weights_sha256

    if recipe is None:
        raise ConfigurationError(
            f"{where} does not state which encoder and LLM it belongs to: name them with --recipe."
        )
    # SLAM-LLM trains on the encoder's outputs directly, not on features that were rounded for a store.
    recipe = replace(recipe, features=replace(recipe.features, dtype="fp32"))
    weights = read()
    if adapter:
        folder = fetch_folder(adapter) if is_s3(adapter) else local_path(adapter)
        inputs = {**inputs, "adapter": sha256_of_file(adapter_file(folder))}
        # ChainMap only reads its second mapping, so an immutable one will do.
        weights = ChainMap(
            {f"llm.{name}": tensor for name, tensor in read_peft(folder).items()},
            cast("MutableMapping[str, torch.Tensor]", weights),
        )
    bases = {
        "encoder": describe_encoder(recipe.encoder).fingerprint(),
        "llm_sha256": weights_sha256(locate_model(recipe.llm.name)),
    }

    def work(folder: Path) -> Outcome:
        facts = {"recipe": recipe.name, "encoder": recipe.encoder.name, "llm": recipe.llm.name}
        return _write(folder, weights, recipe, bases, facts, where, target)

    return run_stage(
        STAGE, output, {**inputs, **target.inputs, "recipe": dump_recipe(recipe), **bases}, work, overwrite
    )


def _convert_model(model: Path, output: str, target: TargetFormat, overwrite: bool) -> Record:
    from slam_asr.artifacts.model_folder import (
        ENCODER,
        LLM,
        model_digests,
        read_adapter,
        read_config,
        read_projector,
    )

    complete = [part for part in (LLM, ENCODER) if (model / part).is_dir()]
    if complete:
        raise ModelError(
            f"{model} holds a completely trained {complete[0]}. It is in the folder {complete[0]}/, in "
            "transformers' format: copy that, or convert the training's checkpoint."
        )
    config = read_config(model)

    def work(folder: Path) -> Outcome:
        weights = {
            f"projector.{name}": tensor for name, tensor in read_projector(model, config).state_dict().items()
        }
        weights |= {f"llm.{name}": tensor for name, tensor in read_adapter(model).items()}
        bases = {"encoder": config.encoder, "llm_sha256": config.llm_sha256}
        return _write(folder, weights, config.typed_recipe, bases, config.training, str(model), target)

    return run_stage(STAGE, output, {"model": model_digests(model), **target.inputs}, work, overwrite)


def _write(
    folder: Path,
    weights: "Mapping[str, torch.Tensor]",
    recipe: Recipe,
    bases: dict[str, Any],
    facts: dict[str, Any],
    where: str,
    target: TargetFormat,
) -> Outcome:
    """Check the weights against their encoder and LLM, write them part by part, and verify the result.

    Args:
        folder: for the result.
        weights: names begin with `projector.`, `llm.` or `encoder.`; read lazily.
        recipe: of the training.
        bases: fingerprint of the encoder and digest of the LLM, for config.json.
        facts: about the training, for config.json.
        where: the checkpoint, for error messages.
        target: how to write it.
    """
    from slam_asr.artifacts.model_folder import (
        LLM,
        ModelConfig,
        projector_from_weights,
        write_adapter,
        write_model,
    )
    from slam_asr.conversion.slam_llm import FILE, write_slam_llm
    from slam_asr.conversion.tuned import (
        check_adapter,
        write_merged_llm,
        write_tuned_encoder,
        write_tuned_llm,
    )
    from slam_asr.models.encoders.registry import describe_encoder
    from slam_asr.models.llm import describe_llm, llm_width
    from slam_asr.pretrained.lazy_tensors import rename_tensors
    from slam_asr.pretrained.locate import locate_model

    names: dict[str, dict[str, str]] = {"projector": {}, "llm": {}, "encoder": {}}
    for name in weights:
        part, _, rest = name.partition(".")
        # A weight of any other part is ignored: its name goes into a dictionary that nothing refers to.
        names.get(part, {})[rest] = name
    parts: dict[str, Mapping[str, torch.Tensor]] = {
        part: rename_tensors(weights, own) for part, own in names.items()
    }
    if not parts["projector"]:
        raise ModelError(f"{where} holds no projector: it is not a checkpoint of slam-asr train.")
    widths = describe_encoder(recipe.encoder).width, llm_width(describe_llm(locate_model(recipe.llm.name)))
    projector = projector_from_weights(parts["projector"], recipe.projector, *widths, where)
    adapter = parts["llm"] if recipe.llm.tuning == "lora" else {}
    if bool(adapter) != any(".lora_" in name for name in parts["llm"]):
        raise ConfigurationError(
            f"{where} and the recipe {recipe.name}, whose llm.tuning is {recipe.llm.tuning}, do not agree on "
            "whether the LLM has a LoRA adapter: give the recipe of the training."
        )
    if adapter:
        check_adapter(adapter, recipe, where)
    if target.to == "llm":
        if not parts["llm"]:
            raise ConfigurationError(
                f"{where} leaves the LLM {recipe.llm.name} unchanged, so it has no trained LLM to write: "
                "leave out --to."
            )
        if adapter:
            write_merged_llm(folder, adapter, recipe)
        else:
            write_tuned_llm(folder, parts["llm"], recipe, where)
        log_line(f"{folder}: use it as llm.name, or in any program that loads transformers' models")
    elif target.to == "slam-llm":
        if parts["encoder"] or (parts["llm"] and not adapter):
            raise ConfigurationError(
                f"{where} contains a completely trained LLM or encoder, which SLAM-LLM's model.pt cannot "
                "hold: leave out --to."
            )
        write_slam_llm(folder, projector.state_dict(), adapter)
        log_line(f"{folder / FILE}: pass it to SLAM-LLM as ckpt_path")
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
            target.half,
        )
    verification = (
        _verify(folder, parts, recipe, widths, where, target)
        if target.verify
        else "not compared with the checkpoint"
    )
    counts = {part: sum(t.numel() for t in tensors.values()) for part, tensors in parts.items() if tensors}
    summary = " and ".join(f"{part} of {count:,} parameters" for part, count in counts.items())
    megabytes = sum(f.stat().st_size for f in folder.rglob("*") if f.suffix in (".safetensors", ".pt")) / 1e6
    return Outcome(f"{summary}, {megabytes:.1f} MB, {verification}", {"parameters": sum(counts.values())})


def _verify(
    folder: Path,
    parts: "dict[str, Mapping[str, torch.Tensor]]",
    recipe: Recipe,
    widths: tuple[int, int],
    where: str,
    target: TargetFormat,
) -> str:
    """Compare the written files with the weights that were read; if they differ, invalidate the result.

    Args:
        folder: of the result.
        parts: the checkpoint's weights of projector, LLM and encoder, by their names in each.
        recipe: of the training.
        widths: of encoder and LLM, in values.
        where: the checkpoint, for error messages.
        target: how the result was written.

    Returns:
        A clause for the summary that states what was compared.

    Raises:
        ModelError: a weight or a loss differs.
    """
    from slam_asr.artifacts.model_folder import CONFIG, projector_from_weights
    from slam_asr.conversion.slam_llm import FILE
    from slam_asr.conversion.verification import (
        TrainedWeights,
        compare_merged_loss,
        compare_written_loss,
        read_back,
        require_encoder,
    )
    from slam_asr.pretrained.locate import locate_model

    rounded = {name: t.half().float() if target.half else t.float() for name, t in parts["projector"].items()}
    before = TrainedWeights(projector_from_weights(rounded, recipe.projector, *widths, where), parts["llm"])
    try:
        if target.to == "llm":
            return compare_merged_loss(recipe, locate_model(recipe.llm.name), widths[0], before, folder)
        if parts["encoder"]:
            require_encoder(folder, parts["encoder"], recipe)
        return compare_written_loss(
            recipe,
            locate_model(recipe.llm.name),
            widths[0],
            before,
            lambda: read_back(folder, recipe, widths, target.to),
            str(folder),
        )
    except BaseException:
        # Without this file, nothing recognises the folder as a model. For `llm`, it is transformers' own
        # config.json, which has the same name.
        (folder / (FILE if target.to == "slam-llm" else CONFIG)).unlink(missing_ok=True)
        raise
