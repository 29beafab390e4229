"""The stage `train`: checks everything that can be checked without weights, then starts torchrun."""

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from slam_asr.errors import UserError
from slam_asr.features.index import to_array
from slam_asr.features.space import address_of
from slam_asr.features.store import FeatureStore
from slam_asr.manifest import Utterance, read_manifest
from slam_asr.processes import FAILURE
from slam_asr.progress import clock, say
from slam_asr.recipe import Recipe, dump_recipe
from slam_asr.stage import FINGERPRINT, Outcome, Record, read_record, require_way, run_stage
from slam_asr.storage import delete, digest, fetch, join, sha256_of_file, walk, write_atomically, write_json
from slam_asr.storage.cache import cache_folder
from slam_asr.training.nodes import Nodes, nodes_of_environment

WAIT_FOR_RECORD = 600.0
"""Seconds for which other nodes wait for the first one's record, once all have trained."""
RENDEZVOUS = 1800
"""Seconds for which a node waits for the others to come: one may still be pulling its image or fetching models."""

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
    from slam_asr.features.audio_source import fit_to_window
    from slam_asr.models.encoder import describe_encoder
    from slam_asr.models.precision import explain_precision, pick_device
    from slam_asr.models.pretrained import locate_model, weights_sha256
    from slam_asr.training.loop import CHECKPOINTS, FACTS, Job

    nodes = nodes_of_environment(recipe.training.nodes)
    device = pick_device()
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
    features = require_features(feature_store, encoder.fingerprint(), recipe, heard.values()) if feature_store else None
    llm_folder = locate_model(recipe.llm.name)
    check_llm(recipe, llm_folder)
    base = {"encoder_fingerprint": encoder.fingerprint(), "llm_sha256": weights_sha256(llm_folder)}
    inputs = {
        "manifests": {name: sha256_of_file(fetch(path)) for name, path in manifests.items()},
        "features": features,
        **base,
        "recipe": _what_decides_the_weights(recipe),
    }
    hours = sum(u.duration or 0.0 for u in utterances["train"]) / 3600

    def train_here(folder: Path, published: str | None) -> None:
        for leftover in (CHECKPOINTS, FACTS, FAILURE):
            _remove(folder / leftover)
        write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
        job = Job(
            recipe=dump_recipe(recipe), train_manifest=train_manifest, dev_manifest=dev_manifest, feature_store=feature_store,
            llm_folder=str(llm_folder), encoder_parameters=encoder.count_parameters(),
            folder=str(folder), published=published,
        )
        write_json(folder / "job.json", asdict(job))
        _torchrun(recipe.training.processes or _accelerators(), folder, nodes)

    def work(folder: Path) -> Outcome:
        from slam_asr.pages.curves import write_curves
        from slam_asr.training.monitor import CURVE, read_curve

        if nodes.number > 1:
            # What other machines left of an attempt that did not end.
            _empty(join(output.replace(FINGERPRINT, digest(inputs)[:16]), CHECKPOINTS))
        train_here(folder, None)
        facts = json.loads((folder / FACTS).read_text())
        curve, validation = read_curve(folder / CURVE)
        last = validation[-1] if validation else curve[-1]
        facts |= {
            "recipe": recipe.name, "encoder": recipe.encoder.name, "llm": recipe.llm.name, **base,
            "train_utterances": len(utterances["train"]), "train_hours": round(hours, 4),
            "curve": curve, "validation": validation,
        }
        write_curves(
            folder / "curves.html", f"{recipe.name}: training",
            [("Models", f"{recipe.encoder.name} + {recipe.llm.name}"), ("Optimiser steps", str(facts["steps"])),
             ("Audio", f"{hours:.2f} h in {len(utterances['train'])} utterances"), ("Time", clock(facts["seconds"]))],
            facts,
        )
        summary = f"{facts['steps']} steps, {'dev ' if validation else ''}accuracy {last['accuracy']:.3f}, loss {last['loss']:.3f}"
        metrics = {"steps": facts["steps"], "loss": round(curve[-1]["loss"], 4), "accuracy": round(curve[-1]["accuracy"], 4)}
        if validation:
            metrics |= {"dev loss": round(last["loss"], 4), "dev accuracy": round(last["accuracy"], 4)}
        return Outcome(summary, metrics, facts)

    if not nodes.leads:
        return _take_part(output, inputs, nodes, train_here, overwrite)
    return run_stage("train", output, inputs, work, overwrite)


