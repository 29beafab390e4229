"""The stage `extract-features`: every utterance of the manifests through the frozen encoder, once."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from slam_asr.features.reader import fit_to_window, read_unchanged, samples_of
from slam_asr.features.store import INDEX, Entry, Index, address_of, plan_shards, write_index, write_shard
from slam_asr.manifest import Utterance, read_manifest
from slam_asr.progress import Meter, say
from slam_asr.recipe import Recipe
from slam_asr.stage import Outcome, Record, require_record, run_stage
from slam_asr.storage import digest, local_path, sha256_of_file

if TYPE_CHECKING:
    import torch

    from slam_asr.models.encoder import EncoderSpec, Prepared, SpeechEncoder

MANIFESTS = ("train.jsonl", "dev.jsonl", "test.jsonl")


def extract_features(recipe: Recipe, manifests: list[str], output: str, overwrite: bool = False) -> Record:
    """Encode every utterance once and keep the result in a feature store.

    Where the recipe trains the encoder too, nothing can be kept, and the store stays empty.

    Args:
        recipe: which encoder, how many of its frames, stored in which precision.
        manifests: manifests (JSON lines), or folders that build-manifest wrote.
        output: folder of the store; {fingerprint} in it becomes a digest of the inputs.
        overwrite: replace a store made from other inputs.

    Returns:
        The stage's record; its folder holds index.json and shards/.

    Raises:
        UserError: a manifest, the encoder or an audio file cannot be used.
    """
    from slam_asr.models.encoder import describe_encoder

    files = manifest_files(manifests)
    spec = describe_encoder(recipe.encoder)
    listed = [u for file in files for u in read_manifest(file)]
    cached = recipe.encoder.tuning == "frozen"
    utterances = unique_audio(fit_to_window(listed, spec) if cached else [])
    fingerprint = {**spec.fingerprint(), "dtype": recipe.features.dtype}
    inputs = {
        "audio": digest(list(utterances)),
        "fingerprint": fingerprint,
        "shard_megabytes": recipe.features.shard_megabytes,
    }

    def work(folder: Path) -> Outcome:
        return _extract(recipe, spec, utterances, fingerprint, folder)

    return run_stage("extract-features", output, inputs, work, overwrite)


def manifest_files(manifests: Iterable[str], inside: Sequence[str] = MANIFESTS) -> list[Path]:
    """Manifests by path; the folder of a finished build-manifest stands for those of it that are meant.

    Raises:
        UserError: a folder that build-manifest did not finish.
    """
    files: list[Path] = []
    for manifest in manifests:
        path = local_path(manifest)
        if path.is_dir():
            files += [require_record(path, "build-manifest").file(name) for name in inside]
        else:
            files.append(path)
    return files


def unique_audio(utterances: Iterable[Utterance]) -> dict[str, Utterance]:
    """Audio by its digest, in the manifests' order, each once."""
    unique: dict[str, Utterance] = {}
    for utterance in utterances:
        unique.setdefault(address_of(utterance), utterance)
    return unique


def _extract(
    recipe: Recipe, spec: "EncoderSpec", utterances: dict[str, Utterance], fingerprint: dict, folder: Path
) -> Outcome:
    from slam_asr.models.precision import DTYPES, encoder_precision, pick_device

    # Until all is there, an older store in this folder does not exist; what a killed run left aside goes.
    (folder / INDEX).unlink(missing_ok=True)
    for litter in (folder / "shards").glob(".*.partial"):
        litter.unlink()
    index = Index(fingerprint, spec.width)
    if not utterances:
        write_index(folder, index)
        return Outcome("nothing to cache: the encoder is trained too", {"utterances": 0})
    device = pick_device()
    compute = encoder_precision(recipe.features.dtype, device)
    stored = DTYPES[recipe.features.dtype]
    hours = sum(u.duration or 0.0 for u in utterances.values()) / 3600
    kept = f", frames: {recipe.encoder.frames}" if spec.window_samples else ""
    say(f"encoder: {recipe.encoder.name}{kept}, {len(utterances)} utterances, {hours:.2f} h")
    encoder = spec.load(DTYPES[compute], device)
    parameters = sum(p.numel() for p in encoder.parameters())
    say(f"encoder parameters: {parameters:,}; computed in {compute} on {device.type}, stored as {recipe.features.dtype}")

    bytes_a_frame = spec.width * stored.itemsize
    sizes = {address: spec.frames_of(samples_of(u)) * bytes_a_frame for address, u in utterances.items()}
    shards = plan_shards(sizes, recipe.features.shard_megabytes * 1_000_000, fingerprint)
    with Meter("extract-features", total=len(utterances), unit="utt") as meter:
        for shard in shards:
            path = folder / "shards" / shard.name
            # Like lengths together: in a batch, all are padded to the longest.
            chosen = sorted((utterances[a] for a in shard.addresses), key=samples_of)
            tensors = _finished(path)
            if tensors is None:
                tensors = {}
                for batch, prepared in _batches(chosen, encoder, recipe.encoder.batch_size):
                    for utterance, frames in zip(batch, encoder.encode(prepared), strict=True):
                        tensors[address_of(utterance)] = frames.to(stored).cpu()
                    meter.update(len(batch))
                write_shard(path, tensors)
            else:
                meter.update(len(tensors))
            index.shards[shard.name] = {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
            index.entries |= {
                address_of(u): Entry(shard.name, len(tensors[address_of(u)]), spec.span_of(samples_of(u))) for u in chosen
            }
    write_index(folder, index)
    size = sum(s["bytes"] for s in index.shards.values())
    return Outcome(
        summary=f"{len(index.entries)} utterances, {size / 1e6:.1f} MB in {len(shards)} shard{'s' * (len(shards) != 1)}",
        metrics={"utterances": len(index.entries), "audio_hours": round(hours, 4), "megabytes": round(size / 1e6, 2)},
        facts={"device": device.type},
    )


def _finished(path: Path) -> "dict[str, torch.Tensor] | None":
    """The entries of a shard that an interrupted run had finished."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path) if path.is_file() else None
    except SafetensorError:
        return None


def _batches(
    utterances: Iterable[Utterance], encoder: "SpeechEncoder", size: int
) -> Iterator[tuple[list[Utterance], "list[Prepared]"]]:
    """Read and prepare audio in threads, two batches ahead of the encoder."""

    def prepare(utterance: Utterance) -> "tuple[Utterance, Prepared]":
        return utterance, encoder.prepare(read_unchanged(utterance))

    rest = iter(utterances)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        waiting = [pool.submit(prepare, u) for u in islice(rest, 3 * size)]
        while waiting:
            done = [w.result() for w in waiting[:size]]
            waiting = waiting[size:] + [pool.submit(prepare, u) for u in islice(rest, size)]
            yield [d[0] for d in done], [d[1] for d in done]
