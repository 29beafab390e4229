"""The stage `train`: checks everything that can be checked without loading weights, then starts torchrun."""

import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slam_asr.artifacts.feature_store.index import to_array
from slam_asr.artifacts.feature_store.store import FeatureStore
from slam_asr.artifacts.manifest import Utterance, read_manifest
from slam_asr.artifacts.stage_record import (
    FINGERPRINT,
    Outcome,
    Record,
    read_record,
    require_permission_to_replace,
    run_stage,
)
from slam_asr.config.recipe import Recipe, dump_recipe
from slam_asr.errors import ConfigurationError, InputError, Stopped, UserError
from slam_asr.progress import clock, log_line
from slam_asr.runtime.worker import FAILURE
from slam_asr.storage import (
    digest,
    fetch,
    is_s3,
    join,
    local_path,
    sha256_of_file,
    write_atomically,
    write_json,
)
from slam_asr.storage.cache import cache_folder
from slam_asr.training.nodes import Nodes, nodes_from_environment
from slam_asr.training.trackers import require_trackers

if TYPE_CHECKING:
    from slam_asr.models.encoders.base import EncoderSpec
    from slam_asr.models.prompt import Prompt

WAIT_FOR_RECORD = 600.0
"""Seconds that other nodes wait for the first node's record after training."""
RENDEZVOUS = 1800
"""Seconds that a node waits for the others, which may still be pulling images or downloading models."""

LAST_CHECKPOINT = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
"""Seconds allowed for the last checkpoint after a signal; a cluster's grace period is usually shorter."""
STOPPING = (signal.SIGTERM, signal.SIGINT)

ALLOCATION = ("MALLOC_MMAP_THRESHOLD_", "4194304")
"""Makes glibc allocate each block above 4 MiB in pages of its own.

Such a block is returned to the system when it is freed. By default glibc raises this threshold to as much as
32 MiB, and activations then leave holes in the heap: training on a CPU took 1.5 times the memory, in the same
time.
"""


