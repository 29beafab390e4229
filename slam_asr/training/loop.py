"""The training loop. torchrun starts one process per GPU, and each runs this module.

`python -m slam_asr.training.loop JOB` reads the job that `slam-asr train` has checked and written, resumes
from the latest checkpoint if one exists, trains, and writes the curve and a final checkpoint.
"""

import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

import torch

from slam_asr.artifacts.model_folder import CTC_HEAD
from slam_asr.errors import UserError
from slam_asr.models.precision import peak_flops
from slam_asr.progress import log_line
from slam_asr.restart import GPU_FAILURE
from slam_asr.runtime.worker import failures_written_to, leave_group
from slam_asr.storage import join, upload, write_json
from slam_asr.training.beginning import describe_head
from slam_asr.training.builder import Parts, build_parts
from slam_asr.training.job import FACTS, TrainingJob
from slam_asr.training.micro_batches import MicroBatch, Totals, remaining_micro_batches, scores_of
from slam_asr.training.monitor import Monitor, StepNumbers
from slam_asr.training.phases import announce, leave_beginning
from slam_asr.training.prefetch import prefetch
from slam_asr.training.resumer import Resumer
from slam_asr.training.validator import StopRequest, Validator

NONFINITE = "nonfinite.jsonl"
PEER_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")
"""Matches the messages with which gloo and NCCL report that another process has ended.

Both also raise RuntimeError, or a subclass of it, for other failures, so only the text distinguishes them.
"""
TEMPORARY = re.compile(
    rf"{GPU_FAILURE.pattern}|nccl(System|Remote|Internal|UnhandledCuda)Error|"
    r"Timed out waiting|[Ss]ocket [Tt]imeout|Connection timed out"
)
"""Matches the messages of failures that are usually over when the training processes start again."""


