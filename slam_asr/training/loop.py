"""One process of a training: started by torchrun, one a GPU.

`python -m slam_asr.training.loop JOB` reads what `slam-asr train` has checked and written down,
and leaves the curve and a checkpoint beside it.
"""

import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from slam_asr.errors import UserError
from slam_asr.features.audio_source import fit_to_window
from slam_asr.features.reader import AudioReader, Reader, StoreReader
from slam_asr.features.space import address_of
from slam_asr.features.store import FeatureStore
from slam_asr.manifest import Utterance, read_manifest
from slam_asr.models.encoder import EncoderSpec, describe_encoder
from slam_asr.models.llm import checkpoint_layers, llm_positions, llm_width, load_llm, load_tokenizer, set_tuning
from slam_asr.models.precision import DTYPES, encoder_precision, explain_precision, pick_device
from slam_asr.models.projector import build_projector
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import Batch, Slam
from slam_asr.processes import die_with_parent, failures_written_to
from slam_asr.progress import say
from slam_asr.recipe import Recipe, load_recipe
from slam_asr.storage import join, write_json
from slam_asr.training import checkpoint
from slam_asr.training.batches import BatchReader, Examples, TrainingPlan, split_step
from slam_asr.training.engine import DeepSpeedEngine, start_process_group
from slam_asr.training.monitor import Monitor
from slam_asr.training.objective import score_answers
from slam_asr.training.prefetch import ahead
from slam_asr.training.schedule import learning_rate_schedule

FACTS = "training.json"
CHECKPOINTS = "checkpoints"


@dataclass
class Job:
    """What `slam-asr train` hands to its processes."""

    recipe: str
    """Resolved, as YAML."""
    train_manifest: str
    dev_manifest: str | None
    feature_store: str | None
    """None where audio is encoded on the way."""
    llm_folder: str
    encoder_parameters: int
    folder: str
    """Where results go."""
    published: str | None = None
    """On all machines but the first: the stage's folder, which this one's share of the checkpoint is uploaded to."""


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


