"""Encoding of planned shards on one device. Each shard is published as soon as it is complete.

While the encoder works on one batch, worker processes prepare the next batches, and a thread writes the
previous shard, or a piece of a shard that takes long.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from slam_asr.artifacts.feature_store.namespace import pack
from slam_asr.artifacts.manifest import Utterance
from slam_asr.errors import UserError
from slam_asr.features.audio_workers import AudioLoader, default_workers
from slam_asr.features.pieces import PIECE_SECONDS, read_pieces, remove_pieces
from slam_asr.features.plan import ExtractionTask, PlannedShard
from slam_asr.models import feature_dtype
from slam_asr.models.encoders.base import SpeechEncoder
from slam_asr.models.grouping import longest_first, padded_batches
from slam_asr.models.precision import DTYPES, encoder_precision, processes_here
from slam_asr.progress import Meter, log_line
from slam_asr.storage import exists, info, join, write_bytes


@dataclass
class AudioBatch:
    """Utterances that are encoded together."""

    shard: PlannedShard
    utterances: list[Utterance]
    spans: list[int]
    """[utterances]: length of each in frames; see `EncoderSpec.span_of`."""
    is_last: bool
    """Whether this is the last batch of its shard."""
    resumed: list["EncodedBatch"] = field(default_factory=list)
    """In the last batch of a shard: the batches of the shard that an interrupted extraction has encoded."""


@dataclass
class EncodedBatch:
    """A batch's features, which may still be on their way from the GPU to the host's memory."""

    batch: AudioBatch
    features: list[feature_dtype.QuantizedFrames]
    """For each utterance, frames [frames, encoder width] in the store's dtype, and scales for fp8."""
    copied: torch.cuda.Event | None = None
    """Marks the end of the copies on the GPU; None if the features were computed on the CPU."""

    def wait(self) -> None:
        """Wait until the copies are complete."""
        if self.copied is not None:
            self.copied.synchronize()


class ShardWriter:
    """Collects batches until their shard is complete, then writes it while the next shard is computed.

    If a shard takes longer than `PIECE_SECONDS`, the features that it has so far are saved in pieces.

    Args:
        task: the settings of the extraction.
        clock: returns the time in seconds.
    """

    def __init__(self, task: ExtractionTask, clock: Callable[[], float] = time.monotonic) -> None:
        self.namespace, self.fingerprint, self.clock = task.namespace, task.fingerprint, clock
        self._features: dict[str, feature_dtype.QuantizedFrames] = {}
        self._spans: dict[str, int] = {}
        self._in_pieces = 0
        """Number of entries in `_features` that are saved in pieces."""
        self._saved = clock()
        """Time by `clock` at which the writing of the last piece or shard began."""
        self._thread = ThreadPoolExecutor(1, "write-shard")
        self._writing: Future[None] | None = None

    def add(self, encoded: EncodedBatch) -> None:
        """Add a batch. All batches of a shard must be added before any batch of the next shard.

        Raises:
            OSError: the disk is full.
            StorageError: object storage cannot be written.
        """
        encoded.wait()
        shard = encoded.batch.shard
        for part in (*encoded.batch.resumed, encoded):
            audio_ids = [u.audio_id for u in part.batch.utterances]
            self._features |= zip(audio_ids, part.features, strict=True)
            self._spans |= zip(audio_ids, part.batch.spans, strict=True)
        if encoded.batch.is_last:
            self._submit(self._publish, shard, self._features, self._spans)
            self._features, self._spans, self._in_pieces = {}, {}, 0
        elif self.clock() - self._saved >= PIECE_SECONDS:
            # A dictionary retains the order of insertion: all entries after the first `_in_pieces` are new.
            self._submit(self._save_piece, shard, dict(islice(self._features.items(), self._in_pieces, None)))
            self._in_pieces = len(self._features)

    def _submit(self, write: Callable[..., None], *arguments: Any) -> None:
        self.finish()  # so that at most one shard waits in memory while the next is collected
        self._writing = self._thread.submit(write, *arguments)
        self._saved = self.clock()

    def finish(self) -> None:
        """Wait until all shards are written.

        Raises:
            OSError: the disk is full.
            StorageError: object storage cannot be written.
        """
        if self._writing is not None:
            self._writing.result()

    def _publish(
        self, shard: PlannedShard, features: dict[str, feature_dtype.QuantizedFrames], spans: dict[str, int]
    ) -> None:
        """Write a shard, and then its receipt."""
        content, index = pack(features, self.fingerprint, spans)
        path = self.namespace.shard_path(index.shards[0].name)
        existing = info(path)
        # A shard is named by the SHA-256 of its content, so an existing file of the same size is identical.
        if existing is None or existing.bytes != len(content):
            write_bytes(path, content)
        # Written after the shard, because a resumed extraction does not compute a shard that has a receipt.
        write_bytes(shard.receipt, index.to_bytes())
        remove_pieces(shard)

    def _save_piece(self, shard: PlannedShard, features: dict[str, feature_dtype.QuantizedFrames]) -> None:
        content, index = pack(features, self.fingerprint, self._spans)
        try:
            write_bytes(join(shard.pieces, index.shards[0].name), content)
        # The shard itself does not need the piece, so the extraction continues.
        except (OSError, UserError) as error:
            log_line(
                "warning: the features so far could not be saved, and must be computed again after an "
                f"interruption: {error}"
            )


