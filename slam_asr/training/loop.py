"""One process of a training: started by torchrun, one a GPU.

`python -m slam_asr.training.loop JOB` reads what `slam-asr train` has checked and written down, goes on from
the latest checkpoint if there is one, and leaves the curve and a last checkpoint.
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

from slam_asr.errors import UserError
from slam_asr.features.reader import StoreReader
from slam_asr.models.packed_attention import allow_packing
from slam_asr.models.precision import explain_precision, peak_flops, pick_device
from slam_asr.models.slam import Batch
from slam_asr.processes import die_with_parent, failures_written_to, leave_group
from slam_asr.progress import log_line
from slam_asr.recipe import Recipe, load_recipe
from slam_asr.storage import join, upload, write_atomically, write_json
from slam_asr.training import checkpoint
from slam_asr.training.batches import BatchReader, TrainingPlan, budget_of, split_packed, split_step
from slam_asr.training.checkpoint import CURVE, Checkpoint
from slam_asr.training.checkpoint_writer import Saver, restore, take_snapshot
from slam_asr.training.engines.choose import make_engine, start_process_group
from slam_asr.training.job import CHECKPOINTS, FACTS, TrainingJob
from slam_asr.training.kernels import compile_layers, use_liger
from slam_asr.training.model_builder import build_model, build_prompt, build_readers, count_parameters
from slam_asr.training.monitor import Monitor, StepNumbers
from slam_asr.training.objective import AnswerScores, allows_chunks, score_answers, score_in_chunks
from slam_asr.training.prefetch import ahead
from slam_asr.training.samples import Sampler, Samples
from slam_asr.training.schedule import learning_rate_schedule
from slam_asr.training.stop_signals import StopRequest

NONFINITE = "nonfinite.jsonl"
PEER_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")
"""How gloo and NCCL say that another process is no more."""


@dataclass
class MicroBatch:
    """What one process puts through the model at once."""

    number: int
    """Of its optimiser step, from 1."""
    epoch: int
    step: list[int]
    """Utterances of the whole step, on all processes."""
    batch: Batch
    targets: int
    """Target tokens of the whole step."""
    is_last: bool
    """Of its step, on this process."""
    filled: int
    """LLM positions that hold something."""
    cells: int
    """The same with padding."""


@dataclass
class Counts:
    """What the loop keeps over its steps, and a checkpoint with it."""

    nonfinite: int = 0
    """Steps in a row that were left out."""
    best_dev_loss: float = math.inf
    stale: int = 0
    """Validations since the best one."""
    validated: int = 0
    """The step of the last validation."""
    seconds: float = 0.0
    """Spent by earlier attempts of this training."""


@dataclass
class Totals:
    """Sums over a step."""

    scores: torch.Tensor | None = None
    """Loss, right tokens and target tokens of this process, where they were computed: asking for them would have a GPU waited for."""
    filled: int = 0
    """LLM positions of this process that hold something."""
    cells: int = 0
    """The same with padding."""
    numbers: tuple[float, ...] = (0.0,) * 5
    """All of these, of all processes."""
    stop: bool = False
    """Whether any process was asked to stop."""
    pending: float = 0.0
    """Checkpoints that are still being written, the mean over the processes."""
    due: bool = False
    """Whether it is time for one."""

    def add(self, scores: torch.Tensor, micro: MicroBatch) -> None:
        """Count a micro-batch."""
        self.scores = scores if self.scores is None else self.scores + scores
        self.filled += micro.filled
        self.cells += micro.cells

    @property
    def loss(self) -> float:
        """Mean over the target tokens."""
        return self.numbers[0] / self.numbers[2]

    @property
    def accuracy(self) -> float:
        """Share of the target tokens that come first in the prediction."""
        return self.numbers[1] / self.numbers[2]

    @property
    def positions(self) -> int:
        """LLM positions that hold something."""
        return int(self.numbers[3])

    @property
    def padding(self) -> float:
        """Share of the LLM positions that hold nothing."""
        return 1 - self.numbers[3] / self.numbers[4]


class Trainer:
    """The loop, as one process sees it."""

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.recipe: Recipe = load_recipe(job.recipe)
        self.options = self.recipe.training
        self.folder = Path(job.folder)
        self.device = self._device()
        self.rank, self.processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        torch.manual_seed(self.options.seed + self.rank)  # of dropout, where there is any
        prompt = build_prompt(job, self.recipe)
        self.readers = build_readers(job, self.recipe, prompt, self.processes)
        self.sampler = (
            Sampler(self.readers["dev"], prompt, self.recipe)
            if "dev" in self.readers and self.options.samples
            else None
        )
        model, stored = build_model(job, self.recipe, self.device)
        self.counts_of_parameters = count_parameters(model, job.encoder_parameters)
        self.budget = budget_of(self.options, self.processes)
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
            model, self.options, self.device, {name: r for name, r in rates.items() if r is not None}, stored
        )
        # An LLM that is spread has its weights only from here on.
        self.packs = self.options.packing and self.engine.try_llm(allow_packing)
        for reader in self.readers.values():
            reader.packs = self.packs
        # Under ZeRO-3 the output layer's weights are whole only while it is called.
        if self.options.zero_stage != 3 and self.engine.try_llm(allows_chunks):
            model.scorer = score_in_chunks
        # Behind the trials, for which nothing need be compiled.
        if self.options.liger:
            use_liger(model.llm)
        if self.options.compile:
            compile_layers(model.llm)
        self.saver = Saver(join(job.published, CHECKPOINTS), self.folder, self.options.checkpoints)
        self.rate = learning_rate_schedule(
            self.options.schedule, self.options.learning_rate, self.options.warmup_steps, self.plan.steps
        )
        self.counts = Counts()
        self.done = self.saved = self.epoch = 0
        """Optimiser steps that are behind, those of the last checkpoint, and the epoch."""
        self.interrupted = False
        """Whether it was asked to stop, and does."""
        self.stop = StopRequest()
        self.started = time.monotonic()
        self.earlier = 0.0
        """Seconds that earlier attempts took."""
        self.monitor: Monitor | None = None

    def _device(self) -> torch.device:
        device = pick_device()
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        start_process_group(device, self.options.engine)
        return device

    def announce(self) -> None:
        """Say what will happen, before the first step."""
        recipe, options = self.recipe, self.options
        examples = self.readers["train"].examples
        audio = (
            "cached features"
            if isinstance(self.readers["train"].reader, StoreReader)
            else "encoded on the way"
        )
        log_line(
            f"models: {recipe.encoder.name} ({audio}) + {recipe.projector.kind} projector + {recipe.llm.name}"
        )
        everything, trained = (
            sum(counts) for counts in zip(*self.counts_of_parameters.values(), strict=True)
        )
        parts = ", ".join(
            f"{name} {count:,}" for name, (_, count) in self.counts_of_parameters.items() if count
        )
        log_line(f"parameters: {everything:,} in encoder, projector and LLM, {trained:,} trained ({parts})")
        spread = {"deepspeed": f"DeepSpeed, ZeRO stage {options.zero_stage}", "ddp": "DDP", "fsdp": "FSDP2"}[
            options.engine
        ]
        compiled = ", layers compiled while the first step waits" if options.compile else ""
        log_line(
            f"device: {self.device.type} × {self.processes}, {explain_precision(options.precision, self.device)}, {spread}{compiled}"
        )
        log_line(
            f"audio: {examples.hours:.2f} h in {len(examples)} utterances; {self.plan.steps} steps of "
            f"{self.budget.step} {'utterances' if self.budget.fixed else 'LLM positions'} in {self.plan.epochs} epochs, "
            f"batches {'packed' if self.packs else 'padded'}"
        )

    def resume(self) -> None:
        """Go on from the latest checkpoint, if there is one."""
        # The first process looks, so that all see the same.
        found: list[Checkpoint | None] = [None]
        if self.rank == 0:
            found = [checkpoint.find(self.saver.folder)]
            checkpoint.discard_newer_than_latest(self.saver.folder)
        torch.distributed.broadcast_object_list(found)
        latest = found[0]
        curve = b""
        if latest is not None:
            if latest.step > self.plan.steps:
                raise UserError(
                    f"{latest.folder} is beyond the {self.plan.steps} steps of this training: raise training.max_steps or training.epochs, or choose another --output."
                )
            restore(self.engine, latest)
            self.done = self.saved = latest.step
            self.epoch, self.counts = latest.epoch, Counts(**latest.counts)
            self.earlier = self.counts.seconds
            if self.rank == 0:
                curve = Path(latest.file(CURVE)).read_bytes()
                log_line(f"going on behind step {latest.step} of {self.plan.steps}, from {latest.folder}")
        if self.rank == 0:
            write_atomically(self.folder / CURVE, curve)
            published = self.job.published if self.job.published != str(self.folder) else None
            self.monitor = Monitor(
                self.folder, self.recipe, self.plan.steps, self.done, self.device, self._work(), published
            )

    def _work(self) -> tuple[float, float | None]:
        """Floating-point operations for a position, and the peak of all devices.

        Forward two a weight of the LLM, back two more through it, and two for its own gradient where it is trained.
        """
        weights, trained = self.counts_of_parameters["llm"]
        peak = peak_flops(self.device)
        return 4.0 * weights + 2.0 * trained, peak and peak * self.processes

    def run(self) -> bool:
        """Train, validate, and leave checkpoints.

        Returns:
            Whether this came to its end, rather than being asked to stop.
        """
        self.stop.listen()
        self.engine.module.train()
        goes_on = self.done < self.plan.steps or self._conclude(Totals())
        totals = Totals()
        for micro in ahead(self._micro_batches()) if goes_on else ():
            batch = micro.batch.to(self.device)
            scores = self._scored(self.engine.forward(batch, micro.is_last), batch)
            self.engine.backward(scores.loss, micro.targets, last=micro.is_last)
            totals.add(scores.sums, micro)
            if micro.is_last:
                self._agree_on(totals)
                self._update(micro, totals)
                if not self._conclude(totals):
                    break
                totals = Totals()
        if self.monitor:
            self.monitor.close()
        self.saver.close()
        return not self.interrupted

    def _conclude(self, totals: "Totals") -> bool:
        """Validate and save behind a step, if it is time → whether there is another one."""
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
        self._keep(totals, dev_loss, forced=self.interrupted or ended)
        if ended and not at_end and self.rank == 0:
            log_line(
                f"step {self.done}: the dev loss was no lower in {counts.stale} validations, so training ends here (training.patience)"
            )
        return not (self.interrupted or ended)

    def _agree_on(self, totals: "Totals") -> None:
        """Make the sums of this process those of all."""
        flags = [self.stop.signal is not None, self.saver.pending, self.rank == 0 and self._time_is_up()]
        known = torch.tensor([totals.filled, totals.cells, *flags], dtype=torch.float64, device=self.device)
        everything = torch.cat([totals.scores, known])
        torch.distributed.all_reduce(everything)
        *numbers, stop, pending, due = everything.tolist()
        totals.numbers, totals.stop, totals.pending, totals.due = (
            tuple(numbers),
            stop > 0,
            pending / self.processes,
            due > 0,
        )

    def _time_is_up(self) -> bool:
        minutes = self.options.checkpoint_minutes
        return bool(minutes) and time.monotonic() - self.saver.last > 60 * minutes

    def _steps_are_up(self) -> bool:
        every = self.options.checkpoint_every
        return bool(every) and self.done - self.saved >= every

    def _update(self, micro: MicroBatch, totals: Totals) -> None:
        """Let the optimiser step."""
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
        # In fp16 a step is left out now and then, while the loss scale finds its place.
        good = math.isfinite(loss) and (update.applied or self.options.precision == "fp16")
        self.counts.nonfinite = 0 if good else self.counts.nonfinite + 1
        if not good:
            self._say_nonfinite(micro, loss)

    def _say_nonfinite(self, micro: MicroBatch, loss: float) -> None:
        what = "loss" if not math.isfinite(loss) else "gradient"
        keys = [self.readers["train"].examples.utterances[i].key for i in micro.step]
        if self.rank == 0:
            with open(self.folder / NONFINITE, "a") as file:
                file.write(json.dumps({"step": micro.number, "what": what, "keys": keys}) + "\n")
            log_line(
                f"step {micro.number} was left out: its {what} is not a number (utterances in {NONFINITE})"
            )
        if self.counts.nonfinite >= self.options.nonfinite_steps:
            if self.rank == 0 and self.job.published != str(self.folder):
                upload(self.folder / NONFINITE, join(self.job.published, NONFINITE))
            shown = ", ".join(keys[:5])
            raise UserError(
                f"The {what} was not a number {self.counts.nonfinite} steps in a row, the last one step {micro.number} (utterances {shown} …; all "
                f"in {join(self.job.published, NONFINITE)}): lower training.learning_rate, set training.gradient_clipping, or train in bf16 or "
                "fp32 if this is fp16; look at those utterances if they are always the same."
            )

    def _keep(self, totals: "Totals", dev_loss: float | None, forced: bool) -> None:
        """Begin a checkpoint, if it is time and older ones are out of the way: training does not wait for slow storage."""
        improved = dev_loss is not None and self.counts.stale == 0
        if self.saved == self.done and dev_loss is None:
            return
        if forced:
            self.saver.wait()
        # One more may wait where it is the best so far; each takes memory.
        elif not (improved and totals.pending <= 1) and (
            totals.pending or not (totals.due or self._steps_are_up())
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
        self.saver.save(take_snapshot(self.engine, about, curve))
        self.saved = self.done

    @property
    def seconds(self) -> float:
        """Spent on this training, earlier attempts included."""
        return self.earlier + time.monotonic() - self.started

    def _micro_batches(self) -> Iterator[MicroBatch]:
        """This process' share of every step that is still to do."""
        reader = self.readers["train"]
        entered = None
        for number, (window, behind, step) in enumerate(self.plan.after(self.done), start=self.done + 1):
            if window is not entered:
                reader.enter(window, behind)
                entered = window
            mine = self._share_of(step, reader)
            targets = reader.targets(step, window.epoch)
            for position, indices in enumerate(mine, start=1):
                batch = reader.batch(indices, window.epoch)
                filled = int(batch.mask.sum()) if indices else 0
                yield MicroBatch(
                    number,
                    window.epoch,
                    step,
                    batch,
                    targets,
                    position == len(mine),
                    filled,
                    batch.mask.numel(),
                )

    def _share_of(self, step: list[int], reader: BatchReader) -> list[list[int]]:
        """What this process computes of a step, batch by batch."""
        positions, batch = reader.examples.positions, self.budget.batch
        if reader.packs and not self.budget.fixed:
            return split_packed(step, positions, self.processes, batch)[self.rank]
        return split_step(step, positions, self.processes, batch, self.budget.sizes(positions))[self.rank]

    def _validate_and_compare(self) -> float | None:
        """The dev loss, counted among the others; None, and interrupted, if asked to stop meanwhile."""
        found = self.validate()
        if found is None:
            self.interrupted = True
            return None
        loss, accuracy = found
        self.counts.validated = self.done
        if loss < self.counts.best_dev_loss:
            self.counts.best_dev_loss, self.counts.stale = loss, 0
        else:
            self.counts.stale += 1
        samples = self._transcribe() if self.sampler else None
        if self.monitor:
            self.monitor.validation(self.done, loss, accuracy, samples)
        return loss

    def _transcribe(self) -> Samples:
        self.engine.module.eval()
        # Layers are compiled for whole utterances, not for a token at a time.
        as_written = (
            torch.compiler.set_stance("force_eager") if self.options.compile else contextlib.nullcontext()
        )
        try:
            with as_written:
                return self.sampler.transcribe(self.engine.bare)
        finally:
            self.engine.module.train()

    @torch.no_grad()
    def validate(self) -> tuple[float, float] | None:
        """Mean loss and accuracy over the target tokens of the dev set, or None if asked to stop meanwhile."""
        reader = self.readers["dev"]
        everything = list(range(len(reader.examples)))
        mine = self._share_of(everything, reader)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.engine.module.eval()
        try:
            for batch in ahead(reader.batch(indices) for indices in mine):
                batch = batch.to(self.device)
                sums += self._scored(self.engine.module(batch), batch).sums
                if self._anyone_stops():
                    return None
        finally:
            self.engine.module.train()
        torch.distributed.all_reduce(sums)
        loss, right, targets = sums.tolist()
        return loss / targets, right / targets

    @staticmethod
    def _scored(output: torch.Tensor | tuple[torch.Tensor, ...], batch: Batch) -> AnswerScores:
        return AnswerScores(*output) if isinstance(output, tuple) else score_answers(output, batch.labels)

    def _anyone_stops(self) -> bool:
        flag = torch.tensor([float(self.stop.signal is not None)], device=self.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())

    def facts(self) -> dict:
        """What the report says about this training."""
        return {
            "projector_parameters": self.counts_of_parameters["projector"][0],
            "trained_parameters": sum(trained for _, trained in self.counts_of_parameters.values()),
            "all_parameters": sum(everything for everything, _ in self.counts_of_parameters.values()),
            "precision": self.options.precision,
            "device": self.device.type,
            "processes": self.processes,
            "steps": self.done,
            "epochs": self.plan.epochs,
            "seconds": round(self.seconds, 1),
        }


def train_in_this_process(job: TrainingJob) -> int:
    """Be one process of the training that `job` describes → the exit code."""
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
    """Entry point of a process under torchrun."""
    die_with_parent()
    # DeepSpeed calls torch by names of yesterday, several times a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    job = TrainingJob(**json.loads(Path(sys.argv[1]).read_text()))
    with failures_written_to(Path(job.folder)):
        try:
            code = train_in_this_process(job)
        except RuntimeError as error:
            if not PEER_GONE.search(str(error)):
                raise
            # What that one died of is what people should read.
            log_line(f"process {os.environ['RANK']} ends, because another one of this training is gone")
            os._exit(1)
    leave_group(code)


if __name__ == "__main__":
    main()
