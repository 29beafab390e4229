"""Estimates the memory, time and storage that a training run needs, and finds options with which it fits."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from slam_asr.config.recipe import Recipe
from slam_asr.models.feature_dtype import bytes_per_frame
from slam_asr.models.precision import DTYPES
from slam_asr.models.projector import positions_of
from slam_asr.planning.memory import Load, Memory, memory_of_phases
from slam_asr.planning.shapes import Shapes, encoder_flops

PROMPT_POSITIONS = 18
"""Approximate length of SLAM-LLM's prompt in tokens of Llama's tokenizer; other prompts are similar."""
TOKENS_PER_SECOND = 3.7
"""Tokens of transcript per second of audio.

LibriSpeech has 2.7 words per second, and Llama's tokenizer about 1.35 tokens per lower-case word.
"""
USABLE = 0.92
"""Share of the memory of a GPU, or of a host without GPUs, that a plan may use.

The rest allows for larger batches and for fragmentation.
"""
ENCODING_SHARE, TRAINING_SHARE = 0.30, 0.40
"""Typical shares of a GPU's peak FLOP/s that encoding and training reach. SLAM-LLM reaches 0.09 to 0.20."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a plan. If `number` is 0, the other fields describe the CPU and its memory."""

    number: int
    """Number of GPUs; 0 for one process on a CPU."""
    memory: float
    """Memory of each GPU in bytes."""
    peak: float
    """Peak FLOP/s of each GPU."""
    bandwidth: float
    """Memory bandwidth of each GPU in bytes per second."""

    @property
    def processes(self) -> int:
        """Number of training processes: one per GPU, or one on a CPU."""
        return max(1, self.number)


@dataclass(frozen=True)
class Speech:
    """The audio of a plan."""

    hours: float
    """Hours of audio to train on."""
    utterance_seconds: float
    """Mean length of an utterance in seconds."""
    test_hours: float
    """Hours of audio to decode."""

    @property
    def utterances(self) -> int:
        """Number of utterances to train on."""
        return max(1, round(self.hours * 3600 / self.utterance_seconds))

    @property
    def samples(self) -> int:
        """Mean length of an utterance in samples at 16 kHz."""
        return round(self.utterance_seconds * 16_000)


@dataclass
class Stage:
    """Estimated work, time in seconds and number of GPUs of one stage."""

    flops: float
    seconds: float
    gpus: int


@dataclass
class Plan:
    """The estimates for a recipe."""

    load: Load
    memory: Memory
    """Memory of one process in bytes: on its GPU or, without GPUs, on the host."""
    fits: bool
    """Whether every phase of training fits in the usable share of the memory: a GPU's or, without GPUs, the
    host's."""
    cache_bytes: float
    """Size in bytes of the feature store for the training audio; 0 if the recipe caches no features."""
    stages: dict[str, Stage]
    """The stages by name: `extract-features`, `train` and `decode`."""
    steps: int
    """Number of optimiser steps, including those of the beginning."""
    beginning: Memory | None = None
    """Memory of one process in the beginning, in bytes; None without a beginning."""
    proposal: dict[str, object] = field(default_factory=dict)
    """Options with which the recipe fits, as from `propose`."""


def estimate(shapes: Shapes, gpus: Gpus, speech: Speech) -> Plan:
    """Estimate the memory, time and storage that a training run needs.

    Args:
        shapes: sizes of the models, and the recipe.
        gpus: the GPUs to train on.
        speech: the audio to train on and to decode.
    """
    recipe, on_gpu = shapes.recipe, gpus.number > 0
    # A micro-batch cannot exceed a process's share of a step.
    share = recipe.training.positions_per_step // gpus.processes
    load = mean_load(shapes, speech.utterance_seconds, min(recipe.training.positions_per_batch, share))
    memory, *beginning = [phase(load) for phase in memory_of_phases(shapes, gpus.processes, on_gpu)]
    capacity = USABLE * gpus.memory
    one = mean_load(shapes, speech.utterance_seconds, 1)  # a budget of 1 position gives the minimum of 1 row
    stages, steps = _stages(shapes, load, gpus, speech)
    frame_bytes = bytes_per_frame(shapes.encoder.width, recipe.features.dtype)
    cache = speech.utterances * shapes.encoder.frames_of(speech.samples) * frame_bytes
    return Plan(
        load,
        memory,
        fits=max(phase.total for phase in (memory, *beginning)) <= capacity,
        cache_bytes=cache if recipe.caches_features else 0,
        stages=stages,
        steps=steps,
        beginning=beginning[0] if beginning else None,
        proposal=propose(shapes, one, gpus.processes, capacity, on_gpu),
    )


def mean_load(shapes: Shapes, seconds: float, budget: int) -> Load:
    """Return the micro-batch of utterances of `seconds` each that fills a budget of LLM positions.

    It has at least one utterance.
    """
    audio = positions_of(shapes.recipe.projector, shapes.encoder.span_of(round(seconds * 16_000)))
    targets = round(seconds * TOKENS_PER_SECOND) + 1
    length = audio + PROMPT_POSITIONS + targets
    return Load(max(1.0, budget / length), length, audio, targets)