def train(
    recipe: Recipe,
    train_manifest: str,
    output: str,
    feature_store: str | None = None,
    dev_manifest: str | None = None,
    overwrite: bool = False,
) -> Record:
    """Train the projector, and whatever else the recipe tunes, with one or more processes and machines.

    Args:
        recipe: models and hyper-parameters.
        train_manifest: utterances to train on (JSON lines).
        output: folder for checkpoints and curves; {fingerprint} in it is replaced by a digest of the inputs.
        feature_store: store written by extract-features. Without one, or if the recipe trains the encoder too
            or has `features.cache: none`, audio is encoded on the fly.
        dev_manifest: utterances to validate on (JSON lines).
        overwrite: replace results of other inputs instead of refusing.

    Returns:
        The stage's record. Its folder contains checkpoints/, curve.jsonl, curves.html and recipe.yaml.

    Raises:
        UserError: inputs do not fit each other, or this machine cannot train the recipe.
    """
    from slam_asr.artifacts.model_folder import WEIGHTS
    from slam_asr.artifacts.utterances import fit_to_window
    from slam_asr.models.encoders.registry import describe_encoder
    from slam_asr.models.precision import explain_precision, pick_device
    from slam_asr.pretrained.locate import locate_model, weights_sha256
    from slam_asr.training.job import CHECKPOINTS, FACTS, TrainingJob
    from slam_asr.training.kernels import require_kernels

    nodes = nodes_from_environment(recipe.training.nodes)
    require_trackers(recipe.training.trackers)
    device = pick_device()
    require_kernels(recipe.training, device)
    for precision in (recipe.training.precision, recipe.decoding.precision):
        explain_precision(precision, device)
    if device.type == "cuda" and recipe.training.processes > _devices():
        raise ConfigurationError(
            f"training.processes is {recipe.training.processes} but this machine has {_devices()} GPUs: "
            "lower it, or leave it at 0 to use them all."
        )
    manifests = {"train": train_manifest, **({"dev": dev_manifest} if dev_manifest else {})}
    utterances = {name: read_manifest(path) for name, path in manifests.items()}
    encoder = describe_encoder(recipe.encoder)
    if not recipe.caches_features:
        feature_store = None
    fitting = {name: fit_to_window(us, encoder) for name, us in utterances.items()}
    _check_utterances(fitting)
    features = (
        require_features(feature_store, encoder.fingerprint(), recipe, fitting.values())
        if feature_store
        else None
    )
    llm_folder = locate_model(recipe.llm.name)
    prompt = check_llm(recipe, llm_folder)
    base = {"encoder_fingerprint": encoder.fingerprint(), "llm_sha256": weights_sha256(llm_folder)}
    inputs: dict[str, Any] = {
        "manifests": {name: sha256_of_file(fetch(path)) for name, path in manifests.items()},
        "features": features,
        **base,
        "recipe": _settings_that_affect_weights(recipe),
    }
    init_from = initial_projector(recipe, encoder, llm_folder, base)
    if init_from is not None:
        inputs["init_from"] = sha256_of_file(init_from / WEIGHTS)
    if recipe.training.utterances_per_batch:
        # With this option the size of a step depends on the number of processes.
        inputs["processes"] = nodes.number * (recipe.training.processes or _devices())
    hours = sum(u.duration or 0.0 for u in utterances["train"]) / 3600
    # Computed as `run_stage` does it: worker nodes do not call that function, but must find the same folder.
    published = output.replace(FINGERPRINT, digest(inputs)[:16]).rstrip("/")
    published = published if is_s3(published) else str(local_path(published).absolute())

    def train_here(folder: Path) -> None:
        from transformers import AutoConfig

        from slam_asr.planning.memory_fit import require_fit
        from slam_asr.planning.shapes import Shapes
        from slam_asr.runtime.machine import machine_of

        processes = recipe.training.processes or _devices()
        shapes = Shapes(recipe, encoder, AutoConfig.from_pretrained(llm_folder), [])
        require_fit(shapes, prompt, fitting["train"], machine_of(device, processes, nodes.number))
        # An earlier attempt may have left these files; they must not be taken for results of this one.
        for leftover in (FACTS, FAILURE):
            _remove(folder / leftover)
        write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
        job = TrainingJob(
            recipe=dump_recipe(recipe),
            train_manifest=train_manifest,
            dev_manifest=dev_manifest,
            feature_store=feature_store,
            llm_folder=str(llm_folder),
            encoder_parameters=encoder.count_parameters(),
            folder=str(folder),
            published=published,
            init_from=str(init_from) if init_from else None,
            inputs=inputs,
        )
        write_json(folder / "job.json", asdict(job))
        _torchrun(processes, folder, nodes, join(published, CHECKPOINTS))

    def work(folder: Path) -> Outcome:
        from slam_asr.training.live import write_page

        require_same_training(join(published, CHECKPOINTS), inputs, overwrite)
        train_here(folder)
        facts = json.loads((folder / FACTS).read_text())
        shown = write_page(
            folder,
            recipe,
            [
                ("Audio", f"{hours:.2f} h in {len(utterances['train'])} utterances"),
                ("Time", clock(facts["seconds"])),
            ],
        )
        curve, validation = shown["curve"], shown["validation"]
        last = validation[-1] if validation else curve[-1]
        facts |= {
            "recipe": recipe.name,
            "encoder": recipe.encoder.name,
            "llm": recipe.llm.name,
            **base,
            "train_utterances": len(utterances["train"]),
            "train_hours": round(hours, 4),
            **shown,
        }
        summary = (
            f"{facts['steps']} steps, {'dev ' if validation else ''}accuracy {last['accuracy']:.3f}, "
            f"loss {last['loss']:.3f}"
        )
        metrics = {
            "steps": facts["steps"],
            "loss": round(curve[-1]["loss"], 4),
            "accuracy": round(curve[-1]["accuracy"], 4),
        }
        if validation:
            metrics |= {"dev loss": round(last["loss"], 4), "dev accuracy": round(last["accuracy"], 4)}
        if "wer" in last:
            metrics["dev WER of samples"] = round(last["wer"], 4)
        return Outcome(summary, metrics, facts)

    if not nodes.is_coordinator:
        return _train_as_worker_node(published, inputs, nodes, train_here, overwrite)
    return run_stage("train", output, inputs, work, overwrite)


def _train_as_worker_node(
    folder: str, inputs: dict[str, Any], nodes: Nodes, train_here: Callable[[Path], None], overwrite: bool
) -> Record:
    """Train on a machine other than the first, and wait for the record that the first one writes.

    Args:
        folder: the stage's results, perhaps in object storage.
        inputs: inputs of this training.
        nodes: this machine's rank.
        train_here: function that trains, with results in a local folder.
        overwrite: whether results of other inputs may be replaced.

    Raises:
        UserError: this node's training failed, or the first node wrote no record within `WAIT_FOR_RECORD`.
    """
    done = read_record(folder)
    if done is not None and done.inputs == inputs:
        log_line(f"train: already there, nothing to do: {done.summary} ({folder})")
        return done
    if done is not None:
        require_permission_to_replace(folder, done, inputs, overwrite)
    work_folder = cache_folder() / "work" / f"{digest(folder)[:24]}-node-{nodes.rank}"
    work_folder.mkdir(parents=True, exist_ok=True)
    try:
        train_here(work_folder)
    finally:
        shutil.rmtree(work_folder, ignore_errors=True)
    deadline = time.monotonic() + WAIT_FOR_RECORD
    while (done := read_record(folder)) is None or done.inputs != inputs:
        if time.monotonic() > deadline:
            raise UserError(f"The first node has written no record in {folder}: see its log for the reason.")
        time.sleep(1.0)
    log_line(f"train: node {nodes.rank} of {nodes.number} is done; the first node wrote {folder}")
    return done


