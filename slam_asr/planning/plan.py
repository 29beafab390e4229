"""`slam-asr plan`: estimate whether a training fits, what it takes, and which options to set.

Nothing is loaded.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from slam_asr.errors import ConfigurationError
from slam_asr.models.feature_dtype import bytes_per_frame
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import positions_of
from slam_asr.planning.memory import Load, Memory, training_memory
from slam_asr.planning.shapes import Shapes, describe, encoder_flops
from slam_asr.progress import clock, log_line
from slam_asr.recipe import Recipe

PROMPT_POSITIONS = 18
"""Approximate length of the reference's prompt with Llama's tokenizer; other prompts are similar."""
TOKENS_A_SECOND = 3.7
"""Tokens of transcript per second of audio.

LibriSpeech has 2.7 words per second, and Llama's tokenizer about 1.35 tokens per lower-case word.
"""
USABLE = 0.92
"""Share of a GPU's memory that the plan uses, because batches vary in size and memory fragments."""
ENCODING, TRAINING = 0.30, 0.40
"""Typical shares of peak FLOP/s of an encoder and a training; the reference trains at 0.09 to 0.20."""


@dataclass
class Stage:
    """Estimated work and time of one stage."""

    flops: float
    seconds: float
    gpus: int


@dataclass
class Plan:
    """Estimate of what a recipe takes."""

    load: Load
    memory: Memory
    """Memory of one GPU, in bytes."""
    fits: bool
    cache_bytes: float
    stages: dict[str, Stage]
    steps: int
    proposal: dict[str, object] = field(default_factory=dict)
    """Options that make it fit or use the memory better; empty if no combination that was tried fits."""


def plan(
    recipe: Recipe,
    gpus: int = 1,
    gpu_memory: float = 80.0,
    hours: float = 960.9,
    utterance_seconds: float = 12.3,
    test_hours: float = 10.5,
    gpu_tflops: float = 989.0,
    gpu_bandwidth: float = 3.35,
) -> Plan:
    """Estimate what a recipe takes on given GPUs: memory by part, storage, FLOPs and hours by stage.

    Args:
        recipe: models and hyper-parameters.
        gpus: number of GPUs to train on; 0 for one process on a CPU.
        gpu_memory: memory of each GPU in GB (10^9 bytes).
        hours: hours of audio to train on; LibriSpeech has 960.9.
        utterance_seconds: mean length of an utterance in seconds; 12.3 in LibriSpeech.
        test_hours: hours of audio to decode; both test sets of LibriSpeech together have 10.5.
        gpu_tflops: peak TFLOP/s of each GPU, dense, in the recipe's precision; an H100 has 989 in bf16.
        gpu_bandwidth: memory bandwidth of each GPU in TB/s; an H100 has 3.35.

    Returns:
        The plan, which is also printed.

    Raises:
        UserError: a model's configuration cannot be found, or a number is not above 0.
    """
    if gpus < 0:
        raise ConfigurationError(f"--gpus is {gpus} but must be at least 0.")
    for name, value in (
        ("gpu-memory", gpu_memory),
        ("hours", hours),
        ("utterance-seconds", utterance_seconds),
        ("test-hours", test_hours),
        ("gpu-tflops", gpu_tflops),
        ("gpu-bandwidth", gpu_bandwidth),
    ):
        if not value > 0:
            raise ConfigurationError(f"--{name} is {value} but must be above 0.")
    shapes = describe(recipe)
    utterances = max(1, round(hours * 3600 / utterance_seconds))
    # A micro-batch cannot exceed the process' share of a step.
    processes = max(1, gpus)
    share = recipe.training.positions_per_step // processes
    load = mean_load(shapes, utterance_seconds, min(recipe.training.positions_per_batch, share))
    memory = training_memory(shapes, load, processes, on_gpu=gpus > 0)
    capacity = USABLE * gpu_memory * 1e9
    one = mean_load(shapes, utterance_seconds, 1)
    stages, steps = _work(
        shapes,
        load,
        utterances,
        utterance_seconds,
        test_hours,
        processes,
        gpu_tflops * 1e12,
        gpu_bandwidth * 1e12,
    )
    frames = shapes.encoder.frames_of(round(utterance_seconds * 16_000))
    cache = (
        utterances * frames * bytes_per_frame(shapes.encoder.width, recipe.features.dtype)
        if recipe.caches_features
        else 0
    )
    result = Plan(
        load,
        memory,
        memory.total <= capacity,
        cache,
        stages,
        steps,
        propose(shapes, one, processes, capacity, gpus > 0),
    )
    _print(result, shapes, gpus, gpu_memory, gpu_tflops, hours)
    return result


