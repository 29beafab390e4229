"""The training loop. torchrun starts one process per GPU, and each runs this module.

`python -m slam_asr.training.loop JOB` reads the job that `slam-asr train` has checked and written, resumes
from the latest checkpoint if one exists, trains, and writes the curve and a final checkpoint.
"""

import contextlib
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from slam_asr.artifacts import checkpoint
from slam_asr.artifacts.checkpoint import CURVE, Checkpoint
from slam_asr.artifacts.feature_store.reader import StoreReader
from slam_asr.config.recipe import Recipe, load_recipe
from slam_asr.errors import ConfigurationError, UserError
from slam_asr.models.answer_loss import AnswerScores, allows_chunks, score_answers, score_in_chunks
from slam_asr.models.packed_attention import allow_packing
from slam_asr.models.precision import explain_precision, peak_flops, pick_device
from slam_asr.models.slam import Batch
from slam_asr.progress import log_line
from slam_asr.runtime.worker import die_with_parent, failures_written_to, leave_group
from slam_asr.storage import join, upload, write_atomically, write_json
from slam_asr.training.batches import BatchReader, TrainingPlan, budget_for, split_packed, split_step
from slam_asr.training.checkpoint_writer import CheckpointWriter, restore, take_snapshot
from slam_asr.training.engines.choose import make_engine, start_process_group
from slam_asr.training.job import CHECKPOINTS, FACTS, TrainingJob
from slam_asr.training.kernels import compile_layers, use_liger
from slam_asr.training.model_builder import build_model, build_prompt, build_readers, count_parameters
from slam_asr.training.monitor import Monitor, StepNumbers
from slam_asr.training.prefetch import prefetch
from slam_asr.training.samples import Samples, SampleTranscriber
from slam_asr.training.schedule import learning_rate_schedule
from slam_asr.training.stop_signals import StopRequest

NONFINITE = "nonfinite.jsonl"
PEER_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")
"""Matches the messages with which gloo and NCCL report that another process has ended.

Both raise a RuntimeError, or a subclass, which they also raise for other failures. Only the text
differs.
"""


@dataclass
class MicroBatch:
    """The utterances that one process passes through the model at once."""

    number: int
    """Number of its optimiser step, from 1."""
    epoch: int
    step: list[int]
    """Indices of the step's utterances, on all processes."""
    batch: Batch
    targets: int
    """Target tokens of the step, on all processes."""
    is_last: bool
    """Whether this is the last micro-batch of its step on this process."""
    filled: int
    """LLM positions without padding."""
    cells: int
    """LLM positions with padding."""


@dataclass
class Counts:
    """State of the loop that lasts from step to step, and is saved with a checkpoint."""

    nonfinite: int = 0
    """Steps in a row that were skipped."""
    best_dev_loss: float = math.inf
    stale: int = 0
    """Validations since the best one."""
    validated: int = 0
    """Step of the last validation."""
    seconds: float = 0.0
    """Time spent on this training, earlier attempts included."""


@dataclass
class Totals:
    """Sums over a step: of this process at first, and of all processes after `Trainer._reduce`."""

    scores: torch.Tensor | None = None
    """[3] float64 on the device: loss, correct tokens and target tokens of this process.

    They stay a tensor: reading the values here would synchronise the GPU.
    """
    filled: int = 0
    """LLM positions of this process, without padding."""
    cells: int = 0
    """LLM positions of this process, with padding."""
    numbers: tuple[float, ...] = (0.0,) * 5
    """Loss, correct tokens, target tokens, filled positions and positions with padding, of all processes."""
    stop: bool = False
    """Whether any process was asked to stop."""
    pending: float = 0.0
    """Checkpoints still being written: the mean over the processes."""
    due: bool = False
    """Whether `training.checkpoint_minutes` have passed since the last checkpoint."""

    def add(self, scores: torch.Tensor, micro: MicroBatch) -> None:
        """Add a micro-batch.

        Args:
            scores: [3] as in `AnswerScores.sums`.
            micro: the micro-batch.
        """
        self.scores = scores if self.scores is None else self.scores + scores
        self.filled += micro.filled
        self.cells += micro.cells

    @property
    def loss(self) -> float:
        """Mean over the target tokens."""
        return self.numbers[0] / self.numbers[2]

    @property
    def accuracy(self) -> float:
        """Share of the target tokens to which the model gives the highest probability."""
        return self.numbers[1] / self.numbers[2]

    @property
    def positions(self) -> int:
        """LLM positions without padding."""
        return int(self.numbers[3])

    @property
    def padding(self) -> float:
        """Share of the LLM positions that is padding."""
        return 1 - self.numbers[3] / self.numbers[4]


