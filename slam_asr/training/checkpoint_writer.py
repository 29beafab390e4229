"""Writes checkpoints in the background, and restores an engine from one.

The training thread only copies the state. A thread in each process writes that process's files under
temporary names and renames (or uploads) them. The threads then exchange the results, and the first process
publishes the checkpoint if all have succeeded.
"""

import functools
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from slam_asr.artifacts import checkpoint
from slam_asr.artifacts.checkpoint import CURVE, Checkpoint, file_name
from slam_asr.errors import ModelError, StorageError, UserError, from_os_error
from slam_asr.progress import log_line
from slam_asr.storage import is_s3, join, local_path, sha256_of_file, upload
from slam_asr.training.engines.engine import Engine


@dataclass
class Snapshot:
    """One process's share of a checkpoint: a copy of the state, taken between two steps."""

    checkpoint: Checkpoint
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Complete tensors on the CPU, by kind of file (`weights`, `moments`, `random`) and then by name."""
    curve: bytes = b""
    """Content of `curve.jsonl`; on the first process only."""


def take_snapshot(engine: Engine, about: Checkpoint, curve: bytes) -> Snapshot:
    """Copy what a checkpoint contains. All processes must call it together.

    Args:
        engine: engine whose state is copied.
        about: the checkpoint's description, in which `files` is still empty.
        curve: content of `curve.jsonl`; empty except on the first process.
    """
    weights, moments = {}, {}
    for name, which, tensor in engine.state_to_save():
        if which == "weight":
            weights[name] = tensor
        else:
            moments[f"{which}/{name}"] = tensor
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    return Snapshot(about, {"weights": weights, "moments": moments, "random": random}, curve)


class CheckpointWriter:
    """Writes snapshots in a thread, one at a time.

    Args:
        folder: of all checkpoints; local, or in object storage.
        scratch: local folder for files that are to be uploaded.
        keep: number of the newest checkpoints to retain.
    """

    def __init__(self, folder: str, scratch: Path, keep: int) -> None:
        self.folder, self.scratch, self.keep = folder, scratch, keep
        self.rank, self.processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # The writing threads have a process group of their own: their messages must not mix with training's.
        self.group = torch.distributed.new_group(backend="gloo") if self.processes > 1 else None
        self.failure: str | None = None
        """Why the last checkpoint could not be written."""
        self.last = time.monotonic()
        """`time.monotonic()` when the last checkpoint was begun."""
        self._snapshots: queue.Queue[Snapshot | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Number of snapshots that are being written or are queued."""
        return self._snapshots.unfinished_tasks

    def save(self, snapshot: Snapshot) -> None:
        """Queue a snapshot. All processes must call it for the same step."""
        self.last = time.monotonic()
        self._snapshots.put(snapshot)

    def wait(self) -> None:
        """Wait until nothing is pending."""
        self._snapshots.join()

    def close(self) -> None:
        """Wait until nothing is pending, and end the thread.

        Raises:
            StorageError: the last checkpoint could not be written.
        """
        self._snapshots.put(None)
        self._thread.join()
        if self.failure:
            raise StorageError(self.failure)

    def _work(self) -> None:
        while (snapshot := self._snapshots.get()) is not None:
            try:
                self.failure = self._write(snapshot)
            finally:
                del snapshot  # frees its memory before the next one arrives
                self._snapshots.task_done()

    def _write(self, snapshot: Snapshot) -> str | None:
        """Write this process's files, and publish the checkpoint when all processes have written theirs.

        Returns:
            None, or the reason why a process could not write.
        """
        about, files, failure = snapshot.checkpoint, {}, None
        try:
            files = self._write_share(snapshot)
        except UserError as error:
            failure = str(error)
        except OSError as error:
            failure = str(from_os_error(error) or error)
        except Exception as error:  # safetensors and torch raise their own exceptions for a failed write
            failure = (
                f"{join(self.folder, about.name)} could not be written ({type(error).__name__}: {error}): "
                "disk full, or no permission?"
            )
        if self.group is not None:
            # Take part even after a failure: the other processes are waiting for this one's result.
            results: list[tuple[dict[str, dict[str, Any]], str | None]] = [({}, None)] * self.processes
            try:
                torch.distributed.all_gather_object(results, (files, failure), group=self.group)
            except RuntimeError:  # the training thread will fail for the same reason, and report it
                return f"The checkpoint of step {about.step} is incomplete: another process has ended."
            files = {name: facts for written, _ in results for name, facts in written.items()}
            failure = next((reason for _, reason in results if reason), None)
        if failure is None and self.rank == 0:
            try:
                about.files = files
                checkpoint.publish(self.folder, about, self.keep)
            except UserError as error:
                failure = str(error)
            except OSError as error:
                failure = str(from_os_error(error) or error)
        if failure and self.rank == 0:
            log_line(
                f"warning: the checkpoint of step {about.step} could not be written; training continues: "
                f"{failure}"
            )
        return failure

    def _write_share(self, snapshot: Snapshot) -> dict[str, dict[str, Any]]:
        """Write this process's files, and return the size in bytes and the SHA-256 of each, by name."""
        name = snapshot.checkpoint.name
        files: dict[str, dict[str, Any]] = {}
        for kind, tensors in snapshot.tensors.items():
            if tensors:
                files |= self._put(
                    name, file_name(kind, self.rank, self.processes), functools.partial(save_file, tensors)
                )
        if snapshot.curve:
            files |= self._put(name, CURVE, lambda path: path.write_bytes(snapshot.curve))
        return files

    def _put(self, folder: str, name: str, write: Callable[[Path], object]) -> dict[str, dict[str, Any]]:
        """Write a file under a temporary name, and give it its own name when it is complete."""
        remote = is_s3(self.folder)
        target = join(self.folder, folder, name)
        partial = (
            self.scratch / f".{name}.partial" if remote else local_path(target).with_name(f".{name}.partial")
        )
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
                os.replace(partial, local_path(target))
        finally:
            partial.unlink(missing_ok=True)
        return {name: facts}


def restore(engine: Engine, saved: Checkpoint) -> None:
    """Restore an engine's state from a checkpoint. All processes must call it together.

    Random number generators are restored only if the number of processes is the same, because each process
    has its own state.

    Raises:
        ModelError: the checkpoint is damaged, or its weights are not those that this training has.
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
    # Each weight has a master and two moments.
    if len(restored) != 3 * len(expected):
        raise ModelError(
            f"The checkpoint {saved.folder} lacks some of the weights that this recipe trains: choose "
            "another --output."
        )
    engine.finish_restoring(saved.updates)
    engine.set_loss_scale(saved.loss_scale)
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if processes == saved.processes:
        with torch.no_grad():
            from safetensors.torch import load_file

            random = load_file(saved.file(file_name("random", rank, processes)))
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])


def complete_shape(engine: Engine, name: str) -> torch.Size:
    """Return the shape of a complete trained weight, however the engine shards it."""
    # ZeRO-3 leaves an empty parameter, and saves the complete shape in this attribute.
    parameter = engine.groups.weights[name]
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