def encode_shards(task: ExtractionTask, shards: list[PlannedShard], device: torch.device) -> None:
    """Load the encoder, compute shards and publish each with its receipt.

    Args:
        task: the settings that the shards have in common.
        shards: the shards to compute, in this order.
        device: the device of the encoder.

    Raises:
        OSError: the disk is full.
        UserError: audio or weights cannot be used, or object storage cannot be written.
    """
    recipe, spec = task.recipe, task.spec
    on_gpu = device.type == "cuda"
    processes = processes_here("features.processes", recipe.features.processes)
    workers = recipe.features.workers or default_workers(processes, on_gpu)
    with AudioLoader(spec.preparer(), workers) as loader:
        precision = encoder_precision(recipe.features.dtype, on_gpu)
        encoder = spec.load(DTYPES[precision], device)
        parameters = sum(p.numel() for p in encoder.parameters())
        log_line(
            f"encoder parameters: {parameters:,}; computed in {precision} on {device}, "
            f"saved as {recipe.features.dtype}"
        )
        run_shards(task, shards, encoder, loader)


def run_shards(
    task: ExtractionTask, shards: list[PlannedShard], encoder: SpeechEncoder, loader: AudioLoader
) -> None:
    """Compute and publish shards with a loaded encoder and running workers; see `encode_shards`."""
    dtype = task.recipe.features.dtype
    writer = ShardWriter(task)
    previous: EncodedBatch | None = None
    with Meter("extract-features", total=sum(len(s.audio) for s in shards), unit="utt") as meter:
        batches = plan_batches(task, shards, meter)
        for batch, inputs in loader.prepare((batch, batch.utterances) for batch in batches):
            # No variable holds the quantized tensors, since the next batch needs their memory on the GPU.
            encoded = _copy_to_host(batch, [feature_dtype.quantize(f, dtype) for f in encoder.encode(inputs)])
            # `add` waits until the batch is copied. The previous batch is therefore added only now, when the
            # GPU already has the current one to compute.
            if previous is not None:
                writer.add(previous)
            previous = encoded
            meter.update(len(batch.utterances))
        if previous is not None:
            writer.add(previous)
        writer.finish()


def plan_batches(task: ExtractionTask, shards: list[PlannedShard], meter: Meter) -> Iterator[AudioBatch]:
    """Divide shards into batches of utterances with similar lengths, so that they need little padding.

    Args:
        task: the settings of the extraction, such as the maximum audio per batch, padding included.
        shards: the shards to divide. A shard that another extraction has finished meanwhile is skipped.
        meter: counts the utterances of skipped shards and of saved batches as done.

    Yields:
        The batches to encode, shard by shard. The last one of a shard also has the shard's saved batches.
    """
    spec, budget = task.spec, task.recipe.encoder.batch_seconds
    for shard in shards:
        if exists(shard.receipt):
            meter.update(len(shard.audio))
            continue
        in_pieces = read_pieces(shard)
        resumed: list[EncodedBatch] = []
        samples = shard.audio.samples.tolist()
        # Equal lengths are ordered by position, so that a resumed extraction forms the same batches; see
        # `features.pieces`.
        groups = padded_batches([spec.seconds_of(n) for n in samples], budget, longest_first(samples))
        for number, members in enumerate(groups, start=1):
            is_last = number == len(groups)
            batch = AudioBatch(
                shard,
                [shard.audio.manifest[int(shard.audio.rows[i])] for i in members],
                [spec.span_of(samples[i]) for i in members],
                is_last,
                resumed if is_last else [],
            )
            audio_ids = [u.audio_id for u in batch.utterances]
            # A batch is taken from pieces only if all its utterances are in them, because rounding depends on
            # which utterances are encoded together. The last batch is always encoded: it completes the shard.
            if not batch.is_last and all(audio_id in in_pieces for audio_id in audio_ids):
                resumed.append(EncodedBatch(batch, [in_pieces[audio_id] for audio_id in audio_ids]))
                meter.update(len(batch.utterances))
            else:
                if batch.resumed:
                    done = sum(len(earlier.batch.utterances) for earlier in batch.resumed)
                    log_line(f"resuming: {done} utterances of an unfinished shard are already encoded")
                yield batch


def _copy_to_host(batch: AudioBatch, features: list[feature_dtype.QuantizedFrames]) -> EncodedBatch:
    """Start copying features to the host's memory, without waiting for the GPU."""
    if not features or features[0].frames.device.type == "cpu":
        return EncodedBatch(batch, features)

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        # Only copies to pinned memory are asynchronous.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)

    copies = [
        feature_dtype.QuantizedFrames(pinned(f.frames), None if f.scales is None else pinned(f.scales))
        for f in features
    ]
    copied = torch.cuda.Event()
    copied.record()
    return EncodedBatch(batch, copies, copied)