class Trainer:
    """The training loop of one process."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.recipe: Recipe = load_recipe(job.recipe)
        self.options = self.recipe.training
        self.folder = Path(job.folder)
        self.device = self._device()
        self.rank, self.processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        torch.manual_seed(self.options.seed + self.rank)  # for dropout, if any
        prompt = build_prompt(job, self.recipe)
        self.readers = build_readers(job, self.recipe, prompt, self.processes)
        self.sample_transcriber = (
            SampleTranscriber(self.readers["dev"], prompt, self.recipe)
            if "dev" in self.readers and self.options.samples
            else None
        )
        model, lazy_weights = build_model(job, self.recipe, self.device)
        self.counts_of_parameters = count_parameters(model, job.encoder_parameters)
        self.budget = budget_for(self.options, self.processes)
        self.plan = TrainingPlan(
            self.readers["train"].examples,
            self.budget,
            self.recipe.features.window_shards,
            self.options.seed,
            self.options.epochs,
            self.options.max_steps,
        )
        rates = {"llm": self.recipe.llm.learning_rate, "encoder": self.recipe.encoder.learning_rate}
        self.engine = make_engine(
            model,
            self.options,
            self.device,
            {name: r for name, r in rates.items() if r is not None},
            lazy_weights,
        )
        # If the LLM is sharded, its weights exist only from here on.
        self.packs = self.options.packing and self.engine.try_llm(allow_packing)
        for reader in self.readers.values():
            reader.packs = self.packs
        # Under ZeRO-3 the output layer's weights are complete only during its own forward call, and
        # `score_in_chunks` reads them directly.
        if self.options.zero_stage != 3 and self.engine.try_llm(allows_chunks):
            model.scorer = score_in_chunks
        # Compile after the trials, which would otherwise compile the layers for their own inputs.
        if self.options.liger:
            use_liger(model.llm)
        if self.options.compile:
            compile_layers(model.llm)
        self.writer = CheckpointWriter(
            join(job.published, CHECKPOINTS), self.folder, self.options.checkpoints
        )
        self.rate = learning_rate_schedule(
            self.options.schedule, self.options.learning_rate, self.options.warmup_steps, self.plan.steps
        )
        self.counts = Counts()
        self.done = self.saved = self.epoch = 0
        """Optimiser steps done, the step of the last checkpoint, and the epoch."""
        self.interrupted = False
        """Whether training ends early because a process was asked to stop."""
        self.stop = StopRequest()
        self.started = time.monotonic()
        self.earlier = 0.0
        """Seconds that earlier attempts took."""
        self.monitor: Monitor | None = None

    def _device(self) -> torch.device:
        """Select this process's device, and join the process group."""
        device = pick_device()
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        start_process_group(device, self.options.engine)
        return device

    def announce(self) -> None:
        """Log models, device and plan before the first step."""
        recipe, options = self.recipe, self.options
        examples = self.readers["train"].examples
        audio = (
            "cached features"
            if isinstance(self.readers["train"].reader, StoreReader)
            else "encoded on the fly"
        )
        log_line(
            f"models: {recipe.encoder.name} ({audio}) + {recipe.projector.kind} projector + {recipe.llm.name}"
        )
        total, trained = (sum(counts) for counts in zip(*self.counts_of_parameters.values(), strict=True))
        parts = ", ".join(
            f"{name} {count:,}" for name, (_, count) in self.counts_of_parameters.items() if count
        )
        log_line(f"parameters: {total:,} in encoder, projector and LLM, {trained:,} trained ({parts})")
        engine = {"deepspeed": f"DeepSpeed, ZeRO stage {options.zero_stage}", "ddp": "DDP", "fsdp": "FSDP2"}[
            options.engine
        ]
        compiled = ", layers are compiled during the first step" if options.compile else ""
        log_line(
            f"device: {self.device.type} × {self.processes}, "
            f"{explain_precision(options.precision, self.device)}, {engine}{compiled}"
        )
        log_line(
            f"audio: {examples.hours:.2f} h in {len(examples)} utterances; {self.plan.steps} steps of "
            f"{self.budget.step} {'utterances' if self.budget.fixed else 'LLM positions'} "
            f"in {self.plan.epochs} epochs, batches {'packed' if self.packs else 'padded'}"
        )

    def resume(self) -> None:
        """Resume from the latest checkpoint, if one exists, and open the curve for appending.

        Raises:
            ConfigurationError: the checkpoint is beyond the steps of this training.
            ModelError: the checkpoint is damaged or incomplete, or holds other weights.
        """
        # Only the first process looks, and broadcasts its finding: otherwise processes could see different
        # pointers.
        candidates: list[Checkpoint | None] = [None]
        if self.rank == 0:
            candidates = [checkpoint.find(self.writer.folder)]
            checkpoint.discard_newer_than_latest(self.writer.folder)
        torch.distributed.broadcast_object_list(candidates)
        latest = candidates[0]
        curve = b""
        if latest is not None:
            if latest.step > self.plan.steps:
                raise ConfigurationError(
                    f"{latest.folder} is beyond the {self.plan.steps} steps of this training: raise "
                    "training.max_steps or training.epochs, or choose another --output."
                )
            restore(self.engine, latest)
            self.done = self.saved = latest.step
            self.epoch, self.counts = latest.epoch, Counts(**latest.counts)
            self.earlier = self.counts.seconds
            if self.rank == 0:
                curve = Path(latest.file(CURVE)).read_bytes()
                log_line(f"resuming after step {latest.step} of {self.plan.steps}, from {latest.folder}")
        if self.rank == 0:
            # Restore the curve as it was at the checkpoint: the steps after the checkpoint are repeated.
            write_atomically(self.folder / CURVE, curve)
            published = self.job.published if self.job.published != str(self.folder) else None
            self.monitor = Monitor(
                self.folder, self.recipe, self.plan.steps, self.done, self.device, self._work(), published
            )

    def _work(self) -> tuple[float, float | None]:
        """Return operations per LLM position, and the peak per second of all devices together, if known.

        Each weight of the LLM takes two operations (multiply and add) in the forward pass and two for the
        gradient of its input; a trained weight takes two more for its own gradient.
        """
        weights, trained = self.counts_of_parameters["llm"]
        peak = peak_flops(self.device)
        return 4.0 * weights + 2.0 * trained, peak and peak * self.processes

    def run(self) -> bool:
        """Train, validate, and write checkpoints.

        Returns:
            True if the training is finished, False if it was asked to stop earlier.
        """
        self.stop.listen()
        self.engine.module.train()
        continues = self.done < self.plan.steps or self._finish_step(Totals())
        totals = Totals()
        for micro in prefetch(self._micro_batches()) if continues else ():
            batch = micro.batch.to(self.device)
            scores = self._score(self.engine.forward(batch, micro.is_last), batch)
            self.engine.backward(scores.loss, micro.targets, last=micro.is_last)
            totals.add(scores.sums, micro)
            if micro.is_last:
                self._reduce(totals)
                self._apply_step(micro, totals)
                if not self._finish_step(totals):
                    break
                totals = Totals()
        if self.monitor:
            self.monitor.close()
        self.writer.close()
        return not self.interrupted

    def _finish_step(self, totals: Totals) -> bool:
        """Validate and save after a step, if due.

        Returns:
            Whether training continues with another step.
        """
        at_end, counts = self.done == self.plan.steps, self.counts
        self.interrupted = totals.stop
        dev_loss = None
        if (
            "dev" in self.readers
            and counts.validated < self.done
            and (self.done % self.options.validate_every == 0 or at_end)
        ):
            dev_loss = self._validate_and_compare()
        ended = (at_end and not self.interrupted) or bool(
            self.options.patience and counts.stale >= self.options.patience
        )
        self._save_if_due(totals, dev_loss, forced=self.interrupted or ended)
        if ended and not at_end and self.rank == 0:
            log_line(
                f"step {self.done}: the dev loss has not fallen for {counts.stale} validations; "
                "training ends early (training.patience)"
            )
        return not (self.interrupted or ended)

    def _reduce(self, totals: Totals) -> None:
        """Replace this process's sums with the sums over all processes.

        One all-reduce carries the scores, the stop request and the state of checkpoints: all processes then
        make the same decisions after the step.
        """
        assert totals.scores is not None  # a step has at least one micro-batch
        flags = [
            self.stop.signal is not None,
            self.writer.pending,
            self.rank == 0 and self._minutes_have_passed(),
        ]
        local = torch.tensor([totals.filled, totals.cells, *flags], dtype=torch.float64, device=self.device)
        sums = torch.cat([totals.scores, local])
        torch.distributed.all_reduce(sums)
        *numbers, stop, pending, due = sums.tolist()
        totals.numbers, totals.stop, totals.pending, totals.due = (
            tuple(numbers),
            stop > 0,
            pending / self.processes,
            due > 0,
        )

    def _minutes_have_passed(self) -> bool:
        minutes = self.options.checkpoint_minutes
        return bool(minutes) and time.monotonic() - self.writer.last > 60 * minutes

    def _steps_have_passed(self) -> bool:
        every = self.options.checkpoint_every
        return bool(every) and self.done - self.saved >= every

    def _apply_step(self, micro: MicroBatch, totals: Totals) -> None:
        """Update the weights, and record the step."""
        number, loss = micro.number, totals.loss
        update = self.engine.step(self.rate(number))
        self.done, self.epoch = number, micro.epoch
        if self.monitor:
            examples = self.readers["train"].examples
            self.monitor.step(
                StepNumbers(
                    step=number,
                    epoch=micro.epoch,
                    loss=loss,
                    accuracy=totals.accuracy,
                    learning_rate=self.rate(number),
                    gradient_norm=update.gradient_norm,
                    padding=totals.padding,
                    positions=totals.positions,
                    audio_seconds=sum(examples.utterances[i].duration or 0.0 for i in micro.step),
                )
            )
        # In fp16 a step is skipped now and then: an overflow is how the loss scale finds its largest value.
        good = math.isfinite(loss) and (update.applied or self.options.precision == "fp16")
        self.counts.nonfinite = 0 if good else self.counts.nonfinite + 1
        if not good:
            self._report_nonfinite(micro, loss)

    def _report_nonfinite(self, micro: MicroBatch, loss: float) -> None:
        """Log a skipped step and its utterances.

        Raises:
            UserError: `training.nonfinite_steps` steps in a row were skipped.
        """
        what = "loss" if not math.isfinite(loss) else "gradient"
        keys = [self.readers["train"].examples.utterances[i].key for i in micro.step]
        if self.rank == 0:
            with open(self.folder / NONFINITE, "a") as file:
                file.write(json.dumps({"step": micro.number, "what": what, "keys": keys}) + "\n")
            log_line(f"step {micro.number} was skipped: its {what} is not finite (utterances in {NONFINITE})")
        if self.counts.nonfinite >= self.options.nonfinite_steps:
            if self.rank == 0 and self.job.published != str(self.folder):
                upload(self.folder / NONFINITE, join(self.job.published, NONFINITE))
            shown = ", ".join(keys[:5])
            raise UserError(
                f"The {what} was not finite for {self.counts.nonfinite} steps in a row, up to step "
                f"{micro.number} (utterances {shown} …; all in {join(self.job.published, NONFINITE)}): lower "
                "training.learning_rate, set training.gradient_clipping, or train in bf16 or fp32 if this is "
                "fp16; look at those utterances if they are always the same."
            )

    def _save_if_due(self, totals: Totals, dev_loss: float | None, forced: bool) -> None:
        """Hand a checkpoint to the writer, if one is due and the writer is idle.

        Training does not wait for slow storage: while a checkpoint is being written, the next one is
        postponed.

        Args:
            totals: sums over this step.
            dev_loss: dev loss of the validation after this step; None if there was none.
            forced: whether training ends here, so that the checkpoint must be written in any case.
        """
        improved = dev_loss is not None and self.counts.stale == 0
        if self.saved == self.done and dev_loss is None:
            return
        if forced:
            self.writer.wait()
        # The best checkpoint so far may queue while one other is written. No more may queue: each holds a
        # copy of the state in memory.
        elif not (improved and totals.pending <= 1) and (
            totals.pending or not (totals.due or self._steps_have_passed())
        ):
            return
        self.counts.seconds = round(self.seconds, 1)
        about = Checkpoint(
            step=self.done,
            epoch=self.epoch,
            updates=self.engine.updates(),
            engine=self.options.engine,
            processes=self.processes,
            inputs=self.job.inputs,
            counts=asdict(self.counts),
            loss_scale=self.engine.loss_scale(),
            dev_loss=dev_loss,
        )
        curve = (self.folder / CURVE).read_bytes() if self.rank == 0 else b""
        self.writer.save(take_snapshot(self.engine, about, curve))
        self.saved = self.done

    @property
    def seconds(self) -> float:
        """Time spent on this training, earlier attempts included."""
        return self.earlier + time.monotonic() - self.started

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """Yield this process's micro-batches of all remaining steps."""
        reader = self.readers["train"]
        current = None
        for number, (window, next_window, step) in enumerate(self.plan.after(self.done), start=self.done + 1):
            if window is not current:
                reader.enter(window, next_window)
                current = window
            mine = self._own_micro_batches(step, reader)
            targets = reader.targets(step, window.epoch)
            for i, indices in enumerate(mine, start=1):
                batch = reader.batch(indices, window.epoch)
                filled = int(batch.mask.sum()) if indices else 0
                yield MicroBatch(
                    number,
                    window.epoch,
                    step,
                    batch,
                    targets,
                    i == len(mine),
                    filled,
                    batch.mask.numel(),
                )

    def _own_micro_batches(self, step: list[int], reader: BatchReader) -> list[list[int]]:
        """Return the indices of this process's share of a step, one list per micro-batch."""
        positions, batch = reader.examples.positions, self.budget.batch
        if reader.packs and not self.budget.fixed:
            return split_packed(step, positions, self.processes, batch)[self.rank]
        return split_step(step, positions, self.processes, batch, self.budget.sizes(positions))[self.rank]

    def _validate_and_compare(self) -> float | None:
        """Validate, and compare with the best dev loss so far.

        Returns:
            The dev loss; None, with `interrupted` set, if a process was asked to stop meanwhile.
        """
        result = self.validate()
        if result is None:
            self.interrupted = True
            return None
        loss, accuracy = result
        self.counts.validated = self.done
        if loss < self.counts.best_dev_loss:
            self.counts.best_dev_loss, self.counts.stale = loss, 0
        else:
            self.counts.stale += 1
        samples = self._transcribe(self.sample_transcriber) if self.sample_transcriber else None
        if self.monitor:
            self.monitor.validation(self.done, loss, accuracy, samples)
        return loss

    def _transcribe(self, transcriber: SampleTranscriber) -> Samples:
        self.engine.module.eval()
        # Layers are compiled for complete utterances. Decoding takes one token at a time, and would compile
        # them again.
        uncompiled = (
            torch.compiler.set_stance("force_eager") if self.options.compile else contextlib.nullcontext()
        )
        try:
            with uncompiled:
                return transcriber.transcribe(self.engine.model)
        finally:
            self.engine.module.train()

    @torch.no_grad()
    def validate(self) -> tuple[float, float] | None:
        """Score the dev set.

        Returns:
            Mean loss and accuracy over its target tokens; None if a process was asked to stop meanwhile.
        """
        reader = self.readers["dev"]
        mine = self._own_micro_batches(list(range(len(reader.examples))), reader)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.engine.module.eval()
        try:
            for batch in prefetch(reader.batch(indices) for indices in mine):
                batch = batch.to(self.device)
                sums += self._score(self.engine.module(batch), batch).sums
                if self._any_process_stops():
                    return None
        finally:
            self.engine.module.train()
        torch.distributed.all_reduce(sums)
        loss, correct, targets = sums.tolist()
        return loss / targets, correct / targets

    @staticmethod
    def _score(output: torch.Tensor | tuple[torch.Tensor, ...], batch: Batch) -> AnswerScores:
        return AnswerScores(*output) if isinstance(output, tuple) else score_answers(output, batch.labels)

    def _any_process_stops(self) -> bool:
        flag = torch.tensor([float(self.stop.signal is not None)], device=self.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())

    def facts(self) -> dict:
        """Return what the training's report contains, as JSON values."""
        return {
            "projector_parameters": self.counts_of_parameters["projector"][0],
            "trained_parameters": sum(trained for _, trained in self.counts_of_parameters.values()),
            "all_parameters": sum(total for total, _ in self.counts_of_parameters.values()),
            "precision": self.options.precision,
            "device": self.device.type,
            "processes": self.processes,
            "steps": self.done,
            "epochs": self.plan.epochs,
            "seconds": round(self.seconds, 1),
        }


def train_in_this_process(job: TrainingJob) -> int:
    """Run one process of a training.

    Returns:
        The exit code: 0, or 128 and the signal's number if a process was asked to stop.
    """
    trainer = Trainer(job)
    if trainer.rank == 0:
        trainer.announce()
    trainer.resume()
    if not trainer.run():
        return 128 + (trainer.stop.signal or 15)
    if trainer.rank == 0:
        write_json(trainer.folder / FACTS, trainer.facts())
    return 0


def main() -> None:
    """Run as one process under torchrun; the only argument is the path of a `TrainingJob` as JSON."""
    die_with_parent()
    # DeepSpeed calls deprecated names of torch, several times per step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    job = TrainingJob(**json.loads(Path(sys.argv[1]).read_text()))
    with failures_written_to(Path(job.folder)):
        try:
            code = train_in_this_process(job)
        except RuntimeError as error:
            if not PEER_GONE.search(str(error)):
                raise
            # The other process's own error explains what happened; this one would only hide it.
            log_line(f"process {os.environ['RANK']} ends, because another process of this training has ended")
            os._exit(1)
    leave_group(code)


if __name__ == "__main__":
    main()
