"""Resumes a training run from its latest checkpoint, and saves its progress in further checkpoints."""

import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from slam_asr.artifacts import checkpoint
from slam_asr.artifacts.checkpoint import BEGINNING, CHECKPOINTS, CURVE, Checkpoint
from slam_asr.errors import ConfigurationError
from slam_asr.progress import log_line
from slam_asr.storage import join, write_atomically
from slam_asr.training.beginning import describe_head
from slam_asr.training.builder import Parts
from slam_asr.training.checkpoint_writer import UNSAVED, CheckpointWriter, restore, take_snapshot
from slam_asr.training.phases import enter_beginning, enter_main


@dataclass
class Counts:
    """State of the loop that every checkpoint contains."""

    nonfinite: int = 0
    """Number of consecutive steps, up to the last one, that were skipped because the loss or the gradient was
    not finite. In fp16, steps with a finite loss do not count."""
    best_dev_loss: float = math.inf
    stale: int = 0
    """Number of validations since the one with the best dev loss."""
    validated: int = 0
    """Step of the last validation."""
    seconds: float = 0.0
    """Time spent on this training run, including earlier attempts."""
    beginning: int | None = None
    """Number of steps of the beginning, if it ended early; otherwise None."""
    sharpness: float | None = None
    """Sharpness of the CTC head at the end of the beginning; None before that."""


@dataclass
class Progress:
    """How far a training run has come."""

    done: int = 0
    """Number of optimiser steps done."""
    epoch: int = 0
    """Number of the epoch of the last step, from 0."""
    counts: Counts = field(default_factory=Counts)
    saved: int = 0
    """Step of the last checkpoint."""
    started: float = field(default_factory=time.monotonic)
    """`time.monotonic()` at the start of this attempt."""
    earlier: float = 0.0
    """Seconds that earlier attempts took until the checkpoint from which this attempt resumes."""

    @property
    def seconds(self) -> float:
        """Time spent on this training run, including earlier attempts."""
        return self.earlier + time.monotonic() - self.started

    def record_dev_loss(self, loss: float) -> None:
        """Compare a validation's dev loss with the best one so far."""
        if loss < self.counts.best_dev_loss:
            self.counts.best_dev_loss, self.counts.stale = loss, 0
        else:
            self.counts.stale += 1


class Resumer:
    """Reads and writes the checkpoints of a training run.

    All processes must call `resume` and `save_if_due` together.

    Args:
        parts: the parts of the training run.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts, self.options = parts, parts.recipe.training
        self.writer = CheckpointWriter(
            join(parts.job.published, CHECKPOINTS), parts.folder, self.options.checkpoints
        )

    def resume(self) -> Progress:
        """Enter the phase of the latest checkpoint, and restore the state that it holds.

        Without a checkpoint, enter the first phase. The file of the curve is set back to its content at the
        checkpoint, or emptied.

        Raises:
            ConfigurationError: the checkpoint is beyond the last step of this training run.
            ModelError: the checkpoint is damaged or incomplete, or does not hold the weights that the recipe
                trains.
            UserError: the model's weights cannot be used, or the folder of the checkpoints cannot be read or
                written.
        """
        parts, progress = self.parts, Progress()
        # Only the first process looks for a checkpoint, and broadcasts the result: otherwise the processes
        # could find different checkpoints.
        candidates: list[Checkpoint | None] = [None]
        if parts.rank == 0:
            # Called before `find`, because the recovered checkpoint is newer than the folder's latest one.
            self._recover(parts.folder / UNSAVED)
            candidates = [checkpoint.find(self.writer.folder)]
            checkpoint.discard_newer_than_latest(self.writer.folder)
        torch.distributed.broadcast_object_list(candidates)
        latest = candidates[0]
        counts = Counts(**latest.counts) if latest else Counts()
        if counts.beginning is not None:
            parts.plan.set_beginning(counts.beginning)
        steps = parts.plan.steps
        # Checked before a phase is entered, because that loads a model.
        if latest is not None and latest.step > steps:
            raise ConfigurationError(
                f"{latest.folder} is beyond the {steps} steps of this training run: raise "
                "training.max_steps or training.epochs, or choose another --output."
            )
        in_beginning = (
            parts.recipe.projector.beginning.active if latest is None else latest.phase == BEGINNING
        )
        if in_beginning:
            enter_beginning(parts)
        else:
            enter_main(parts, counts.sharpness)
        curve = b""
        if latest is not None:
            restore(parts.engine, latest)
            self.writer.latest = latest.folder
            progress = Progress(latest.step, latest.epoch, counts, saved=latest.step, earlier=counts.seconds)
            if parts.rank == 0:
                curve = Path(latest.file(CURVE)).read_bytes()
                log_line(f"resuming after step {latest.step} of {steps}, from {latest.folder}")
        if parts.rank == 0:
            # The steps after the checkpoint are repeated, and their lines of the curve are written again.
            write_atomically(parts.folder / CURVE, curve)
        return progress

    def _recover(self, unsaved: Path) -> None:
        """Upload the checkpoint that an earlier attempt on this machine could not upload."""
        if unsaved.is_dir():
            checkpoint.recover(str(unsaved), self.writer.folder, self.options.checkpoints)
            # Removed, because all files that remain in the training run's folder are uploaded at its end.
            shutil.rmtree(unsaved)

    def minutes_have_passed(self) -> bool:
        """Whether `training.checkpoint_minutes` have passed since the last checkpoint."""
        minutes = self.options.checkpoint_minutes
        return bool(minutes) and time.monotonic() - self.writer.last_save > 60 * minutes

    def save_if_due(
        self, progress: Progress, due: bool, pending: float, dev_loss: float | None, forced: bool
    ) -> None:
        """Hand a checkpoint to the writer, if one is due and the writer is idle.

        Training does not wait for slow storage: while a checkpoint is being written, the next one is
        postponed. Two cases are exceptions: the best checkpoint so far is queued, and with `forced`, training
        waits until the writer is idle.

        Args:
            progress: how far the training has come, this step included.
            due: whether `training.checkpoint_minutes` have passed, by the clock of the first process.
            pending: number of checkpoints that are being written or queued, as a mean over the processes.
            dev_loss: dev loss after this step; None if it was not measured, and in the beginning.
            forced: whether training or its beginning ends here, so that the step must be saved in any case.
        """
        improved = dev_loss is not None and progress.counts.stale == 0
        # A step that is already saved is saved again only to add its dev loss.
        if progress.saved == progress.done and dev_loss is None:
            return
        if forced:
            # Wait, so that no other snapshot is in memory when the one below is taken.
            self.writer.wait()
        elif improved:
            # The best checkpoint so far may wait in the queue while one other is written. No more may wait,
            # because each holds a copy of the state in memory.
            if pending > 1:
                return
        else:
            steps_have_passed = 0 < self.options.checkpoint_every <= progress.done - progress.saved
            if pending or not (due or steps_have_passed):
                return
        parts, counts = self.parts, progress.counts
        counts.seconds = round(progress.seconds, 1)
        about = Checkpoint(
            step=progress.done,
            epoch=progress.epoch,
            updates=parts.engine.updates(),
            engine=self.options.engine,
            processes=parts.processes,
            inputs=parts.job.inputs,
            counts=asdict(counts),
            loss_scale=parts.engine.loss_scale(),
            dev_loss=dev_loss,
            phase=parts.phase.name,
            ctc_head=describe_head(parts.job, parts.recipe, counts.sharpness),
        )
        curve = (parts.folder / CURVE).read_bytes() if parts.rank == 0 else b""
        self.writer.save(take_snapshot(parts.engine, about, curve))
        progress.saved = progress.done