class Loop:
    """Runs the steps of a training run in one process, with the validations and checkpoints between them.

    Args:
        parts: the parts of the training run.
        resumer: restores the latest checkpoint when the loop is created, and saves the next ones.
    """

    def __init__(self, parts: Parts, resumer: Resumer) -> None:
        self.parts, self.resumer = parts, resumer
        self.options = parts.recipe.training
        self.stop = StopRequest()
        self.validator = Validator(parts, self.stop)
        self.progress = resumer.resume()
        self.interrupted = False
        """Whether training ends early because a process was asked to stop by a signal."""
        self.monitor: Monitor | None = None
        if parts.rank == 0:
            published = parts.job.published if parts.job.published != parts.job.folder else None
            self.monitor = Monitor(parts.folder, parts.recipe, self.progress.done, parts.device, published)
            self._announce_phase()

    def run(self) -> bool:
        """Train, validate, and write checkpoints.

        Returns:
            True if training is finished, False if a process was asked to stop earlier.

        Raises:
            UserError: too many steps in a row were skipped, or a checkpoint could not be written.
        """
        # Not earlier: while models are loaded, there is nothing to save, and a signal should end the process
        # at once.
        self.stop.listen()
        while self._run_phase():
            self.progress.counts.sharpness = leave_beginning(self.parts)
            self._announce_phase()
        if self.monitor:
            self.monitor.close()
        self.resumer.writer.close()
        return not self.interrupted

    def _announce_phase(self) -> None:
        if self.monitor:
            parts, phase, peak = self.parts, self.parts.phase, peak_flops(self.parts.device)
            self.monitor.enter(
                phase.name,
                phase.operations_per_position,
                peak and peak * parts.processes,
                last_step=parts.last_step,
                total_steps=parts.plan.steps,
            )
            announce(parts)

    def _run_phase(self) -> bool:
        """Take the remaining steps of the current phase.

        Returns:
            Whether training continues with another phase; False at the end of training.
        """
        parts, done, engine = self.parts, self.progress.done, self.parts.engine
        engine.module.train()
        # A training run that was killed after the last step of a phase still has to validate and save.
        continues = done < parts.last_step or self._finish_step(Totals())
        if done == parts.last_step:
            return continues
        totals = Totals()
        for micro in prefetch(remaining_micro_batches(parts, done)):
            batch = micro.batch.to(parts.device)
            scores = scores_of(engine.forward(batch, micro.is_last), batch)
            engine.backward(scores.loss, micro.targets, last=micro.is_last)
            totals.add(scores.sums, micro)
            if micro.is_last:
                self._reduce(totals)
                self._apply_step(micro, totals)
                # If a checkpoint could not be written, training ends, because further steps would be lost.
                # `CheckpointWriter.close` then raises the error.
                continues = self._finish_step(totals) and not totals.failed
                # A validation may have ended the beginning with this step, although more micro-batches of the
                # beginning have been prefetched.
                if not continues or self.progress.done == parts.last_step:
                    break
                totals = Totals()
        return continues

    def _reduce(self, totals: Totals) -> None:
        """Replace this process's sums with the sums over all processes.

        One all-reduce carries the scores, the stop request and the state of checkpoints. All processes then
        make the same decisions after the step.
        """
        assert totals.scores is not None  # a step has at least one micro-batch
        parts = self.parts
        flags = [
            self.stop.signal is not None,
            self.resumer.writer.pending,
            self.resumer.writer.failure is not None,
            parts.rank == 0 and self.resumer.minutes_have_passed(),
        ]
        local = torch.tensor([totals.filled, totals.cells, *flags], dtype=torch.float64, device=parts.device)
        sums = torch.cat([totals.scores, local])
        torch.distributed.all_reduce(sums)
        # All numbers are transferred at once, because each `.item()` would make the CPU wait for the GPU.
        loss, correct, targets, filled, cells, stop, pending, failed, due = sums.tolist()
        totals.loss, totals.accuracy = loss / targets, correct / targets
        totals.positions, totals.padding = int(filled), 1 - filled / cells
        totals.stop, totals.failed, totals.due = stop > 0, failed > 0, due > 0
        totals.pending = pending / parts.processes

    def _apply_step(self, micro: MicroBatch, totals: Totals) -> None:
        """Update the weights, and record the step."""
        number, loss, rate = micro.number, totals.loss, self.parts.phase.rate(micro.number)
        update = self.parts.engine.step(rate)
        self.progress.done, self.progress.epoch = number, micro.epoch
        if self.monitor:
            utterances = self.parts.readers["train"].examples.utterances
            self.monitor.step(
                StepNumbers(
                    step=number,
                    epoch=micro.epoch,
                    loss=loss,
                    accuracy=totals.accuracy,
                    learning_rate=rate,
                    gradient_norm=update.gradient_norm,
                    padding=totals.padding,
                    positions=totals.positions,
                    audio_seconds=sum(utterances[i].duration or 0.0 for i in micro.step),
                )
            )
        # In fp16, skipped steps are normal: the loss scale grows until a gradient overflows.
        good = math.isfinite(loss) and (update.applied or self.options.precision == "fp16")
        counts = self.progress.counts
        counts.nonfinite = 0 if good else counts.nonfinite + 1
        if not good:
            self._report_nonfinite(micro, loss)

    def _report_nonfinite(self, micro: MicroBatch, loss: float) -> None:
        """Log a skipped step and its utterances.

        Raises:
            UserError: `training.nonfinite_steps` steps in a row were skipped.
        """
        job, file = self.parts.job, self.parts.folder / NONFINITE
        what = "loss" if not math.isfinite(loss) else "gradient"
        keys = [self.parts.readers["train"].examples.utterances[i].key for i in micro.step]
        if self.parts.rank == 0:
            with open(file, "a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": micro.number, "what": what, "keys": keys}) + "\n")
            log_line(f"step {micro.number} was skipped: its {what} is not finite (utterances in {NONFINITE})")
        in_a_row = self.progress.counts.nonfinite
        if in_a_row >= self.options.nonfinite_steps:
            if self.parts.rank == 0 and job.published != job.folder:
                upload(file, join(job.published, NONFINITE))
            shown = ", ".join(keys[:5])
            rate = f"{'projector.beginning' if self.parts.in_beginning else 'training'}.learning_rate"
            raise UserError(
                f"The {what} was not finite for {in_a_row} steps in a row, up to step "
                f"{micro.number} (utterances {shown} …; all in {join(job.published, NONFINITE)}): lower "
                f"{rate}, set training.gradient_clipping, or train in bf16 or fp32 if this is "
                "fp16; look at those utterances if they are always the same."
            )

    def _finish_step(self, totals: Totals) -> bool:
        """Validate and save after a step, if due.

        Args:
            totals: the step's sums over all processes.

        Returns:
            Whether training continues, in this phase or the next one.
        """
        progress, counts = self.progress, self.progress.counts
        at_end, in_beginning = progress.done == self.parts.last_step, self.parts.in_beginning
        self.interrupted = totals.stop
        dev_loss = None
        if (
            "dev" in self.parts.readers
            # A resumed training run may begin at a step that was validated before it was saved.
            and counts.validated < progress.done
            and (progress.done % self.options.validate_every == 0 or at_end)
        ):
            dev_loss = self._validate()
        ended = (at_end and not in_beginning and not self.interrupted) or bool(
            self.options.patience and counts.stale >= self.options.patience
        )
        # The end of the beginning is saved too, because the LLM is loaded next, which may take all memory.
        # `at_end` is not used here: the validation above may have ended the beginning with this step.
        forced = self.interrupted or ended or (in_beginning and progress.done == self.parts.last_step)
        self.resumer.save_if_due(progress, totals.due, totals.pending, dev_loss, forced)
        if ended and not at_end and self.parts.rank == 0:
            log_line(
                f"step {progress.done}: the dev loss has not fallen for {counts.stale} validations; "
                "training ends early (training.patience)"
            )
        return not (self.interrupted or ended)

    def _validate(self) -> float | None:
        """Validate, transcribe, and compare the dev loss with the best one so far.

        Returns:
            The dev loss. None in the beginning, because CTC's loss cannot be compared with the LLM's. None
            also if a process was asked to stop meanwhile; then `interrupted` is set.
        """
        result = self.validator.validate()
        if result is None:
            self.interrupted = True
            return None
        loss, accuracy, samples = result
        progress, plan = self.progress, self.parts.plan
        progress.counts.validated = progress.done
        until = self.parts.recipe.projector.beginning.until
        if not self.parts.in_beginning:
            progress.record_dev_loss(loss)
        elif until and 1 - accuracy <= until and progress.done < plan.beginning:
            # The token error rate on dev is low enough, so the beginning ends with this step.
            progress.counts.beginning = progress.done
            plan.set_beginning(progress.done)
        if self.monitor:
            self.monitor.validation(progress.done, loss, accuracy, samples)
        return None if self.parts.in_beginning else loss


