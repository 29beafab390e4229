"""One process of a training: started by torchrun, one a GPU.

`python -m slam_asr.training.loop JOB` reads what `slam-asr train` has checked and written down,
and leaves the curve and a checkpoint beside it.
"""

import contextlib
import ctypes
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from slam_asr.errors import EXIT_CODE, UserError, from_os_error
from slam_asr.features.reader import AudioReader, fit_to_window
from slam_asr.features.store import FeatureStore
from slam_asr.manifest import read_manifest
from slam_asr.models.encoder import EncoderSpec, describe_encoder
from slam_asr.models.llm import checkpoint_layers, llm_positions, llm_width, load_llm, load_tokenizer, set_tuning
from slam_asr.models.precision import DTYPES, explain_precision, pick_device
from slam_asr.models.projector import build_projector
from slam_asr.models.prompt import Prompt
from slam_asr.models.slam import Slam
from slam_asr.progress import say
from slam_asr.recipe import Recipe, load_recipe
from slam_asr.storage import write_atomically, write_json
from slam_asr.training import checkpoint
from slam_asr.training.batches import BatchReader, make_examples, split_step, training_steps
from slam_asr.training.engine import DeepSpeedEngine, start_process_group
from slam_asr.training.monitor import Monitor
from slam_asr.training.objective import score_answers
from slam_asr.training.schedule import learning_rate_schedule

FAILURE = "failure.txt"
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


