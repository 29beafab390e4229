"""Checks the inputs of a training run before the encoder or the LLM is loaded.

This module also collects the inputs that the trained weights depend on, for the stage's fingerprint.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slam_asr.artifacts import model_folder
from slam_asr.artifacts.feature_store.index import to_array
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.manifest import Utterance, read_manifest
from slam_asr.artifacts.utterances import fit_to_window
from slam_asr.config.recipe import Recipe, dump_recipe, settings_that_affect_weights
from slam_asr.errors import ConfigurationError, InputError
from slam_asr.models.encoders.base import EncoderSpec
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import describe_llm, llm_positions, llm_width, require_targets, require_usable_llm
from slam_asr.models.precision import explain_precision, pick_device, processes_here
from slam_asr.models.prompt import Prompt
from slam_asr.pretrained.locate import locate_model
from slam_asr.pretrained.model_files import weights_sha256
from slam_asr.progress import log_line
from slam_asr.storage import digest, fetch, join, sha256_of_file
from slam_asr.training.beginning import tokens_for_ctc
from slam_asr.training.job import TrainingJob
from slam_asr.training.kernels import require_kernels
from slam_asr.training.launch import Nodes, nodes_from_environment
from slam_asr.training.trackers import require_trackers


@dataclass
class CheckedInputs:
    """The inputs of a training run that has passed all checks."""

    device: torch.device
    nodes: Nodes
    """The number of machines, and the rank of this one."""
    processes: int
    """Training processes on this machine."""
    encoder: EncoderSpec
    prompt: Prompt
    utterances: Mapping[str, Sequence[Utterance]]
    """All utterances, by set (`train`, `dev`)."""
    fitting: Mapping[str, Sequence[Utterance]]
    """The utterances that training uses, by set: those that `encoder.long_audio` does not skip."""
    base: dict[str, Any]
    """`encoder_fingerprint`, and `llm_sha256`: the digest of the LLM's weights."""
    job: TrainingJob
    """What the training processes need. The stage fills in `folder`, `published`, `rows` and
    `encoder_parameters`."""

    @property
    def hours(self) -> float:
        """Hours of audio in the train set."""
        return sum(u.duration or 0.0 for u in self.utterances["train"]) / 3600


def check_inputs(
    recipe: Recipe, train_manifest: str, dev_manifest: str | None, feature_store: str | None
) -> CheckedInputs:
    """Check that this machine can train the recipe on these inputs.

    Args:
        recipe: models and hyper-parameters.
        train_manifest: path of the utterances to train on (JSON lines).
        dev_manifest: path of the utterances to validate on, if any.
        feature_store: path of the feature store, if any. It is ignored if the recipe caches no features.

    Raises:
        UserError: inputs do not fit each other, or this machine cannot train the recipe.
    """
    nodes = nodes_from_environment(recipe.training.nodes)
    device = _device_for(recipe)
    processes = processes_here("training.processes", recipe.training.processes)
    manifests = {"train": train_manifest, **({"dev": dev_manifest} if dev_manifest else {})}
    utterances = {name: read_manifest(path) for name, path in manifests.items()}
    encoder = describe_encoder(recipe.encoder)
    encoder.require_weights()
    # The LLM is checked before the audio is hashed, which may take long.
    llm_folder = locate_model(recipe.llm.name)
    prompt = check_llm(recipe, llm_folder)
    fingerprint = encoder.fingerprint()
    fitting = {name: fit_to_window(us, encoder) for name, us in utterances.items()}
    warn_of_shared_utterances(fitting)
    feature_store = (feature_store or None) if recipe.caches_features else None
    features = feature_store and require_features(feature_store, fingerprint, recipe, fitting.values())
    # Digests of contents, not names: a resumed training may find its models in another folder.
    base = {"encoder_fingerprint": fingerprint, "llm_sha256": weights_sha256(llm_folder)}
    init_from, initial_digests, sharpness = _check_initial_model(recipe, encoder, llm_folder, base)
    inputs: dict[str, Any] = {
        "manifests": {name: sha256_of_file(fetch(path)) for name, path in manifests.items()},
        "features": features,
        "recipe": settings_that_affect_weights(recipe),
        **(base | initial_digests),
    }
    ctc_tokens: list[int] = []
    if recipe.projector.uses_ctc:
        ctc_tokens = tokens_for_ctc(recipe, encoder, prompt.tokenizer, fitting)
        inputs["ctc_tokens"] = {"number": len(ctc_tokens), "sha256": digest(ctc_tokens)}
    if recipe.training.utterances_per_batch:
        # With this option the size of a step depends on the number of processes.
        inputs["processes"] = nodes.number * processes
    job = TrainingJob(
        recipe=dump_recipe(recipe),
        train_manifest=train_manifest,
        dev_manifest=dev_manifest,
        feature_store=feature_store,
        llm_folder=str(llm_folder),
        init_from=str(init_from) if init_from else None,
        ctc_tokens=ctc_tokens,
        ctc_sharpness=sharpness,
        inputs=inputs,
    )
    return CheckedInputs(device, nodes, processes, encoder, prompt, utterances, fitting, base, job)


