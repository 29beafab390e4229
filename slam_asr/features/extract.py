"""The stage `extract-features`: every utterance of the manifests through the frozen encoder, once."""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from slam_asr.errors import UserError
from slam_asr.features.store import INDEX, Entry, Index, address_of, plan_shards, write_index, write_shard
from slam_asr.manifest import Utterance, read_manifest
from slam_asr.progress import Meter, say
from slam_asr.recipe import Recipe
from slam_asr.stage import Outcome, Record, require_record, run_stage
from slam_asr.storage import digest, local_path, sha256_of_file

if TYPE_CHECKING:
    import torch

    from slam_asr.models.encoder import WhisperEncoder

MANIFESTS = ("train.jsonl", "dev.jsonl", "test.jsonl")


def extract_features(recipe: Recipe, manifests: list[str], output: str, overwrite: bool = False) -> Record:
    """Encode every utterance once and keep the result in a feature store.

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
    utterances = unique_audio(u for file in files for u in read_manifest(file))
    spec = describe_encoder(recipe.encoder)
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


def _extract(recipe: Recipe, spec, utterances: dict[str, Utterance], fingerprint: dict, folder: Path) -> Outcome:
    from slam_asr.audio import SAMPLE_RATE
    from slam_asr.models.encoder import load_encoder
    from slam_asr.models.precision import DTYPES, encoder_precision, pick_device

    device = pick_device()
    compute = encoder_precision(recipe.features.dtype, device)
    stored = DTYPES[recipe.features.dtype]
    hours = sum(u.duration or 0.0 for u in utterances.values()) / 3600
    say(f"encoder: {recipe.encoder.name}, frames: {recipe.encoder.frames}, {len(utterances)} utterances, {hours:.2f} h")
    encoder = load_encoder(spec, DTYPES[compute], device)
    say(f"encoder parameters: {spec.parameters:,}; computed in {compute} on {device.type}, stored as {recipe.features.dtype}")

    def planned_frames(utterance: Utterance) -> int:
        return spec.window_frames if utterance.duration is None else spec.frames_of_seconds(utterance.duration)

    bytes_a_frame = spec.width * stored.itemsize
    sizes = {address: planned_frames(u) * bytes_a_frame for address, u in utterances.items()}
    index = Index(fingerprint, spec.width)
    shards = plan_shards(sizes, recipe.features.shard_megabytes * 1_000_000, fingerprint)
    # Until all is there, an older store in this folder does not exist; what a killed run left aside goes.
    (folder / INDEX).unlink(missing_ok=True)
    for litter in (folder / "shards").glob(".*.partial"):
        litter.unlink()
    with Meter("extract-features", total=len(utterances), unit="utt") as meter:
        for shard in shards:
            path = folder / "shards" / shard.name
            tensors = _finished(path)
            if tensors is None:
                tensors = {}
                batches = _batches((utterances[a] for a in shard.addresses), encoder, recipe.encoder.batch_size)
                for batch, mels, samples in batches:
                    for utterance, frames in zip(batch, encoder.encode(mels, samples), strict=True):
                        tensors[address_of(utterance)] = frames.to(stored).cpu()
                    meter.update(len(batch))
                write_shard(path, tensors)
            else:
                meter.update(len(tensors))
            index.shards[shard.name] = {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
            index.entries |= {address: Entry(shard.name, len(t)) for address, t in tensors.items()}
    cut = sum(round((u.duration or 0) * SAMPLE_RATE) > spec.window_samples for u in utterances.values())
    if cut:
        say(f"{cut} utterances are longer than the encoder's {spec.window_samples / SAMPLE_RATE:.0f}-s window and were cut there")
    write_index(folder, index)
    size = sum(s["bytes"] for s in index.shards.values())
    return Outcome(
        summary=f"{len(index.entries)} utterances, {size / 1e6:.1f} MB in {len(shards)} shard{'s' * (len(shards) != 1)}",
        metrics={"utterances": len(index.entries), "audio_hours": round(hours, 4), "megabytes": round(size / 1e6, 2)},
        facts={"cut_at_window": cut, "device": device.type},
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
    utterances: Iterable[Utterance], encoder: "WhisperEncoder", size: int
) -> Iterator[tuple[list[Utterance], "list[torch.Tensor]", list[int]]]:
    """Read audio and compute mels in threads, two batches ahead of the encoder."""
    from slam_asr.audio import audio_sha256, load_audio

    def prepare(utterance: Utterance) -> tuple:
        if utterance.sha256 not in (None, audio_sha256(utterance.source)):
            raise UserError(f"{utterance.source} was changed since its manifest was built: run `slam-asr build-manifest` again.")
        waveform = load_audio(utterance.source)
        return utterance, encoder.log_mel(waveform), len(waveform)

    rest = iter(utterances)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        waiting = [pool.submit(prepare, u) for u in islice(rest, 3 * size)]
        while waiting:
            done = [w.result() for w in waiting[:size]]
            waiting = waiting[size:] + [pool.submit(prepare, u) for u in islice(rest, size)]
            yield [d[0] for d in done], [d[1] for d in done], [d[2] for d in done]