def propose(
    shapes: Shapes, one: Load, processes: int, capacity: float, on_gpu: bool = True
) -> dict[str, object]:
    """Find the smallest ZeRO stage with which the recipe fits, and the largest batch that fits with it.

    If no stage is enough, gradient checkpointing is added. If that is not enough either, and training runs on
    GPUs, the optimiser is offloaded too.

    Args:
        shapes: sizes of the models, and the recipe.
        one: a micro-batch of a single utterance.
        processes: number of processes that train.
        capacity: bytes of memory for each process.
        on_gpu: whether training runs on GPUs.

    Returns:
        Keys of the recipe and their values; empty if no combination that was tried fits.
    """
    recipe = shapes.recipe
    checkpointing: dict[str, Any] = {"gradient_checkpointing": True}
    offloading = {**checkpointing, "offload_optimizer": True}
    for more in ({}, checkpointing, offloading) if on_gpu else ({}, checkpointing):
        # A single process has nothing to shard, but stage 2 lets it offload its optimiser.
        for stage in (0, 1, 2, 3) if processes > 1 else (0, 2):
            if more.get("offload_optimizer") and stage == 0:
                continue
            engine = {} if recipe.training.engine == "deepspeed" else {"engine": "deepspeed"}
            options = {**engine, "zero_stage": stage, "offload_optimizer": False, **more}
            training = replace(recipe.training, **options)
            changed = replace(shapes, recipe=replace(recipe, training=training))
            phases = memory_of_phases(changed, processes, on_gpu)
            if rows := min(_rows_that_fit(memory, one, capacity) for memory in phases):
                options |= _budget(recipe, one.length, rows, processes)
                return {f"training.{name}": value for name, value in options.items()}
    return {}


def _rows_that_fit(memory: Callable[[Load], Memory], one: Load, capacity: float) -> int:
    """Return the largest number of utterances with which a phase takes at most `capacity` bytes."""
    first, second = (memory(replace(one, rows=n)).total for n in (1, 2))
    if first > capacity:
        return 0
    # Memory is linear in the number of utterances, except that logits in chunks stop growing when a chunk is
    # full. Extrapolation from 1 and 2 utterances therefore never predicts too little memory.
    return int((capacity - first) // (second - first)) + 1


def _budget(recipe: Recipe, length: int, rows: int, processes: int) -> dict[str, int]:
    """Return the option for the size of a micro-batch, with a value within a process's share of a step."""
    options = recipe.training
    if options.utterances_per_batch:
        return {"utterances_per_batch": min(rows, options.utterances_per_batch)}
    return {"positions_per_batch": min(rows * length, max(length, options.positions_per_step // processes))}


def _stages(shapes: Shapes, load: Load, gpus: Gpus, speech: Speech) -> tuple[dict[str, Stage], int]:
    """Return the estimates for each stage, and the number of optimiser steps."""
    recipe, options = shapes.recipe, shapes.recipe.training
    encode = encoder_flops(shapes.encoder, speech.samples)
    positions = speech.utterances * load.length
    steps_per_epoch = max(1, -(-positions // options.positions_per_step))
    steps = min(options.max_steps, steps_per_epoch * options.epochs)
    # Number of utterances that training reads, counted once per epoch. `max_steps` may end training before
    # the last epoch is complete.
    trained = speech.utterances * steps / steps_per_epoch
    width, layers = shapes.width, shapes.layers
    # FLOPs per weight and position: 2 for the forward pass, 2 for the gradients of activations, and 2 more if
    # gradient checkpointing repeats the forward pass. A trained weight takes 2 more for its own gradient.
    passes = 2 + 2 + (2 if options.gradient_checkpointing else 0)
    text = load.length * (passes * shapes.layer_parameters + 2 * shapes.llm_trained)
    # Causal attention multiplies half of all pairs of positions, twice: 2 · length² · width FLOPs in the
    # forward pass. The backward pass takes twice as many: both factors of each product need a gradient.
    attention = (passes + 2) * load.length * load.length * width * layers
    # The output layer runs only at targets: forward, and gradients of its inputs.
    output = 4 * load.targets * shapes.vocabulary * width
    projected = 6 * load.audio * shapes.projector_parameters
    on_the_fly = 0 if recipe.caches_features else encode
    # A trained encoder also has a backward pass, which takes twice the FLOPs of the forward pass.
    encoding = 3 * on_the_fly if recipe.encoder.tuning == "full" else on_the_fly
    train = trained * (text + attention + output + projected + encoding)
    if recipe.projector.beginning.active:
        beginning_steps = recipe.projector.beginning.steps
        # The head has three matrix products, of 2 FLOPs per multiply-add: the logits, the gradient of the
        # outputs, and the expected embeddings.
        head = 6 * load.audio * shapes.vocabulary * width
        train += speech.utterances * beginning_steps / steps_per_epoch * (projected + head + on_the_fly)
        steps += beginning_steps
    extract = speech.utterances * encode if recipe.caches_features else 0
    tested = speech.test_hours * 3600 / speech.utterance_seconds
    prefill = tested * (2 * shapes.layer_parameters * (load.length - load.targets) + on_the_fly)
    beams = recipe.decoding.beams
    # As in `plan_batches`, each beam takes positions for audio and prompt, and for the longest answer.
    positions_of_one = (load.length - load.targets + recipe.decoding.max_new_tokens) * beams
    rows = max(1, recipe.decoding.positions_per_batch // positions_of_one)
    decode = prefill + tested * 2 * shapes.llm_parameters * load.targets * beams
    # Each decoding step reads all weights once. A batch takes as many steps as its longest answer has tokens,
    # which is about 1.5 times the mean.
    llm_bytes = shapes.llm_parameters * DTYPES[recipe.decoding.precision].itemsize
    reading = tested / rows * 1.5 * load.targets * llm_bytes / gpus.bandwidth
    return {
        "extract-features": Stage(extract, extract / (gpus.peak * ENCODING_SHARE), 1),
        "train": Stage(train, train / (gpus.processes * gpus.peak * TRAINING_SHARE), gpus.processes),
        "decode": Stage(decode, decode / (gpus.peak * ENCODING_SHARE) + reading, 1),
    }, steps
