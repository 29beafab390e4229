"""Recognises the kind of a checkpoint by its content, and opens checkpoints of all kinds in the same form."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slam_asr.artifacts.checkpoint import CHECKPOINTS, MAIN, Checkpoint, all_complete, find, require
from slam_asr.artifacts.model_folder import (
    CTC_HEAD,
    ENCODER,
    LLM,
    WEIGHTS,
    adapter_file,
    fetch_model,
    model_digests,
    read_adapter,
    read_config,
    read_peft,
    read_projector,
    shipped_models,
)
from slam_asr.artifacts.stage_record import RECORD, Record, read_record, require_record
from slam_asr.config.recipe import Recipe, dump_recipe, load_recipe, value_of, with_base_models_of
from slam_asr.conversion.slam_llm import FILE as SLAM_LLM_FILE
from slam_asr.conversion.slam_llm import from_slam_llm, is_slam_llm
from slam_asr.conversion.zero_checkpoint import find_zero_folder, fp32_weights
from slam_asr.errors import ConfigurationError, ModelError
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import require_usable_llm
from slam_asr.pretrained.lazy_tensors import LazyTensors, join_tensors, lazy_tensors
from slam_asr.pretrained.locate import locate_base_model, locate_model
from slam_asr.pretrained.model_files import weight_files, weight_names, weights_sha256
from slam_asr.pretrained.unpickle import read_pickle
from slam_asr.pretrained.weight_checks import require_sound_files, tensor_dtypes
from slam_asr.progress import log_line
from slam_asr.storage import exists, fetch, fetch_folder, join, sha256_of_file


@dataclass
class Content:
    """What a checkpoint of any kind contains."""

    weights: Mapping[str, torch.Tensor]
    """The names begin with `projector.`, `llm.` or `encoder.`. Some mappings load a tensor on each access."""
    recipe: Recipe
    """The recipe of the training."""
    bases: dict[str, Any]
    """Fingerprint of the encoder and digest of the LLM, for config.json."""
    facts: dict[str, Any]
    """Facts about the training, for config.json."""
    where: str
    """Path of the checkpoint, for messages."""


@dataclass
class Source:
    """A checkpoint of a known kind."""

    inputs: dict[str, Any]
    """Digests and options that identify the content, for the stage's fingerprint."""
    read: Callable[[], Content]
    """Opens the content; not called if the stage has already converted it."""


def find_source(checkpoint: str, which: str, recipe: Recipe | None, adapter: str | None) -> Source | Path:
    """Recognise a checkpoint by its content.

    Args:
        checkpoint: folder, file or name; this and the other options are those of `convert_checkpoint`.
        which: which checkpoint of a training run is converted: `latest`, `best` or `average`.
        recipe: names encoder and LLM for a checkpoint that does not name them; for other checkpoints, it
            states where these models are now.
        adapter: folder of a LoRA adapter that is not in the checkpoint.

    Returns:
        The checkpoint; or, if it is the original file of a speech encoder, only the file's local path.

    Raises:
        ModelError: the checkpoint is missing, incomplete or damaged.
        InputError: another stage than `train` wrote the folder, or the training run has no checkpoint.
        ConfigurationError: the options contradict the checkpoint's kind, or it needs a recipe.
    """
    if checkpoint.endswith("model_states.pt"):
        # DeepSpeed's file of the weights; the optimiser's files are in the same folder.
        checkpoint = checkpoint.rpartition("/")[0] or "."
    elif exists(checkpoint):
        return _from_file(fetch(checkpoint), recipe, adapter)
    saved = None
    # A model folder has a stage's record too, so it must be recognised before a training run.
    is_model = checkpoint in shipped_models() or exists(join(checkpoint, WEIGHTS))
    if not is_model and not exists(join(checkpoint, RECORD)):
        local = fetch_folder(checkpoint)
        if not local.is_dir():
            raise ModelError(f"There is no file or folder {checkpoint}: check the path.")
        if (folder := find_zero_folder(local)) is not None:
            # These include the optimiser's files, which contain ZeRO's fp32 weights.
            files = sorted(folder.glob("*.pt"))
            return _from_others(fp32_weights(folder), folder, _digests(files), recipe, adapter)
        if (local / SLAM_LLM_FILE).is_file():
            return _from_file(local / SLAM_LLM_FILE, recipe, adapter)
        if weight_names(local):
            # DeepSpeed's zero_to_fp32.py wrote one file, or several and their index.
            require_sound_files(local, "checkpoint")
            return _from_tensors(weight_files(local), local, recipe, adapter)
        saved = find(join(checkpoint, CHECKPOINTS))
    if adapter and (is_model or saved or exists(join(checkpoint, RECORD))):
        raise ConfigurationError(
            f"--adapter is for a checkpoint of SLAM-LLM; {checkpoint} contains its adapter itself, if it has "
            "one: leave out --adapter."
        )
    if is_model:
        return _from_model(fetch_model(checkpoint), recipe)
    trained = _unfinished(checkpoint, saved) if saved else require_record(checkpoint, "train")
    return _from_training(trained, which, recipe)


