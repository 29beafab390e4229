"""Writes checkpoints in the background, and restores an engine from a checkpoint.

The training thread only copies the state. A second thread in each process writes that process's files under
temporary names, and renames or uploads them. These threads then exchange their results, and the first process
publishes the checkpoint if all have succeeded.
"""

import functools
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file

from slam_asr.artifacts import checkpoint
from slam_asr.artifacts.checkpoint import CURVE, Checkpoint, file_name
from slam_asr.errors import ModelError, StorageError, UserError, from_os_error
from slam_asr.progress import log_line
from slam_asr.storage import allow_readers, is_s3, join, local_path, sha256_of_file, upload
from slam_asr.storage.local import PARTIAL
from slam_asr.storage.retry import patience
from slam_asr.training.engines.engine import MOMENTS, Engine

T = TypeVar("T")

UNSAVED = "unsaved"
"""Name of the local folder for a checkpoint whose upload failed. The next attempt on this machine uploads
it."""
_FIRST_PAUSE, _MAX_PAUSE = 0.1, 10.0
"""First and longest pause, in seconds, between two attempts to write a checkpoint."""


@dataclass
class Snapshot:
    """One process's share of a checkpoint: a copy of the state, taken between two steps."""

    checkpoint: Checkpoint
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """The tensors that this process saves, complete and on the CPU, by kind of file (`weights`, `moments`,
    `random`) and then by name."""
    curve: bytes = b""
    """Content of `curve.jsonl`; on the first process only."""


def take_snapshot(engine: Engine, about: Checkpoint, curve: bytes) -> Snapshot:
    """Copy this process's share of a checkpoint. All processes must call this function together.

    Args:
        engine: the engine whose state is copied.
        about: the checkpoint's description, in which `files` is still empty.
        curve: content of `curve.jsonl`; empty except on the first process.
    """
    weights, moments = {}, {}
    for name, which, tensor in engine.state_to_save():
        if which == "weight":
            weights[name] = tensor
        else:
            moments[f"{which}/{name}"] = tensor
    # Each process saves its own random state, because the processes draw different dropout masks.
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    return Snapshot(about, {"weights": weights, "moments": moments, "random": random}, curve)


