"""Writing checkpoints while training goes on.

The training thread only copies what is to be written; a thread of each process writes it aside, publishes
it, and tells the first process so, which makes the checkpoint count when all are done.
"""

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from slam_asr.errors import UserError, from_os_error
from slam_asr.progress import log_line
from slam_asr.storage import is_s3, join, local_path, sha256_of_file, upload
from slam_asr.training import checkpoint
from slam_asr.training.checkpoint import CURVE, Checkpoint, file_name
from slam_asr.training.engines.engine import Engine


@dataclass
class Snapshot:
    """What one process writes of a checkpoint, copied while nothing moves."""

    checkpoint: Checkpoint
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """By the kind of file, then by name."""
    curve: bytes = b""
    """Of the first process."""


def take_snapshot(engine: Engine, about: Checkpoint, curve: bytes) -> Snapshot:
    """Copy what a checkpoint needs; all processes call it together."""
    weights, moments = {}, {}
    for name, which, tensor in engine.share():
        if which == "weight":
            weights[name] = tensor
        else:
            moments[f"{which}/{name}"] = tensor
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    return Snapshot(about, {"weights": weights, "moments": moments, "random": random}, curve)


class Saver:
    """Writes snapshots, one at a time, in a thread.

    Args:
        folder: of all checkpoints; local, or in object storage.
        scratch: local folder for what is on its way to object storage.
        keep: how many of the last checkpoints stay.
    """

    def __init__(self, folder: str, scratch: Path, keep: int) -> None:
        self.folder, self.scratch, self.keep = folder, scratch, keep
        self.rank, self.processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # Messages between the writing threads must not mix with those of training.
        self.group = torch.distributed.new_group(backend="gloo") if self.processes > 1 else None
        self.failure: str | None = None
        """Why the last one could not be written."""
        self.last = time.monotonic()
        """When the last one was begun."""
        self._snapshots: queue.Queue[Snapshot | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Snapshots that are being written, or wait for it."""
        return self._snapshots.unfinished_tasks

    def save(self, snapshot: Snapshot) -> None:
        """Have a snapshot written; all processes call it."""
        self.last = time.monotonic()
        self._snapshots.put(snapshot)

    def wait(self) -> None:
        """Wait until nothing is pending."""
        self._snapshots.join()

    def close(self) -> None:
        """Wait for what is pending, and end.

        Raises:
            UserError: the last checkpoint could not be written.
        """
        self._snapshots.put(None)
        self._thread.join()
        if self.failure:
            raise UserError(self.failure)

    def _work(self) -> None:
        while (snapshot := self._snapshots.get()) is not None:
            try:
                self.failure = self._write(snapshot)
            finally:
                del snapshot  # its memory
                self._snapshots.task_done()

    def _write(self, snapshot: Snapshot) -> str | None:
        """Write this process' share and hear of the others'; the reason where any could not."""
        about, files, failure = snapshot.checkpoint, {}, None
        try:
            files = self._write_share(snapshot)
        except UserError as error:
            failure = str(error)
        except OSError as error:
            failure = str(from_os_error(error) or error)
        # safetensors and torch tell of a failed write by errors of their own.
        except Exception as error:
            failure = f"{join(self.folder, about.name)} could not be written ({type(error).__name__}: {error}): disk full, or no permission?"
        if self.group is not None:
            told: list = [None] * self.processes
            try:
                torch.distributed.all_gather_object(told, (files, failure), group=self.group)
            except RuntimeError:  # the training thread will find out by itself, and say so
                return f"The checkpoint of step {about.step} is not whole: another process is gone."
            files = {name: facts for theirs, _ in told for name, facts in theirs.items()}
            failure = next((f for _, f in told if f), None)
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
                f"warning: the checkpoint of step {about.step} could not be written, training goes on: {failure}"
            )
        return failure

    def _write_share(self, snapshot: Snapshot) -> dict[str, dict]:
        name, files = snapshot.checkpoint.name, {}
        for kind, tensors in snapshot.tensors.items():
            if tensors:
                files |= self._put(
                    name,
                    file_name(kind, self.rank, self.processes),
                    lambda path, t=tensors: save_file(t, path),
                )
        if snapshot.curve:
            files |= self._put(name, CURVE, lambda path: path.write_bytes(snapshot.curve))
        return files

    def _put(self, folder: str, name: str, write: Callable[[Path], object]) -> dict[str, dict]:
        """Write a file aside, and let it appear under its name when it is whole."""
        remote = is_s3(self.folder)
        target = join(self.folder, folder, name)
        aside = (
            self.scratch / f".{name}.partial" if remote else local_path(target).with_name(f".{name}.partial")
        )
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(aside)
            facts = {"bytes": aside.stat().st_size, "sha256": sha256_of_file(aside)}
            if remote:
                upload(aside, target)
            else:
                with open(aside, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(aside, local_path(target))
        finally:
            aside.unlink(missing_ok=True)
        return {name: facts}


def restore(engine: Engine, found: Checkpoint) -> None:
    """Put an engine where a checkpoint left it; all processes call it.

    Raises:
        UserError: the checkpoint is damaged, or does not hold what is trained here.
    """
    wanted = set(engine.groups.weights)
    met = set()
    for kind in ("weights", "moments"):
        for key, tensor in found.tensors(kind).items():
            which, name = ("weight", key) if kind == "weights" else key.split("/", 1)
            if name not in wanted or tensor.shape != shape_of(engine, name):
                raise UserError(
                    f"The checkpoint {found.folder} holds {name} of shape {list(tensor.shape)}, which is not what this recipe trains: choose another --output."
                )
            engine.put_state(name, which, tensor)
            met.add((which, name))
    if len(met) != 3 * len(wanted):
        raise UserError(
            f"The checkpoint {found.folder} lacks some of what this recipe trains: choose another --output."
        )
    engine.finish_restoring(found.updates)
    engine.put_loss_scale(found.loss_scale)
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if processes == found.processes:
        with torch.no_grad():
            from safetensors.torch import load_file

            random = load_file(found.file(file_name("random", rank, processes)))
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])


def shape_of(engine: Engine, name: str) -> torch.Size:
    """The whole shape of a trained weight, however it is spread."""
    parameter = engine.groups.weights[name]
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
