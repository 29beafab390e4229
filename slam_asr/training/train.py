"""The stage `train`: checks everything that can be checked without weights, then starts torchrun."""

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

from slam_asr.errors import Stopped, UserError
from slam_asr.features.index import to_array
from slam_asr.features.store import FeatureStore
from slam_asr.manifest import Utterance, read_manifest
from slam_asr.processes import FAILURE
from slam_asr.progress import clock, log_line
from slam_asr.recipe import Recipe, dump_recipe
from slam_asr.stage import FINGERPRINT, Outcome, Record, read_record, require_way, run_stage
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
from slam_asr.training.nodes import Nodes, nodes_of_environment
from slam_asr.training.trackers import require_trackers

if TYPE_CHECKING:
    from slam_asr.models.encoder import EncoderSpec
    from slam_asr.models.prompt import Prompt

WAIT_FOR_RECORD = 600.0
"""Seconds for which other nodes wait for the first one's record, once all have trained."""
RENDEZVOUS = 1800
"""Seconds for which a node waits for the others to come: one may still be pulling its image or fetching models."""

LAST_CHECKPOINT = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
"""Seconds for which a training that was asked to stop may write its last checkpoint; a cluster's own grace period is most often shorter."""
STOPPING = (signal.SIGTERM, signal.SIGINT)

ALLOCATION = ("MALLOC_MMAP_THRESHOLD_", "4194304")
"""Has glibc give each block above 4 MiB pages of its own, returned when it is freed. Left alone it raises that threshold to
32 MiB, and activations leave holes between them: on a CPU a training took half as much memory again, in the same time."""


def train(
    recipe: Recipe,
    train_manifest: str,
    output: str,
    feature_store: str | None = None,
    dev_manifest: str | None = None,
    overwrite: bool = False,
) -> Record:
    """Train the projector, and what else the recipe says, with DeepSpeed on one or more processes.

    Args:
        recipe: models and hyper-parameters.
        train_manifest: utterances to train on (JSON lines).
        output: folder for checkpoints and curves; {fingerprint} in it becomes a digest of the inputs.
        feature_store: written by extract-features; without it, or where the encoder is trained too, audio is encoded on the way.
        dev_manifest: utterances to validate on.
        overwrite: replace results of other inputs.

    Returns:
        The stage's record; its folder holds checkpoints/, curve.jsonl, curves.html and recipe.yaml.

    Raises:
        UserError: inputs that do not fit each other, or a machine that cannot train this.
    """
    from slam_asr.conversion.model import WEIGHTS
    from slam_asr.features.audio_source import fit_to_window
    from slam_asr.models.encoder import describe_encoder
    from slam_asr.models.precision import explain_precision, pick_device
    from slam_asr.models.pretrained import locate_model, weights_sha256
    from slam_asr.training.job import CHECKPOINTS, FACTS, TrainingJob
    from slam_asr.training.kernels import require_kernels

    nodes = nodes_of_environment(recipe.training.nodes)
    require_trackers(recipe.training.trackers)
    device = pick_device()
    require_kernels(recipe.training, device)
    for precision in (recipe.training.precision, recipe.decoding.precision):
        explain_precision(precision, device)
    if device.type == "cuda" and recipe.training.processes > _accelerators():
        raise UserError(
            f"training.processes is {recipe.training.processes} but this machine has {_accelerators()} GPUs: lower it, or "
            "leave it at 0 to use them all."
        )
    manifests = {"train": train_manifest, **({"dev": dev_manifest} if dev_manifest else {})}
    utterances = {name: read_manifest(path) for name, path in manifests.items()}
    encoder = describe_encoder(recipe.encoder)
    if not recipe.caches_features:
        feature_store = None
    heard = {name: fit_to_window(us, encoder) for name, us in utterances.items()}
    _look_at(heard)
    features = (
        require_features(feature_store, encoder.fingerprint(), recipe, heard.values())
        if feature_store
        else None
    )
    llm_folder = locate_model(recipe.llm.name)
    prompt = check_llm(recipe, llm_folder)
    base = {"encoder_fingerprint": encoder.fingerprint(), "llm_sha256": weights_sha256(llm_folder)}
    inputs = {
        "manifests": {name: sha256_of_file(fetch(path)) for name, path in manifests.items()},
        "features": features,
        **base,
        "recipe": _what_decides_the_weights(recipe),
    }
    init_from = projector_to_begin_with(recipe, encoder, llm_folder, base)
    if init_from is not None:
        inputs["init_from"] = sha256_of_file(init_from / WEIGHTS)
    if recipe.training.utterances_per_batch:
        inputs["processes"] = nodes.number * (recipe.training.processes or _accelerators())
    hours = sum(u.duration or 0.0 for u in utterances["train"]) / 3600
    published = output.replace(FINGERPRINT, digest(inputs)[:16]).rstrip("/")
    published = published if is_s3(published) else str(local_path(published).absolute())

    def train_here(folder: Path) -> None:
        from transformers import AutoConfig

        from slam_asr.planning.memory_fit import place_of, require_fit
        from slam_asr.planning.shapes import Shapes

        processes = recipe.training.processes or _accelerators()
        shapes = Shapes(recipe, encoder, AutoConfig.from_pretrained(llm_folder), [])
        require_fit(shapes, prompt, heard["train"], place_of(device, processes, nodes.number))
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
        summary = f"{facts['steps']} steps, {'dev ' if validation else ''}accuracy {last['accuracy']:.3f}, loss {last['loss']:.3f}"
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
        return _take_part(published, inputs, nodes, train_here, overwrite)
    return run_stage("train", output, inputs, work, overwrite)