def recipe_in(checkpoint: str) -> Recipe | None:
    """Return the recipe that a checkpoint contains: that of a training run or of a model folder.

    Args:
        checkpoint: as for `convert_checkpoint`.

    Returns:
        The recipe; None for a checkpoint of another kind, or one that does not exist.
    """
    if checkpoint in shipped_models() or exists(join(checkpoint, WEIGHTS)):
        return read_config(checkpoint).typed_recipe
    record = read_record(checkpoint)
    trained = record.stage == "train" if record else find(join(checkpoint, CHECKPOINTS)) is not None
    return _recipe_of_training(checkpoint) if trained else None


def _unfinished(folder: str, saved: Checkpoint) -> Record:
    """Describe a training run that has saved a checkpoint but has not finished.

    Raises:
        ModelError: the run is still in its beginning, in which the projector is trained without the LLM.
    """
    if saved.phase != MAIN:
        raise ModelError(
            f"The training run in {folder} is still in its beginning, and its projector cannot be used with "
            "the LLM yet: convert it later."
        )
    log_line(f"note: the training run in {folder} has not finished; it has done {saved.step} steps so far")
    bases = {key: saved.inputs[key] for key in ("encoder_fingerprint", "llm_sha256")}
    recipe = _recipe_of_training(folder)
    names = {"recipe": recipe.name, "encoder": recipe.encoder.name, "llm": recipe.llm.name}
    head = {CTC_HEAD: saved.ctc_head} if saved.ctc_head else {}
    return Record("", facts=names | bases | head, stage="train", folder=folder, inputs=saved.inputs)


def _recipe_of_training(folder: str) -> Recipe:
    return load_recipe(fetch(join(folder, "recipe.yaml")).read_text(encoding="utf-8"))


def _from_training(trained: Record, which: str, given: Recipe | None) -> Source:
    place = join(trained.folder, CHECKPOINTS)
    # Checkpoints of the beginning have other weights, and are not averaged with later ones.
    if which == "average":
        sources = [saved for saved in all_complete(place) if saved.phase == MAIN]
    else:
        sources = [require(place, which)]
    files = [{name: facts["sha256"] for name, facts in source.files.items()} for source in sources]
    recipe = _recipe_of_training(trained.folder)

    def read() -> Content:
        facts = {**trained.facts, "steps": sources[-1].step}
        if which == "average":
            facts["averaged_steps"] = ", ".join(str(source.step) for source in sources)
            log_line(f"mean of {len(sources)} checkpoints, of steps {facts['averaged_steps']}")
        bases = {"encoder": facts.pop("encoder_fingerprint"), "llm_sha256": facts.pop("llm_sha256")}
        located = _located(recipe, given, bases, trained.folder)
        return Content(_mean(sources), located, bases, facts, sources[-1].folder)

    inputs = {"training": trained.inputs, "files": files if which == "average" else files[0]}
    return Source(inputs | _new_places(recipe, given), read)


def _located(trained: Recipe, given: Recipe | None, bases: dict[str, Any], where: str) -> Recipe:
    """Return a training run's recipe, with the user's names for base models that have moved.

    Args:
        trained: the recipe of the training.
        given: the user's recipe, from which only `MODEL_KEYS` are taken.
        bases: fingerprint of the encoder and digest of the LLM in the training.
        where: the checkpoint, for error messages.

    Raises:
        ModelError: a model is not the one of the training.
    """
    recipe = with_base_models_of(trained, given)
    for key in ("encoder.name", "llm.name"):
        name = value_of(recipe, key)
        folder = locate_base_model(name, key, where)
        if name == value_of(trained, key):
            continue
        # An encoder's fingerprint includes its preprocessing, which its folder also defines. An LLM is
        # compared by its weights alone.
        if key == "encoder.name":
            same = describe_encoder(recipe.encoder).fingerprint() == bases["encoder"]
        else:
            same = weights_sha256(folder) == bases["llm_sha256"]
        if not same:
            raise ModelError(
                f"{key} is {name}, which is not the model that {where} was trained with, "
                f"{value_of(trained, key)}: the weights' sha256 differs; name a folder with the same weights."
            )
    return recipe


def _new_places(trained: Recipe, given: Recipe | None) -> dict[str, str]:
    """Return the names of the base models that are no longer where they were in training, by recipe key."""
    recipe = with_base_models_of(trained, given)
    names = {key: value_of(recipe, key) for key in ("encoder.name", "llm.name")}
    return {key: name for key, name in names.items() if name != value_of(trained, key)}