class Trainer:
    """The loop, as one process sees it."""

    def __init__(self, job: Job) -> None:
        self.recipe: Recipe = load_recipe(job.recipe)
        self.options = self.recipe.training
        self.folder = Path(job.folder)
        self.device = self._device()
        self.rank, self.processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        torch.manual_seed(self.options.seed + self.rank)  # of dropout, where there is any
        llm_folder = Path(job.llm_folder)
        prompt = Prompt(load_tokenizer(llm_folder), self.recipe.llm)
        store = FeatureStore(job.feature_store) if job.feature_store else None
        spec = describe_encoder(self.recipe.encoder)
        manifests = {"train": job.train_manifest, **({"dev": job.dev_manifest} if job.dev_manifest else {})}
        utterances = {name: fit_to_window(read_manifest(path), spec) for name, path in manifests.items()}
        sources = {name: store or AudioReader(us, spec) for name, us in utterances.items()}
        spellings = {"train": prompt.drawn, "dev": [prompt.main]}
        limit = llm_positions(llm_folder)
        examples = {
            name: make_examples(us, sources[name], self.recipe.projector, prompt, spellings[name], limit)
            for name, us in utterances.items()
        }
        draw = functools.partial(prompt.draw, self.options.seed)
        self.readers = {"train": BatchReader(examples["train"], sources["train"], draw)}
        if "dev" in manifests:
            self.readers["dev"] = BatchReader(examples["dev"], sources["dev"])
        self.hours = sum(u.duration or 0.0 for u in utterances["train"]) / 3600
        model = self._model(llm_folder, None if store else spec, spec.width)
        for source in sources.values():
            if isinstance(source, AudioReader):
                source.encoder = model.encoder
        self.counts = {
            name: (sum(p.numel() for p in part.parameters()), sum(p.numel() for p in part.parameters() if p.requires_grad))
            for name, part in model.named_children()
        }
        self.counts.setdefault("encoder", (job.encoder_parameters, 0))
        self.plan = list(
            training_steps(
                self.readers["train"].positions, self.options.positions_per_step, self.options.seed,
                self.options.epochs, self.options.max_steps,
            )
        )
        rates = {"llm": self.recipe.llm.learning_rate, "encoder": self.recipe.encoder.learning_rate}
        self.engine = DeepSpeedEngine(model, self.options, self.device, {name: r for name, r in rates.items() if r is not None})

    def _model(self, llm_folder: Path, encoder: EncoderSpec | None, encoder_width: int) -> Slam:
        """The model in the recipe's precision, with what is trained open to gradients."""
        recipe, seed, dtype = self.recipe, self.options.seed, DTYPES[self.options.precision]
        llm = load_llm(llm_folder, dtype)
        set_tuning(llm, recipe.llm, seed)
        projector = build_projector(recipe.projector, encoder_width, llm_width(llm), seed)
        heard = encoder.load(dtype) if encoder else None
        if heard is not None:
            heard.requires_grad_(recipe.encoder.tuning == "full")
        if self.options.gradient_checkpointing:
            checkpoint_layers(llm)
            if recipe.encoder.tuning == "full":
                checkpoint_layers(heard)
        return Slam(projector, llm, heard, recipe.encoder.batch_size)

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
        audio = "cached features" if isinstance(self.readers["train"].reader, FeatureStore) else "encoded on the way"
        say(f"models: {recipe.encoder.name} ({audio}) + {recipe.projector.kind} projector + {recipe.llm.name}")
        everything, trained = (sum(counts) for counts in zip(*self.counts.values(), strict=True))
        parts = ", ".join(f"{name} {count:,}" for name, (_, count) in self.counts.items() if count)
        say(f"parameters: {everything:,} in encoder, projector and LLM, {trained:,} trained ({parts})")
        say(
            f"device: {self.device.type} × {self.processes}, {explain_precision(options.precision, self.device)}, "
            f"ZeRO stage {options.zero_stage}"
        )
        say(
            f"audio: {self.hours:.2f} h in {len(self.readers['train'].examples)} utterances; {len(self.plan)} steps of "
            f"{options.positions_per_step} LLM positions in {self.plan[-1][0] + 1} epochs"
        )

    def run(self) -> None:
        """Train, validate, and leave a checkpoint."""
        options = self.options
        rate = learning_rate_schedule(options.schedule, options.learning_rate, options.warmup_steps, len(self.plan))
        monitor = Monitor(self.folder, len(self.plan), options.log_every) if self.rank == 0 else None
        self.engine.engine.train()
        for number, (epoch, step) in enumerate(self.plan, start=1):
            loss, accuracy = self._step(step, epoch, rate(number), number)
            if monitor:
                positions = sum(self.readers["train"].positions[i] for i in step)
                monitor.step(number, epoch, loss, accuracy, rate(number), positions)
            if "dev" in self.readers and (number % options.validate_every == 0 or number == len(self.plan)):
                dev_loss, dev_accuracy = self.validate()
                if monitor:
                    monitor.validation(number, dev_loss, dev_accuracy)
        if monitor:
            monitor.close()
        self._save()

    def _step(self, step: list[int], epoch: int, learning_rate: float, number: int) -> tuple[float, float]:
        """One optimiser step over the given utterances → mean loss and accuracy over all its targets."""
        reader = self.readers["train"]
        micro_batches = split_step(step, reader.positions, self.processes, self.options.positions_per_batch)[self.rank]
        targets = reader.targets(step, epoch)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for position, indices in enumerate(micro_batches, start=1):
            batch = reader.batch(indices, epoch).to(self.device)
            scores = score_answers(self.engine.engine(batch), batch.labels)
            self.engine.backward(scores.loss, targets, last=position == len(micro_batches))
            self.engine.step(learning_rate)
            sums += scores.sums
        loss, accuracy = self._means(sums)
        if not math.isfinite(loss):
            keys = ", ".join(reader.examples[i].key for i in step[:5])
            raise UserError(
                f"The loss is {loss} at step {number} (utterances {keys} …): lower training.learning_rate, or train in "
                "bf16 or fp32 if this is fp16."
            )
        return loss, accuracy

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Mean loss and accuracy over the target tokens of the dev set."""
        reader = self.readers["dev"]
        everything = list(range(len(reader.examples)))
        mine = split_step(everything, reader.positions, self.processes, self.options.positions_per_batch)[self.rank]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.engine.engine.eval()
        for indices in mine:
            batch = reader.batch(indices).to(self.device)
            sums += score_answers(self.engine.engine(batch), batch.labels).sums
        self.engine.engine.train()
        return self._means(sums)

    def _means(self, sums: torch.Tensor) -> tuple[float, float]:
        torch.distributed.all_reduce(sums)
        loss, right, targets = sums.tolist()
        return loss / targets, right / targets

    def _save(self) -> None:
        steps = len(self.plan)
        tag = f"global_step{steps}"
        state = {"step": steps, "epoch": self.plan[-1][0], "rng": torch.get_rng_state(), "seed": self.options.seed}
        folder = self.folder / CHECKPOINTS
        self.engine.save(folder, tag, state)
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
            "steps": len(self.plan), "epochs": self.plan[-1][0] + 1, "seconds": round(seconds, 1),
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


@contextlib.contextmanager
def failures_written_to(folder: Path) -> Iterator[None]:
    """Leave a user's mistake as a sentence for the parent, and exit with its code."""
    try:
        yield
    except UserError as error:
        _leave(folder, error)
    except torch.OutOfMemoryError:
        _leave(folder, UserError("The GPU's memory is full: lower training.positions_per_batch, or raise training.zero_stage."))
    except OSError as error:
        known = from_os_error(error)
        if known is None:
            raise
        _leave(folder, known)


def _leave(folder: Path, error: UserError) -> None:
    try:
        write_atomically(folder / FAILURE, str(error))
    except OSError:  # On a full disk the parent can only refer to this line.
        print(error, file=sys.stderr, flush=True)
    # The other processes wait in a collective operation; leaving at once lets torchrun end them.
    os._exit(EXIT_CODE)


def die_with_parent() -> None:
    """Have the kernel end this process when torchrun's agent is gone, even if that was killed."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


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