def _check_initial_model(
    recipe: Recipe, encoder: EncoderSpec, llm_folder: Path, base: dict[str, Any]
) -> tuple[Path | None, dict[str, str], float | None]:
    """Fetch and check the model that `projector.init_from` names, if any.

    A warning is logged if its projector was trained with another encoder or LLM.

    Args:
        recipe: the training run's recipe; names the model.
        encoder: encoder of this training run.
        llm_folder: folder of this training run's LLM.
        base: `encoder_fingerprint` and `llm_sha256` of this training run.

    Returns:
        The model's local folder, or None; the SHA-256 of the weights to start from, keyed by `init_from` for
        the projector and by `init_adapter` for the adapter; and the sharpness of the model's CTC head, or
        None.

    Raises:
        UserError: the model does not exist, or its projector or adapter does not fit the recipe's.
    """
    name = recipe.projector.init_from
    if not name:
        return None, {}, None
    folder = model_folder.fetch_model(name)
    config = model_folder.read_config(folder)
    # Called only for its checks: each training process builds the projector itself.
    model_folder.projector_from_weights(
        model_folder.read_projector(folder, config).state_dict(),
        recipe.projector,
        encoder.width,
        llm_width(describe_llm(llm_folder, recipe.llm.trust_remote_code)),
        f"projector.init_from: {join(folder, model_folder.WEIGHTS)}",
    )
    others = ["encoder"] if config.encoder != base["encoder_fingerprint"] else []
    others += ["LLM"] if config.llm_sha256 != base["llm_sha256"] else []
    if others:
        log_line(
            f"warning: the projector of {name} was trained with another {' and '.join(others)}: it may be "
            "of little use as a starting point"
        )
    digests = {"init_from": sha256_of_file(folder / model_folder.WEIGHTS)}
    if _starts_from_adapter(recipe, folder):
        digests["init_adapter"] = sha256_of_file(model_folder.adapter_file(folder / model_folder.ADAPTER))
    head = config.training.get(model_folder.CTC_HEAD)
    return folder, digests, head and head["sharpness"]


def _starts_from_adapter(recipe: Recipe, folder: Path) -> bool:
    """Return whether a training run also starts from the adapter of the model in `projector.init_from`.

    A warning is logged if the model has an adapter but the recipe trains none.

    Args:
        recipe: the training run's recipe.
        folder: the model's local folder.

    Raises:
        ConfigurationError: the model has an adapter of another size or scale, or on other layers.
    """
    if not (folder / model_folder.ADAPTER).is_dir():
        return False
    name = recipe.projector.init_from
    if recipe.llm.tuning != "lora":
        log_line(
            f"warning: {name} was trained with a LoRA adapter, which is left out here: set llm.tuning to "
            "lora to start from it too"
        )
        return False
    ours, theirs = recipe.llm.lora, model_folder.read_config(folder).typed_recipe.llm.lora
    targets = f"[{', '.join(theirs.targets)}]"
    needed = [
        f"llm.lora.{key} to {value}"
        for key, value in (("rank", theirs.rank), ("alpha", theirs.alpha), ("targets", targets))
        if getattr(ours, key) != getattr(theirs, key)
    ]
    if needed:
        raise ConfigurationError(
            f"projector.init_from: the LoRA adapter of {name} does not fit the recipe's: set "
            f"{', '.join(needed)}."
        )
    return True