def _take_part(
    folder: str, inputs: dict[str, Any], nodes: Nodes, train_here: Callable[[Path], None], overwrite: bool
) -> Record:
    """Be a machine that trains with the others, while the first one keeps the record."""
    done = read_record(folder)
    if done is not None and done.inputs == inputs:
        log_line(f"train: already there, nothing to do: {done.summary} ({folder})")
        return done
    if done is not None:
        require_way(folder, done, inputs, overwrite)
    bench = cache_folder() / "work" / f"{digest(folder)[:24]}-node-{nodes.rank}"
    bench.mkdir(parents=True, exist_ok=True)
    try:
        train_here(bench)
    finally:
        shutil.rmtree(bench, ignore_errors=True)
    deadline = time.monotonic() + WAIT_FOR_RECORD
    while (done := read_record(folder)) is None or done.inputs != inputs:
        if time.monotonic() > deadline:
            raise UserError(f"The first node has left no record in {folder}: its own log says why.")
        time.sleep(1.0)
    log_line(f"train: node {nodes.rank} of {nodes.number} is done; the first one wrote {folder}")
    return done


def require_same_training(folder: str, inputs: dict[str, Any], overwrite: bool) -> None:
    """Look at what an earlier attempt left: it is gone on with, or refused, or removed.

    Args:
        folder: of checkpoints.
        inputs: of this training.
        overwrite: whether those of another training may go.

    Raises:
        UserError: they are another training's, with the keys that differ.
    """
    from slam_asr.training import checkpoint

    found = checkpoint.find(folder)
    if found is None:
        return
    differing = _what_differs(found.inputs, inputs)
    if differing and not overwrite:
        shown = ", ".join(f"{key} {before} → {now}" for key, before, now in differing[:5])
        raise UserError(
            f"{found.folder} is a checkpoint of another training ({len(differing)} keys differ: {shown}{', …' * (len(differing) > 5)}): choose another "
            "--output, or add --overwrite true to begin anew."
        )
    if differing:
        checkpoint.clear(folder)