def require_same_training(folder: str, inputs: dict[str, Any], overwrite: bool) -> None:
    """Check that checkpoints of an earlier attempt belong to this training, so that it may resume from them.

    Args:
        folder: folder of the checkpoints.
        inputs: inputs of this training.
        overwrite: whether to remove another training's checkpoints instead of refusing.

    Raises:
        ConfigurationError: the checkpoints belong to another training; the message names the keys that
            differ.
    """
    from slam_asr.artifacts import checkpoint

    latest = checkpoint.find(folder)
    if latest is None:
        return
    differing = _differences(latest.inputs, inputs)
    if differing and not overwrite:
        shown = ", ".join(f"{key} {before} → {now}" for key, before, now in differing[:5])
        more = ", …" if len(differing) > 5 else ""
        raise ConfigurationError(
            f"{latest.folder} is a checkpoint of another training ({len(differing)} keys differ: "
            f"{shown}{more}): choose another --output, or add --overwrite true to start again."
        )
    if differing:
        checkpoint.clear(folder)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """List (key, before, now) of the inputs that differ, except those that a resumed training may change."""
    flat_before, flat_now = _flat(before), _flat(now)
    harmless = {"recipe.training.validate_every", "recipe.training.patience"}
    if flat_before.get("recipe.training.schedule") == flat_now.get("recipe.training.schedule") == "constant":
        # With a constant rate, the total number of steps does not affect the steps done so far.
        harmless |= {"recipe.training.max_steps", "recipe.training.epochs"}
    keys = sorted(
        k for k in flat_before | flat_now if flat_before.get(k) != flat_now.get(k) and k not in harmless
    )
    return [
        (key.removeprefix("recipe."), _shown(flat_before.get(key)), _shown(flat_now.get(key))) for key in keys
    ]


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries; keys are joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return flat


def _shown(value: object) -> str:
    """Return a value as text for a message; a long text, such as a SHA-256, is cut to 12 characters."""
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 20 else text[:12] + "…"


def _check_utterances(fitting: dict[str, Sequence[Utterance]]) -> None:
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
            "all of its parts if it was divided."
        )
    return store.fingerprint


def initial_projector(
    recipe: Recipe, encoder: "EncoderSpec", llm_folder: Path, base: dict[str, Any]
) -> Path | None:
    """Fetch the model that `projector.init_from` names, and check that its projector fits.

    Args:
        recipe: its section `projector` is read.
        encoder: encoder of this training.
        llm_folder: folder of this training's LLM.
        base: fingerprints of encoder and LLM.

    Returns:
        The model's local folder; None if `projector.init_from` is empty.

    Raises:
        UserError: the model does not exist, or its projector has another kind or size.
    """
    from slam_asr.artifacts.model_folder import (
        WEIGHTS,
        fetch_model,
        projector_from_weights,
        read_config,
        read_projector,
    )
    from slam_asr.models.llm import describe_llm, llm_width

    name = recipe.projector.init_from
    if not name:
        return None
    folder = fetch_model(name)
    config = read_config(folder)
    weights = read_projector(folder, config).state_dict()
    projector_from_weights(
        weights,
        recipe.projector,
        encoder.width,
        llm_width(describe_llm(llm_folder)),
        f"projector.init_from: {join(folder, WEIGHTS)}",
    )
    others = [
        part
        for part, here, there in (
            ("encoder", base["encoder_fingerprint"], config.encoder),
            ("LLM", base["llm_sha256"], config.llm_sha256),
        )
        if here != there
    ]
    if others:
        log_line(
            f"warning: the projector of {name} was trained with another {' and '.join(others)}: it may be "
            "of little use as a starting point"
        )
    return folder