def _mean(sources: Sequence[Checkpoint]) -> Mapping[str, torch.Tensor]:
    """Return the mean of the checkpoints' fp32 weights; each tensor is computed when it is accessed."""
    first, *others = (source.tensors("weights") for source in sources)

    def mean(name: str) -> torch.Tensor:
        # m_n = m_(n-1) + (x_n - m_(n-1)) / n. However many checkpoints exist, a running mean needs only two
        # tensors in memory, and it has no large sum that would lose precision.
        running = first[name]
        for count, other in enumerate(others, start=2):
            running = running + (other[name] - running) / count
        return running

    return LazyTensors({name: partial(mean, name) for name in first})


def _from_file(path: Path, recipe: Recipe | None, adapter: str | None) -> Source | Path:
    if path.suffix == ".safetensors":
        tensor_dtypes(path)  # raises if the file is damaged
        return _from_tensors([path], path, recipe, adapter)
    content = read_pickle(path)
    if not is_slam_llm(content):
        if adapter:
            raise ConfigurationError(
                f"--adapter is for a checkpoint of SLAM-LLM, but {path} holds an encoder: leave it out."
            )
        return path
    return _from_others(content, path, {"file": sha256_of_file(path)}, recipe, adapter)


def _from_tensors(files: list[Path], where: Path, recipe: Recipe | None, adapter: str | None) -> Source:
    """Open a checkpoint whose files contain nothing but tensors, as safetensors or pickles."""
    is_safe = files[0].suffix == ".safetensors"
    tensors = lazy_tensors(files) if is_safe else join_tensors(*map(read_pickle, files))
    if not is_slam_llm(tensors):
        raise ModelError(
            f"{where} holds no weights of SLAM-LLM's projector (encoder_projector.…): give a checkpoint of a "
            "training."
        )
    return _from_others(tensors, where, _digests(files), recipe, adapter)


def _digests(files: list[Path]) -> dict[str, Any]:
    return {"files": {file.name: sha256_of_file(file) for file in files}}


def _from_others(
    weights: Mapping[str, torch.Tensor],
    where: Path,
    inputs: dict[str, Any],
    recipe: Recipe | None,
    adapter: str | None,
) -> Source:
    """Describe a checkpoint of another program, which does not name its encoder and LLM.

    Args:
        weights: the checkpoint's weights, by this project's names or by those of SLAM-LLM.
        where: the checkpoint, for messages.
        inputs: digests of its files.
        recipe: names encoder and LLM.
        adapter: folder of a LoRA adapter that is not in the checkpoint.
    """
    if recipe is None:
        raise ConfigurationError(
            f"{where} does not state which encoder and LLM it belongs to: name them with --recipe."
        )
    # SLAM-LLM trains on the encoder's outputs directly, not on features that were rounded for a store.
    recipe = replace(recipe, features=replace(recipe.features, dtype="fp32"))
    if is_slam_llm(weights):
        weights = from_slam_llm(weights, str(where))
    if adapter:
        folder = fetch_folder(adapter)
        inputs = {**inputs, "adapter": sha256_of_file(adapter_file(folder))}
        weights = join_tensors(weights, {f"llm.{name}": t for name, t in read_peft(folder).items()})
    encoder, llm_folder = describe_encoder(recipe.encoder), locate_model(recipe.llm.name)
    encoder.require_weights()
    require_usable_llm(llm_folder, recipe.llm)
    bases = {"encoder": encoder.fingerprint(), "llm_sha256": weights_sha256(llm_folder)}
    facts = {"recipe": recipe.name, "encoder": recipe.encoder.name, "llm": recipe.llm.name}
    content = Content(weights, recipe, bases, facts, str(where))
    return Source({**inputs, "recipe": dump_recipe(recipe), **bases}, lambda: content)


def _from_model(model: Path, given: Recipe | None) -> Source:
    complete = [part for part in (LLM, ENCODER) if (model / part).is_dir()]
    if complete:
        raise ModelError(
            f"{model} holds a completely trained {complete[0]}. It is in the folder {complete[0]}/, in "
            "transformers' format: copy that, or convert the training's checkpoint."
        )
    config = read_config(model)

    def read() -> Content:
        projector = read_projector(model, config).state_dict()
        weights = {f"projector.{name}": tensor for name, tensor in projector.items()}
        weights |= {f"llm.{name}": tensor for name, tensor in read_adapter(model).items()}
        bases = {"encoder": config.encoder, "llm_sha256": config.llm_sha256}
        recipe = _located(config.typed_recipe, given, bases, str(model))
        return Content(weights, recipe, bases, config.training, str(model))

    return Source({"model": model_digests(model)} | _new_places(config.typed_recipe, given), read)
