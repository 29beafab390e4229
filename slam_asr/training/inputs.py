"""Checks a training run's inputs before any weight is loaded, and lists those that the weights depend on."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slam_asr.artifacts.feature_store.index import to_array
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.manifest import Utterance, read_manifest
from slam_asr.artifacts.model_folder import ADAPTER, CTC_HEAD, WEIGHTS, adapter_file, read_config
from slam_asr.artifacts.utterances import fit_to_window
from slam_asr.config.recipe import Recipe
from slam_asr.errors import ConfigurationError, InputError
from slam_asr.models.encoders.base import EncoderSpec
from slam_asr.models.encoders.registry import describe_encoder
from slam_asr.models.llm import describe_llm, llm_positions, require_targets, require_usable_llm
from slam_asr.models.precision import explain_precision, pick_device, processes_here
from slam_asr.models.prompt import Prompt
from slam_asr.pretrained.locate import locate_model
from slam_asr.pretrained.model_files import weights_sha256
from slam_asr.progress import log_line
from slam_asr.storage import digest, fetch, sha256_of_file
from slam_asr.training.beginning import tokens_for_ctc
from slam_asr.training.initial_model import initial_projector, starts_from_adapter
from slam_asr.training.kernels import require_kernels
from slam_asr.training.launch import Nodes, nodes_from_environment
from slam_asr.training.trackers import require_trackers


@dataclass
class CheckedInputs:
    """The inputs of a training run that has passed all checks."""

    device: torch.device
    nodes: Nodes
    """The machines of the training, and which of them this one is."""
    processes: int
    """Training processes on this machine."""
    encoder: EncoderSpec
    llm_folder: Path
    prompt: Prompt
    utterances: Mapping[str, Sequence[Utterance]]
    """All utterances, by set (`train`, `dev`)."""
    fitting: Mapping[str, Sequence[Utterance]]
    """Those that fit the encoder's window."""
    feature_store: str | None
    """None if audio is encoded on the fly."""
    init_from: Path | None
    """Local folder of the model whose projector the training starts from."""
    init_adapter: bool
    """Whether the training also starts from that model's adapter."""
    ctc_tokens: list[int]
    """Token ids that CTC distinguishes, the blank's first; empty if the training has no CTC loss."""
    base: dict[str, Any]
    """Fingerprint of the encoder and digest of the LLM's weights."""
    inputs: dict[str, Any]
    """Everything that the trained weights depend on by more than rounding."""

    @property
    def ctc_sharpness(self) -> float | None:
        """Sharpness that the initial model's CTC head had; None if it had no head."""
        head = read_config(self.init_from).training.get(CTC_HEAD) if self.init_from else None
        return head and head["sharpness"]

    @property
    def hours(self) -> float:
        """Hours of audio to train on."""
        return sum(u.duration or 0.0 for u in self.utterances["train"]) / 3600


def check_inputs(
    recipe: Recipe, train_manifest: str, dev_manifest: str | None, feature_store: str | None
) -> CheckedInputs:
    """Check that this machine can train the recipe on these inputs.

    Args:
        recipe: models and hyper-parameters.
        train_manifest: utterances to train on (JSON lines).
        dev_manifest: utterances to validate on.
        feature_store: feature store; ignored if the recipe caches no features.

    Raises:
        UserError: inputs do not fit each other, or this machine cannot train the recipe.
    """
    nodes = nodes_from_environment(recipe.training.nodes)
    device = pick_device()
    _require_machine_for(recipe, device)
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
    check_utterances(fitting)
    feature_store = (feature_store or None) if recipe.caches_features else None
    features = feature_store and require_features(feature_store, fingerprint, recipe, fitting.values())
    # Contents rather than names, so a resumed training may find its models in another folder.
    base = {"encoder_fingerprint": fingerprint, "llm_sha256": weights_sha256(llm_folder)}
    inputs: dict[str, Any] = {
        "manifests": {name: sha256_of_file(fetch(path)) for name, path in manifests.items()},
        "features": features,
        **base,
        "recipe": settings_that_affect_weights(recipe),
    }
    init_from = initial_projector(recipe, encoder, llm_folder, base)
    if init_from is not None:
        inputs["init_from"] = sha256_of_file(init_from / WEIGHTS)
    init_adapter = init_from is not None and starts_from_adapter(recipe, init_from)
    if init_from is not None and init_adapter:
        inputs["init_adapter"] = sha256_of_file(adapter_file(init_from / ADAPTER))
    ctc_tokens: list[int] = []
    if recipe.projector.uses_ctc:
        ctc_tokens = tokens_for_ctc(recipe, encoder, prompt.tokenizer, fitting)
        inputs["ctc_tokens"] = {"number": len(ctc_tokens), "sha256": digest(ctc_tokens)}
    if recipe.training.utterances_per_batch:
        # With this option the size of a step depends on the number of processes.
        inputs["processes"] = nodes.number * processes
    return CheckedInputs(
        device=device,
        nodes=nodes,
        processes=processes,
        encoder=encoder,
        llm_folder=llm_folder,
        prompt=prompt,
        utterances=utterances,
        fitting=fitting,
        feature_store=feature_store,
        init_from=init_from,
        init_adapter=init_adapter,
        ctc_tokens=ctc_tokens,
        base=base,
        inputs=inputs,
    )


