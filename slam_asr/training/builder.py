"""Builds the parts of a training run in one process: device, data, model, engine and plan."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from slam_asr.artifacts.feature_store.reader import StoreReader
from slam_asr.config.recipe import Recipe, load_recipe
from slam_asr.models.answer_loss import allows_chunks, score_in_chunks
from slam_asr.models.packed_attention import allow_packing
from slam_asr.models.precision import explain_precision, peak_flops, pick_device
from slam_asr.progress import log_line
from slam_asr.training.batches import BatchReader
from slam_asr.training.engines.choose import make_engine, start_process_group
from slam_asr.training.engines.engine import Engine
from slam_asr.training.job import TrainingJob
from slam_asr.training.kernels import compile_layers, use_liger
from slam_asr.training.model_builder import build_model, build_readers, count_parameters
from slam_asr.training.step_plan import Budget, TrainingPlan, budget_for


@dataclass
class Parts:
    """The parts of a training run in one process."""

    job: TrainingJob
    recipe: Recipe
    device: torch.device
    rank: int
    """Number of this process among those of all machines, from 0."""
    processes: int
    """Number of processes on all machines."""
    readers: dict[str, BatchReader]
    """Batch readers of the sets `train` and, if the job has one, `dev`."""
    parameters: dict[str, tuple[int, int]]
    """(all, trained) parameters of `projector`, `llm` and `encoder`."""
    budget: Budget
    plan: TrainingPlan
    engine: Engine
    packs: bool
    """Whether utterances share rows of a batch."""
    rate: Callable[[int], float]
    """Learning rate by step; the first step is 1."""

    @property
    def folder(self) -> Path:
        """Local folder for results."""
        return Path(self.job.folder)

    def work_per_position(self) -> tuple[float, float | None]:
        """Return operations per LLM position, and the peak per second of all devices together, if known.

        Each weight of the LLM takes two operations (multiply and add) in the forward pass and two for the
        gradient of its input; a trained weight takes two more for its own gradient.
        """
        weights, trained = self.parameters["llm"]
        peak = peak_flops(self.device)
        return 4.0 * weights + 2.0 * trained, peak and peak * self.processes


def build_parts(job: TrainingJob) -> Parts:
    """Join the process group, load data and model, and create the engine.

    Raises:
        UserError: data or weights cannot be used.
    """
    recipe = load_recipe(job.recipe)
    options = recipe.training
    device = _join_processes(options.engine)
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(options.seed + rank)  # for dropout, if any
    readers = build_readers(job, recipe, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))
    model, lazy_weights = build_model(job, recipe, device)
    # Counted before the engine shards the model.
    parameters = count_parameters(model, job.encoder_parameters)
    budget = budget_for(options, processes)
    plan = TrainingPlan(
        readers["train"].examples,
        budget,
        recipe.features.window_shards,
        options.seed,
        options.epochs,
        options.max_steps,
    )
    rates = {"llm": recipe.llm.learning_rate, "encoder": recipe.encoder.learning_rate}
    engine = make_engine(
        model, options, device, {name: r for name, r in rates.items() if r is not None}, lazy_weights
    )
    # If the LLM is sharded, its weights exist only from here on.
    packs = options.packing and engine.try_llm(allow_packing)
    for reader in readers.values():
        reader.packs = packs
    # Under ZeRO-3 the output layer's weights are complete only during its own forward call, and
    # `score_in_chunks` reads them directly.
    if options.zero_stage != 3 and engine.try_llm(allows_chunks):
        model.scorer = score_in_chunks
    # Compile after the trials, which would otherwise compile the layers for their own inputs.
    if options.liger:
        use_liger(model.llm)
    if options.compile:
        compile_layers(model.llm)
    return Parts(
        job=job,
        recipe=recipe,
        device=device,
        rank=rank,
        processes=processes,
        readers=readers,
        parameters=parameters,
        budget=budget,
        plan=plan,
        engine=engine,
        packs=packs,
        rate=learning_rate_schedule(
            options.schedule, options.learning_rate, options.warmup_steps, plan.steps
        ),
    )


def learning_rate_schedule(
    kind: str, peak: float, warmup_steps: int, total_steps: int
) -> Callable[[int], float]:
    """Create a function from step (the first is 1) to learning rate.

    The rate rises linearly to `peak` over `warmup_steps`. Then it stays there (`constant`, as in the SLAM-ASR
    paper) or falls to zero at the last step (`linear`, `cosine`).

    Args:
        kind: `constant`, `linear` or `cosine`.
        peak: highest learning rate.
        warmup_steps: steps of the linear rise.
        total_steps: steps of the training.

    Returns:
        A function from step to learning rate.
    """

    def rate(step: int) -> float:
        # With 0 warm-up steps this is never true, because steps begin at 1; so nothing is divided by 0.
        if step <= warmup_steps:
            return peak * step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if kind == "linear":
            return peak * (1 - progress)
        if kind == "cosine":
            return peak * (1 + math.cos(math.pi * progress)) / 2
        return peak

    return rate


def _join_processes(engine: str) -> torch.device:
    """Select this process's device, and join the process group."""
    device = pick_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    start_process_group(device, engine)
    return device


def announce(parts: Parts) -> None:
    """Log models, device and plan before the first step."""
    recipe, options, plan, budget = parts.recipe, parts.recipe.training, parts.plan, parts.budget
    train = parts.readers["train"]
    audio = "cached features" if isinstance(train.reader, StoreReader) else "encoded on the fly"
    log_line(
        f"models: {recipe.encoder.name} ({audio}) + {recipe.projector.kind} projector + {recipe.llm.name}"
    )
    total, trained = (sum(counts) for counts in zip(*parts.parameters.values(), strict=True))
    by_part = ", ".join(f"{name} {count:,}" for name, (_, count) in parts.parameters.items() if count)
    log_line(f"parameters: {total:,} in encoder, projector and LLM, {trained:,} trained ({by_part})")
    engine = {"deepspeed": f"DeepSpeed, ZeRO stage {options.zero_stage}", "ddp": "DDP", "fsdp": "FSDP2"}
    compiled = ", layers are compiled during the first step" if options.compile else ""
    log_line(
        f"device: {parts.device.type} × {parts.processes}, "
        f"{explain_precision(options.precision, parts.device)}, {engine[options.engine]}{compiled}"
    )
    log_line(
        f"audio: {train.examples.hours:.2f} h in {len(train.examples)} utterances; {plan.steps} steps of "
        f"{budget.step} {'utterances' if budget.fixed else 'LLM positions'} "
        f"in {plan.epochs} epochs, batches {'packed' if parts.packs else 'padded'}"
    )