def check_llm(recipe: Recipe, folder: Path) -> "Prompt":
    """Check that an LLM suits the recipe, from its configuration and tokenizer alone.

    Args:
        recipe: its sections `llm` and `decoding` are read.
        folder: folder of the LLM.

    Returns:
        The recipe's prompts, tokenised.

    Raises:
        UserError: the folder has no causal LM or no tokenizer; the prompt's template or the layers for
            adapters do not exist; or prompt and answer leave no positions for audio.
    """
    from slam_asr.models.llm import describe_llm, llm_positions, load_tokenizer, require_targets
    from slam_asr.models.prompt import Prompt

    prompt = Prompt(load_tokenizer(folder), recipe.llm)
    longest = max(len(s.before) + len(s.ids) for s in (prompt.main, *prompt.drawn))
    limit = llm_positions(folder)
    if limit is not None and longest + recipe.decoding.max_new_tokens >= limit:
        raise ConfigurationError(
            f"The prompt takes {longest} LLM positions and decoding.max_new_tokens "
            f"{recipe.decoding.max_new_tokens}, which leaves none for audio in the {limit} that "
            f"{recipe.llm.name} holds: shorten one of them."
        )
    if recipe.llm.tuning == "lora":
        require_targets(describe_llm(folder), recipe.llm.lora)
    return prompt


def _settings_that_affect_weights(recipe: Recipe) -> dict[str, Any]:
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
    del values["encoder"]["batch_seconds"]
    del values["projector"]["init_from"]  # the digest of its weights is an input of its own
    # Of the store's settings only these matter: the dtype rounds the features, and the size and the mixing
    # of shards determine the order of the utterances.
    values["features"] = {
        key: values["features"][key] for key in ("dtype", "shard_megabytes", "window_shards")
    }
    return {section: values[section] for section in ("encoder", "features", "projector", "llm", "training")}


def _devices() -> int:
    """Return the number of GPUs on this machine, or 1 if it has none and trains on the CPU."""
    import torch

    return max(1, torch.cuda.device_count())


def _torchrun(processes: int, folder: Path, nodes: Nodes, checkpoints: str) -> None:
    """Run the training loop in `processes` processes under torchrun's launcher, on this and all other nodes.

    Args:
        processes: number of processes on this machine.
        folder: contains `job.json`; a failing process writes its message there.
        nodes: this machine's rank, and the address at which the machines meet.
        checkpoints: folder of the checkpoints, for the message after a stop.

    Raises:
        Stopped: a signal stopped the training.
        UserError: a process failed; the message is that of the process that failed first, if it wrote one.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault(*ALLOCATION)
    os.environ.setdefault(*LAST_CHECKPOINT)
    # Each process uses its share of the cores; by default each would start threads for all of them.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Use an address, not a name: resolving `localhost` may need a resolver that a container does not have.
    # With port 0 the system picks a free port.
    single_node = {
        "run_id": f"slam-asr-{os.getpid()}",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "127.0.0.1:0",
        "local_addr": "127.0.0.1",
    }
    several_nodes = {
        "run_id": "slam-asr",
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{nodes.address}:{nodes.port}",
        "rdzv_configs": {"rank": nodes.rank, "timeout": RENDEZVOUS},
    }
    config = LaunchConfig(
        min_nodes=nodes.number,
        max_nodes=nodes.number,
        nproc_per_node=processes,
        max_restarts=0,
        monitor_interval=0.2,
        **(several_nodes if nodes.number > 1 else single_node),
    )
    here = f" on node {nodes.rank} of {nodes.number}" if nodes.number > 1 else ""
    log_line(f"starting {processes} training process{'es' * (processes > 1)}{here}")
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "slam_asr.training.loop", str(folder / "job.json"))
    except SignalException as error:
        raise Stopped(_stopped_message(error.sigval.name, checkpoints), 128 + error.sigval.value) from error
    except ChildFailedError as error:
        failure = folder / FAILURE
        if failure.is_file():
            raise UserError(failure.read_text()) from error
        # When one process fails, those that lose it as a peer end with code 1. The code of a process that a
        # signal killed is negative, so the minimum is the code of the cause.
        code = min(failed.exitcode for failed in error.failures.values())
        if code - 128 in STOPPING:
            raise Stopped(_stopped_message(signal.Signals(code - 128).name, checkpoints), code) from error
        if code == -9:
            raise UserError(
                "A training process was killed (signal 9), usually because the machine ran out of memory: "
                "lower training.positions_per_batch or training.processes."
            ) from error
        raise UserError(f"A training process ended with code {code}; its own message is above.") from error


def _stopped_message(signal_name: str, checkpoints: str) -> str:
    """Build the message of a stopped training, with its latest checkpoint and how to resume."""
    from slam_asr.artifacts import checkpoint

    latest = checkpoint.find(checkpoints)
    state = f"after step {latest.step}, saved in {latest.folder}" if latest else "before the first checkpoint"
    return f"stopped by {signal_name} {state}; run the same command again to resume"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