def _require_machine_for(recipe: Recipe, device: torch.device) -> None:
    """Check that this machine has what a recipe's trackers, kernels and precisions need.

    Raises:
        ConfigurationError: something is missing.
    """
    require_trackers(recipe.training.trackers)
    require_kernels(recipe.training, device)
    for precision in (recipe.training.precision, recipe.decoding.precision):
        explain_precision(precision, device)  # raises if it cannot be used


def check_utterances(fitting: Mapping[str, Sequence[Utterance]]) -> None:
    """Refuse an empty set, and warn if dev utterances are also in train.

    Validation on utterances that were trained on does not measure generalisation.

    Args:
        fitting: utterances that fit the encoder's window, by set (`train`, `dev`).

    Raises:
        InputError: no utterance is left to train on, or to validate on.
    """
    for name, utterances in fitting.items():
        if not utterances:
            raise InputError(
                f"The {name} manifest has no usable utterance: it is empty, or all are longer than the "
                "encoder's window (encoder.long_audio is set-aside)."
            )
    # By audio, not by key: the same recording may have another name in each set.
    trained = {u.audio_id for u in fitting["train"]}
    shared = [u.key for u in fitting.get("dev", ()) if u.audio_id in trained]
    if shared:
        log_line(
            f"warning: {len(shared)} of {len(fitting['dev'])} dev utterances are also in train (first "
            f"{shared[0]}): the dev loss will be lower than on speech that was not trained on, and neither "
            "early stopping nor the best checkpoint can be trusted"
        )


def require_features(
    path: str, expected: dict[str, Any], recipe: Recipe, manifests: Iterable[Sequence[Utterance]]
) -> dict[str, Any]:
    """Check that a feature store has every utterance, and return its fingerprint.

    Args:
        path: path of the store.
        expected: fingerprint of the encoder.
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
    """Check that an LLM suits the recipe, without reading the values of its weights.

    Args:
        recipe: its sections `llm` and `decoding` are read.
        folder: folder of the LLM.

    Returns:
        The recipe's prompts, tokenised.

    Raises:
        UserError: the folder has no causal LM or no tokenizer, or weights that do not fit its configuration;
            the prompt's template or the layers for adapters do not exist; or prompt and answer leave no
            positions for audio.
    """
    trust = recipe.llm.trust_remote_code
    prompt = Prompt(require_usable_llm(folder, recipe.llm), recipe.llm)
    # Training may draw any of these prompts for any utterance.
    longest = max(len(s.before) + len(s.ids) for s in (prompt.main, *prompt.for_training))
    limit = llm_positions(folder, trust)
    if limit is not None and longest + recipe.decoding.max_new_tokens >= limit:
        raise ConfigurationError(
            f"{recipe.llm.name} holds {limit} LLM positions: the prompt takes {longest} and "
            f"decoding.max_new_tokens {recipe.decoding.max_new_tokens}, which leaves none for audio; shorten "
            "the prompt, or lower decoding.max_new_tokens."
        )
    if recipe.llm.tuning == "lora":
        require_targets(describe_llm(folder, trust), recipe.llm.lora)
    return prompt


def settings_that_affect_weights(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's settings that the trained weights depend on by more than rounding.

    The engine, for example, is left out: all engines give the same weights up to rounding.
    """
    values = asdict(recipe)
    for key in (
        "nodes",
        "processes",
        "engine",
        "zero_stage",
        "log_every",
        "positions_per_batch",
        "offload_optimizer",
        "deepspeed",
        "packing",
        "gradient_checkpointing",
        "compile",
        "liger",
        "nonfinite_steps",
        "checkpoint_every",
        "checkpoint_minutes",
        "checkpoints",
        "samples",
        "trackers",
    ):
        del values["training"][key]
    assert isinstance(recipe.training.deepspeed, dict)  # loading the recipe has read a file that it named
    optimizer = recipe.training.deepspeed.get("optimizer")
    if optimizer:
        values["training"]["deepspeed"] = {"optimizer": optimizer}
    # These keys are newer than the first training runs, which must still match their inputs: keys whose
    # feature is not used are left out.
    for section, key in (
        ("llm", "trust_remote_code"),
        ("llm", "answer_prefix"),
        ("projector", "dropout"),
        ("projector", "ctc_weight"),
        ("projector", "drop_blanks"),
    ):
        if not values[section][key]:
            del values[section][key]
    if not recipe.projector.beginning.active:
        del values["projector"]["beginning"]
    del values["encoder"]["batch_seconds"]
    del values["projector"]["init_from"]  # the digest of its weights is an input of its own
    # Of the feature store's settings only these matter: the dtype rounds the features, and the size and the
    # mixing of shards determine the order of the utterances.
    values["features"] = {
        key: values["features"][key] for key in ("dtype", "shard_megabytes", "window_shards")
    }
    return {section: values[section] for section in ("encoder", "features", "projector", "llm", "training")}