class CheckpointWriter:
    """Writes snapshots in a thread, one at a time.

    Args:
        folder: the folder of all checkpoints, local or in object storage.
        scratch: local folder for files before their upload, and for a checkpoint that cannot be uploaded.
        keep: number of the newest checkpoints to retain.

    Raises:
        ConfigurationError: SLAM_ASR_S3_PATIENCE is not a number of seconds.
    """

    def __init__(self, folder: str, scratch: Path, keep: int) -> None:
        self.folder, self.scratch, self.keep = folder, scratch, keep
        self.rank, self.processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # The writing threads have a process group of their own: their messages must not mix with training's.
        self.group = torch.distributed.new_group(backend="gloo") if self.processes > 1 else None
        self.failure: str | None = None
        """Why a checkpoint could not be written, or None. After a failure, no further one is written."""
        self.latest = ""
        """Folder of the latest checkpoint that was published or resumed from."""
        self.patience = patience()
        """Seconds for which a failing write is repeated."""
        self.last_save = time.monotonic()
        """`time.monotonic()` at the last call of `save`, or at the start of this attempt."""
        self._snapshots: queue.Queue[Snapshot | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Number of snapshots that are being written or are queued."""
        return self._snapshots.unfinished_tasks

    def save(self, snapshot: Snapshot) -> None:
        """Queue a snapshot. All processes must call this method for the same step."""
        self.last_save = time.monotonic()
        self._snapshots.put(snapshot)

    def wait(self) -> None:
        """Wait until nothing is pending."""
        self._snapshots.join()

    def close(self) -> None:
        """Wait until nothing is pending, and end the thread.

        Raises:
            StorageError: a checkpoint could not be written.
        """
        self._snapshots.put(None)
        self._thread.join()
        if self.failure:
            raise StorageError(self.failure)

    def _work(self) -> None:
        while (snapshot := self._snapshots.get()) is not None:
            try:
                self.failure = self._write(snapshot)
            # gloo raises this error if another process has ended. The training thread will fail too, and
            # report it.
            except RuntimeError:
                step = snapshot.checkpoint.step
                self.failure = f"The checkpoint of step {step} is incomplete: another process has ended."
            finally:
                del snapshot  # frees its memory before the next one arrives
                self._snapshots.task_done()

    def _write(self, snapshot: Snapshot) -> str | None:
        """Write this process's files, and publish the checkpoint when all processes have written theirs.

        Returns:
            None, or the reason why a process could not write. All processes return the same.

        Raises:
            RuntimeError: another process has ended.
        """
        failure = self._write_to(self.folder, snapshot, self.patience)
        if failure is None:
            self.latest = join(self.folder, snapshot.checkpoint.name)
        elif self.failure is None:
            step, where = snapshot.checkpoint.step, self._save_locally(snapshot)
            return f"The checkpoint of step {step} could not be written: {failure}; {where}"
        return failure

    def _write_to(self, folder: str, snapshot: Snapshot, patience: float) -> str | None:
        """Write and publish a checkpoint in `folder`, as `_write` does, and try for `patience` seconds."""
        about, written, failure = snapshot.checkpoint, None, self.failure
        if failure is None:
            written, failure = _patiently(about.step, patience, lambda: self._write_share(snapshot, folder))
        files, failure = self._agree(written, failure)
        if failure is None and self.rank == 0:
            complete = replace(about, files=files)
            _, failure = _patiently(
                about.step, patience, lambda: checkpoint.publish(folder, complete, self.keep)
            )
        # Only the first process knows whether publishing has succeeded.
        return self._agree(None, failure)[1]

    def _agree(
        self, files: dict[str, dict[str, Any]] | None, failure: str | None
    ) -> tuple[dict[str, dict[str, Any]], str | None]:
        """Exchange results between all processes.

        A process must call this method even after a failure, because the other processes wait for it.

        Returns:
            The files of all processes; and the failure of the lowest rank that failed, or None.

        Raises:
            RuntimeError: another process has ended.
        """
        if self.group is None:
            return files or {}, failure
        results: list[tuple[dict[str, dict[str, Any]] | None, str | None]] = [(None, None)] * self.processes
        torch.distributed.all_gather_object(results, (files, failure), group=self.group)
        together = {name: facts for written, _ in results for name, facts in (written or {}).items()}
        return together, next((reason for _, reason in results if reason), None)

    def _save_locally(self, snapshot: Snapshot) -> str:
        """Save a checkpoint to a local disk if it cannot be uploaded, and describe how to resume.

        All processes must call this method together.

        Returns:
            The end of a message: where the latest weights are, and what to do.

        Raises:
            RuntimeError: another process has ended.
        """
        about, folder = snapshot.checkpoint, str(self.scratch / UNSAVED)
        earlier = (
            f"the latest checkpoint is {self.latest}" if self.latest else "there is no earlier checkpoint"
        )
        resume = f"make {self.folder} writable, and run the same command again"
        # On several machines, none of them would have all files of the checkpoint.
        on_one_machine = os.environ.get("LOCAL_WORLD_SIZE", "1") == str(self.processes)
        if is_s3(self.folder) and on_one_machine and self._write_to(folder, snapshot, patience=0.0) is None:
            return (
                f"the weights are in {join(folder, about.name)}, and {earlier}: {resume} on this machine, "
                "which then uploads them and resumes."
            )
        return f"{earlier}: {resume} to resume."

    def _write_share(self, snapshot: Snapshot, folder: str) -> dict[str, dict[str, Any]]:
        """Write this process's files of a checkpoint.

        Args:
            snapshot: this process's share of the checkpoint.
            folder: the folder of all checkpoints, local or in object storage.

        Returns:
            `bytes` and `sha256` of each file, keyed by the file's name.
        """
        writers: dict[str, Callable[[Path], object]] = {
            file_name(kind, self.rank, self.processes): functools.partial(save_file, tensors)
            for kind, tensors in snapshot.tensors.items()
            if tensors
        }
        if snapshot.curve:
            writers[CURVE] = lambda path: path.write_bytes(snapshot.curve)
        step_folder = join(folder, snapshot.checkpoint.name)
        return {name: self._put(step_folder, name, write) for name, write in writers.items()}

    def _put(self, folder: str, name: str, write: Callable[[Path], object]) -> dict[str, Any]:
        """Write a file under a temporary name, rename or upload it when it is complete, and describe it."""
        remote, target = is_s3(folder), join(folder, name)
        partial = (self.scratch if remote else local_path(folder)) / f".{name}{PARTIAL}"
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            facts = {"bytes": partial.stat().st_size, "sha256": sha256_of_file(partial)}
            if remote:
                upload(partial, target)
            else:
                # Before the rename: after a power failure the name must not point to missing content.
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                allow_readers(partial)
                os.replace(partial, local_path(target))
        finally:
            partial.unlink(missing_ok=True)
        return facts


def _patiently(step: int, patience: float, write: Callable[[], T]) -> tuple[T | None, str | None]:
    """Call `write`, and repeat it for `patience` seconds while it fails.

    Training continues meanwhile. No checkpoint is lost if expired credentials are renewed, or space on a full
    disk is freed, within that time. `step` is named in a warning.

    Returns:
        The result of `write` and None; or None and the reason of the failure, without a full stop.
    """
    # The first attempt counts too: it may itself have waited for storage.
    pause, deadline = _FIRST_PAUSE, time.monotonic() + patience
    while True:
        try:
            return write(), None
        except Exception as error:
            reason = _reason(error)
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return None, reason.rstrip(".")
        if pause == _FIRST_PAUSE:
            log_line(
                f"warning: the checkpoint of step {step} could not be written; training continues, and "
                f"the write is repeated for another {remaining:.0f} s: {reason}"
            )
        time.sleep(min(pause, remaining))
        pause = min(2 * pause, _MAX_PAUSE)


def _reason(error: Exception) -> str:
    """Describe in one sentence why a checkpoint could not be written."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return str(from_os_error(error) or error)
    # safetensors and torch raise exceptions of their own if a write fails.
    return f"{type(error).__name__}: {error}: disk full, or no permission?"


def restore(engine: Engine, saved: Checkpoint) -> None:
    """Restore an engine's state from a checkpoint. All processes must call this function together.

    The random number generators are restored only if the number of processes is the same, because each
    process has saved the state of its own generators.

    Raises:
        ModelError: the checkpoint is damaged, or does not hold the weights that this recipe trains.
    """
    expected = set(engine.groups.weights)
    restored = set()
    for kind in ("weights", "moments"):
        for key, tensor in saved.tensors(kind).items():
            which, name = ("weight", key) if kind == "weights" else key.split("/", 1)
            if name not in expected or tensor.shape != complete_shape(engine, name):
                raise ModelError(
                    f"The checkpoint {saved.folder} holds {name} of shape {list(tensor.shape)}, which this "
                    "recipe does not train: choose another --output."
                )
            engine.set_state(name, which, tensor)
            restored.add((which, name))
    # For each trained weight, a checkpoint holds the master and Adam's moments.
    if len(restored) != (1 + len(MOMENTS)) * len(expected):
        raise ModelError(
            f"The checkpoint {saved.folder} lacks some of the weights that this recipe trains: choose "
            "another --output."
        )
    engine.finish_restoring(saved.updates)
    engine.set_loss_scale(saved.loss_scale)
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if processes == saved.processes:
        random = load_file(saved.file(file_name("random", rank, processes)))
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])


def complete_shape(engine: Engine, name: str) -> torch.Size:
    """Return the shape of a complete trained weight, even if the engine shards the weight."""
    # Under ZeRO-3 the parameter itself is empty, and DeepSpeed records its complete shape in `ds_shape`.
    # Under FSDP2 the parameter is a DTensor, whose `shape` is the complete one.
    parameter = engine.groups.weights[name]
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