def _what_differs(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(key, before, now) of all inputs that differ and are not harmless."""
    flat_before, flat_now = _flat(before), _flat(now)
    harmless = {"recipe.training.validate_every", "recipe.training.patience"}
    if flat_before.get("recipe.training.schedule") == flat_now.get("recipe.training.schedule") == "constant":
        # Whatever their number, the steps before are the same.
        harmless |= {"recipe.training.max_steps", "recipe.training.epochs"}
    keys = sorted(
        k for k in flat_before | flat_now if flat_before.get(k) != flat_now.get(k) and k not in harmless
    )
    return [
        (key.removeprefix("recipe."), _shown(flat_before.get(key)), _shown(flat_now.get(key))) for key in keys
    ]


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return flat


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 20 else text[:12] + "…"


def _look_at(heard: dict[str, Sequence[Utterance]]) -> None:
    """Refuse a set without utterances, and say where validation would measure what was learnt by heart.

    Raises:
        UserError: nothing is left to train on, or to validate on.
    """
    for name, utterances in heard.items():
        if not utterances:
            raise UserError(
                f"The {name} manifest has no utterance that can be heard: all are longer than the encoder's window (encoder.long_audio is set-aside), or it is empty."
            )
    trained = {u.audio_id for u in heard["train"]}
    shared = [u.key for u in heard.get("dev", ()) if u.audio_id in trained]
    if shared:
        log_line(
            f"warning: {len(shared)} of {len(heard['dev'])} dev utterances are also in train (first {shared[0]}): the dev loss is lower than it would be on "
            "speech that was not trained on, and neither early stopping nor the best checkpoint can be trusted"
        )


def require_features(
    path: str, expected: dict[str, Any], recipe: Recipe, manifests: Iterable[Sequence[Utterance]]
) -> dict[str, Any]:
    """The fingerprint of a feature store, after a look that it has every utterance.

    Args:
        path: the store.
        expected: fingerprint of the encoder.
        recipe: names the dtype.
        manifests: the utterances.

    Raises:
        UserError: no store, another encoder's, or one that lacks some.
    """
    addresses = [u.audio_id for utterances in manifests for u in utterances]
    store = FeatureStore(path, expected, recipe.features.dtype, addresses)
    absent = np.flatnonzero(store.index.locate(to_array(addresses)) < 0)
    if len(absent):
        key = next(itertools.islice(itertools.chain.from_iterable(manifests), int(absent[0]), None)).key
        raise UserError(
            f"The feature store {path} lacks {len(absent)} of {len(addresses)} utterances, first {key} (audio {addresses[absent[0]][:16]}…): run "
            "`slam-asr extract-features` over this manifest, all of its parts if it was divided."
        )
    return store.fingerprint


def projector_to_begin_with(
    recipe: Recipe, encoder: "EncoderSpec", llm_folder: Path, base: dict[str, Any]
) -> Path | None:
    """The local folder of the model that `projector.init_from` names, after a look that its projector fits; None where it names none.

    Args:
        recipe: its section `projector`.
        encoder: of this training.
        llm_folder: of this training.
        base: fingerprints of both.

    Raises:
        UserError: no model there, or one of another kind or size.
    """
    from slam_asr.conversion.model import WEIGHTS, projector_with, read_config, read_projector
    from slam_asr.conversion.shipped import fetch_model
    from slam_asr.models.llm import describe_llm, llm_width

    name = recipe.projector.init_from
    if not name:
        return None
    folder = fetch_model(name)
    config = read_config(folder)
    weights = read_projector(folder, config).state_dict()
    projector_with(
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
            f"warning: the projector of {name} was trained with another {' and '.join(others)}: as a beginning it may be worth little"
        )
    return folder


def check_llm(recipe: Recipe, folder: Path) -> "Prompt":
    """Refuse an LLM that does not suit the recipe, from its configuration and tokenizer alone.

    Returns:
        The recipe's prompts as its tokenizer spells them.

    Raises:
        UserError: no causal LM, no tokenizer, no such prompt, no such layers for adapters, or no room for an answer.
    """
    from slam_asr.models.llm import describe_llm, llm_positions, load_tokenizer, require_targets
    from slam_asr.models.prompt import Prompt

    prompt = Prompt(load_tokenizer(folder), recipe.llm)
    longest = max(len(s.before) + len(s.ids) for s in (prompt.main, *prompt.drawn))
    limit = llm_positions(folder)
    if limit is not None and longest + recipe.decoding.max_new_tokens >= limit:
        raise UserError(
            f"The prompt takes {longest} LLM positions and decoding.max_new_tokens {recipe.decoding.max_new_tokens}, which leaves no "
            f"room for audio in the {limit} that {recipe.llm.name} holds: shorten one of them."
        )
    if recipe.llm.tuning == "lora":
        require_targets(describe_llm(folder), recipe.llm.lora)
    return prompt


def _what_decides_the_weights(recipe: Recipe) -> dict:
    """The recipe without what changes nothing but rounding: names, logging, how the work is divided."""
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
    optimizer = recipe.training.deepspeed.get("optimizer")
    if optimizer:
        values["training"]["deepspeed"] = {"optimizer": optimizer}
    del values["encoder"]["batch_seconds"]
    del values["projector"]["init_from"]  # its weights count, wherever they lie
    # How shards are mixed decides the order, as their size does.
    values["features"] = {
        key: values["features"][key] for key in ("dtype", "shard_megabytes", "window_shards")
    }
    return {section: values[section] for section in ("encoder", "features", "projector", "llm", "training")}


def _accelerators() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _torchrun(processes: int, folder: Path, nodes: Nodes, checkpoints: str) -> None:
    """Run the loop in `processes` processes under torchrun's own launcher, here and on the other nodes.

    Raises:
        Stopped: a signal asked for it; the processes have left a checkpoint.
        UserError: with the sentence of the process that failed first.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault(*ALLOCATION)
    os.environ.setdefault(*LAST_CHECKPOINT)
    # Each process takes its share of the cores; left alone, every one would take them all.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Python's own answer to a loopback name may need a resolver that a container does not have.
    alone = {
        "run_id": f"slam-asr-{os.getpid()}",
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "127.0.0.1:0",
        "local_addr": "127.0.0.1",
    }
    together = {
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
        **(together if nodes.number > 1 else alone),
    )
    here = f" on node {nodes.rank} of {nodes.number}" if nodes.number > 1 else ""
    log_line(f"starting {processes} training process{'es' * (processes > 1)}{here}")
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "slam_asr.training.loop", str(folder / "job.json"))
    except SignalException as error:
        raise Stopped(_how_far(error.sigval.name, checkpoints), 128 + error.sigval.value) from error
    except ChildFailedError as error:
        failure = folder / FAILURE
        if failure.is_file():
            raise UserError(failure.read_text()) from error
        # Those that lost a process end too; what it died of says more.
        code = min(failed.exitcode for failed in error.failures.values())
        if code - 128 in STOPPING:
            raise Stopped(_how_far(signal.Signals(code - 128).name, checkpoints), code) from error
        if code == -9:
            raise UserError(
                "A training process was killed (signal 9), most often for want of memory: "
                "lower training.positions_per_batch or training.processes."
            ) from error
        raise UserError(
            f"A training process ended with code {code}; its own message stands above."
        ) from error


def _how_far(name: str, checkpoints: str) -> str:
    from slam_asr.training import checkpoint

    found = checkpoint.find(checkpoints)
    kept = (
        f"behind step {found.step}, which {found.folder} holds" if found else "before there was a checkpoint"
    )
    return f"stopped by {name} {kept}; run the same command again to go on"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