class Trainer:
    """The loop, as one process sees it."""

    def __init__(self, job: Job) -> None:
        self.recipe: Recipe = load_recipe(job.recipe)
        self.options = self.recipe.training
        self.folder, self.published = Path(job.folder), job.published
        self.device = self._device()
        self.rank, self.processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        torch.manual_seed(self.options.seed + self.rank)  # of dropout, where there is any
        llm_folder = Path(job.llm_folder)
        prompt = Prompt(load_tokenizer(llm_folder), self.recipe.llm)
        spec = describe_encoder(self.recipe.encoder)
        manifests = {"train": job.train_manifest, **({"dev": job.dev_manifest} if job.dev_manifest else {})}
        utterances = {name: fit_to_window(read_manifest(path), spec) for name, path in manifests.items()}
        source = self._reader(job.feature_store, spec, utterances.values())
        spellings = {"train": prompt.drawn, "dev": [prompt.main]}
        limit = llm_positions(llm_folder)
        examples = {
            name: Examples(us, source, self.recipe.projector, prompt, spellings[name], limit) for name, us in utterances.items()
        }
        threads = 1 if job.feature_store else max(1, len(os.sched_getaffinity(0)) // self.processes)
        self.readers = {"train": BatchReader(examples["train"], source, functools.partial(prompt.draw, self.options.seed), threads)}
        if "dev" in manifests:
            self.readers["dev"] = BatchReader(examples["dev"], source, threads=threads)
        model = self._model(llm_folder, None if job.feature_store else spec, spec.width)
        self.counts = {
            name: (sum(p.numel() for p in part.parameters()), sum(p.numel() for p in part.parameters() if p.requires_grad))
            for name, part in model.named_children()
        }
        self.counts.setdefault("encoder", (job.encoder_parameters, 0))
        self.plan = TrainingPlan(
            examples["train"], self.options.positions_per_step, self.recipe.features.window_shards, self.options.seed,
            self.options.epochs, self.options.max_steps,
        )
        rates = {"llm": self.recipe.llm.learning_rate, "encoder": self.recipe.encoder.learning_rate}
        self.engine = DeepSpeedEngine(model, self.options, self.device, {name: r for name, r in rates.items() if r is not None})

    def _reader(self, store: str | None, spec: EncoderSpec, manifests: Iterable[Sequence[Utterance]]) -> Reader:
        """The feature store, or the audio itself."""
        if store is None:
            return AudioReader(spec, self.recipe.features)
        wanted = [address_of(u) for utterances in manifests for u in utterances]
        cache = int(self.recipe.features.cache_gigabytes * 1e9)
        return StoreReader(FeatureStore(store, spec.fingerprint(), self.recipe.features.dtype, wanted, cache))

    def _model(self, llm_folder: Path, encoder: EncoderSpec | None, encoder_width: int) -> Slam:
        """The model in the recipe's precision, with what is trained open to gradients."""
        recipe, seed, dtype = self.recipe, self.options.seed, DTYPES[self.options.precision]
        llm = load_llm(llm_folder, dtype)
        set_tuning(llm, recipe.llm, seed)
        projector = build_projector(recipe.projector, encoder_width, llm_width(llm), seed)
        heard = None
        if encoder is not None and recipe.encoder.tuning == "full":
            heard = encoder.load(dtype).requires_grad_(True)
        elif encoder is not None:
            heard = encoder.load(DTYPES[encoder_precision(recipe.features.dtype, self.device.type == "cuda")], self.device)
        if self.options.gradient_checkpointing:
            checkpoint_layers(llm)
            if recipe.encoder.tuning == "full":
                checkpoint_layers(heard)
        return Slam(projector, llm, heard, recipe.features.dtype)

    @staticmethod
    def _device() -> torch.device:
        device = pick_device()
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        start_process_group(device)
        return device

    def announce(self) -> None:
        """Say what will happen, before the first step."""
        recipe, options = self.recipe, self.options
        audio = "cached features" if isinstance(self.readers["train"].reader, StoreReader) else "encoded on the way"
        say(f"models: {recipe.encoder.name} ({audio}) + {recipe.projector.kind} projector + {recipe.llm.name}")
        everything, trained = (sum(counts) for counts in zip(*self.counts.values(), strict=True))
        parts = ", ".join(f"{name} {count:,}" for name, (_, count) in self.counts.items() if count)
        say(f"parameters: {everything:,} in encoder, projector and LLM, {trained:,} trained ({parts})")
        say(
            f"device: {self.device.type} × {self.processes}, {explain_precision(options.precision, self.device)}, "
            f"ZeRO stage {options.zero_stage}"
        )
        say(
            f"audio: {self.readers['train'].examples.hours:.2f} h in {len(self.readers['train'].examples)} utterances; {self.plan.steps} "
            f"steps of {options.positions_per_step} LLM positions in {self.plan.epochs} epochs"
        )

    def run(self) -> None:
        """Train, validate, and leave a checkpoint."""
        options = self.options
        rate = learning_rate_schedule(options.schedule, options.learning_rate, options.warmup_steps, self.plan.steps)
        monitor = Monitor(self.folder, self.plan.steps, options.log_every) if self.rank == 0 else None
        self.engine.engine.train()
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for micro in ahead(self._micro_batches()):
            number = micro.number
            batch = micro.batch.to(self.device)
            scores = score_answers(self.engine.engine(batch), batch.labels)
            self.engine.backward(scores.loss, micro.targets, last=micro.is_last)
            self.engine.step(rate(number))
            sums += scores.sums
            if not micro.is_last:
                continue
            loss, accuracy = self._means(sums)
            sums.zero_()
            self._require_finite(loss, micro)
            if monitor:
                positions = sum(self.readers["train"].examples.positions[i] for i in micro.step)
                monitor.step(number, micro.epoch, loss, accuracy, rate(number), positions)
            if "dev" in self.readers and (number % options.validate_every == 0 or number == self.plan.steps):
                dev_loss, dev_accuracy = self.validate()
                if monitor:
                    monitor.validation(number, dev_loss, dev_accuracy)
        if monitor:
            monitor.close()
        self._save()

    def _micro_batches(self) -> Iterator["MicroBatch"]:
        """This process' share of every step."""
        reader, budget = self.readers["train"], self.options.positions_per_batch
        entered = None
        for number, (window, behind, step) in enumerate(self.plan, start=1):
            if window is not entered:
                reader.enter(window, behind)
                entered = window
            mine = split_step(step, reader.examples.positions, self.processes, budget)[self.rank]
            targets = reader.targets(step, window.epoch)
            for position, indices in enumerate(mine, start=1):
                yield MicroBatch(number, window.epoch, step, reader.batch(indices, window.epoch), targets, position == len(mine))

    def _require_finite(self, loss: float, micro: "MicroBatch") -> None:
        if not math.isfinite(loss):
            keys = ", ".join(self.readers["train"].examples.utterances[i].key for i in micro.step[:5])
            raise UserError(
                f"The loss is {loss} at step {micro.number} (utterances {keys} …): lower training.learning_rate, or train in "
                "bf16 or fp32 if this is fp16."
            )

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the target tokens of the dev set."""
        reader = self.readers["dev"]
        everything = list(range(len(reader.examples)))
        mine = split_step(everything, reader.examples.positions, self.processes, self.options.positions_per_batch)[self.rank]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.engine.engine.eval()
        for batch in ahead(reader.batch(indices) for indices in mine):
            batch = batch.to(self.device)
            sums += score_answers(self.engine.engine(batch), batch.labels).sums
        self.engine.engine.train()
        return self._means(sums)

    def _means(self, sums: torch.Tensor) -> tuple[float, float]:
        torch.distributed.all_reduce(sums)
        loss, right, targets = sums.tolist()
        return loss / targets, right / targets

    def _save(self) -> None:
        steps = self.plan.steps
        tag = f"global_step{steps}"
        state = {"step": steps, "epoch": self.plan.epochs - 1, "rng": torch.get_rng_state(), "seed": self.options.seed}
        folder = self.folder / CHECKPOINTS
        self.engine.save(folder, tag, state)
        torch.distributed.barrier()
        if self.published and int(os.environ["LOCAL_RANK"]) == 0:
            checkpoint.contribute(folder, tag, join(self.published, CHECKPOINTS))
        if self.options.nodes > 1:
            torch.distributed.barrier()
        if self.rank == 0:
            checkpoint.publish(folder, tag)

    def facts(self, seconds: float) -> dict:
        """What the report says about this training."""
        return {
            "projector_parameters": self.counts["projector"][0],
            "trained_parameters": sum(trained for _, trained in self.counts.values()),
            "all_parameters": sum(everything for everything, _ in self.counts.values()),
            "precision": self.options.precision, "device": self.device.type, "processes": self.processes,
            "steps": self.plan.steps, "epochs": self.plan.epochs, "seconds": round(seconds, 1),
        }


def train_in_this_process(job: Job) -> None:
    """Be one process of the training that `job` describes."""
    started = time.monotonic()
    trainer = Trainer(job)
    if trainer.rank == 0:
        trainer.announce()
    trainer.run()
    if trainer.rank == 0:
        write_json(trainer.folder / FACTS, trainer.facts(time.monotonic() - started))


def main() -> None:
    """Entry point of a process under torchrun."""
    die_with_parent()
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    with failures_written_to(Path(job.folder)):
        train_in_this_process(job)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