def _device_for(recipe: Recipe) -> torch.device:
    """Return the device to train on, if this machine has what the recipe's trackers and kernels need.

    Raises:
        ConfigurationError: something is missing, or the device cannot compute in one of the precisions.
    """
    device = pick_device()
    require_trackers(recipe.training.trackers)
    require_kernels(recipe.training, device)
    for precision in (recipe.training.precision, recipe.decoding.precision):
        explain_precision(precision, device)  # called for its check of the precision
    return device


def warn_of_shared_utterances(fitting: Mapping[str, Sequence[Utterance]]) -> None:
    """Log a warning if dev utterances are also in train: validation would not measure generalisation.

    Args:
        fitting: utterances that training uses, by set (`train`, `dev`).
    """
    # Compared by audio, not by key: the same recording may have a different key in each set.
    trained = {u.audio_id for u in fitting["train"]}
    shared = [u.key for u in fitting.get("dev", ()) if u.audio_id in trained]
    if shared:
        log_line(
            f"warning: {len(shared)} of {len(fitting['dev'])} dev utterances are also in train (first "
            f"{shared[0]}): the dev loss will be lower than on unseen speech, and neither early stopping nor "
            "the best checkpoint can be trusted"
        )


def require_features(
    path: str, expected: dict[str, Any], recipe: Recipe, manifests: Iterable[Sequence[Utterance]]
) -> dict[str, Any]:
    """Check that a feature store has every utterance, and return the store's fingerprint.

    Args:
        path: path of the store.
        expected: fingerprint of the recipe's encoder.
        recipe: names the dtype of the features.
        manifests: the utterances of each set.

    Raises:
        UserError: the store does not exist, was written with another encoder, or lacks utterances.
    """
    audio_ids = [u.audio_id for utterances in manifests for u in utterances]
    store = FeatureStore(path, expected, recipe.features.dtype, audio_ids)
    missing = np.flatnonzero(store.index.locate(to_array(audio_ids)) < 0)
    if len(missing):
        key = next(itertools.islice(itertools.chain.from_iterable(manifests), int(missing[0]), None)).key
        raise InputError(
            f"The feature store {path} lacks {len(missing)} of {len(audio_ids)} utterances, first {key} "
            f"(audio {audio_ids[missing[0]][:16]}…): run `slam-asr extract-features` over this manifest, "
            "for all work shards if there are several."
        )
    return store.fingerprint


def check_llm(recipe: Recipe, folder: Path) -> Prompt:
    """Check that an LLM can be used with the recipe, without reading the values of its weights.

    Args:
        recipe: the training run's recipe.
        folder: folder of the LLM.

    Returns:
        The recipe's prompts, tokenised.

    Raises:
        UserError: the folder has no causal LM or no tokenizer; its weights do not fit its configuration; the
            LLM lacks the prompt's template or the layers for adapters; or prompt and answer leave no LLM
            positions for audio.
    """
    trust = recipe.llm.trust_remote_code
    prompt = Prompt(require_usable_llm(folder, recipe.llm), recipe.llm)
    # Training may draw any of these prompts for any utterance.
    longest = max(len(s.before) + len(s.ids) for s in (prompt.main, *prompt.for_training))
    limit = llm_positions(folder, trust)
    if limit is not None and longest + recipe.decoding.max_new_tokens >= limit:
        raise ConfigurationError(
            f"{recipe.llm.name} holds {limit} LLM positions: the prompt takes {longest}, and the answer may "
            f"take {recipe.decoding.max_new_tokens} (decoding.max_new_tokens), which leaves none for audio; "
            "shorten the prompt, or lower decoding.max_new_tokens."
        )
    if recipe.llm.tuning == "lora":
        require_targets(describe_llm(folder, trust), recipe.llm.lora)
    return prompt