def mean_load(shapes: Shapes, seconds: float, budget: int) -> Load:
    """The micro-batch of utterances of mean length, at least one, that fills a budget of LLM positions."""
    audio = positions_of(shapes.recipe.projector, shapes.encoder.span_of(round(seconds * 16_000)))
    targets = round(seconds * TOKENS_A_SECOND) + 1
    length = audio + PROMPT_POSITIONS + targets
    return Load(max(1.0, budget / length), length, audio, targets)


def propose(
    shapes: Shapes, one: Load, processes: int, capacity: float, on_gpu: bool = True
) -> dict[str, object]:
    """Find the smallest ZeRO stage with which the recipe fits, and the largest batch that fits with it.

    If no stage is enough, gradient checkpointing is tried, and then offloading the optimiser in addition.

    Args:
        shapes: sizes of the models.
        one: a batch of a single utterance.
        processes: number of processes that train.
        capacity: bytes for each process.
        on_gpu: whether it trains on GPUs.

    Returns:
        Keys of the recipe and their values; empty if no combination that was tried fits.
    """
    recipe = shapes.recipe
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True}
    offloading = {**checkpointing, "offload_optimizer": True}
    for more in ({}, checkpointing, offloading) if on_gpu else ({}, checkpointing):
        for stage in (0, 1, 2, 3) if processes > 1 else (0, 2):
            if more.get("offload_optimizer") and stage == 0:
                continue
            engine = {} if recipe.training.engine == "deepspeed" else {"engine": "deepspeed"}
            options = {**engine, "zero_stage": stage, "offload_optimizer": False, **more}
            training = replace(recipe.training, **options)
            changed = replace(shapes, recipe=replace(recipe, training=training))
            first, second = (
                training_memory(changed, replace(one, rows=n), processes, on_gpu).total for n in (1, 2)
            )
            if first > capacity:
                continue
            rows = int((capacity - first) // (second - first)) + 1
            return {
                f"training.{name}": value
                for name, value in {**options, **_budget(recipe, one.length, rows, processes)}.items()
            }
    return {}


def _budget(recipe: Recipe, length: int, rows: int, processes: int) -> dict[str, int]:
    """The key for the size of a micro-batch, with a value that does not exceed a step."""
    options = recipe.training
    if options.utterances_per_batch:
        return {"utterances_per_batch": min(rows, options.utterances_per_batch)}
    return {"positions_per_batch": min(rows * length, max(length, options.positions_per_step // processes))}


def _work(
    shapes: Shapes,
    load: Load,
    utterances: int,
    seconds: float,
    test_hours: float,
    gpus: int,
    peak: float,
    bandwidth: float,
) -> tuple[dict[str, Stage], int]:
    recipe = shapes.recipe
    options, samples = recipe.training, round(seconds * 16_000)
    encode = encoder_flops(shapes.encoder, samples)
    positions = utterances * load.length
    steps_an_epoch = max(1, -(-positions // options.positions_per_step))
    steps = min(options.max_steps, steps_an_epoch * options.epochs)
    seen = utterances * steps / steps_an_epoch
    width, layers = shapes.width, shapes.layers
    # Forward, and gradients of activations, are two FLOPs each a weight and position; gradients of weights as
    # many again.
    passes = 2 + 2 + (2 if options.gradient_checkpointing else 0)
    text = load.length * (passes * shapes.layer_parameters + 2 * shapes.llm_trained)
    attention = (passes + 2) * load.length * load.length * width * layers
    output = 4 * load.targets * shapes.vocabulary * width
    projected = 6 * load.audio * shapes.projector_parameters
    on_the_fly = 0 if recipe.caches_features else encode
    encoding = 3 * on_the_fly if recipe.encoder.tuning == "full" else on_the_fly
    train = seen * (text + attention + output + projected + encoding)
    extract = utterances * encode if recipe.caches_features else 0
    tested = test_hours * 3600 / seconds
    prefill = tested * (2 * shapes.layer_parameters * (load.length - load.targets) + on_the_fly)
    beams = recipe.decoding.beams
    rows = max(
        1, recipe.decoding.positions_per_batch // ((load.length + recipe.decoding.max_new_tokens) * beams)
    )
    decode = prefill + tested * 2 * shapes.llm_parameters * load.targets * beams
    # Each decoding step reads all weights once, and a batch lasts as long as its longest answer: about 1.5
    # times the mean.
    reading = (
        tested
        / rows
        * 1.5
        * load.targets
        * shapes.llm_parameters
        * DTYPES[recipe.decoding.precision].itemsize
        / bandwidth
    )
    return {
        "extract-features": Stage(extract, extract / (peak * ENCODING), 1),
        "train": Stage(train, train / (gpus * peak * TRAINING), gpus),
        "decode": Stage(decode, decode / (peak * ENCODING) + reading, 1),
    }, steps


def _print(
    result: Plan, shapes: Shapes, gpus: int, gpu_memory: float, gpu_tflops: float, hours: float
) -> None:
    recipe, memory = shapes.recipe, result.memory
    log_line(f"{recipe.name}: {recipe.encoder.name} + {recipe.projector.kind} projector + {recipe.llm.name}")
    for note in shapes.notes:
        log_line(f"  {note}")
    log_line(
        f"parameters: encoder {shapes.encoder_parameters:,}, projector {shapes.projector_parameters:,}, LLM "
        f"{shapes.llm_parameters:,} (of which trained {shapes.llm_trained:,})"
    )
    engine = recipe.training.engine
    sharding = (
        f"ZeRO stage {recipe.training.zero_stage}"
        if engine == "deepspeed"
        else {"ddp": "DDP", "fsdp": "FSDP2"}[engine]
    )
    where = f"each of {gpus} GPU{'s' * (gpus > 1)}" if gpus else "a process on a CPU, beyond an idle one,"
    log_line(f"\nmemory of {where} in training, {sharding}, GB:")
    load = result.load
    rows = {
        "frozen weights": memory.frozen,
        "trained weights and gradients": memory.trained,
        "optimiser": memory.optimizer,
        f"activations ({load.rows:.1f} utterances of {load.length} positions)": memory.activations,
        f"logits ({load.rows * load.targets:.0f} targets × {shapes.vocabulary})": memory.logits,
        "CUDA and NCCL, about": memory.overhead,
    }
    for name, size in rows.items():
        if size:
            log_line(f"  {name:<52}{size / 1e9:8.2f}")
    verdict = "fits" if result.fits else "DOES NOT FIT"
    log_line(
        f"  {'total':<52}{memory.total / 1e9:8.2f}  {verdict} into {gpu_memory:g} GB ({USABLE:.0%} of them "
        "usable)"
    )
    if recipe.training.offload_optimizer:
        log_line(
            "  "
            f"{'optimiser in host memory, all hosts together':<52}{12 * shapes.trained_parameters / 1e9:8.2f}"
        )
    if result.cache_bytes:
        log_line(f"\nfeature cache: {result.cache_bytes / 1e9:,.1f} GB for {hours:g} h")
    log_line(
        f"\nwork, at {gpu_tflops:g} TFLOP/s each, of which {ENCODING:.0%} encoding and {TRAINING:.0%} "
        f"training, in {result.steps:,} steps:"
    )
    for name, stage in result.stages.items():
        log_line(
            f"  {name:<18}{stage.flops / 1e12:14,.1f} TFLOP {clock(stage.seconds):>12} on {stage.gpus} "
            f"{'GPU' if gpus else 'CPU'}{'s' * (stage.gpus > 1)}"
        )
    total = sum(s.seconds * s.gpus for s in result.stages.values()) / 3600
    log_line(f"  {'GPU-hours' if gpus else 'hours':<18}{total:12,.1f}")
    if result.proposal:
        command = " ".join(f"--{name} {str(value).lower()}" for name, value in result.proposal.items())
        log_line(f"\nproposed: {command}")
    else:
        log_line(
            "\nno combination of options fits: take more GPUs or larger ones, or a smaller LLM, or "
            "llm.tuning lora"
        )
