"""What a training takes in memory, time and storage, and which options make it fit: estimates."""

from dataclasses import dataclass, field, replace
from typing import Any

from slam_asr.config.recipe import Recipe
from slam_asr.models.feature_dtype import bytes_per_frame
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import positions_of
from slam_asr.planning.memory import Load, Memory, training_memory
from slam_asr.planning.shapes import Shapes, encoder_flops

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


def estimate(
    shapes: Shapes,
    gpus: int,
    gpu_memory: float,
    hours: float,
    utterance_seconds: float,
    test_hours: float,
    peak: float,
    bandwidth: float,
) -> Plan:
    """Estimate what a training takes.

    Args:
        shapes: sizes of the models, and the recipe.
        gpus: number of GPUs to train on; 0 for one process on a CPU.
        gpu_memory: memory of each GPU in GB (10^9 bytes).
        hours: hours of audio to train on.
        utterance_seconds: mean length of an utterance in seconds.
        test_hours: hours of audio to decode.
        peak: peak FLOP/s of each GPU.
        bandwidth: memory bandwidth of each GPU in bytes per second.
    """
    recipe = shapes.recipe
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
        peak,
        bandwidth,
    )
    frames = shapes.encoder.frames_of(round(utterance_seconds * 16_000))
    cache = (
        utterances * frames * bytes_per_frame(shapes.encoder.width, recipe.features.dtype)
        if recipe.caches_features
        else 0
    )
    return Plan(
        load,
        memory,
        memory.total <= capacity,
        cache,
        stages,
        steps,
        propose(shapes, one, processes, capacity, gpus > 0),
    )


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