def _take_part(
    output: str, inputs: dict[str, Any], nodes: Nodes, train_here: Callable[[Path, str | None], None], overwrite: bool
) -> Record:
    """Be a machine that trains with the others, while the first one keeps the record."""
    folder = output.replace(FINGERPRINT, digest(inputs)[:16])
    done = read_record(folder)
    if done is not None and done.inputs == inputs:
        say(f"train: already there, nothing to do: {done.summary} ({folder})")
        return done
    if done is not None:
        require_way(folder, done, inputs, overwrite)
    bench = cache_folder() / "work" / f"{digest(folder)[:24]}-node-{nodes.rank}"
    bench.mkdir(parents=True, exist_ok=True)
    try:
        train_here(bench, folder)
    finally:
        shutil.rmtree(bench, ignore_errors=True)
    deadline = time.monotonic() + WAIT_FOR_RECORD
    while (done := read_record(folder)) is None or done.inputs != inputs:
        if time.monotonic() > deadline:
            raise UserError(f"The first node has left no record in {folder}: its own log says why.")
        time.sleep(1.0)
    say(f"train: node {nodes.rank} of {nodes.number} is done; the first one wrote {folder}")
    return done


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
    addresses = [address_of(u) for utterances in manifests for u in utterances]
    store = FeatureStore(path, expected, recipe.features.dtype, addresses)
    absent = np.flatnonzero(store.index.locate(to_array(addresses)) < 0)
    if len(absent):
        key = next(itertools.islice(itertools.chain.from_iterable(manifests), int(absent[0]), None)).key
        raise UserError(
            f"The feature store {path} lacks {len(absent)} of {len(addresses)} utterances, first {key} (audio {addresses[absent[0]][:16]}…): run "
            "`slam-asr extract-features` over this manifest, all of its parts if it was divided."
        )
    return store.fingerprint


def check_llm(recipe: Recipe, folder: Path) -> None:
    """Refuse an LLM that does not suit the recipe, from its configuration and tokenizer alone.

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


def _what_decides_the_weights(recipe: Recipe) -> dict:
    """The recipe without what changes nothing but rounding: names, logging, how the work is divided."""
    values = asdict(recipe)
    for key in ("nodes", "processes", "log_every", "positions_per_batch", "offload_optimizer", "gradient_checkpointing"):
        del values["training"][key]
    del values["encoder"]["batch_seconds"]
    # How shards are mixed decides the order, as their size does.
    values["features"] = {key: values["features"][key] for key in ("dtype", "shard_megabytes", "window_shards")}
    return {section: values[section] for section in ("encoder", "features", "projector", "llm", "training")}


def _accelerators() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _empty(folder: str) -> None:
    for file in list(walk(folder)):
        delete(join(folder, file.name))


def _torchrun(processes: int, folder: Path, nodes: Nodes) -> None:
    """Run the loop in `processes` processes under torchrun's own launcher, here and on the other nodes.

    Raises:
        UserError: with the sentence of the process that failed first.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault(*ALLOCATION)
    # Each process takes its share of the cores; left alone, every one would take them all.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # Python's own answer to a loopback name may need a resolver that a container does not have.
    alone = {"run_id": f"slam-asr-{os.getpid()}", "rdzv_backend": "c10d", "rdzv_endpoint": "127.0.0.1:0", "local_addr": "127.0.0.1"}
    together = {
        "run_id": "slam-asr", "rdzv_backend": "static", "rdzv_endpoint": f"{nodes.address}:{nodes.port}",
        "rdzv_configs": {"rank": nodes.rank, "timeout": RENDEZVOUS},
    }  # fmt: skip
    config = LaunchConfig(
        min_nodes=nodes.number, max_nodes=nodes.number, nproc_per_node=processes, max_restarts=0, monitor_interval=0.2,
        **(together if nodes.number > 1 else alone),
    )
    here = f" on node {nodes.rank} of {nodes.number}" if nodes.number > 1 else ""
    say(f"starting {processes} training process{'es' * (processes > 1)}{here}")
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "slam_asr.training.loop", str(folder / "job.json"))
    except SignalException as error:
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        failure = folder / FAILURE
        if failure.is_file():
            raise UserError(failure.read_text()) from error
        code = next(iter(error.failures.values())).exitcode
        if code == -9:
            raise UserError(
                "A training process was killed (signal 9), most often for want of memory: "
                "lower training.positions_per_batch or training.processes."
            ) from error
        raise UserError(f"A training process ended with code {code}; its own message stands above.") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