def facts_of(parts: Parts, loop: Loop) -> dict[str, object]:
    """Return the facts for the training run's report, as JSON values."""
    head = describe_head(parts.job, parts.recipe, loop.progress.counts.sharpness)
    return ({CTC_HEAD: head} if head else {}) | {
        "projector_parameters": parts.phase.parameters["projector"][0],
        "trained_parameters": sum(trained for _, trained in parts.phase.parameters.values()),
        "all_parameters": sum(total for total, _ in parts.phase.parameters.values()),
        "precision": parts.recipe.training.precision,
        "device": parts.device.type,
        "processes": parts.processes,
        "steps": loop.progress.done,
        "epochs": parts.plan.epochs,
        "seconds": round(loop.progress.seconds, 1),
    }


def train_in_this_process(job: TrainingJob) -> int:
    """Train as one of the processes of a training run.

    Returns:
        The exit code: 0, or 128 plus the signal's number if a process was asked to stop.

    Raises:
        UserError: the training cannot start or continue.
    """
    parts = build_parts(job)
    loop = Loop(parts, Resumer(parts))
    if not loop.run():
        return 128 + (loop.stop.signal or 15)
    if parts.rank == 0:
        write_json(parts.folder / FACTS, facts_of(parts, loop))
    return 0


def main() -> None:
    """Run one training process under torchrun. The only argument is the path of a `TrainingJob` as JSON."""
    # DeepSpeed calls deprecated functions of torch several times per step, and each call would warn.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    job = TrainingJob(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with failures_written_to(Path(job.folder)):
        try:
            code = train_in_this_process(job)
        except RuntimeError as error:
            if PEER_GONE.search(str(error)):
                # The other process reports the cause, from which this error's message would only distract.
                reason = "because another process of this training run has ended"
            elif TEMPORARY.search(str(error)):
                reason = f"after a failure that may be temporary: {str(error).splitlines()[0]}"
            else:
                raise
            log_line(f"process {os.environ['RANK']} ends, {reason}")
            os._exit(os.EX_TEMPFAIL)
    leave_group(code)


if __name__ == "__main__":
    main()
