"""One process of an extraction: planned shards through the encoder, on one device.

While the encoder works on a batch, worker processes prepare the next ones, and a thread writes the
shard before. With several GPUs, each has such a process: `python -m slam_asr.features.encode JOB`.
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slam_asr.features.audio_workers import Loader, workers_beside
from slam_asr.features.extract import Extraction
from slam_asr.features.launch import ExtractionJob
from slam_asr.features.namespace import FeatureNamespace, pack
from slam_asr.features.plan import Planned
from slam_asr.manifest import Utterance
from slam_asr.models import feature_dtype
from slam_asr.models.encoder import EncoderSpec, SpeechEncoder, batches_of, describe_encoder
from slam_asr.models.precision import DTYPES, encoder_precision, pick_device, processes_here
from slam_asr.processes import die_with_parent, failures_written_to
from slam_asr.progress import Meter, log_line
from slam_asr.recipe import load_recipe
from slam_asr.storage import exists, info, write_bytes
from slam_asr.work_split import WorkShard


@dataclass
class AudioBatch:
    """Utterances that are encoded together."""

    shard: Planned
    utterances: list[Utterance]
    spans: list[int]
    """Their lengths in frames."""
    is_last: bool
    """Of its shard."""


@dataclass
class Encoded:
    """A batch's features on their way to the host's memory."""

    batch: AudioBatch
    features: list[feature_dtype.QuantizedFrames]
    arrived: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Until they are there."""
        if self.arrived is not None:
            self.arrived.synchronize()


class ShardWriter:
    """Collects batches until their shard is whole, and writes it while the next one is computed.

    Args:
        space: where shards go.
        fingerprint: of what computes them.
    """

    def __init__(self, space: FeatureNamespace, fingerprint: dict[str, Any]) -> None:
        self.space, self.fingerprint = space, fingerprint
        self._features: dict[str, feature_dtype.QuantizedFrames] = {}
        self._spans: dict[str, int] = {}
        self._thread = ThreadPoolExecutor(1, "write-shard")
        self._writing: Future | None = None

    def add(self, encoded: Encoded) -> None:
        """Take a batch."""
        encoded.wait()
        addresses = [u.audio_id for u in encoded.batch.utterances]
        self._features |= zip(addresses, encoded.features, strict=True)
        self._spans |= zip(addresses, encoded.batch.spans, strict=True)
        if encoded.batch.is_last:
            self.finish()  # one shard at a time waits in memory
            self._writing = self._thread.submit(
                self._publish, encoded.batch.shard, self._features, self._spans
            )
            self._features, self._spans = {}, {}

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: the disk is full.
            UserError: object storage cannot be used.
        """
        if self._writing is not None:
            self._writing.result()

    def _publish(
        self, shard: Planned, features: dict[str, feature_dtype.QuantizedFrames], spans: dict[str, int]
    ) -> None:
        """Write a shard, and then its receipt."""
        content, index = pack(features, self.fingerprint, spans)
        path = self.space.shard(index.shards[0].name)
        there = info(path)
        if there is None or there.bytes != len(content):
            write_bytes(path, content)
        write_bytes(shard.receipt, index.to_bytes())


def encode_shards(extraction: Extraction, shards: list[Planned], device: torch.device) -> None:
    """Compute shards and publish each with its receipt.

    Args:
        extraction: what they belong to.
        shards: to compute, in this order.
        device: for the encoder.

    Raises:
        UserError: audio or weights that cannot be used, or no room for the shards.
    """
    recipe, spec = extraction.recipe, extraction.spec
    workers = recipe.features.workers or workers_beside(
        processes_here("features.processes", recipe.features.processes), device.type == "cuda"
    )
    with Loader(spec.preparer(), workers) as loader:
        compute = encoder_precision(recipe.features.dtype, device.type == "cuda")
        encoder = spec.load(DTYPES[compute], device)
        parameters = sum(p.numel() for p in encoder.parameters())
        log_line(
            f"encoder parameters: {parameters:,}; computed in {compute} on {device}, stored as {recipe.features.dtype}"
        )
        run_shards(extraction, shards, encoder, loader)


def run_shards(extraction: Extraction, shards: list[Planned], encoder: SpeechEncoder, loader: Loader) -> None:
    """The same, with what it takes at hand."""
    recipe = extraction.recipe
    writer = ShardWriter(extraction.space, extraction.fingerprint)
    under_way: Encoded | None = None
    with Meter("extract-features", total=sum(len(s.audio) for s in shards), unit="utt") as meter:
        batches = plan_batches(shards, extraction.spec, recipe.encoder.batch_seconds, meter)
        for batch, inputs in loader.batches((batch, batch.utterances) for batch in batches):
            encoded = _to_host(
                batch, [feature_dtype.quantize(f, recipe.features.dtype) for f in encoder.encode(inputs)]
            )
            # A GPU has this batch to do while the one before it is collected.
            if under_way is not None:
                writer.add(under_way)
            under_way = encoded
            meter.update(len(batch.utterances))
        if under_way is not None:
            writer.add(under_way)
        writer.finish()


def plan_batches(
    shards: list[Planned], spec: EncoderSpec, budget: float, meter: Meter
) -> Iterator[AudioBatch]:
    """All batches of all shards; a batch has utterances of like lengths, since all are padded to the longest."""
    for shard in shards:
        if exists(shard.receipt):  # another extraction of the same audio was faster
            meter.update(len(shard.audio))
            continue
        samples = shard.audio.samples.tolist()
        order = sorted(range(len(samples)), key=lambda i: (-samples[i], i))
        groups = batches_of([spec.seconds_of(samples[i]) for i in order], budget)
        for number, group in enumerate(groups, start=1):
            chosen = [order[i] for i in group]
            utterances = [shard.audio.manifest[int(shard.audio.rows[i])] for i in chosen]
            yield AudioBatch(
                shard, utterances, [spec.span_of(samples[i]) for i in chosen], is_last=number == len(groups)
            )


def _to_host(batch: AudioBatch, features: list[feature_dtype.QuantizedFrames]) -> Encoded:
    """Start the copies to the host's memory."""
    if not features or features[0].frames.device.type == "cpu":
        return Encoded(batch, features)

    def pinned(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    copies = [feature_dtype.QuantizedFrames(pinned(f.frames), pinned(f.scales)) for f in features]
    arrived = torch.cuda.Event()
    arrived.record()
    return Encoded(batch, copies, arrived)


def main() -> None:
    """Entry point of one process of several on a machine."""
    die_with_parent()
    job = ExtractionJob(**json.loads(Path(sys.argv[1]).read_text()))
    with failures_written_to(Path(job.folder)):
        recipe = load_recipe(job.recipe)
        extraction = Extraction(
            recipe, describe_encoder(recipe.encoder), job.files, job.output, WorkShard(**job.part)
        )
        device = pick_device()
        if device.type == "cuda":
            device = torch.device("cuda", job.process)
            torch.cuda.set_device(device)
        encode_shards(extraction, extraction.missing(extraction.plans(), job.process, job.processes), device)


if __name__ == "__main__":
    main()
